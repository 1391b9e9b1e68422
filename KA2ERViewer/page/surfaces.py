"""Surfaces of segments in the 3D view.

Slicer's own closed surfaces are a representation of the segmentation, which slows down every write of a mask by what
it takes to make them again. Here they are models beside it, made anew once a prediction is through.
"""

from __future__ import annotations

from typing import Any

import vtk

from SlicerKA2ERLib.SegmentWriter import LABELMAP, segmentIds

MANY = 3_000_000
"""Voxels around a segment from which on every second one along each axis is enough for a picture."""
SMOOTHING = 12


class Surfaces:
    """One model per segment, in no file.

    Args:
        scene: the MRML scene.
    """

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        self._models: dict[str, Any] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self.outdated = False

    def clear(self) -> None:
        """Show none."""
        for node in self._models.values():
            self._scene.RemoveNode(node)
        self._models.clear()
        self._seen.clear()
        self.outdated = False

    def update(self, segmentation: Any) -> bool:
        """Make those anew whose voxels changed. Whether there is one now, and was none before."""
        self.outdated, none_before = False, self._is_empty()
        present = segmentIds(segmentation) if segmentation is not None else []
        for gone in [segment for segment in self._models if segment not in present]:
            self._scene.RemoveNode(self._models.pop(gone))
            self._seen.pop(gone, None)
        for segment in present:
            self._show(segmentation, segment)
        return none_before and not self._is_empty()

    def _is_empty(self) -> bool:
        return not any(node.GetPolyData() and node.GetPolyData().GetNumberOfPoints() for node in self._models.values())

    def _show(self, segmentation: Any, segment_id: str) -> None:
        segment = segmentation.GetSegmentation().GetSegment(segment_id)
        image = segment.GetRepresentation(LABELMAP)
        model = self._models.get(segment_id) or self._new_model(segment_id)
        display = model.GetDisplayNode()
        display.SetColor(*segment.GetColor())
        display.SetVisibility(bool(segmentation.GetDisplayNode().GetSegmentVisibility(segment_id)))
        scalars = image.GetPointData().GetScalars() if image is not None else None
        seen = (segment.GetLabelValue(), image.GetMTime(), scalars.GetMTime()) if scalars is not None else ()
        if self._seen.get(segment_id) != seen:
            self._seen[segment_id] = seen
            model.SetAndObservePolyData(surface_of(image, segment.GetLabelValue()) if seen else vtk.vtkPolyData())
            model.SetAndObserveTransformNodeID(segmentation.GetTransformNodeID())

    def _new_model(self, segment_id: str) -> Any:
        node = self._scene.CreateNodeByClass("vtkMRMLModelNode")
        node.UnRegister(None)
        node.SetName("Surface")
        node.SetHideFromEditors(True)
        node.SetSaveWithScene(False)
        self._scene.AddNode(node)
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetVisibility2D(False)
        display.SetAmbient(0.15)
        display.SetSpecular(0.25)
        self._models[segment_id] = node
        return node


def surface_of(image: Any, label: int) -> Any:
    """Smooth surface around the voxels of one label, in the segmentation's local RAS.

    Args:
        image: vtkOrientedImageData of a binary labelmap.
    """
    plain, matrix = vtk.vtkImageData(), vtk.vtkMatrix4x4()
    plain.ShallowCopy(image)
    plain.SetOrigin(0, 0, 0)
    plain.SetSpacing(1, 1, 1)
    plain.SetDirectionMatrix(vtk.vtkMatrix3x3())
    image.GetImageToWorldMatrix(matrix)

    step = 2 if image.GetNumberOfPoints() > MANY else 1
    shrink = vtk.vtkImageShrink3D()
    shrink.SetInputData(plain)
    shrink.SetShrinkFactors(step, step, step)
    shrink.MeanOff()
    pad = vtk.vtkImageConstantPad()  # the surface closes where the labelmap ends
    pad.SetInputConnection(shrink.GetOutputPort())
    shrink.Update()
    a, b, c, d, e, f = shrink.GetOutput().GetExtent()
    pad.SetOutputWholeExtent(a - 1, b + 1, c - 1, d + 1, e - 1, f + 1)
    edges = vtk.vtkDiscreteFlyingEdges3D()
    edges.SetInputConnection(pad.GetOutputPort())
    edges.SetValue(0, label)
    edges.ComputeNormalsOff()
    smooth = vtk.vtkWindowedSincPolyDataFilter()
    smooth.SetInputConnection(edges.GetOutputPort())
    smooth.SetNumberOfIterations(SMOOTHING)
    smooth.SetPassBand(0.05)
    smooth.NormalizeCoordinatesOn()
    transform = vtk.vtkTransform()
    transform.SetMatrix(matrix)
    place = vtk.vtkTransformPolyDataFilter()
    place.SetInputConnection(smooth.GetOutputPort())
    place.SetTransform(transform)
    normals = vtk.vtkPolyDataNormals()
    normals.SetInputConnection(place.GetOutputPort())
    normals.SplittingOff()
    normals.ConsistencyOff()
    normals.AutoOrientNormalsOn()
    normals.Update()
    return normals.GetOutput()
