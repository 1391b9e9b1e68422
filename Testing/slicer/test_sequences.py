"""Volumes over time: one segmentation per frame, and the next frame from this one."""

from __future__ import annotations

import numpy as np
import pytest
import slicer

from KA2ERSegment.errors import SessionStateError

FRAMES = 3


@pytest.fixture
def a_browser(a_scene, an_array, an_oblique_affine):
    """Three frames; the object moves by three voxels along I."""
    sequence = a_scene.scene.AddNewNodeByClass("vtkMRMLSequenceNode", "Frames")
    sequence.SetIndexName("time")
    sequence.SetIndexUnit("s")
    for n in range(FRAMES):
        node = slicer.vtkMRMLScalarVolumeNode()
        node.SetName("frame")
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(an_oblique_affine))
        slicer.util.updateVolumeFromArray(node, np.roll(an_array, 3 * n, axis=2))
        sequence.SetDataNodeAtValue(node, str(n))
    browser = a_scene.scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "Browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    browser.SetSelectedItemNumber(0)
    a_scene.applicationLogic.GetModuleLogic("Sequences").UpdateAllProxyNodes()
    return browser


@pytest.fixture
def a_frame_logic(a_logic, a_browser):
    """On the proxy volume of `a_browser`."""
    a_logic.setVolumeNode(a_browser.GetProxyNode(a_browser.GetMasterSequenceNode()))
    return a_logic


def go_to(a_scene, logic, browser, frame, wait):
    browser.SetSelectedItemNumber(frame)
    a_scene.applicationLogic.GetModuleLogic("Sequences").UpdateAllProxyNodes()
    wait(logic)


def centre(node):
    bounds = [0.0] * 6
    node.GetRASBounds(bounds)
    return [(bounds[2 * n] + bounds[2 * n + 1]) / 2 for n in range(3)]


def test_single_volume_has_no_frames(a_logic):
    assert not a_logic.hasFrames
    with pytest.raises(SessionStateError, match="must be a frame of a sequence"):
        a_logic.propagate()


def test_each_frame_keeps_its_own_segmentation_and_prompts(a_scene, a_frame_logic, a_browser, segment_array, wait):
    logic = a_frame_logic
    assert logic.hasFrames
    logic.addSegment("vessel")
    logic.segmentThisFrame()
    logic.addPoint(centre(logic.volumeNode), True)
    wait(logic)
    first = segment_array(logic)
    assert first.sum() > 0

    go_to(a_scene, logic, a_browser, 1, wait)
    assert logic.prompts() == []
    logic.addPoint(np.add(centre(logic.volumeNode), (6, 0, 0)), True)
    wait(logic)
    assert logic.lastError == ""
    assert len(logic.prompts()) == 1
    second = segment_array(logic)
    assert not np.array_equal(first, second)

    go_to(a_scene, logic, a_browser, 0, wait)
    assert np.array_equal(segment_array(logic), first)
    assert len(logic.prompts()) == 1
    go_to(a_scene, logic, a_browser, 1, wait)
    assert np.array_equal(segment_array(logic), second)


def test_next_frame_begins_with_this_ones_mask_and_positive_points(
    a_scene, a_frame_logic, a_browser, an_engine, segment_array, wait
):
    logic = a_frame_logic
    here = centre(logic.volumeNode)
    logic.addPoint(here, True)
    logic.addPoint(np.add(here, (6, 0, 0)), False)
    wait(logic)
    first = segment_array(logic)

    logic.propagate()
    wait(logic)

    assert logic.lastError == ""
    assert a_browser.GetSelectedItemNumber() == 1
    kinds = [step["prompt"]["type"] for step in an_engine.sessions[-1].steps if "prompt" in step]
    assert kinds == ["mask", "point"]
    assert [row.positive for row in logic.prompts()] == [True]
    assert (segment_array(logic) & first).sum() == first.sum()
    assert an_engine.sessions[-1].array.mean() == pytest.approx(slicer.util.arrayFromVolume(logic.volumeNode).mean())
    go_to(a_scene, logic, a_browser, 0, wait)
    assert np.array_equal(segment_array(logic), first)
    assert len(logic.prompts()) == 2


def test_last_frame_has_no_next_one(a_frame_logic, a_browser, wait):
    logic = a_frame_logic
    logic.addPoint(centre(logic.volumeNode), True)
    wait(logic)
    for _ in range(FRAMES - 1):
        logic.propagate()
        wait(logic)
    assert logic.lastError == ""
    with pytest.raises(SessionStateError, match="this is the last one"):
        logic.propagate()


def test_empty_frame_is_not_propagated(a_frame_logic, a_browser):
    with pytest.raises(SessionStateError, match="Segment this frame first"):
        a_frame_logic.propagate()
    assert a_browser.GetSelectedItemNumber() == 0
