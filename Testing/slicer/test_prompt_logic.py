"""The logic on a real scene: prompts in, segments out, and what the user does meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import slicer
import vtk

from KA2ERSegment.errors import PromptError, SessionStateError


def ras_at(node, *shares):
    """World RAS of a voxel, by its place along I, J and K (0..1)."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    ijk = [round(share * (size - 1)) for share, size in zip(shares, node.GetImageData().GetDimensions(), strict=True)]
    return matrix.MultiplyPoint((*ijk, 1.0))[:3]


@pytest.fixture
def here(a_volume_node):
    return ras_at(a_volume_node, 0.5, 0.5, 0.5)


@pytest.fixture
def there(a_volume_node):
    return ras_at(a_volume_node, 0.15, 0.2, 0.3)


def paint(logic, segment_id, box, value, bind=None):
    """What a hand does in the Segment Editor: set voxels of a segment through Slicer's own logic."""
    from SlicerKA2ERLib.SegmentWriter import orientedImage
    from SlicerKA2ERLib.VolumeIO import ijkToRas

    editor, node = slicer.vtkSlicerSegmentEditorLogic(), slicer.vtkMRMLSegmentEditorNode()
    editor.SetMRMLScene(logic.segmentationNode.GetScene())
    node.SetAndObserveSegmentationNode(logic.segmentationNode)
    node.SetOverwriteMode(node.OverwriteNone)
    editor.SetSegmentEditorNode(node)
    image = orientedImage(np.ones(box.shape_kji, dtype=bool), box, ijkToRas(logic.volumeNode))
    mode = editor.ModificationModeAdd if value else editor.ModificationModeRemove
    editor.ModifySegmentByLabelmap(logic.segmentationNode, segment_id, image, mode, True, True)


# -- the main path -------------------------------------------------------------------------------------------------


def test_first_click_makes_a_segment_and_a_marker(a_logic, a_volume_node, segment_array, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)

    (row,) = a_logic.segments()
    assert row.hasPrompts
    assert row.quality == pytest.approx(0.9)
    mask = segment_array(a_logic, row.id)
    assert mask[tuple(round(0.5 * (n - 1)) for n in mask.shape)]
    assert 10 < mask.sum() < mask.size / 2
    assert [(prompt.kind, prompt.positive) for prompt in a_logic.prompts()] == [("point", True)]


def test_segment_is_what_the_engine_says_voxel_for_voxel(a_logic, an_engine, segment_array, wait, here, there):
    for ras, positive in ((here, True), (there, True), (np.add(here, (4, 0, 0)), False)):
        a_logic.addPoint(ras, positive)
    wait(a_logic)

    assert np.array_equal(segment_array(a_logic), an_engine.sessions[-1]._masks()[a_logic.selectedSegment])


def test_every_kind_of_prompt_becomes_a_marker_and_a_step(a_logic, a_volume_node, an_engine, wait, here, there):
    matrix = vtk.vtkMatrix4x4()
    a_volume_node.GetIJKToRASMatrix(matrix)
    axes = [np.array([matrix.GetElement(r, c) for r in range(3)]) for c in range(3)]
    a_logic.addBox(here, [axes[0] * 6, axes[1] * 5, axes[2] * 3], True)
    a_logic.addScribble([here, np.add(here, axes[0] * 3)], True, 1.5)
    a_logic.addLasso([there, np.add(there, axes[0] * 5), np.add(there, axes[1] * 5)], False)
    wait(a_logic)

    assert a_logic.lastError == ""
    assert [(p.kind, p.positive) for p in a_logic.prompts()] == [("box", True), ("scribble", True), ("lasso", False)]
    assert [step["prompt"]["type"] for step in an_engine.sessions[-1].steps] == ["box", "scribble", "lasso"]


def test_click_outside_the_volume_is_refused_and_changes_nothing(a_logic, an_engine):
    with pytest.raises(PromptError, match="outside volume"):
        a_logic.addPoint((1e4, 0, 0), True)

    assert a_logic.segments() == []
    assert an_engine.sessions == []


def test_click_without_volume_or_engine_says_what_is_missing(a_scene, a_volume_node, here):
    from SlicerKA2ERLib.PromptLogic import PromptLogic

    logic = PromptLogic(a_scene.scene, a_scene.applicationLogic)
    with pytest.raises(SessionStateError, match="a volume must be chosen"):
        logic.addPoint(here, True)
    logic.setVolumeNode(a_volume_node)
    with pytest.raises(SessionStateError, match="no engine is set up"):
        logic.addPoint(here, True)
    logic.close()


def test_engine_is_asked_in_one_other_thread_only(a_logic, an_engine, wait, here, there):
    a_logic.warmUp()
    for ras in (here, there):
        a_logic.addPoint(ras, True)
    a_logic.undo()
    wait(a_logic)

    assert threading.get_ident() not in an_engine.threads
    assert len(an_engine.threads) == 1
    assert an_engine.asked["open"] == 1


def test_only_the_changed_box_is_written(a_logic, a_volume_node, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)

    segment = a_logic.segmentationNode.GetSegmentation().GetSegment(a_logic.selectedSegment)
    extent = segment.GetRepresentation("Binary labelmap").GetExtent()
    assert np.prod([b - a + 1 for a, b in zip(extent[::2], extent[1::2], strict=True)]) < np.prod(
        a_volume_node.GetImageData().GetDimensions()
    )


def test_large_boxes_are_written_by_a_shorter_way_with_the_same_voxels(
    a_logic, an_engine, segment_array, wait, here, there, monkeypatch
):
    from SlicerKA2ERLib import SegmentWriter

    modified = []
    a_logic.addSegment("by hand")
    a_logic.nextSegment()
    monkeypatch.setattr(SegmentWriter, "LARGE", 0)
    for ras, positive in ((here, True), (there, True), (np.add(here, (4, 0, 0)), False)):
        a_logic.addPoint(ras, positive)
        wait(a_logic)
        mask = an_engine.sessions[-1]._masks()[a_logic.selectedSegment]
        assert np.array_equal(segment_array(a_logic), mask)
        if not modified:
            segmentation = a_logic.segmentationNode.GetSegmentation()
            segmentation.AddObserver(segmentation.SourceRepresentationModified, lambda *_: modified.append(1))
    assert modified
    assert a_logic.segments()[0].status == "in progress"
    assert an_engine.asked["edit"] == 0
    a_logic.undo()
    monkeypatch.setattr(SegmentWriter, "LARGE", 10**9)
    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), an_engine.sessions[-1]._masks()[a_logic.selectedSegment])


@pytest.mark.parametrize("large", [0, 10**9])
def test_surfaces_of_all_segments_stay_up_to_date(a_logic, segment_array, wait, here, there, monkeypatch, large):
    from SlicerKA2ERLib import SegmentWriter

    monkeypatch.setattr(SegmentWriter, "LARGE", large)
    a_logic.addPoint(there, True)
    wait(a_logic)
    first = a_logic.selectedSegment
    node = a_logic.segmentationNode
    node.CreateClosedSurfaceRepresentation()
    a_logic.nextSegment()
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.addPoint(np.add(here, (5, 0, 0)), True)
    wait(a_logic)

    for segment_id in (first, a_logic.selectedSegment):
        surface = node.GetClosedSurfaceInternalRepresentation(segment_id)
        assert surface.GetNumberOfPoints() > 0
        mass = vtk.vtkMassProperties()
        mass.SetInputData(surface)
        voxel = np.prod(a_logic.volumeNode.GetSpacing())
        assert mass.GetVolume() == pytest.approx(segment_array(a_logic, segment_id).sum() * voxel, rel=0.3)


def test_redo_keeps_what_a_hand_drew_meanwhile_and_the_engine_is_told(
    a_logic, an_engine, segment_array, wait, here, there
):
    from KA2ERSegment.geometry import Box

    a_logic.addPoint(here, True)
    a_logic.addPoint(there, True)
    wait(a_logic)
    both = segment_array(a_logic)
    a_logic.undo()
    wait(a_logic)
    paint(a_logic, a_logic.selectedSegment, Box((0, 20, 12), (3, 22, 14)), True)
    a_logic.redo()
    wait(a_logic)

    expected = both.copy()
    expected[12:14, 20:22, 0:3] = True
    assert np.array_equal(segment_array(a_logic), expected)
    a_logic.addPoint(np.add(here, (1, 0, 0)), True)
    wait(a_logic)
    assert an_engine.asked["edit"] == 1
    assert segment_array(a_logic)[12:14, 20:22, 0:3].all()
    assert np.array_equal(segment_array(a_logic), an_engine.sessions[-1]._masks()[a_logic.selectedSegment])


def test_segmentation_knows_its_source_volume(a_logic, a_volume_node, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)

    node = a_logic.segmentationNode
    reference = node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole())
    assert reference is a_volume_node
    segment = node.GetSegmentation().GetSegment(a_logic.selectedSegment)
    geometry = node.GetSegmentation().GetConversionParameter("Reference image geometry")
    assert geometry
    assert a_logic.segments()[0].status == "in progress"
    assert segment.GetRepresentation("Binary labelmap") is not None


# -- undo, redo, markers -------------------------------------------------------------------------------------------


def test_undo_takes_the_marker_away_and_redo_brings_both_back(a_logic, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    one = segment_array(a_logic)
    a_logic.addPoint(there, True)
    wait(a_logic)
    two = segment_array(a_logic)
    assert a_logic.canUndo
    assert not a_logic.canRedo

    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), one)
    assert len(a_logic.prompts()) == 1
    assert a_logic.canRedo

    a_logic.redo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), two)
    assert len(a_logic.prompts()) == 2

    a_logic.undo()
    a_logic.undo()
    wait(a_logic)
    assert segment_array(a_logic).sum() == 0
    assert a_logic.prompts() == []
    assert not a_logic.canUndo


def test_deleted_point_takes_its_part_of_the_mask_along(a_logic, an_engine, segment_array, wait, here, there):
    a_logic.addPoint(there, True)
    wait(a_logic)
    alone = segment_array(a_logic)
    a_logic.addPoint(here, True)
    wait(a_logic)

    a_logic.deletePrompt(a_logic.prompts()[1].nodeId)
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), alone)
    assert len(an_engine.sessions[-1].steps) == 1

    a_logic.undo()
    wait(a_logic)
    assert len(a_logic.prompts()) == 2


def test_point_moved_in_the_scene_moves_the_mask(a_logic, a_scene, an_engine, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    before = segment_array(a_logic)
    node = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")

    node.InvokeEvent(node.PointStartInteractionEvent)
    node.SetNthControlPointPositionWorld(0, *np.add(here, (1, 0, 0)))
    a_logic.poll()
    assert an_engine.asked["revise"] == 0  # while the user still holds it
    node.SetNthControlPointPositionWorld(0, *there)
    node.InvokeEvent(node.PointEndInteractionEvent)
    wait(a_logic)

    after = segment_array(a_logic)
    assert an_engine.asked["revise"] == 1
    assert not (before & after).any()
    assert after.sum() > 10

    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), before)
    assert np.allclose(node.GetNthControlPointPositionWorld(0), here)


def test_point_placed_by_slicers_own_place_mode_is_a_prompt(a_logic, a_scene, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    before = segment_array(a_logic).sum()
    node = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")

    node.AddControlPointWorld(vtk.vtkVector3d(*there))
    wait(a_logic)

    assert segment_array(a_logic).sum() > before
    assert len(a_logic.prompts()) == 2


def test_move_that_the_engine_refuses_puts_the_marker_back(a_logic, a_scene, segment_array, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)
    before = segment_array(a_logic)
    node = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")

    node.SetNthControlPointPositionWorld(0, 9e3, 0, 0)
    wait(a_logic)

    assert "outside" in a_logic.lastError
    assert np.allclose(node.GetNthControlPointPositionWorld(0), here)
    assert np.array_equal(segment_array(a_logic), before)


def test_reset_empties_the_segment_and_undo_brings_all_back(a_logic, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    a_logic.addPoint(there, False)
    wait(a_logic)
    before = segment_array(a_logic)

    a_logic.reset()
    wait(a_logic)
    assert segment_array(a_logic).sum() == 0
    assert a_logic.prompts() == []

    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), before)
    assert [p.positive for p in a_logic.prompts()] == [True, False]


def test_two_hundred_points_are_two_nodes(a_logic, a_scene, an_engine, wait, here):
    rng = np.random.default_rng(0)
    an_engine.hold()
    for n in range(200):
        a_logic.addPoint(np.add(here, rng.normal(0, 1.5, 3)), n % 3 > 0)

    assert len(a_logic.prompts()) == 200
    assert [row.number for row in a_logic.prompts()] == list(range(1, 201))
    assert a_scene.scene.GetNumberOfNodesByClass("vtkMRMLMarkupsNode") == 2
    a_logic.cancel()
    wait(a_logic)
    assert a_logic.prompts() == []


def test_finish_is_one_step_per_slider_way_and_belongs_to_the_segment(a_logic, an_engine, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)
    for mm in (0.5, 1.0, 1.5):
        a_logic.setFinish(mm, True)
        wait(a_logic)
    assert (a_logic.smoothingMm, a_logic.islands) == (1.5, True)

    a_logic.undo()
    wait(a_logic)
    assert a_logic.smoothingMm == 0.0
    assert a_logic.canUndo
    a_logic.addSegment()
    assert a_logic.smoothingMm == 0.0
    assert len(an_engine.sessions[-1].steps) == 1


# -- neighbours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neighbours", "loses", "overlaps"), [
    ("keep", False, False),
    ("compete", True, False),
    ("overlap", False, True),
])  # fmt: skip
def test_neighbours_lose_voxels_only_where_the_user_chose_so(
    a_logic, segment_array, wait, here, neighbours, loses, overlaps
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    first, before = a_logic.selectedSegment, segment_array(a_logic)
    second = a_logic.nextSegment()
    a_logic.setNeighbours(neighbours)

    a_logic.addPoint(np.add(here, (6.5, 0, 0)), True)
    wait(a_logic)

    after, mine = segment_array(a_logic, first), segment_array(a_logic, second)
    assert mine.sum() > 0
    assert (after.sum() < before.sum()) == loses
    assert (after & mine).any() == overlaps
    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic, first), before)


def test_segments_painted_by_hand_are_kept_off_from_the_first_prompt_on(a_logic, segment_array, wait, here):
    from KA2ERSegment.geometry import Box

    a_logic.addSegment("by hand")
    hand = a_logic.selectedSegment
    paint(a_logic, hand, Box((17, 8, 4), (24, 14, 10)), True)
    before = segment_array(a_logic, hand)
    a_logic.nextSegment()

    a_logic.addPoint(here, True)
    wait(a_logic)

    assert before.sum() > 0
    assert np.array_equal(segment_array(a_logic, hand), before)
    assert not (segment_array(a_logic) & before).any()
    a_logic.undo()
    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic, hand), before)  # undo never reaches what was there before


def test_segments_of_one_shared_layer_stay_apart(a_scene, a_logic, an_engine, a_volume_node, segment_array, wait, here):
    labels = np.zeros(slicer.util.arrayFromVolume(a_volume_node).shape, dtype=np.uint8)
    labels[2:5, 2:6, 2:6], labels[8:12, 14:20, 20:28], labels[0, 0, 0:5], labels[13, 20:, 3] = 1, 2, 3, 5
    labelmap = a_scene.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    matrix = vtk.vtkMatrix4x4()
    a_volume_node.GetIJKToRASMatrix(matrix)
    labelmap.SetIJKToRASMatrix(matrix)
    slicer.util.updateVolumeFromArray(labelmap, labels)
    node = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labelmap, node)
    assert node.GetSegmentation().GetNumberOfLayers() == 1
    a_logic.setSegmentationNode(node)
    one, two, three, five = (row.id for row in a_logic.segments())

    a_logic.selectSegment(one)
    a_logic.addPoint(here, True)
    wait(a_logic)

    known = an_engine.sessions[-1]._masks()
    for name, value in ((two, 2), (three, 3), (five, 5)):
        assert np.array_equal(segment_array(a_logic, name), labels == value)
        assert np.array_equal(known[name], labels == value)
    assert (segment_array(a_logic, one) & (labels == 1)).sum() == (labels == 1).sum()
    assert segment_array(a_logic, one).sum() > (labels == 1).sum()


# -- edits by hand, masking ----------------------------------------------------------------------------------------


def test_next_prompt_starts_from_the_edited_mask(a_logic, an_engine, segment_array, wait, here, there):
    from KA2ERSegment.geometry import Box

    a_logic.addPoint(here, True)
    wait(a_logic)
    paint(a_logic, a_logic.selectedSegment, Box((1, 1, 1), (3, 3, 3)), True)
    assert a_logic.quality is None
    edited = segment_array(a_logic)

    a_logic.addPoint(there, True)
    wait(a_logic)

    assert an_engine.asked["edit"] == 1
    assert (segment_array(a_logic) & edited).sum() == edited.sum()
    assert a_logic.quality is not None
    a_logic.undo()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), edited)


def test_our_own_writes_are_no_edits_by_hand(a_logic, an_engine, wait, here, there):
    for ras in (here, there):
        a_logic.addPoint(ras, True)
        wait(a_logic)
    a_logic.undo()
    wait(a_logic)

    assert an_engine.asked["edit"] == 0


def test_editable_area_is_respected_and_the_engine_is_told(
    a_scene, a_logic, an_engine, segment_array, wait, here, there
):
    from KA2ERSegment.geometry import Box

    a_logic.addSegment("area")
    area = a_logic.selectedSegment
    paint(a_logic, area, Box((0, 0, 0), (16, 22, 14)), True)
    inside = segment_array(a_logic, area)
    editor = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedInsideSingleSegment)
    editor.SetMaskSegmentID(area)
    a_logic.segmentEditorNode = editor
    a_logic.setNeighbours("overlap")
    a_logic.nextSegment()

    a_logic.addPoint(here, True)
    wait(a_logic)
    masked = segment_array(a_logic)
    assert masked.sum() > 0
    assert not (masked & ~inside).any()

    a_logic.addPoint(there, True)
    wait(a_logic)
    steps = an_engine.sessions[-1].steps
    assert [bool(step.get("amend")) for step in steps if "edit" in step] == [False, True]
    assert np.array_equal(segment_array(a_logic), an_engine.sessions[-1]._masks()[a_logic.selectedSegment])

    a_logic.undo()
    a_logic.undo()
    wait(a_logic)
    assert segment_array(a_logic).sum() == 0


def test_intensity_range_is_respected(a_scene, a_logic, a_volume_node, segment_array, wait, here):
    editor = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor.SetSourceVolumeIntensityMask(True)
    editor.SetSourceVolumeIntensityMaskRange(50, 1000)
    a_logic.segmentEditorNode = editor

    a_logic.addPoint(here, True)
    wait(a_logic)

    mask = segment_array(a_logic)
    assert mask.sum() > 0
    assert (slicer.util.arrayFromVolume(a_volume_node)[mask] >= 50).all()


def test_segment_editors_undo_is_offered_each_write(a_logic, wait, here, there):
    saved = []
    a_logic.saveStateForUndo = lambda: saved.append(a_logic.selectedSegment)
    a_logic.addPoint(here, True)
    a_logic.addPoint(there, True)
    wait(a_logic)

    assert len(saved) == 2


# -- work under way ------------------------------------------------------------------------------------------------


def test_prompts_wait_for_their_turn_in_order(a_logic, an_engine, wait, here, there):
    an_engine.hold()
    a_logic.addPoint(here, True)
    assert an_engine.entered.wait(10)
    a_logic.addPoint(there, False)
    a_logic.addPoint(np.add(here, (1, 1, 0)), True)
    assert a_logic.busy
    assert len(a_logic.prompts()) == 3

    an_engine.release()
    wait(a_logic)
    assert a_logic.busy == ""
    polarities = [step["prompt"]["polarity"] for step in an_engine.sessions[-1].steps]
    assert polarities == ["positive", "negative", "positive"]


def test_cancel_drops_the_running_prompt_the_queue_and_their_markers(
    a_logic, an_engine, segment_array, wait, here, there
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    before = segment_array(a_logic)
    an_engine.hold()
    a_logic.addPoint(there, True)
    a_logic.addPoint(np.add(there, (1, 0, 0)), True)
    assert an_engine.entered.wait(10)

    a_logic.cancel()
    wait(a_logic)

    assert a_logic.lastError == ""
    assert len(a_logic.prompts()) == 1
    assert np.array_equal(segment_array(a_logic), before)
    a_logic.addPoint(there, True)
    wait(a_logic)
    assert len(a_logic.prompts()) == 2


def test_engine_that_does_not_stop_is_replaced_and_told_everything_again(
    a_logic, an_engine, segment_array, wait, here, there
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    before = segment_array(a_logic)
    an_engine.stubborn = True
    an_engine.hold()
    a_logic.addPoint(there, True)
    assert an_engine.entered.wait(10)
    a_logic.cancel()
    wait(a_logic)
    assert np.array_equal(segment_array(a_logic), before)

    an_engine.release()
    a_logic.addPoint(there, False)
    wait(a_logic)
    assert an_engine.starts == 2
    assert [step["prompt"]["polarity"] for step in an_engine.sessions[-1].steps] == ["positive", "negative"]


def test_engine_that_dies_in_a_prediction_loses_nothing(a_logic, an_engine, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    an_engine.dieAt = "add"

    a_logic.addPoint(there, True)
    wait(a_logic)

    assert a_logic.lastError == ""
    assert an_engine.starts == 2
    assert len(an_engine.sessions[-1].steps) == 2
    assert np.array_equal(segment_array(a_logic), an_engine.sessions[-1]._masks()[a_logic.selectedSegment])
    a_logic.undo()
    wait(a_logic)
    assert len(a_logic.prompts()) == 1


def test_engine_that_died_while_idle_is_told_everything_again(a_logic, an_engine, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    an_engine.die()

    a_logic.addPoint(there, True)
    wait(a_logic)
    assert a_logic.lastError == ""
    assert len(an_engine.sessions[-1].steps) == 2


def test_prompt_that_the_engine_refuses_leaves_scene_and_undo_as_they_were(a_logic, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.nextSegment()
    a_logic.addPoint(there, True)
    wait(a_logic)
    before = segment_array(a_logic)

    a_logic.addPoint(here, True)  # inside the first segment, and neighbours keep their voxels
    wait(a_logic)

    assert "neighbours keep" in a_logic.lastError
    assert len(a_logic.prompts()) == 1
    assert np.array_equal(segment_array(a_logic), before)
    a_logic.undo()
    wait(a_logic)
    assert a_logic.prompts() == []


def test_another_engine_is_told_what_the_first_one_knew(a_logic, an_engine, wait, here, there):
    from engine_double import EngineDouble

    a_logic.addPoint(here, True)
    wait(a_logic)
    other = EngineDouble()
    a_logic.connectEngine(lambda: other)
    wait(a_logic)
    a_logic.addPoint(there, True)
    wait(a_logic)

    assert an_engine.poll() == "dead"
    assert len(other.sessions[-1].steps) == 2
    assert a_logic.lastError == ""


# -- the scene changes meanwhile -----------------------------------------------------------------------------------


def test_scene_closed_in_the_middle_of_a_prediction(a_scene, a_logic, an_engine, wait, here):
    an_engine.hold()
    a_logic.addPoint(here, True)
    assert an_engine.entered.wait(10)

    a_scene.scene.Clear(0)
    an_engine.release()
    wait(a_logic)

    assert a_logic.volumeNode is None
    assert a_logic.segmentationNode is None
    assert a_logic.segments() == []
    assert a_logic.lastError == ""
    assert a_scene.scene.GetNumberOfNodesByClass("vtkMRMLMarkupsNode") == 0


@pytest.mark.parametrize("what", ["volume", "segmentation", "segment"])
def test_deleted_in_the_middle_of_a_prediction(a_scene, a_logic, an_engine, wait, here, what):
    a_logic.addPoint(here, True)
    wait(a_logic)
    an_engine.hold()
    a_logic.addPoint(np.add(here, (2, 0, 0)), True)
    assert an_engine.entered.wait(10)
    if what == "segment":
        a_logic.removeSegment(a_logic.selectedSegment)
    else:
        a_scene.scene.RemoveNode(a_logic.volumeNode if what == "volume" else a_logic.segmentationNode)
    an_engine.release()
    wait(a_logic)

    assert a_logic.lastError == ""
    if what == "volume":
        assert a_logic.volumeNode is None
    else:
        assert a_scene.scene.GetNumberOfNodesByClass("vtkMRMLMarkupsFiducialNode") == 0
        assert a_logic.segments() == []
        a_logic.addPoint(here, True)
        wait(a_logic)
        assert a_logic.lastError == ""
        assert len(a_logic.prompts()) == 1


def test_deleted_segment_comes_back_with_undo(a_logic, segment_array, wait, here, there):
    a_logic.addPoint(here, True)
    wait(a_logic)
    first, before = a_logic.selectedSegment, segment_array(a_logic)
    a_logic.segmentationNode.GetSegmentation().GetSegment(first).SetName("liver")
    a_logic.nextSegment()
    a_logic.addPoint(there, True)
    wait(a_logic)

    a_logic.removeSegment(first)
    a_logic.undo()
    wait(a_logic)

    assert {row.id: row.name for row in a_logic.segments()}[first] == "liver"
    assert np.array_equal(segment_array(a_logic, first), before)
    assert len(a_logic.prompts(first)) == 1


def test_two_volumes_have_their_own_sessions_and_segments(
    a_scene, a_logic, an_engine, an_array, an_affine, segment_array, wait, here
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    first_volume, first = a_logic.volumeNode, a_logic.segmentationNode
    before = segment_array(a_logic)
    second = a_scene.addVolume(an_array[:, :15, :20].copy(), an_affine, "Another")

    a_logic.setSegmentationNode(None)
    a_logic.setVolumeNode(second)
    a_logic.addPoint(ras_at(second, 0.5, 0.5, 0.5), True)
    wait(a_logic)
    assert a_logic.segmentationNode is not first
    assert an_engine.sessions[-1].shape_kji == (14, 15, 20)
    assert segment_array(a_logic).sum() > 0

    a_logic.setVolumeNode(first_volume)
    a_logic.setSegmentationNode(first)
    assert np.array_equal(segment_array(a_logic), before)
    assert len(a_logic.prompts()) == 1
    a_logic.addPoint(np.add(here, (1, 0, 0)), False)
    wait(a_logic)
    assert a_logic.lastError == ""
    assert len(an_engine.sessions[-1].steps) >= 2


def test_changed_voxels_begin_a_new_session_with_the_same_segments(
    a_logic, an_engine, a_volume_node, wait, here, there
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    slicer.util.arrayFromVolume(a_volume_node)[...] += 1
    slicer.util.arrayFromVolumeModified(a_volume_node)

    a_logic.addPoint(there, True)
    wait(a_logic)
    assert an_engine.asked["open"] == 2
    assert len(a_logic.prompts()) == 2
    assert a_logic.lastError == ""


def test_closed_logic_leaves_prompts_and_segments_and_stops_the_engine(a_scene, a_logic, an_engine, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.close()

    assert an_engine.poll() == "dead"
    assert a_scene.scene.GetNumberOfNodesByClass("vtkMRMLMarkupsFiducialNode") == 1
    assert a_scene.scene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode") == 1


def test_suggestion_moves_all_slice_views_there(a_scene, a_logic, a_slice_view, wait, here):
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.suggest()
    wait(a_logic)

    ras, positive = a_logic.suggestion
    assert not positive
    normal = np.array([a_slice_view.node.GetSliceToRAS().GetElement(r, 2) for r in range(3)])
    assert a_slice_view.node.GetSliceOffset() == pytest.approx(normal @ ras)


def test_logs_say_nothing_of_volume_or_patient(a_logic, a_volume_node, wait, here, caplog, an_engine):
    a_volume_node.SetName("DOE^JANE")
    caplog.set_level(0)
    an_engine.dieAt = "add"
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.addPoint(here, True)
    wait(a_logic)

    assert "DOE" not in caplog.text
    assert "DOE" not in a_logic.lastError
