"""Volume node -> plain arrays, and the way between world coordinates and a volume's own.

The engine works in the volume's local RAS: the volume's parent transform is applied on the way in and out, so that
moving the patient in the scene changes no prompt and no mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import slicer
import vtk
import vtk.util.numpy_support

from KA2ERSegment.errors import GeometryError, VolumeError
from KA2ERSegment.geometry import Box, FloatArray


@dataclass(frozen=True, eq=False)
class VolumeGrid:
    """The geometry of a volume: what prompts need to know of it.

    Args:
        shape_kji: of its array.
        ijk_to_ras: 4x4 affine to the volume's local RAS.
        name: for messages; the volume's own name stays out of them, because messages end in logs.
    """

    shape_kji: tuple[int, int, int]
    ijk_to_ras: FloatArray = field(repr=False)
    name: str = "the volume"

    @cached_property
    def ras_to_ijk(self) -> FloatArray:
        return np.linalg.inv(self.ijk_to_ras)

    @property
    def box(self) -> Box:
        return Box.of_shape(self.shape_kji)


@dataclass(frozen=True, eq=False)
class VolumeData:
    """What the engine gets of a volume node.

    Args:
        key: equal while neither voxels nor geometry of the node change.
        array: (K, J, I), a view of the node's voxels that keeps them alive.
        grid: its geometry.
    """

    key: tuple[Any, ...]
    array: np.ndarray = field(repr=False)
    grid: VolumeGrid


def volumeData(node: Any) -> VolumeData:
    """No copy. Raises VolumeError where the node has no image, or one with several components per voxel."""
    image = node.GetImageData()
    if image is None or image.GetPointData().GetScalars() is None or image.GetNumberOfPoints() == 0:
        message = "the volume must have voxels, it is empty. Choose another volume."
        raise VolumeError(message)
    scalars = image.GetPointData().GetScalars()
    if scalars.GetNumberOfComponents() != 1:
        message = (
            f"the volume must have one value per voxel, it has {scalars.GetNumberOfComponents()}. "
            "Turn a colour image into a scalar volume first (module Vector to Scalar Volume)."
        )
        raise VolumeError(message)
    i, j, k = image.GetDimensions()
    array = vtk.util.numpy_support.vtk_to_numpy(scalars).reshape(k, j, i)
    matrix = ijkToRas(node)
    return VolumeData(volumeKey(node), array, VolumeGrid((k, j, i), matrix))


def volumeKey(node: Any) -> tuple[Any, ...]:
    """Another one as soon as voxels or geometry change; MTimes are never used twice in a process."""
    image = node.GetImageData()
    scalars = image.GetPointData().GetScalars() if image else None
    times = (image.GetMTime(), scalars.GetMTime()) if scalars else (0, 0)
    return (node.GetID(), *times, ijkToRas(node).tobytes())


def ijkToRas(node: Any) -> FloatArray:
    """4x4, voxel index to the volume's local RAS."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return toNumpy(matrix)


def matrixBetween(source: Any, target: Any) -> FloatArray:
    """4x4 from the local RAS of one node to that of another; None stands for the world.

    Raises:
        GeometryError: the transform between them is not linear.
    """
    matrix = vtk.vtkMatrix4x4()
    fromNode = source.GetParentTransformNode() if source is not None else None
    toNode = target.GetParentTransformNode() if target is not None else None
    if not slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(fromNode, toNode, matrix):
        message = (
            "the volume must be under linear transforms only; it is under a nonlinear one. "
            "Harden that transform (module Transforms), or take the volume out of it."
        )
        raise GeometryError(message)
    return toNumpy(matrix)


def toNumpy(matrix: Any) -> FloatArray:
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def toVtk(matrix: FloatArray) -> Any:
    result = vtk.vtkMatrix4x4()
    result.DeepCopy(np.asarray(matrix, dtype=float).ravel().tolist())
    return result
