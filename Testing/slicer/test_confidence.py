"""Confidence per expert in the slice views, the outline of what changed, terminology: real nodes, drawn offscreen."""

from __future__ import annotations

import numpy as np
import pytest
import slicer
import vtk
from engine_double import SessionDouble

from KA2ERSegment.engine.wire import Opinion
from KA2ERSegment.engine.workplaces import as_bytes
from KA2ERSegment.errors import SessionStateError
from KA2ERSegment.geometry import apply_affine
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch
from SlicerKA2ERLib.VolumeIO import ijkToRas, toVtk


@pytest.fixture
def here(a_volume_node):
    bounds = [0.0] * 6
    a_volume_node.GetRASBounds(bounds)
    return [(bounds[2 * n] + bounds[2 * n + 1]) / 2 for n in range(3)]


@pytest.fixture
def a_segmented_logic(a_logic, a_slice_view, wait, here):
    """With one click done, and an axial view on it."""
    a_slice_view.show(a_logic.volumeNode)
    a_slice_view.jumpTo(here)
    a_logic.addPoint(here, True)
    wait(a_logic)
    return a_logic


def overlays(scene):
    nodes = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode", scene.scene)
    return {node.GetName(): node for node in nodes if node.GetName() != "A volume"}


def layer_ids(view):
    composite = view.composite
    return [composite.GetNthLayerVolumeID(n) for n in range(3, 3 + composite.GetNumberOfAdditionalLayers())]


def test_experts_are_listed_with_their_share_in_the_segment(a_logic, wait, here):
    assert a_logic.experts() == []
    a_logic.warmUp()
    wait(a_logic)
    assert [row.name for row in a_logic.experts()] == ["foundation", "tiny_trunk", "tiny_brain"]
    assert [row.share for row in a_logic.experts()] == [None, None, None]

    a_logic.addPoint(here, True)
    wait(a_logic)
    assert [row.share for row in a_logic.experts()] == [0.5, 0.3, 0.2]
    assert len({row.color for row in a_logic.experts()}) == 3


DECODERS = {"decoder general": 0.6, "decoder tiny_trunk": 0.0, "decoder tiny_brain": 0.4}
VOTERS = {"head basic": 0.5, "head tiny_trunk": 0.25, "head adaptive 1": 0.25}


def test_decoders_and_voters_are_listed_after_the_encoders(a_logic, an_engine, wait, here):
    an_engine.experts |= {"decoders": DECODERS, "head": VOTERS}
    a_logic.addPoint(here, True)
    wait(a_logic)

    rows = a_logic.experts()
    titles = [
        "Foundation", "Tiny trunk", "Tiny brain", "General decoder", "Tiny trunk decoder", "Tiny brain decoder",
        "Basic voter", "Tiny trunk voter", "Adaptive 1 voter",
    ]  # fmt: skip
    assert [row.title for row in rows] == titles
    assert [row.mode for row in rows] == ["amalgamation"] * 3 + ["decoders"] * 3 + ["head"] * 3
    assert {row.name: row.share for row in rows[3:]} == DECODERS | VOTERS
    assert len({row.color for row in rows}) == 9
    assert [row.name for row in rows if row.canBeLeftOut] == ["tiny_trunk", "tiny_brain"]
    for name in ("decoder tiny_trunk", "head basic"):
        with pytest.raises(SessionStateError, match="expert must be one of"):
            a_logic.setExpertEnabled(name, False)
    a_logic.setExpertEnabled("tiny_brain", False)
    assert [row.name for row in a_logic.experts() if not row.enabled] == ["tiny_brain"]


def test_a_voter_is_shown_over_the_slices_and_asked_for_only_then(a_logic, an_engine, a_scene, wait, here):
    an_engine.experts |= {"decoders": DECODERS, "head": VOTERS}
    a_logic.addPoint(here, True)
    wait(a_logic)
    assert an_engine.asked["opinion"] == 0

    a_logic.setExpertShown("head tiny_trunk", True)
    a_logic.setExpertKind("head tiny_trunk", "share")
    a_logic.setExpertShown("decoder general", True)
    wait(a_logic)
    assert a_logic.lastError == ""
    nodes = overlays(a_scene)
    assert set(nodes) == {"Tiny trunk voter share", "General decoder probability"}
    opinion = an_engine.sessions[-1].opinion(a_logic.selectedSegment, "head tiny_trunk")
    array = slicer.util.arrayFromVolume(nodes["Tiny trunk voter share"])
    np.testing.assert_allclose(array, opinion.weight / 255, atol=1e-6)


def test_what_no_longer_takes_part_is_not_asked_for(a_segmented_logic, an_engine, a_scene, wait, here):
    """As with an encoder that was switched off before the latest prompt."""
    a_segmented_logic.setExpertShown("tiny_brain", True)
    wait(a_segmented_logic)
    assert len(overlays(a_scene)) == 1
    an_engine.experts["amalgamation"] = {"foundation": 0.6, "tiny_trunk": 0.4}
    a_segmented_logic.addPoint(np.add(here, (3, 0, 0)), True)
    wait(a_segmented_logic)

    assert overlays(a_scene) == {}
    assert a_segmented_logic.lastError == ""


def test_an_expert_that_is_gone_when_its_answer_comes_is_shown_without_a_fuss(
    a_segmented_logic, a_scene, wait, monkeypatch
):
    """The list of experts changed between question and answer."""
    a_segmented_logic.setExpertShown("tiny_brain", True)
    monkeypatch.setattr(a_segmented_logic._confidence, "rows", lambda *_: [])
    wait(a_segmented_logic)

    assert a_segmented_logic.lastError == ""
    assert len(overlays(a_scene)) == 1


def test_overlays_that_are_off_cost_nothing(a_segmented_logic, a_scene, an_engine):
    assert an_engine.asked["opinion"] == an_engine.asked["disagreement"] == 0
    assert overlays(a_scene) == {}


def test_shown_expert_is_a_volume_of_the_patch_in_a_layer_of_its_own(a_segmented_logic, a_scene, a_slice_view, wait):
    before = a_slice_view.render()
    a_segmented_logic.setExpertShown("tiny_trunk", True)
    wait(a_segmented_logic)

    (node,) = overlays(a_scene).values()
    array = slicer.util.arrayFromVolume(node)
    assert array.dtype == np.float32
    assert np.allclose(array, 170 / 255)
    assert np.prod(array.shape) < np.prod(slicer.util.arrayFromVolume(a_segmented_logic.volumeNode).shape)
    assert layer_ids(a_slice_view) == [node.GetID()]
    assert a_slice_view.composite.GetBackgroundVolumeID() == a_segmented_logic.volumeNode.GetID()
    assert not a_slice_view.composite.GetForegroundVolumeID()
    assert (a_slice_view.render() != before).any()


def test_overlay_lies_where_the_engine_looked(a_segmented_logic, a_scene, an_engine, wait):
    a_segmented_logic.setExpertShown("foundation", True)
    wait(a_segmented_logic)

    (node,) = overlays(a_scene).values()
    opinion = an_engine.sessions[-1].opinion(a_segmented_logic.selectedSegment, "foundation")
    assert node.GetImageData().GetDimensions() == opinion.probability.shape[::-1]
    np.testing.assert_allclose(ijkToRas(node), opinion.ijk_to_ras, atol=1e-6)


@pytest.fixture
def a_prediction(any_volume):
    """On a patch within an anisotropic volume, with two arms of which no two samples agree."""
    volume, rng = any_volume, np.random.default_rng(3)
    canonical = volume.canonical()
    i, j, k = canonical.shape_ijk
    patch = Patch((0.2 * i, 0.15 * j, 0.25 * k), (0.06 * i, 0.07 * j, 0.05 * k), 8)
    box = patch.box(canonical.shape_kji)
    weights = rng.random((2, 4, 4, 4)).astype(np.float32)
    logits = rng.normal(0, 3, (2, 8, 8, 8)).astype(np.float32)
    return Prediction(
        volume,
        canonical,
        "liver",
        patch,
        logits[0],
        PackedMask.pack(box, np.ones(box.shape_kji, dtype=bool)),
        box,
        ("foundation", "tiny_trunk"),
        weights / weights.sum(axis=0),
        lambda arm: logits[arm],
    )


@pytest.mark.parametrize("under", [False, True])
def test_overlay_says_at_every_place_in_the_world_what_the_library_says_there(
    a_prediction, a_logic, a_volume_node, a_scene, value_at, wait, an_oblique_affine, monkeypatch, under
):
    prediction, volume = a_prediction, a_prediction.volume
    a_volume_node.SetIJKToRASMatrix(toVtk(volume.ijk_to_ras))
    moved = an_oblique_affine if under else np.eye(4)
    if under:
        parent = a_scene.scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        parent.SetMatrixTransformToParent(toVtk(moved))
        a_volume_node.SetAndObserveTransformNodeID(parent.GetID())

    def opinion(_session, _name, arm):
        return Opinion(arm, prediction.patch_to_ras, *(as_bytes(each) for each in prediction.opinion_on_patch(arm)))

    def disagreement(_session, _name):
        return prediction.patch_to_ras, as_bytes(prediction.disagreement_on_patch())

    monkeypatch.setattr(SessionDouble, "opinion", opinion)
    monkeypatch.setattr(SessionDouble, "disagreement", disagreement)
    middle = apply_affine(volume.ijk_to_ras, (np.array(volume.shape_ijk) - 1) / 2)
    a_logic.addPoint(apply_affine(moved, middle), True)
    wait(a_logic)
    a_logic.setExpertShown("foundation", True)
    a_logic.setExpertShown("tiny_trunk", True)
    a_logic.setExpertKind("tiny_trunk", "share")
    a_logic.setDisagreementShown(True)
    wait(a_logic)
    assert a_logic.lastError == ""

    nodes = overlays(a_scene)
    assert len(nodes) == 3
    expected = {
        "Foundation probability": prediction.experts["foundation"].probability,
        "Tiny trunk share": prediction.experts["tiny_trunk"].weight,
        "Disagreement": prediction.disagreement,
    }
    ijk = np.argwhere(np.ones(volume.shape_kji, dtype=bool))[:, ::-1]
    world = apply_affine(moved, apply_affine(volume.ijk_to_ras, ijk))
    for name, image in expected.items():
        shown, said = value_at(nodes[name], world), image.ravel()
        within = np.isfinite(shown)
        assert within.sum() > 500
        assert said[within].std() > 0.05
        np.testing.assert_allclose(shown[within], said[within], atol=0.003, err_msg=name)


def test_several_experts_and_the_disagreement_are_shown_at_once(a_segmented_logic, a_scene, a_slice_view, wait):
    for name in ("foundation", "tiny_trunk", "tiny_brain"):
        a_segmented_logic.setExpertShown(name, True)
    a_segmented_logic.setDisagreementShown(True)
    wait(a_segmented_logic)

    nodes = overlays(a_scene)
    assert len(nodes) == 4
    assert set(layer_ids(a_slice_view)) == {node.GetID() for node in nodes.values()}
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(a_scene.scene)
    name = a_segmented_logic.segments()[0].name
    folder = hierarchy.GetItemChildWithName(hierarchy.GetSceneItemID(), f"KA2ER confidence: {name}")
    assert folder
    assert all(hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) == folder for node in nodes.values())
    a_segmented_logic.setExpertOpacity("foundation", 0)
    for name in nodes:
        legend = slicer.util.getNode(f"{name} legend")
        assert slicer.vtkSlicerColorLogic.GetColorLegendDisplayNode(legend).GetVisibility(a_slice_view.node.GetID())
        assert not legend.GetSaveWithScene()


def test_legend_is_drawn_beside_the_image(a_segmented_logic, a_slice_view, wait):
    a_slice_view.composite.SetBackgroundVolumeID(None)
    before = a_slice_view.render()
    a_segmented_logic.setExpertShown("tiny_trunk", True)
    wait(a_segmented_logic)
    a_segmented_logic.setExpertOpacity("tiny_trunk", 0.0)
    changed = (a_slice_view.render() != before).any(axis=2)

    right = changed[:, 3 * changed.shape[1] // 4 :]
    assert right.sum() > 200


def test_overlay_lightens_black_and_does_not_cover_white_with_black(a_scene, a_volume_node, a_slice_view, here):
    from SlicerKA2ERLib.Overlays import Overlays

    display = a_volume_node.GetDisplayNode()
    display.SetAutoWindowLevel(False)
    a_slice_view.show(a_volume_node)
    a_slice_view.jumpTo(here)
    overlays = Overlays(a_scene.scene, a_scene.applicationLogic, legends=False)
    shape = a_volume_node.GetImageData().GetDimensions()[::-1]
    brightest = {}
    for low, high, image in ((-2000, -1000, "white"), (1000, 2000, "black")):
        display.SetWindowLevelMinMax(low, high)
        for value in (0.0, 0.06, 1.0):
            place = ijkToRas(a_volume_node), np.full(shape, value)
            overlays.put("red", "red", (1, 0, 0), 0.5, "liver", *place, a_volume_node)
            picture = a_slice_view.render()
            brightest[image, value] = picture[picture.shape[0] // 2, picture.shape[1] // 2].max()
    overlays.clear()

    assert brightest["black", 0.0] == 0
    assert brightest["white", 0.0] == 255
    assert 0 < brightest["black", 0.06] < brightest["black", 1.0]
    assert brightest["white", 0.06] > 170


@pytest.mark.parametrize("count", [2, 4, 7])
def test_legends_of_many_experts_do_not_cover_each_other(a_scene, a_volume_node, count):
    from SlicerKA2ERLib.Overlays import Overlays

    shown, values = Overlays(a_scene.scene, a_scene.applicationLogic), np.ones((2, 2, 2))
    for n in range(count + 1):
        shown.put(str(n), f"Expert {n}", (1, 0, 0), 0.5, "liver", np.eye(4), values, a_volume_node)
    shown.remove("0")

    logic = slicer.vtkSlicerColorLogic
    names = [f"Expert {n} legend" for n in range(1, count + 1)]
    legends = [logic.GetColorLegendDisplayNode(slicer.util.getNode(name)) for name in names]
    heights = [legend.GetPosition()[1] for legend in legends]
    gaps = -np.diff(heights)
    assert (gaps >= [legend.GetSize()[1] for legend in legends[1:]]).all()
    assert min(heights) >= 0
    shown.clear()


def test_overlays_follow_every_prompt_and_opacity_needs_no_engine(
    a_segmented_logic, a_scene, an_engine, a_slice_view, wait, here
):
    a_segmented_logic.setExpertShown("tiny_brain", True)
    wait(a_segmented_logic)
    a_segmented_logic.addPoint(np.add(here, (8, 0, 0)), True)
    wait(a_segmented_logic)
    assert an_engine.asked["opinion"] == 2
    (node,) = overlays(a_scene).values()
    assert node.GetImageData().GetDimensions()[0] > 1

    a_segmented_logic.setExpertOpacity("tiny_brain", 0.25)
    assert a_slice_view.composite.GetNthLayerOpacity(3) == pytest.approx(0.25)
    assert an_engine.asked["opinion"] == 2


def test_share_is_shown_instead_of_probability(a_segmented_logic, a_scene, wait):
    a_segmented_logic.setExpertShown("tiny_brain", True)
    a_segmented_logic.setExpertKind("tiny_brain", "share")
    wait(a_segmented_logic)

    (node,) = overlays(a_scene).values()
    assert np.allclose(slicer.util.arrayFromVolume(node), 85 / 255)
    with pytest.raises(SessionStateError, match="probability, share"):
        a_segmented_logic.setExpertKind("tiny_brain", "colour")


@pytest.mark.parametrize("how", ["off", "segment", "other segment", "close", "scene"])
def test_overlays_go_with_what_they_belong_to(a_segmented_logic, a_scene, a_slice_view, wait, how):
    logic = a_segmented_logic
    logic.setExpertShown("tiny_brain", True)
    logic.setDisagreementShown(True)
    wait(logic)
    assert len(overlays(a_scene)) == 2
    nodes_before = a_scene.scene.GetNumberOfNodes()

    if how == "off":
        logic.setExpertShown("tiny_brain", False)
        logic.setDisagreementShown(False)
    elif how == "segment":
        logic.removeSegment(logic.selectedSegment)
    elif how == "other segment":
        logic.nextSegment()
    elif how == "close":
        logic.close()
    else:
        a_scene.scene.Clear(0)
    if how != "close":
        wait(logic)

    assert overlays(a_scene) == {}
    if how != "scene":
        assert not any(layer_ids(a_slice_view))
        # two volumes with display and colours, two legends with displays: at most a segment's marker came instead
        assert a_scene.scene.GetNumberOfNodes() <= nodes_before - 12 + 2
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(a_scene.scene)
        items = vtk.vtkIdList()
        hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), items, True)
        names = [hierarchy.GetItemName(items.GetId(n)) for n in range(items.GetNumberOfIds())]
        assert not any(name.startswith("KA2ER confidence") for name in names)


def test_layers_of_others_stay_as_they_are(a_segmented_logic, a_scene, a_slice_view, an_array, an_affine, wait):
    theirs = a_scene.addVolume(an_array, an_affine, "A volume")
    a_slice_view.composite.SetNthLayerVolumeID(3, theirs.GetID())
    a_segmented_logic.setExpertShown("tiny_brain", True)
    wait(a_segmented_logic)
    a_segmented_logic.setExpertShown("tiny_brain", False)
    wait(a_segmented_logic)

    assert a_slice_view.composite.GetNthLayerVolumeID(3) == theirs.GetID()


def test_expert_that_is_switched_off_takes_no_part_from_the_next_prompt_on(a_segmented_logic, an_engine, wait, here):
    a_segmented_logic.setExpertEnabled("tiny_brain", False)
    assert {row.name: row.enabled for row in a_segmented_logic.experts()}["tiny_brain"] is False
    a_segmented_logic.addPoint(np.add(here, (3, 0, 0)), True)
    wait(a_segmented_logic)
    a_segmented_logic.setExpertEnabled("tiny_brain", True)
    a_segmented_logic.addPoint(np.add(here, (0, 3, 0)), True)
    wait(a_segmented_logic)

    assert [step.get("experts") for step in an_engine.sessions[-1].steps] == [None, ["tiny_trunk"], None]
    with pytest.raises(SessionStateError, match="expert must be one of"):
        a_segmented_logic.setExpertEnabled("foundation", False)


def outlines(scene):
    """Slice views have hidden models of their own."""
    found = slicer.util.getNodesByClass("vtkMRMLModelNode", scene)
    return [node for node in found if node.GetName() == "KA2ER what changed"]


def test_what_changed_is_outlined_for_a_moment(a_segmented_logic, a_scene, wait, monkeypatch):
    from SlicerKA2ERLib import Outline

    (outline,) = outlines(a_scene.scene)
    assert not outline.GetSaveWithScene()
    assert outline.GetHideFromEditors()
    assert outline.GetDisplayNode().GetVisibility2D()
    around, segment = np.zeros(6), np.zeros(6)
    outline.GetRASBounds(around)
    a_segmented_logic.segmentationNode.GetRASBounds(segment)
    within = np.linalg.norm(a_segmented_logic.volumeNode.GetSpacing())  # oblique: corners stick out of boxes
    np.testing.assert_allclose(around, segment, atol=within)  # all of the first mask is new
    later = Outline.time.monotonic() + Outline.SECONDS + 1
    monkeypatch.setattr(Outline.time, "monotonic", lambda: later)
    a_segmented_logic.poll()
    assert not outlines(a_scene.scene)


def test_a_large_change_is_outlined_roughly(a_segmented_logic, a_scene, monkeypatch):
    """In the right place all the same."""
    from KA2ERSegment.geometry import Box
    from SlicerKA2ERLib import Outline
    from SlicerKA2ERLib.VolumeIO import volumeData

    logic, box = a_segmented_logic, Box((3, 4, 2), (15, 18, 12))
    given = a_segmented_logic.segmentationNode, logic.volumeNode, volumeData(logic.volumeNode), box
    bounds = []
    for most in (Outline.MOST_VOXELS, 300):
        monkeypatch.setattr(Outline, "MOST_VOXELS", most)
        outline = Outline.Outline(a_scene.scene)
        outline.show(*given, np.ones(box.shape_kji, dtype=bool))
        node = outlines(a_scene.scene)[-1]
        bounds.append((node.GetPolyData().GetNumberOfPoints(), np.zeros(6)))
        node.GetRASBounds(bounds[-1][1])
        outline.clear()
    (fine, exact), (coarse, rough) = bounds
    assert coarse < fine / 2
    np.testing.assert_allclose(rough, exact, atol=3 * np.max(logic.volumeNode.GetSpacing()))


ENTRY = (
    "Segmentation category and type - 3D Slicer General Anatomy list"
    "~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
)


def test_terminology_names_the_segment(a_segmented_logic):
    segment_id = a_segmented_logic.selectedSegment
    a_segmented_logic.setTerminology(segment_id, ENTRY)

    segment = a_segmented_logic.segmentationNode.GetSegmentation().GetSegment(segment_id)
    assert a_segmented_logic.segments()[0].name == "Liver"
    assert segment.GetTerminology() is not None
    with pytest.raises(SessionStateError, match="terminology entry"):
        a_segmented_logic.setTerminology(segment_id, "liver")


def test_status_is_slicers_own(a_segmented_logic):
    segment_id = a_segmented_logic.selectedSegment
    a_segmented_logic.setStatus(segment_id, "completed")

    segment = a_segmented_logic.segmentationNode.GetSegmentation().GetSegment(segment_id)
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    assert logic.GetSegmentStatus(segment) == logic.Completed
    assert a_segmented_logic.segments()[0].status == "completed"
    with pytest.raises(SessionStateError, match="a status must be one of"):
        a_segmented_logic.setStatus(segment_id, "done")
