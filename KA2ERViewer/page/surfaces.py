"""Surfaces of segments in the 3D view.

Slicer's own closed surfaces are a representation of the segmentation, which slows down every write of a mask by what
it takes to make them again. Here they are models beside it, made anew once a prediction is through.
"""

from __future__ import annotations

from typing import Any

import vtk
import vtk.util.numpy_support

from KA2ERSegment.geometry import Box
from SlicerKA2ERLib.SegmentWriter import LABELMAP, segmentIds

MANY = 1_000_000
"""Voxels around a segment from which on every second one is enough for a picture, along each axis that is not `FEW`."""
FEW = 16
"""Voxels along an axis of which none is left out: a lesion in one slice would be gone."""
SMOOTHING = 12
GROWN = 1.4
"""So many times larger than the camera was set for: it is set again."""


class Surfaces:
    """One model per segment, in no file.

    Args:
        scene: the MRML scene.
    """

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        self._models: dict[str, Any] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self._size_seen = 0.0
        self.outdated = False

    def clear(self) -> None:
        """Show none."""
        for node in self._models.values():
            self._scene.RemoveNode(node)
        self._models.clear()
        self._seen.clear()
        self._size_seen = 0.0
        self.outdated = False

    def update(self, segmentation: Any) -> bool:
        """Make those anew whose voxels changed. Whether what is shown is much larger than when it last was."""
        self.outdated = False
        present = segmentIds(segmentation) if segmentation is not None else []
        for gone in [segment for segment in self._models if segment not in present]:
            self._scene.RemoveNode(self._models.pop(gone))
            self._seen.pop(gone, None)
        for segment in present:
            self._show(segmentation, segment)
        size = self._size()
        grown = size > GROWN * self._size_seen
        if grown or not size:
            self._size_seen = size
        return grown

    def _size(self) -> float:
        """Diagonal around all surfaces, mm."""
        box = vtk.vtkBoundingBox()
        for node in self._models.values():
            if node.GetPolyData() is not None and node.GetPolyData().GetNumberOfPoints():
                box.AddBounds(node.GetPolyData().GetBounds())
        return float(box.GetDiagonalLength()) if box.IsValid() else 0.0

    def _show(self, segmentation: Any, segment_id: str) -> None:
        segment = segmentation.GetSegmentation().GetSegment(segment_id)
        image = segment.GetRepresentation(LABELMAP)
        model = self._models.get(segment_id) or self._new_model(segment_id)
        display = model.GetDisplayNode()
        display.SetColor(*segment.GetColor())
        display.SetVisibility(bool(segmentation.GetDisplayNode().GetSegmentVisibility(segment_id)))
        scalars = image.GetPointData().GetScalars() if image is not None else None
        seen: tuple[int, ...] = ()
        if scalars is not None and image.GetNumberOfPoints() > 0:
            seen = (segment.GetLabelValue(), image.GetMTime(), scalars.GetMTime())
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
    i0, i1, j0, j1, k0, k1 = image.GetExtent()
    values = vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())
    values = values.reshape(k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1)
    box = Box.around(values == label)
    if box is None:
        return vtk.vtkPolyData()
    # Segments share labelmaps: most of this one may be another's. vtkImageClip would copy voxel by voxel.
    own = vtk.util.numpy_support.numpy_to_vtk(box.crop(values).ravel(), deep=True)
    corners = zip(box.start, box.stop, (i0, j0, k0), strict=True)
    plain, matrix = vtk.vtkImageData(), vtk.vtkMatrix4x4()
    plain.SetExtent([n for start, stop, first in corners for n in (first + start, first + stop - 1)])
    plain.GetPointData().SetScalars(own)
    image.GetImageToWorldMatrix(matrix)

    shrink = vtk.vtkImageShrink3D()
    shrink.SetInputData(plain)
    shrink.SetShrinkFactors([2 if box.size > MANY and size > FEW else 1 for size in box.shape_kji[::-1]])
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
    edges.Update()
    if not edges.GetOutput().GetNumberOfPoints():
        return edges.GetOutput()
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
