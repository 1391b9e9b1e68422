"""A locked segment stays as it is, whatever is asked for; what is refused says why and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import slicer
import vtk

from KA2ERSegment.errors import SessionStateError


@pytest.fixture
def here(a_volume_node):
    return middle_of(a_volume_node)


@pytest.fixture
def a_locked_one(a_logic, wait, here):
    """Logic, ID of its locked segment, which is selected and has one prompt."""
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.setLocked(a_logic.selectedSegment, True)
    return a_logic, a_logic.selectedSegment


def middle_of(node):
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    ijk = [round(0.5 * (size - 1)) for size in node.GetImageData().GetDimensions()]
    return matrix.MultiplyPoint((*ijk, 1.0))[:3]


VERBS = {
    "point": lambda logic, here: logic.addPoint(np.add(here, (4, 0, 0)), True),
    "scribble": lambda logic, here: logic.addScribble([here, np.add(here, (3, 0, 0))], False, 1.0),
    "reset": lambda logic, here: logic.reset(),
    "finish": lambda logic, here: logic.setFinish(2.0, False),
    "remove": lambda logic, here: logic.removeSegment(logic.selectedSegment),
    "deletePrompt": lambda logic, here: logic.deletePrompt(logic.prompts()[0].nodeId),
}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_what_would_change_a_locked_segment_is_refused(a_locked_one, segment_array, wait, here, verb):
    logic, segment = a_locked_one
    before, steps = segment_array(logic), len(logic.journal()["steps"])

    with pytest.raises(SessionStateError, match=r"'Segment_1' is\. Unlock it"):
        VERBS[verb](logic, here)
    wait(logic)

    assert np.array_equal(segment_array(logic, segment), before)
    assert len(logic.prompts()) == 1
    assert len(logic.journal()["steps"]) == steps
    assert logic.segments()[0].locked


@pytest.mark.parametrize("verb", ["undo", "redo"])
def test_undo_and_redo_stop_at_a_locked_segment_and_go_on_when_it_is_unlocked(a_logic, segment_array, wait, here, verb):
    a_logic.addPoint(here, True)
    wait(a_logic)
    if verb == "redo":
        a_logic.undo()
        wait(a_logic)
    before, prompts = segment_array(a_logic), a_logic.prompts()
    a_logic.setLocked(a_logic.selectedSegment, True)

    getattr(a_logic, verb)()
    wait(a_logic)

    assert "Unlock it first" in a_logic.lastError
    assert "'Segment_1'" in a_logic.lastError
    assert np.array_equal(segment_array(a_logic), before)
    assert a_logic.prompts() == prompts

    a_logic.setLocked(a_logic.selectedSegment, False)
    getattr(a_logic, verb)()
    wait(a_logic)
    assert not np.array_equal(segment_array(a_logic), before)


def test_undo_of_another_segments_prompt_works_beside_a_locked_one(a_locked_one, segment_array, wait, here):
    logic, locked = a_locked_one
    before = segment_array(logic, locked)
    logic.nextSegment()
    logic.addPoint(np.add(here, (6.5, 0, 0)), True)
    wait(logic)
    assert segment_array(logic).any()

    logic.undo()
    wait(logic)

    assert not segment_array(logic).any()
    assert np.array_equal(segment_array(logic, locked), before)


@pytest.mark.parametrize(("neighbours", "overlaps"), [("keep", False), ("compete", False), ("overlap", True)])
def test_neighbours_prompt_takes_nothing_from_a_locked_segment(
    a_locked_one, an_engine, segment_array, wait, here, neighbours, overlaps
):
    logic, locked = a_locked_one
    before = segment_array(logic, locked)
    logic.setNeighbours(neighbours)
    other = logic.nextSegment()

    logic.addPoint(np.add(here, (6.5, 0, 0)), True)
    wait(logic)

    assert segment_array(logic, other).any()
    assert np.array_equal(segment_array(logic, locked), before)
    assert (segment_array(logic, other) & before).any() == overlaps
    logic.addPoint(np.add(here, (7.5, 1, 0)), True)  # the engine is told what became of both before it
    wait(logic)
    told = an_engine.sessions[-1]._masks()
    assert np.array_equal(segment_array(logic, locked), before)
    assert logic.lastError == ""
    assert set(told) == {locked, other}


def test_marker_of_a_locked_segment_cannot_be_dragged_and_goes_back(a_locked_one, a_scene, segment_array, wait, here):
    logic, _ = a_locked_one
    before = segment_array(logic)
    node = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")
    assert node.GetLocked()

    node.SetNthControlPointPositionWorld(0, *np.add(here, (3, 0, 0)))
    wait(logic)

    assert "Unlock it" in logic.lastError
    assert np.allclose(node.GetNthControlPointPositionWorld(0), here)
    assert np.array_equal(segment_array(logic), before)
    logic.setLocked(logic.selectedSegment, False)
    assert not node.GetLocked()


def test_point_that_another_tool_put_into_a_locked_segment_goes_again(a_locked_one, a_scene, segment_array, wait, here):
    logic, _ = a_locked_one
    before = segment_array(logic)
    node = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")

    node.AddControlPointWorld(vtk.vtkVector3d(*np.add(here, (4, 0, 0))))
    wait(logic)

    assert node.GetNumberOfControlPoints() == 1
    assert np.array_equal(segment_array(logic), before)


def test_lock_is_saved_with_the_segmentation(a_locked_one, a_scene, tmp_path):
    logic, _ = a_locked_one
    path = tmp_path / "locked.seg.nrrd"
    storage = slicer.vtkMRMLSegmentationStorageNode()
    storage.SetFileName(str(path))
    assert storage.WriteData(logic.segmentationNode)

    node = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    assert storage.ReadData(node)
    logic.setSegmentationNode(node)

    assert [row.locked for row in logic.segments()] == [True]


def test_hand_may_not_paint_where_neighbours_keep_theirs(a_locked_one, segment_array):
    from KA2ERSegment.geometry import Box

    logic, locked = a_locked_one
    whole = Box.of_shape(segment_array(logic, locked).shape)
    mine = segment_array(logic, locked)
    other = logic.nextSegment()

    for neighbours, unlocked_counts in (("keep", True), ("compete", False)):
        logic.setNeighbours(neighbours)
        assert np.array_equal(logic.isTaken(other, whole), mine)
        logic.setLocked(locked, False)
        taken = logic.isTaken(other, whole)
        assert (taken is not None and taken.any()) == unlocked_counts
        logic.setLocked(locked, True)
    logic.setNeighbours("overlap")
    assert logic.isTaken(other, whole) is None
