"""What the soak test found: orders of events that nobody thinks of."""

from __future__ import annotations

import gc
import time
import weakref

import numpy as np
import pytest
import slicer
import vtk

from KA2ERSegment.errors import CancelledError
from KA2ERSegment.geometry import Box


@pytest.fixture
def here(a_volume_node):
    """World RAS in the middle of the volume."""
    return ras_at(a_volume_node, 0.5)


@pytest.fixture
def there(a_volume_node):
    """World RAS near a corner of the volume."""
    return ras_at(a_volume_node, 0.2)


def ras_at(node, share):
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    ijk = [round(share * (size - 1)) for size in node.GetImageData().GetDimensions()]
    return matrix.MultiplyPoint((*ijk, 1.0))[:3]


@pytest.mark.parametrize("verb", ["undo", "redo"])
def test_nothing_is_undone_before_the_first_prompt_and_the_reason_is_told(a_logic, wait, here, verb):
    getattr(a_logic, verb)()
    wait(a_logic)
    assert "nothing to undo" in a_logic.lastError

    a_logic.addPoint(here, True)
    wait(a_logic)
    assert len(a_logic.prompts()) == 1
    assert a_logic.canUndo


@pytest.mark.parametrize("change", ["delete", "move"])
def test_marker_that_changes_while_its_prompt_is_worked_on_is_followed_afterwards(
    a_scene, a_logic, an_engine, wait, here, change
):
    an_engine.hold()
    a_logic.addPoint(here, True)
    assert an_engine.entered.wait(10)
    (row,) = a_logic.prompts()
    if change == "delete":
        a_logic.deletePrompt(row.nodeId)
    else:
        nodeId, _, _ = row.nodeId.partition("#")
        a_scene.scene.GetNodeByID(nodeId).SetNthControlPointPosition(0, here[0] + 3, here[1], here[2])
    a_logic.poll()
    an_engine.release()
    wait(a_logic)

    assert a_logic.lastError == ""
    steps = an_engine.sessions[-1].steps
    if change == "delete":
        assert steps == ()
        assert a_logic.prompts() == []
    else:
        assert [step["prompt"]["ras"] for step in steps] == [pytest.approx((here[0] + 3, here[1], here[2]))]
        assert len(a_logic.prompts()) == 1


@pytest.mark.parametrize("way", ["undo", "delete", "remove the segment", "abort a box in 3D"])
def test_marker_that_goes_leaves_nothing_in_the_scene(a_scene, a_logic, wait, here, way):
    a_logic.addSegment()
    wait(a_logic)
    before = a_scene.scene.GetNumberOfNodes()
    if way == "abort a box in 3D":
        a_logic.setTool("roi")
        a_logic.setTool("none")
    else:
        a_logic.addPoint(here, True)
        wait(a_logic)
        outline = 2  # shown for a moment: a segmentation and its display
        assert a_scene.scene.GetNumberOfNodes() == before + 2 + outline
        if way == "undo":
            a_logic.undo()
        elif way == "delete":
            a_logic.deletePrompt(a_logic.prompts()[0].nodeId)
        else:
            a_logic.removeSegment(a_logic.selectedSegment)
        wait(a_logic)
        a_logic._outline.clear()

    assert a_scene.scene.GetNumberOfNodes() == before


@pytest.fixture
def cancel_at(monkeypatch):
    """Let the engine cancel a verb once, when it is called for the nth time from now on."""
    from engine_double import SessionDouble

    def cancel(verb, nth=1):
        real, calls = getattr(SessionDouble, verb), []

        def called(self, *arguments, **keywords):
            calls.append(verb)
            if len(calls) == nth:
                message = "the prediction was cancelled."
                raise CancelledError(message)
            return real(self, *arguments, **keywords)

        monkeypatch.setattr(SessionDouble, verb, called)

    return cancel


def paint(logic):
    """A hand draws one voxel into the selected segment."""
    from SlicerKA2ERLib.SegmentWriter import orientedImage
    from SlicerKA2ERLib.VolumeIO import ijkToRas

    node, segment_id = logic.segmentationNode, logic.selectedSegment
    image = orientedImage(np.ones((1, 1, 1), dtype=bool), Box((1, 1, 1), (2, 2, 2)), ijkToRas(logic.volumeNode))
    editor, parameters = slicer.vtkSlicerSegmentEditorLogic(), slicer.vtkMRMLSegmentEditorNode()
    editor.SetMRMLScene(node.GetScene())
    parameters.SetAndObserveSegmentationNode(node)
    editor.SetSegmentEditorNode(parameters)
    editor.ModifySegmentByLabelmap(node, segment_id, image, editor.ModificationModeAdd, True, True)


def test_hand_edit_is_told_again_where_telling_it_was_cancelled(
    a_logic, an_engine, segment_array, wait, here, there, cancel_at
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    paint(a_logic)
    cancel_at("edit")
    a_logic.addPoint(there, True)
    wait(a_logic)
    assert len(a_logic.prompts()) == 1

    a_logic.addPoint(there, True)
    wait(a_logic)
    told = an_engine.sessions[-1]._masks()[a_logic.selectedSegment]
    assert told[1, 1, 1]
    assert np.array_equal(segment_array(a_logic), told)


def test_deleted_segment_is_taken_from_the_engine_where_that_was_cancelled_once(
    a_logic, an_engine, wait, here, there, cancel_at
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    first = a_logic.selectedSegment
    a_logic.nextSegment()
    a_logic.removeSegment(first)
    cancel_at("remove")
    a_logic.addPoint(there, True)
    wait(a_logic)

    a_logic.addPoint(here, True)  # with neighbours kept it would be refused if that segment were there
    wait(a_logic)
    assert a_logic.lastError == ""
    assert first not in an_engine.sessions[-1]._masks()
    assert len(a_logic.prompts()) == 1


def test_prompts_of_a_scene_are_told_once_where_telling_them_was_cancelled(
    a_logic, an_engine, wait, here, there, cancel_at
):
    for ras in (here, there):
        a_logic.addPoint(ras, True)
        wait(a_logic)
    segmentation = a_logic.segmentationNode
    a_logic.setSegmentationNode(None)
    a_logic.setSegmentationNode(segmentation)
    cancel_at("add", nth=2)
    a_logic.addPoint(here, True)
    wait(a_logic)
    assert len(a_logic.prompts()) == 2

    a_logic.addPoint(here, True)
    wait(a_logic)
    assert len(an_engine.sessions[-1].steps) == 3
    assert len(a_logic.prompts()) == 3


def test_overlays_that_are_switched_off_leave_nothing_in_the_scene(a_scene, a_logic, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic._outline.clear()

    def count():
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(a_scene.scene)
        items = vtk.vtkIdList()
        hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), items, True)
        return a_scene.scene.GetNumberOfNodes(), items.GetNumberOfIds()

    before = count()
    for shown in (True, False):
        a_logic.setExpertShown("foundation", shown)
        a_logic.setDisagreementShown(shown)
        wait(a_logic)
        assert (count() == before) is not shown


def test_prompts_keep_their_order_through_reset_and_undo(a_logic, wait, here, there):
    for point, positive in ((here, True), (there, False), (there, True)):
        a_logic.addPoint(point, positive)
        wait(a_logic)
    before = [(row.number, row.positive) for row in a_logic.prompts()]

    for verb in (a_logic.reset, a_logic.undo):
        verb()
        wait(a_logic)
    assert [(row.number, row.positive) for row in a_logic.prompts()] == before

    a_logic.deletePrompt(a_logic.prompts()[0].nodeId)
    wait(a_logic)
    a_logic.undo()
    wait(a_logic)
    assert [(row.number, row.positive) for row in a_logic.prompts()] == before


def test_move_after_a_reset_does_not_go_to_the_same_prompt_before_it(a_scene, a_logic, an_engine, wait, here):
    for verb in (lambda: a_logic.addPoint(here, True), a_logic.reset, lambda: a_logic.addPoint(here, True)):
        verb()
        wait(a_logic)
    nodeId, _, _ = a_logic.prompts()[0].nodeId.partition("#")
    node = a_scene.scene.GetNodeByID(nodeId)
    node.SetNthControlPointPosition(0, here[0] + 3, here[1], here[2])
    wait(a_logic)

    first, _, last = an_engine.sessions[-1].steps
    assert last["prompt"]["ras"][0] - first["prompt"]["ras"][0] == pytest.approx(3)
    assert node.GetNthControlPointPosition(0)[0] == pytest.approx(here[0] + 3)


def test_removed_marker_tells_nobody_of_parts_that_went_with_it(a_scene, a_logic, wait, here):
    """Slicer's window takes display nodes away by itself; removing them again would be an error in its log."""
    scene = a_scene.scene
    a_logic.addPoint(here, True)
    wait(a_logic)
    node = scene.GetNodeByID(a_logic.prompts()[0].nodeId.partition("#")[0])
    display, strangers = node.GetDisplayNode(), []

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def asWindow(_caller, event, gone):
        if event == "NodeRemovedEvent" and gone is node:
            scene.RemoveNode(display)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def look(_caller, _event, gone):
        strangers.append(gone) if gone.GetScene() is not scene else None

    tags = [
        scene.AddObserver(scene.NodeRemovedEvent, asWindow),
        scene.AddObserver(scene.NodeAboutToBeRemovedEvent, look),
    ]
    a_logic.undo()
    wait(a_logic)
    for tag in tags:
        scene.RemoveObserver(tag)

    assert node.GetScene() is None
    assert display.GetScene() is None
    assert strangers == []


def test_what_a_job_gave_and_what_it_raised_are_not_kept_until_the_next_job():
    class Large:
        """Stands for a mask, or for what the frames of a traceback hold."""

    from SlicerKA2ERLib.Jobs import Job, Jobs

    jobs, seen = Jobs("test"), []

    def work(fail):
        large = Large()
        seen.append(weakref.ref(large))
        if fail:
            message = "as it may"
            raise ValueError(message)
        return large

    for fail in (False, True):
        jobs.submit(Job("", lambda fail=fail: lambda: work(fail), lambda _: None, lambda _: None))
        end = time.monotonic() + 10
        while not jobs.idle and time.monotonic() < end:
            jobs.poll()
        time.sleep(0)
        while seen[-1]() is not None and time.monotonic() < end:
            gc.collect()
        assert seen[-1]() is None
    jobs.close()


def test_only_the_selected_segments_prompts_are_shown(a_scene, a_logic, wait, here, there):
    def shown():
        nodes = slicer.util.getNodesByClass("vtkMRMLMarkupsNode", a_scene.scene)
        return [node.GetName() for node in nodes if node.GetDisplayNode().GetVisibility()]

    a_logic.addPoint(here, True)
    wait(a_logic)
    first = a_logic.selectedSegment
    assert shown() == ["Segment_1 + point"]
    a_logic.nextSegment()
    assert shown() == []
    a_logic.addPoint(there, False)
    wait(a_logic)
    assert shown() == ["Segment_2 - point"]
    a_logic.selectSegment(first)
    assert shown() == ["Segment_1 + point"]
