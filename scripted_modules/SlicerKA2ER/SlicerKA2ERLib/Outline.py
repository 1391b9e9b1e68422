"""What a prompt changed, outlined in the slice views for a moment: far-away changes do not go unnoticed.

A surface around the changed voxels, which slice views draw as a line. Not a segmentation: Slicer's subject hierarchy
writes an error for every event of a segmentation node that it does not list.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import vtk

from KA2ERSegment.geometry import BoolArray, Box
from SlicerKA2ERLib.SegmentWriter import gridInSegmentation, orientedImage
from SlicerKA2ERLib.VolumeIO import VolumeData, toVtk

SECONDS = 1.5
COLOR = (1.0, 0.95, 0.3)
MOST_VOXELS = 1_000_000
"""Of the crop that is outlined; a larger one is thinned out, so that Slicer never waits for an outline."""


class Outline:
    """One at a time, in a node that is neither listed nor saved.

    Args:
        scene: the MRML scene.
    """

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        self._node: Any = None
        self._until = 0.0
        self.enabled = True

    @property
    def isShown(self) -> bool:
        return self._node is not None

    def show(self, segmentation: Any, volumeNode: Any, data: VolumeData, box: Box, changed: BoolArray) -> None:
        """Outline voxels of a box of the volume."""
        tight = Box.around(changed)
        self.clear()
        if tight is None or not self.enabled:
            return
        node = self._scene.CreateNodeByClass("vtkMRMLModelNode")
        node.UnRegister(None)
        node.SetName("KA2ER what changed")
        node.SetHideFromEditors(True)
        node.SetSaveWithScene(False)
        node.SetAndObservePolyData(_surface(tight, changed, box, gridInSegmentation(segmentation, volumeNode, data)))
        self._scene.AddNode(node)
        parent = segmentation.GetParentTransformNode()
        node.SetAndObserveTransformNodeID(parent.GetID() if parent else None)
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetColor(COLOR)
        display.SetVisibility2D(True)
        display.SetVisibility3D(False)
        display.SetSliceIntersectionThickness(3)
        self._node, self._until = node, time.monotonic() + SECONDS

    def poll(self) -> None:
        """Take it away when its time is over."""
        if self._node is not None and time.monotonic() > self._until:
            self.clear()

    def clear(self) -> None:
        node, self._node = self._node, None
        if node is not None and node.GetScene() is self._scene:
            if node.GetDisplayNode() is not None:
                self._scene.RemoveNode(node.GetDisplayNode())
            self._scene.RemoveNode(node)


def _surface(tight: Box, changed: BoolArray, box: Box, grid: Any) -> Any:
    """Surface around the true voxels, in the segmentation's local RAS.

    Args:
        tight: around the true voxels of `changed`.
        changed: (K, J, I) of `box`.
        box: in voxels of the volume.
        grid: 4x4 from voxels to local RAS.
    """
    stride = 1
    while tight.size / stride**3 > MOST_VOXELS:
        stride += 1
    thin = tight.crop(changed)[::stride, ::stride, ::stride]
    padded = np.pad(thin, 1)  # the surface closes where the crop ends
    offset = np.add(tight.start, box.start) - stride
    image = orientedImage(padded, Box.of_shape(padded.shape), np.eye(4))
    contour = vtk.vtkFlyingEdges3D()
    contour.SetInputData(image)
    contour.SetValue(0, 0.5)
    contour.ComputeNormalsOff()
    contour.ComputeScalarsOff()
    toVoxels = np.diag([stride, stride, stride, 1.0])
    toVoxels[:3, 3] = offset
    transform = vtk.vtkTransform()
    transform.SetMatrix(toVtk(grid @ toVoxels))
    placed = vtk.vtkTransformPolyDataFilter()
    placed.SetTransform(transform)
    placed.SetInputConnection(contour.GetOutputPort())
    placed.Update()
    return placed.GetOutput()
