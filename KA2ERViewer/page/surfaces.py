"""Surfaces of segments in the 3D view.

Slicer's own closed surfaces are a representation of the segmentation, which slows down every write of a mask by what
it takes to make them again. Here they are models beside it, made anew once a prediction is through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import vtk
import vtk.util.numpy_support

from KA2ERSegment.geometry import Box
from SlicerKA2ERLib.SegmentWriter import LABELMAP, segmentIds

MANY = 1_000_000
"""Voxels around a segment from which on means of two are enough for a picture, along each axis with more than `FEW`."""
FEW = 16
"""Voxels along an axis that are all kept."""
THIN = 0.3
"""Part of the voxels that a sample stands for which makes it inside: a sheet of one voxel is a half."""
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
    inside = values == label
    box = Box.around(inside)
    if box is None:
        return vtk.vtkPolyData()
    # Segments share labelmaps: most of this one may be another's.
    own = box.crop(inside).astype(np.float32)
    steps = [2 if box.size > MANY and size > FEW else 1 for size in box.shape_kji]
    own = np.pad(mean_of(own, steps), 1)  # the surface closes where the labelmap ends
    plain, matrix = vtk.vtkImageData(), vtk.vtkMatrix4x4()
    plain.SetDimensions(own.shape[::-1])
    plain.SetSpacing(steps[::-1])
    places = zip(box.start, (i0, j0, k0), steps[::-1], strict=True)
    plain.SetOrigin([first + start + (step - 1) / 2 - step for start, first, step in places])
    plain.GetPointData().SetScalars(vtk.util.numpy_support.numpy_to_vtk(own.ravel()))
    image.GetImageToWorldMatrix(matrix)

    edges = vtk.vtkFlyingEdges3D()
    edges.SetInputData(plain)
    edges.SetValue(0, 0.5 if max(steps) == 1 else THIN)
    edges.ComputeNormalsOff()
    edges.ComputeGradientsOff()
    edges.ComputeScalarsOff()
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


def mean_of(mask: npt.NDArray[np.float32], steps: Sequence[int]) -> npt.NDArray[np.float32]:
    """Mean over blocks of so many voxels along each axis; what is beyond the end counts as 0."""
    ends = [(0, -size % step) for size, step in zip(mask.shape, steps, strict=True)]
    mask = np.pad(mask, ends)
    for axis, step in enumerate(steps):
        parts = [mask[(slice(None),) * axis + (slice(first, None, step),)] for first in range(step)]
        mask = sum(parts[1:], parts[0]) / np.float32(step) if step > 1 else mask
    return mask
