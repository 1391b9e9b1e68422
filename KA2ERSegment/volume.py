"""`Volume`: the only image type in the library."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import Box, FloatArray, Ijk, check_affine, ras_axes
from KA2ERSegment.image_files import read_image


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A 3D image in patient space.

    Args:
        array_kji: (K, J, I) real numbers, any dtype, not copied. Finite, and not one value throughout.
        ijk_to_ras: 4x4 affine from voxel index (I, J, K) to RAS mm. Oblique and left-handed ones are fine.
        name: free text for messages and pictures; it is never logged and never saved with prompts.

    Raises:
        VolumeError: not a 3D array of real numbers, NaN or infinite voxels, a constant image.
        GeometryError: an affine that cannot be used.
    """

    array_kji: npt.NDArray[Any] = field(repr=False)
    ijk_to_ras: FloatArray = field(repr=False)
    name: str = "volume"

    def __post_init__(self) -> None:
        array = np.asarray(self.array_kji)
        object.__setattr__(self, "array_kji", _check_array(array, self.name))
        object.__setattr__(self, "ijk_to_ras", check_affine(self.ijk_to_ras))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Volume:
        """Read NIfTI (by nibabel), NRRD, MHA or a folder with one DICOM series (by SimpleITK).

        Raises:
            VolumeError: missing, truncated, 2D, 4D or colour files, a folder with two series or missing slices.
        """
        array_kji, ijk_to_ras, name = read_image(path)
        return cls(array_kji, ijk_to_ras, name)

    @property
    def shape_kji(self) -> tuple[int, int, int]:
        """Shape of the array, (K, J, I)."""
        k, j, i = self.array_kji.shape
        return k, j, i

    @property
    def shape_ijk(self) -> Ijk:
        """Number of voxels along I, J and K."""
        k, j, i = self.shape_kji
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Spacing in mm along I, J and K."""
        i, j, k = np.linalg.norm(self.ijk_to_ras[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def box(self) -> Box:
        """The box of all voxels."""
        return Box.of_shape(self.shape_kji)

    @property
    def ras_to_ijk(self) -> FloatArray:
        """4x4 affine from RAS mm to continuous voxel index (I, J, K)."""
        return np.asarray(np.linalg.inv(self.ijk_to_ras), dtype=np.float64)

    def canonical(self) -> Volume:
        """The same image with voxel axes closest to R, A and S, all running positive. A view: nothing is copied."""
        axes, signs = ras_axes(self.ijk_to_ras)
        matrix = self.ijk_to_ras.copy()
        matrix[:3, :3] = self.ijk_to_ras[:3, axes] * signs
        for axis, sign in zip(axes, signs, strict=True):
            if sign < 0:
                matrix[:3, 3] += self.ijk_to_ras[:3, axis] * (self.shape_ijk[axis] - 1)
        view = object.__new__(Volume)  # checked already: no second pass over the voxels
        object.__setattr__(view, "array_kji", self.to_canonical(self.array_kji))
        object.__setattr__(view, "ijk_to_ras", check_affine(matrix))
        object.__setattr__(view, "name", self.name)
        return view

    def to_canonical(self, array_kji: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View of an array on this volume's grid with the axes of `canonical()`; writing to it writes through."""
        axes, signs = ras_axes(self.ijk_to_ras)
        flip = tuple(slice(None, None, signs[r]) for r in (2, 1, 0))
        return array_kji.transpose([2 - axes[r] for r in (2, 1, 0)])[flip]

    def from_canonical_box(self, box: Box) -> Box:
        """The box on this volume's grid of a box on the grid of `canonical()`."""
        axes, signs = ras_axes(self.ijk_to_ras)
        start, stop = [0, 0, 0], [0, 0, 0]
        for r, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
            a, b, size = box.start[r], box.stop[r], self.shape_ijk[axis]
            start[axis], stop[axis] = (a, b) if sign > 0 else (size - b, size - a)
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def same_grid(self, shape_kji: tuple[int, ...], ijk_to_ras: FloatArray) -> bool:
        """Whether an array of that shape and affine lies on this volume's grid, to a hundredth of a voxel."""
        if tuple(shape_kji) != self.shape_kji:
            return False
        corners = np.array([(i, j, k, 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
        corners[:, :3] *= np.array(self.shape_ijk) - 1
        apart = np.linalg.norm((corners @ (np.asarray(ijk_to_ras) - self.ijk_to_ras).T)[:, :3], axis=1)
        return bool(apart.max() < 0.01 * min(self.spacing))


def _check_array(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    if array.ndim != 3 or 0 in array.shape:
        message = (
            f"volume {name!r} must be a 3D array (K, J, I), got shape {array.shape}. "
            "Choose one frame or channel of a 4D image; stack 2D images first."
        )
        raise VolumeError(message)
    if array.dtype == np.bool_ or not (
        np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    ):
        message = f"volume {name!r} must hold real numbers, got dtype {array.dtype}."
        raise VolumeError(message)
    lowest, highest = array.min(), array.max()  # NaN and infinity show in these two
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        message = f"volume {name!r} has NaN or infinite voxels. Replace them first, e.g. with numpy.nan_to_num."
        raise VolumeError(message)
    if lowest == highest:
        message = f"volume {name!r} has the value {lowest} in every voxel: there is nothing to segment."
        raise VolumeError(message)
    return array
