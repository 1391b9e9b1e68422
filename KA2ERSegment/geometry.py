"""Affines and half-open boxes: pure functions on coordinates, no images.

Names state axes. `ijk` is a voxel index (I fastest), `kji` the order of a numpy array's axes, `ras` patient
space in mm (right, anterior, superior positive). A voxel's integer index is its centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import GeometryError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Ijk = tuple[int, int, int]
Ras = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open box of voxels `[start, stop)`, both in IJK order. It may lie partly outside any volume."""

    start: Ijk
    stop: Ijk

    @classmethod
    def of_shape(cls, shape_kji: tuple[int, ...]) -> Box:
        """The box that covers a whole array of shape (K, J, I)."""
        if len(shape_kji) != 3:
            message = f"an array must have three axes (K, J, I), got shape {tuple(shape_kji)}."
            raise GeometryError(message)
        k, j, i = shape_kji
        return cls((0, 0, 0), (i, j, k))

    @classmethod
    def around(cls, mask_kji: BoolArray) -> Box | None:
        """Smallest box around the true voxels of a (K, J, I) mask, or None where there are none."""
        if not mask_kji.any():
            return None
        start, stop = [], []
        for axis in (2, 1, 0):
            hits = np.flatnonzero(mask_kji.any(axis=tuple(a for a in range(3) if a != axis)))
            start.append(int(hits[0]))
            stop.append(int(hits[-1]) + 1)
        return cls((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    @property
    def shape_kji(self) -> tuple[int, int, int]:
        """Shape of the array that this box cuts out; zero where the box is empty."""
        i, j, k = (max(0, stop - start) for start, stop in zip(self.start, self.stop, strict=True))
        return k, j, i

    @property
    def size(self) -> int:
        """Number of voxels."""
        k, j, i = self.shape_kji
        return k * j * i

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of a (K, J, I) array that cuts this box out. The box must lie inside the array."""
        (i0, j0, k0), (i1, j1, k1) = self.start, self.stop
        return slice(k0, k1), slice(j0, j1), slice(i0, i1)

    def contains(self, ijk: Ijk) -> bool:
        """Whether the voxel lies inside."""
        return all(a <= x < b for a, x, b in zip(self.start, ijk, self.stop, strict=True))

    def dilate(self, voxels: int) -> Box:
        """Grown by `voxels` on all six faces (shrunk where negative)."""
        i0, j0, k0 = (a - voxels for a in self.start)
        i1, j1, k1 = (b + voxels for b in self.stop)
        return Box((i0, j0, k0), (i1, j1, k1))

    def intersect(self, other: Box) -> Box:
        """Common part; of size 0 where there is none."""
        i0, j0, k0 = (max(a, b) for a, b in zip(self.start, other.start, strict=True))
        i1, j1, k1 = (min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box((i0, j0, k0), (max(i0, i1), max(j0, j1), max(k0, k1)))

    def union(self, other: Box) -> Box:
        """Smallest box around both; an empty box adds nothing."""
        if self.size == 0:
            return other
        if other.size == 0:
            return self
        i0, j0, k0 = (min(a, b) for a, b in zip(self.start, other.start, strict=True))
        i1, j1, k1 = (max(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box((i0, j0, k0), (i1, j1, k1))

    def shift(self, ijk: Ijk) -> Box:
        """Moved by a whole number of voxels."""
        i0, j0, k0 = (a + d for a, d in zip(self.start, ijk, strict=True))
        i1, j1, k1 = (b + d for b, d in zip(self.stop, ijk, strict=True))
        return Box((i0, j0, k0), (i1, j1, k1))

    def within(self, other: Box) -> Box:
        """This box in the voxel index of an array that was cut out of `other`: what indexes the crop."""
        i, j, k = other.start
        return self.shift((-i, -j, -k))

    def crop(self, array_kji: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View of the part of a (K, J, I) array inside this box; the box must lie inside the array."""
        if self.intersect(Box.of_shape(array_kji.shape)) != self:
            message = f"{self} must lie inside an array of shape KJI {array_kji.shape}. Intersect it first."
            raise GeometryError(message)
        return array_kji[self.slices]

    def paste(self, patch_kji: npt.NDArray[Any], into_kji: npt.NDArray[Any]) -> None:
        """Write `patch_kji`, of this box's shape, into an array in place."""
        if patch_kji.shape != self.shape_kji:
            message = f"patch of shape KJI {patch_kji.shape} does not fill {self} of shape KJI {self.shape_kji}."
            raise GeometryError(message)
        self.crop(into_kji)[...] = patch_kji


def check_affine(ijk_to_ras: npt.ArrayLike) -> FloatArray:
    """Validated copy of a 4x4 affine (IJK to RAS mm, float64).

    Left-handed and oblique affines are fine. Raises GeometryError where the matrix is not 4x4, not finite,
    singular (a zero spacing is), or where its last row is not (0, 0, 0, 1).
    """
    try:
        matrix = np.array(ijk_to_ras, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"ijk_to_ras must be a 4x4 matrix of numbers, got {ijk_to_ras!r}."
        raise GeometryError(message) from error
    if matrix.shape != (4, 4):
        message = f"ijk_to_ras must be a 4x4 matrix, got shape {matrix.shape}."
        raise GeometryError(message)
    if not np.isfinite(matrix).all():
        message = f"ijk_to_ras must be finite, got {matrix.tolist()}. Repair the image's header."
        raise GeometryError(message)
    if not np.allclose(matrix[3], (0, 0, 0, 1)):
        message = f"the last row of ijk_to_ras must be (0, 0, 0, 1), got {matrix[3].tolist()}."
        raise GeometryError(message)
    matrix[3] = (0, 0, 0, 1)  # rounding must not travel into inverses
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    if (spacing < 1e-6).any():
        message = f"spacing must be above zero, got {spacing.tolist()} mm (IJK). Repair the image's header."
        raise GeometryError(message)
    if abs(np.linalg.det(matrix[:3, :3] / spacing)) < 1e-4:
        message = f"ijk_to_ras must be invertible, got {matrix.tolist()}: two of its axes are parallel."
        raise GeometryError(message)
    matrix.setflags(write=False)
    return matrix


def apply_affine(matrix: FloatArray, points: npt.ArrayLike) -> FloatArray:
    """Points (..., 3) through a 4x4 affine."""
    return np.asarray(points, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def ras_axes(ijk_to_ras: FloatArray) -> tuple[Ijk, Ijk]:
    """Which voxel axis lies closest to R, A and S, and its sign (+1 or -1).

    Returns:
        axes: `axes[r]` is the IJK axis (0..2) closest to RAS axis r; a permutation.
        signs: +1 where that voxel axis runs towards +r, else -1.
    """
    direction = ijk_to_ras[:3, :3] / np.linalg.norm(ijk_to_ras[:3, :3], axis=0)
    orders = [(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b]
    axes = max(orders, key=lambda order: sum(abs(direction[r, order[r]]) for r in range(3)))
    signs = [1 if direction[r, axes[r]] >= 0 else -1 for r in range(3)]
    return axes, (signs[0], signs[1], signs[2])
