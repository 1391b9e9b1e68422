"""Prompts and segments survive a saved scene; volumes under transforms; segmentations on other grids."""

from __future__ import annotations

import numpy as np
import pytest
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from KA2ERSegment.errors import GeometryError, SessionStateError


@pytest.fixture
def here(a_volume_node):
    return world(a_volume_node, 0.5, 0.5, 0.5)


@pytest.fixture
def there(a_volume_node):
    return world(a_volume_node, 0.15, 0.2, 0.3)


def world(node, *shares):
    """World RAS of a voxel, by its place along I, J and K (0..1), through the volume's own transform."""
    matrix, parent = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(node.GetParentTransformNode(), None, parent)
    ijk = [round(share * (size - 1)) for share, size in zip(shares, node.GetImageData().GetDimensions(), strict=True)]
    return parent.MultiplyPoint(matrix.MultiplyPoint((*ijk, 1.0)))[:3]


def turned(degrees=(25, -40, 10), shift=(12.0, -30.0, 7.0)):
    transform = vtk.vtkTransform()
    transform.Translate(*shift)
    for axis, angle in zip(("X", "Y", "Z"), degrees, strict=True):
        getattr(transform, f"Rotate{axis}")(angle)
    return transform.GetMatrix()


def put_under_transform(a_scene, node, matrix):
    transform = a_scene.scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    transform.SetMatrixTransformToParent(matrix)
    node.SetAndObserveTransformNodeID(transform.GetID())
    return transform


def save_and_load(a_scene, logic, folder):
    """Write the scene as .mrb, close it, read it again; returns the volume and the segmentation."""
    path = folder / "scene.mrb"
    assert a_scene.scene.WriteToMRB(str(path), None)
    a_scene.scene.Clear(0)
    assert a_scene.scene.ReadFromMRB(str(path), True)
    scalars = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode", a_scene.scene)
    (volume,) = [node for node in scalars if not node.IsA("vtkMRMLLabelMapVolumeNode")]
    (segmentation,) = slicer.util.getNodesByClass("vtkMRMLSegmentationNode", a_scene.scene)
    logic.setVolumeNode(volume)
    logic.setSegmentationNode(segmentation)
    return volume, segmentation


def box_around(point, size=6.0):
    return [np.subtract(point, size / 2), [(size, 0, 0), (0, size, 0), (0, 0, size)]]


def test_saved_scene_has_its_prompts_with_their_segments(
    a_scene, a_logic, an_engine, segment_array, wait, here, there, tmp_path
):
    a_logic.addPoint(here, True)
    a_logic.addPoint(np.add(here, (5, 0, 0)), False)
    a_logic.addScribble([here, np.add(here, (0, 4, 0))], True, 2.5)
    first = a_logic.selectedSegment
    a_logic.nextSegment()
    a_logic.addBox(*box_around(there), True)
    a_logic.addLasso([there, np.add(there, (5, 0, 0)), np.add(there, (0, 5, 0))], True)
    wait(a_logic)
    assert a_logic.lastError == ""
    second = a_logic.selectedSegment
    rows = {s: [(p.kind, p.positive, p.number) for p in a_logic.prompts(s)] for s in (first, second)}
    masks = {s: segment_array(a_logic, s) for s in (first, second)}
    old = an_engine.sessions[-1].steps

    save_and_load(a_scene, a_logic, tmp_path)

    assert {s: [(p.kind, p.positive, p.number) for p in a_logic.prompts(s)] for s in (first, second)} == rows
    assert all(np.array_equal(segment_array(a_logic, s), masks[s]) for s in (first, second))
    assert len(an_engine.sessions) == 1  # nothing is asked before the next prompt
    a_logic.selectSegment(first)
    a_logic.addPoint(np.add(here, (0, 0, 4)), True)
    wait(a_logic)

    assert a_logic.lastError == ""
    told = [
        step["prompt"]["type"] for step in an_engine.sessions[-1].steps if step["object"] == first and "prompt" in step
    ]
    assert told == ["point", "point", "scribble", "point"]
    assert (segment_array(a_logic, first) & masks[first]).sum() == masks[first].sum()
    assert np.array_equal(segment_array(a_logic, second), masks[second])
    scribble = next(s["prompt"] for s in an_engine.sessions[-1].steps if s.get("prompt", {}).get("type") == "scribble")
    before = next(s["prompt"] for s in old if s.get("prompt", {}).get("type") == "scribble")
    assert scribble["radius"] == before["radius"]
    assert np.allclose(scribble["points"], before["points"], atol=1e-4)


def test_prompt_of_a_loaded_scene_can_be_deleted_and_the_mask_follows(
    a_scene, a_logic, segment_array, wait, here, there, tmp_path
):
    a_logic.addPoint(here, True)
    wait(a_logic)
    alone = segment_array(a_logic)
    a_logic.addPoint(there, True)
    wait(a_logic)
    save_and_load(a_scene, a_logic, tmp_path)

    a_logic.deletePrompt(a_logic.prompts()[1].nodeId)
    wait(a_logic)

    assert a_logic.lastError == ""
    assert len(a_logic.prompts()) == 1
    assert (segment_array(a_logic) ^ alone).sum() <= 4  # a file's affine is off by rounding: voxels on the rim


def test_undo_after_loading_stops_at_what_was_loaded(a_scene, a_logic, segment_array, wait, here, there, tmp_path):
    a_logic.addPoint(here, True)
    wait(a_logic)
    before = segment_array(a_logic)
    save_and_load(a_scene, a_logic, tmp_path)
    a_logic.addPoint(there, True)
    wait(a_logic)

    for _ in range(3):
        a_logic.undo()
    wait(a_logic)

    assert np.array_equal(segment_array(a_logic), before)
    assert len(a_logic.prompts()) == 1


def test_markers_follow_the_segmentation_when_ids_change(a_scene, a_logic, wait, here, tmp_path):
    """Imported into a scene whose IDs are taken, nodes get others."""
    a_logic.addPoint(here, True)
    wait(a_logic)
    path = tmp_path / "scene.mrb"
    assert a_scene.scene.WriteToMRB(str(path), None)
    volume = a_logic.volumeNode
    assert a_scene.scene.ReadFromMRB(str(path), False)  # beside what is there
    segmentations = slicer.util.getNodesByClass("vtkMRMLSegmentationNode", a_scene.scene)
    (imported,) = [n for n in segmentations if n is not a_logic.segmentationNode and not n.GetHideFromEditors()]
    a_logic.setSegmentationNode(imported)
    assert len(a_logic.prompts()) == 1
    assert a_logic.volumeNode is volume


def test_overlays_and_outline_are_not_saved(a_scene, a_logic, a_slice_view, wait, here, tmp_path):
    a_logic.addPoint(here, True)
    wait(a_logic)
    a_logic.setExpertShown("tiny_trunk", True)
    wait(a_logic)
    volume, segmentation = save_and_load(a_scene, a_logic, tmp_path)

    assert volume.GetName() == "A volume"
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode", a_scene.scene)) == 1
    assert segmentation.GetSegmentation().GetNumberOfSegments() == 1


# -- transforms ----------------------------------------------------------------------------------------------------


def test_volume_under_a_transform_gets_its_segment_in_the_right_place(
    a_scene, a_logic, a_volume_node, an_engine, segment_array, wait
):
    put_under_transform(a_scene, a_volume_node, turned())
    a_logic.addPoint(world(a_volume_node, 0.5, 0.5, 0.5), True)
    wait(a_logic)

    node = a_logic.segmentationNode
    assert node.GetParentTransformNode() is a_volume_node.GetParentTransformNode()
    mask = an_engine.sessions[-1]._masks()[a_logic.selectedSegment]
    assert mask[tuple(round(0.5 * (n - 1)) for n in mask.shape)]
    assert np.array_equal(segment_array(a_logic), mask)
    marker = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")
    assert np.allclose(marker.GetNthControlPointPositionWorld(0), world(a_volume_node, 0.5, 0.5, 0.5), atol=1e-6)


def test_transform_that_changes_moves_markers_and_asks_nothing(a_scene, a_logic, a_volume_node, an_engine, wait):
    transform = put_under_transform(a_scene, a_volume_node, turned())
    a_logic.addPoint(world(a_volume_node, 0.5, 0.5, 0.5), True)
    wait(a_logic)
    transform.SetMatrixTransformToParent(turned((0, 10, 70), (1, 2, 3)))
    wait(a_logic)

    marker = a_scene.scene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode")
    assert np.allclose(marker.GetNthControlPointPositionWorld(0), world(a_volume_node, 0.5, 0.5, 0.5), atol=1e-6)
    assert an_engine.asked["revise"] == 0
    a_logic.addBox(*box_around(world(a_volume_node, 0.4, 0.4, 0.5)), True)
    wait(a_logic)
    assert a_logic.lastError == ""
    assert an_engine.asked["revise"] == 0
    assert [row.kind for row in a_logic.prompts()] == ["point", "box"]


def test_segmentation_under_another_transform_is_written_in_the_right_place(
    a_scene, a_logic, a_volume_node, an_engine, wait, here
):
    """The user took the volume out of its transform and left the segmentation in it."""
    a_logic.addSegment()
    put_under_transform(a_scene, a_logic.segmentationNode, turned())
    a_logic.addPoint(here, True)
    wait(a_logic)
    assert a_logic.lastError == ""

    image = (
        a_logic.segmentationNode.GetSegmentation()
        .GetSegment(a_logic.selectedSegment)
        .GetRepresentation("Binary labelmap")
    )
    extent = image.GetExtent()
    shape = [extent[5] - extent[4] + 1, extent[3] - extent[2] + 1, extent[1] - extent[0] + 1]
    found = np.argwhere(vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape))[:, ::-1] + extent[::2]
    matrix, parent = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(
        a_logic.segmentationNode.GetParentTransformNode(), None, parent
    )
    points = [parent.MultiplyPoint(matrix.MultiplyPoint((*map(float, ijk), 1.0)))[:3] for ijk in found]
    centroid = np.mean(points, axis=0)
    assert np.linalg.norm(centroid - here) < 2.5


def test_nonlinear_transform_is_refused_with_what_to_do(a_scene, a_logic, a_volume_node, an_engine):
    spline = vtk.vtkThinPlateSplineTransform()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for point in ((0, 0, 0), (10, 0, 0), (0, 10, 0), (0, 0, 10), (5, 5, 5)):
        source.InsertNextPoint(point)
        target.InsertNextPoint(point[0] + point[1] ** 2 / 10, point[1], point[2])
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    transform = a_scene.scene.AddNewNodeByClass("vtkMRMLTransformNode")
    transform.SetAndObserveTransformToParent(spline)
    a_volume_node.SetAndObserveTransformNodeID(transform.GetID())

    with pytest.raises(GeometryError, match="nonlinear"):
        a_logic.addPoint((0, 0, 0), True)
    assert an_engine.sessions == []


# -- segmentations from elsewhere ----------------------------------------------------------------------------------


def test_segmentation_on_another_grid_is_known_and_kept(a_scene, a_logic, a_volume_node, an_engine, wait, here):
    """Twice as fine, and cropped: made by another tool on another reference."""
    from SlicerKA2ERLib.SegmentWriter import orientedImage

    matrix = vtk.vtkMatrix4x4()
    a_volume_node.GetIJKToRASMatrix(matrix)
    fine = slicer.util.arrayFromVTKMatrix(matrix)
    fine[:3, :3] /= 2
    from KA2ERSegment.geometry import Box

    box = Box((8, 10, 6), (20, 26, 14))
    node = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.CreateDefaultDisplayNodes()
    node.AddSegmentFromBinaryLabelmapRepresentation(orientedImage(np.ones(box.shape_kji, bool), box, fine), "theirs")
    theirs = node.GetSegmentation().GetNthSegmentID(0)
    voxels = node.GetSegmentation().GetSegment(theirs).GetRepresentation("Binary labelmap").GetNumberOfPoints()
    a_logic.setSegmentationNode(node)
    a_logic.nextSegment()

    a_logic.addPoint(here, True)
    wait(a_logic)

    assert a_logic.lastError == ""
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is a_volume_node
    expected = box.size / 8
    assert an_engine.sessions[-1]._masks()[theirs].sum() == pytest.approx(expected, rel=0.35)
    after = node.GetSegmentation().GetSegment(theirs).GetRepresentation("Binary labelmap").GetNumberOfPoints()
    assert after == voxels


def test_segmentation_of_surfaces_is_refused_with_what_to_do(a_scene, a_logic, here):
    node = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.CreateDefaultDisplayNodes()
    node.SetSourceRepresentationToClosedSurface()
    sphere = vtk.vtkSphereSource()
    sphere.Update()
    node.AddSegmentFromClosedSurfaceRepresentation(sphere.GetOutput(), "surface")
    a_logic.setSegmentationNode(node)

    with pytest.raises(SessionStateError, match="made of voxels"):
        a_logic.addPoint(here, True)


def test_colour_volume_is_refused_with_what_to_do(a_scene, a_logic, an_oblique_affine):
    node = a_scene.scene.AddNewNodeByClass("vtkMRMLVectorVolumeNode")
    slicer.util.updateVolumeFromArray(node, np.zeros((4, 5, 6, 3), dtype=np.uint8))
    a_logic.setVolumeNode(node)

    with pytest.raises(ValueError, match="one value per voxel"):
        a_logic.addPoint((0, 0, 0), True)
