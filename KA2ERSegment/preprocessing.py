"""From a volume to the patch that the network sees, and back.

All of it works on the canonical view of a volume (`Volume.canonical`): voxel axes closest to R, A and S, so a
patch is an axis-aligned grid in voxel index, and only its step differs from axis to axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from KA2ERSegment.geometry import BoolArray, Box, FloatArray, Ijk

Float3 = tuple[float, float, float]

MAX_STEP_RATIO = 4.0
"""Largest ratio between a patch's steps in mm: beyond it, shapes are stretched past what training shows."""
MIN_STEP = 0.25
"""Smallest step of a patch in voxels: finer sampling only interpolates."""


@dataclass(frozen=True, slots=True)
class Patch:
    """A cubic grid of `size`^3 samples in a canonical volume; sample p of axis a lies at `origin[a] + step[a] * p`.

    Args:
        origin: continuous voxel index (I, J, K) of the first sample.
        step: voxels between neighbouring samples (I, J, K), above zero.
        size: samples along each axis.
    """

    origin: Float3
    step: Float3
    size: int

    @classmethod
    def fit(cls, start: npt.ArrayLike, stop: npt.ArrayLike, spacing: npt.ArrayLike, size: int, margin: float) -> Patch:
        """The patch for an object between two corners, with a margin on each side.

        Args:
            start: corner in continuous voxel index (I, J, K), at a voxel's outer face.
            stop: opposite corner.
            spacing: of the volume, mm (I, J, K).
            size: samples along each axis.
            margin: of each side, as a share of the object's extent (and never under two voxels).
        """
        spacing = np.asarray(spacing, dtype=float)
        start, stop = np.asarray(start, dtype=float), np.asarray(stop, dtype=float)
        centre = (start + stop) / 2
        extent = stop - start
        wanted = np.maximum(extent * (1 + 2 * margin), extent + 4.0) * spacing  # mm
        wanted = np.maximum(wanted, wanted.max() / MAX_STEP_RATIO)
        step = np.maximum(wanted / spacing / size, MIN_STEP)
        origin = centre - step * (size - 1) / 2 - 0.5  # outer faces lie half a voxel off the centres
        i, j, k = (float(x) for x in origin)
        di, dj, dk = (float(x) for x in step)
        return cls((i, j, k), (di, dj, dk), size)

    @classmethod
    def cube(cls, centre: npt.ArrayLike, extent_mm: float, spacing: npt.ArrayLike, size: int) -> Patch:
        """The patch of one extent (mm) along all axes around a voxel index (I, J, K)."""
        half = extent_mm / np.asarray(spacing, dtype=float) / 2
        middle = np.asarray(centre, dtype=float) + 0.5
        return cls.fit(middle - half, middle + half, spacing, size, margin=0.0)

    @property
    def faces(self) -> tuple[FloatArray, FloatArray]:
        """Outer corners in continuous voxel index, faces (not centres): `stop - start` is the extent in voxels."""
        origin, step = np.asarray(self.origin), np.asarray(self.step)
        return origin - step / 2 + 0.5, origin + step * (self.size - 0.5) + 0.5

    def box(self, shape_kji: tuple[int, int, int]) -> Box:
        """Voxels of a volume of that shape whose centres lie inside the patch; may be empty."""
        start, stop = self.faces
        (i0, j0, k0), (i1, j1, k1) = np.ceil(start - 0.5).astype(int), np.ceil(stop - 0.5).astype(int)
        return Box((int(i0), int(j0), int(k0)), (int(i1), int(j1), int(k1))).intersect(Box.of_shape(shape_kji))

    def to_patch(self, ijk: npt.ArrayLike) -> FloatArray:
        """Continuous sample index (I, J, K) of points (..., 3) in voxel index (I, J, K)."""
        sample: FloatArray = (np.asarray(ijk, dtype=float) - np.asarray(self.origin)) / np.asarray(self.step)
        return sample

    @property
    def to_ijk(self) -> FloatArray:
        """4x4 from sample index (I, J, K) to continuous voxel index."""
        matrix = np.diag([*self.step, 1.0])
        matrix[:3, 3] = self.origin
        return matrix

    def read_by(self, shape_kji: tuple[int, int, int]) -> BoolArray:
        """(S, S, S) bool, KJI: samples less than a step off a volume of that shape, all that `upsample` reads there."""
        near = []
        for axis in range(3):
            origin, step = self.origin[2 - axis], self.step[2 - axis]
            at, reach = origin + step * np.arange(self.size), max(step, 0.5)  # a voxel is half of one wide to each side
            near.append((at > -reach) & (at < shape_kji[axis] - 1 + reach))
        read: BoolArray = near[0][:, None, None] & near[1][:, None] & near[2]
        return read

    def contains(self, ijk: npt.ArrayLike, inset: float = 0.0) -> bool:
        """Whether a voxel lies inside, at least `inset` of the patch's extent away from its faces."""
        sample = self.to_patch(ijk)
        border = inset * self.size - 0.5
        return bool((sample >= border).all() and (sample <= self.size - 1 - border).all())


def sample_image(array_kji: npt.NDArray[Any], patch: Patch) -> tuple[Tensor, Tensor]:
    """Image values on a patch: linear where the patch is finer than the volume, a tent filter where coarser.

    Large steps read only every n-th voxel, so the cost is bounded by the patch and not by the volume.

    Args:
        array_kji: (K, J, I) image of a canonical volume.
        patch: where to sample.

    Returns:
        image: (S, S, S) float32, KJI; outside the volume the nearest voxel's value.
        inside: (S, S, S) bool, whether the sample lies in the volume.
    """
    crops, weights, inside = [], [], []
    for axis in range(3):  # KJI
        origin, step = patch.origin[2 - axis], patch.step[2 - axis]
        crop, weight, valid = _axis_weights(origin, step, patch.size, array_kji.shape[axis])
        crops.append(crop)
        weights.append(torch.from_numpy(weight))
        inside.append(torch.from_numpy(valid))
    values = torch.from_numpy(np.array(array_kji[tuple(crops)], dtype=np.float32, order="C"))
    values = torch.einsum("kc,abc->kab", weights[2], values)  # I: the axis with contiguous memory first
    values = torch.einsum("jb,kab->kja", weights[1], values)
    values = torch.einsum("ia,kja->ijk", weights[0], values)
    return values, inside[0][:, None, None] & inside[1][:, None] & inside[2]


def sample_nearest(array_kji: npt.NDArray[Any], patch: Patch, outside: float = 0) -> npt.NDArray[Any]:
    """Values of the nearest voxel on a patch, (S, S, S) of the array's dtype; `outside` beyond the volume."""
    indices, inside = [], []
    for axis in range(3):
        at = patch.origin[2 - axis] + patch.step[2 - axis] * np.arange(patch.size)
        nearest = np.floor(at + 0.5).astype(int)
        inside.append((nearest >= 0) & (nearest < array_kji.shape[axis]))
        indices.append(nearest.clip(0, array_kji.shape[axis] - 1))
    values = array_kji[np.ix_(*indices)]
    values[~(inside[0][:, None, None] & inside[1][:, None] & inside[2])] = outside
    return values


def upsample(logits: npt.NDArray[np.float32], patch: Patch, box: Box) -> npt.NDArray[np.float32]:
    """Patch values on the voxels of a box, linear between samples; the nearest sample's value beyond the patch.

    Args:
        logits: (S, S, S) float32, KJI.
        patch: where the samples lie.
        box: of voxels in the canonical volume.

    Returns:
        (K, J, I) float32 of the box's shape.
    """
    values = torch.from_numpy(np.ascontiguousarray(logits, dtype=np.float32))
    for axis in range(3):
        a, b = box.start[2 - axis], box.stop[2 - axis]
        at = (np.arange(a, b) - patch.origin[2 - axis]) / patch.step[2 - axis]
        values = _linear_along(axis, values, at)
    return values.numpy()


def _linear_along(axis: int, values: Tensor, at: npt.NDArray[np.floating[Any]]) -> Tensor:
    """Values between the samples along one axis of (K, J, I), linear; the outermost ones' beyond."""
    size = values.shape[axis]
    at = at.clip(0, size - 1)
    if axis == 2:  # neighbours in memory: a product with a matrix that is mostly zero is quicker than picking them out
        distance = np.abs(np.arange(size)[None] - at[:, None])
        return values @ torch.from_numpy(np.maximum(0.0, 1.0 - distance).astype(np.float32)).T
    below = torch.from_numpy(at.astype(np.int64))
    share = torch.from_numpy((at % 1).astype(np.float32)).reshape(-1, *[1] * (2 - axis))
    above = values.index_select(axis, (below + 1).clamp_max(size - 1))
    return values.index_select(axis, below).lerp_(above, share)


def normalise(image: Tensor, inside: Tensor) -> Tensor:
    """The two channels of a patch that the network sees, independent of unit and modality.

    Channel 0 is the z-score after clipping to the 0.5 and 99.5 percentiles (as nnU-Net normalises CT, here from
    the patch alone); channel 1 is the grey value's rank in 0..1 minus one half, which keeps soft tissue apart
    beside air and bone. Both are 0 outside the volume.

    Args:
        image: (B, S, S, S) float32.
        inside: (B, S, S, S) bool.

    Returns:
        (B, 2, S, S, S) float32.
    """
    channels = []
    for values, valid in zip(image, inside, strict=True):
        known = values[valid][::3] if bool(valid.any()) else values.flatten()
        levels = torch.quantile(known, torch.linspace(0.005, 0.995, 128, device=values.device))
        low, high = levels[0], levels[-1]
        clipped = values.clamp(low, high)
        known = known.clamp(low, high)
        if bool(low < high):
            zscore = (clipped - known.mean()) / known.std().clamp_min(1e-6)
        else:  # one grey value, or one sample: over a deviation of zero, rounding would look like tissue
            zscore = torch.zeros_like(values)
        rank = torch.searchsorted(levels, clipped.contiguous()).float() / len(levels) - 0.5
        channels.append(torch.stack([zscore, rank]) * valid)
    return torch.stack(channels)


@dataclass(frozen=True, slots=True)
class RawPatch:
    """Patches with grey values in the unit of their images: what an expert with a normalisation of its own reads.

    Args:
        values: (B, S, S, S) float32, KJI.
        inside: (B, S, S, S) bool, whether the sample lies in the volume.
        step: (B, 3) float32, mm between neighbouring samples along K, J and I.
        statistics: (B, 6) float32, `image_statistics` of the whole image.
        has_unit: (B,) bool; false for an image made from labels, whose grey values mean nothing in themselves.
    """

    values: Tensor
    inside: Tensor
    step: Tensor
    statistics: Tensor
    has_unit: Tensor

    @classmethod
    def without_unit(cls, values: Tensor, inside: Tensor, step: Tensor) -> RawPatch:
        """Images that nobody acquired, made from labels or of noise: all that is known of them is in the patch."""
        flat = values.flatten(1)
        own = [flat.mean(1), flat.std(1), flat.mean(1), flat.std(1), flat.amin(1), flat.amax(1)]
        unknown = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        return cls(values, inside, step, torch.stack(own, dim=1), unknown)

    def case(self, index: int) -> RawPatch:
        """One of the patches, B = 1."""
        own = slice(index, index + 1)
        return RawPatch(*(getattr(self, name)[own] for name in RawPatch.__slots__))

    def to(self, device: torch.device) -> RawPatch:
        """The same on a device."""
        return RawPatch(*(getattr(self, name).to(device) for name in RawPatch.__slots__))


def image_statistics(array_kji: npt.NDArray[Any]) -> Tensor:
    """What nnU-Net's normalisations need to know of a whole image, from at most some four million of its voxels.

    Args:
        array_kji: (K, J, I) grey values.

    Returns:
        (6,) float32: mean and standard deviation in the box around what is not 0, both of the voxels that are not 0,
        lowest and highest value in the box.
    """
    every = math.ceil((array_kji.size / 4e6) ** (1 / 3))
    values = np.asarray(array_kji[::every, ::every, ::every], dtype=np.float32)
    around = Box.around(values != 0)
    values = values if around is None else values[around.slices]
    tissue = values[values != 0] if around is not None else values
    numbers = [values.mean(dtype=float), values.std(dtype=float), tissue.mean(dtype=float), tissue.std(dtype=float)]
    return torch.tensor([*numbers, values.min(), values.max()], dtype=torch.float32)


def resample(values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The same region on a grid of another number of samples: linear where it gets finer, a tent filter where coarser.

    Args:
        values: (..., K, J, I); samples lie at the centres of equal parts of the region.
        shape: of the new grid.

    Returns:
        (..., *shape).
    """
    for axis, size in zip((-3, -2, -1), shape, strict=True):
        length = values.shape[axis]
        if length != size:
            step = length / size
            crop, weight, _ = _axis_weights((step - 1) / 2, step, size, length)
            part = values.movedim(axis, -1)[..., crop]
            values = (part @ torch.from_numpy(weight).to(values).T).movedim(-1, axis)
    return values


def _axis_weights(
    origin: float, step: float, size: int, length: int
) -> tuple[slice, npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Voxels to read along one axis, their (size, voxels) weights, and which samples lie in the volume."""
    stride = max(1, int(step / 2))
    at = origin + step * np.arange(size)
    first = int(np.clip(np.floor(at[0] - step), 0, length - 1))
    last = int(np.clip(np.ceil(at[-1] + step), 0, length - 1))
    voxels = np.arange(first, last + 1, stride)
    reach = max(1.0, step, stride)
    centres = at.clip(voxels[0], voxels[-1])
    weight = np.maximum(0.0, 1.0 - np.abs(voxels[None] - centres[:, None]) / reach)
    weight /= weight.sum(axis=1, keepdims=True)
    return slice(first, last + 1, stride), weight.astype(np.float32), (at > -0.5) & (at < length - 0.5)


__all__ = [
    "Ijk",
    "Patch",
    "RawPatch",
    "image_statistics",
    "normalise",
    "resample",
    "sample_image",
    "sample_nearest",
    "upsample",
]
