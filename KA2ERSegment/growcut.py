"""Slicer's Grow from seeds, driven by the same prompts as a session: the classical tool to compare with.

The one file of the library that may import slicer: `vtkImageGrowCutSegment` is the filter behind the effect of
that name in Slicer's Segment Editor, here from the package `slicer-core` (extra `slicer`). The filter labels each
voxel by the seed from which it is reached over the least change of intensity; what matters is where the seeds are.
Prompts become the seeds that a user of Slicer would paint with the same knowledge, see `GrowCut`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import KA2ERError, SessionStateError
from KA2ERSegment.geometry import BoolArray, Box
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.volume import Volume

_BACKGROUND, _OBJECT = 1, 2
_SHELL = 2


class GrowCut:
    """Grow from seeds: prompts in, mask out, with the verbs that `evaluation` asks for.

    - A positive box: everything just outside it is background, and the ellipsoid in its middle is object.
    - A click: a ball of its polarity, as a brush leaves it; a later prompt paints over an earlier one.
    - Without a box: a frame around all clicks, `reach` mm away, is background. Where a side of the frame would lie
      outside the volume there is none; where all would, the border of the volume takes its place.
    - Scribbles, lassos and masks are seeds as they are.

    Args:
        click_radius: of the ball of a click, in voxels of the finest axis (so it is round in mm).
        box_core: axes of the ellipsoid in the middle of a box, as a share of the box's edges.
        reach: mm from a click to the frame where there is no box.
        locality: Slicer's "seed locality": what a distance of 1 mm counts for, as a share of the range of intensities
            (1st to 99th percentile of what is computed, so that CT and MR are treated alike).
    """

    def __init__(
        self, click_radius: float = 2.0, box_core: float = 0.5, reach: float = 10.0, locality: float = 0.01
    ) -> None:
        self._filter_class = _filter_class()
        self._click_radius = click_radius
        self._box_core = box_core
        self._reach = reach
        self._locality = locality
        self._volume: Volume | None = None
        self._prompts: tuple[Prompt, ...] = ()
        settings = f"click_radius={click_radius}, box_core={box_core}, reach={reach}, locality={locality}"
        self.identity = f"growcut (slicer-core {metadata.version('slicer-core')}, {settings})"

    def start(self, volume: Volume) -> None:
        """Forget everything and begin with this volume."""
        self._volume, self._prompts = volume, ()

    def add(self, prompt: Prompt) -> BoolArray:
        """The (K, J, I) mask after this prompt and all earlier ones since `start`."""
        if self._volume is None:
            message = "a volume must be set before the first prompt. Call start first."
            raise SessionStateError(message)
        prompt.region(self._volume)  # PromptError before any change
        self._prompts = (*self._prompts, prompt)
        return self._grow(self._volume)

    def _grow(self, volume: Volume) -> BoolArray:
        region = self._region(volume)
        seeds = self._seeds(volume, region)
        intensity = region.crop(volume.array_kji)
        low, high = np.percentile(intensity, (1, 99))
        penalty = self._locality * float(high - low)
        grown = _run_filter(self._filter_class(), intensity, seeds, volume.spacing, penalty)
        mask = np.zeros(volume.shape_kji, dtype=bool)
        region.paste(grown == _OBJECT, mask)
        return mask

    def _region(self, volume: Volume) -> Box:
        """The part of the volume that is computed; the seeds around it end in it."""
        region: Box | None = None
        boxed = self._has_box()
        for prompt in self._prompts:
            covered, _ = prompt.region(volume)
            box = covered.dilate(_SHELL) if boxed else _dilate_mm(covered, self._reach, volume)
            region = box if region is None else region.union(box)
        if region is None:
            message = "there must be a prompt before anything can grow."
            raise SessionStateError(message)
        return region.intersect(volume.box)

    def _has_box(self) -> bool:
        return any(isinstance(p, BoxPrompt) and p.polarity is Polarity.POSITIVE for p in self._prompts)

    def _seeds(self, volume: Volume, region: Box) -> npt.NDArray[np.uint8]:
        seeds = np.zeros(region.shape_kji, dtype=np.uint8)
        if self._has_box():
            inside = np.zeros(region.shape_kji, dtype=bool)
            for prompt in self._prompts:
                if isinstance(prompt, BoxPrompt) and prompt.polarity is Polarity.POSITIVE:
                    box = prompt.box(volume)
                    inside[_local(box, region).slices] = True
            seeds[~inside] = _BACKGROUND
        else:
            seeds[_frame(region, volume)] = _BACKGROUND
        for prompt in self._prompts:
            box, covered = self._painted(prompt, volume)
            box, covered = _clip(box, covered, region)
            value = _OBJECT if prompt.polarity is Polarity.POSITIVE else _BACKGROUND
            seeds[_local(box, region).slices][covered] = value
        return seeds

    def _painted(self, prompt: Prompt, volume: Volume) -> tuple[Box, BoolArray]:
        """What a user would paint for one prompt: a box and its (K, J, I) voxels, perhaps partly outside."""
        if isinstance(prompt, PointPrompt):
            i, j, k = prompt.ijk(volume)
            radius = self._click_radius * min(volume.spacing)
            return _ellipsoid((i, j, k), tuple(radius / s for s in volume.spacing))
        if isinstance(prompt, BoxPrompt) and prompt.polarity is Polarity.POSITIVE:
            box = prompt.box(volume)
            middle = tuple((a + b - 1) / 2 for a, b in zip(box.start, box.stop, strict=True))
            radii = tuple(max(0.5, self._box_core * (b - a) / 2) for a, b in zip(box.start, box.stop, strict=True))
            return _ellipsoid(middle, radii)
        return prompt.region(volume)


def _filter_class() -> Any:
    try:
        from slicer import vtkImageGrowCutSegment
    except ImportError as error:
        message = "Grow from seeds needs the package `slicer-core`: pip install ka2ersegment[slicer]."
        raise KA2ERError(message) from error
    return vtkImageGrowCutSegment


def _run_filter(
    grow: Any,
    intensity: npt.NDArray[Any],
    seeds: npt.NDArray[np.uint8],
    spacing: tuple[float, float, float],
    distance_penalty: float,
) -> npt.NDArray[np.uint8]:
    """Labels of a fresh filter, (K, J, I); both inputs are (K, J, I) of one shape, spacing is mm along I, J, K."""
    thin = [(0, max(0, 3 - n)) for n in seeds.shape]  # the filter refuses fewer than three voxels along an axis
    grow.SetIntensityVolume(_vtk_image(np.pad(np.asarray(intensity, dtype=np.float32), thin, mode="edge"), spacing))
    padded = np.pad(seeds, thin, mode="edge")
    grow.SetSeedLabelVolume(_vtk_image(padded, spacing))
    grow.SetDistancePenalty(distance_penalty)
    grow.Update()
    labels: npt.NDArray[np.uint8] = _numpy_support().vtk_to_numpy(grow.GetOutput().GetPointData().GetScalars())
    k, j, i = seeds.shape
    return labels.reshape(padded.shape)[:k, :j, :i].copy()  # the filter owns the memory


def _vtk_image(array: npt.NDArray[Any], spacing: tuple[float, float, float]) -> Any:
    from vtkmodules.vtkCommonDataModel import vtkImageData

    image = vtkImageData()
    image.SetDimensions(array.shape[::-1])
    image.SetSpacing(spacing)
    image.GetPointData().SetScalars(_numpy_support().numpy_to_vtk(np.ascontiguousarray(array).ravel(), deep=True))
    return image


def _numpy_support() -> Any:
    """Any: it has no types where vtk is installed, and is not there where it is not."""
    from vtkmodules.util import numpy_support

    return numpy_support


def _ellipsoid(middle: tuple[float, ...], radii: tuple[float, ...]) -> tuple[Box, BoolArray]:
    """Voxels of an ellipsoid, at least the one nearest to its middle; `middle` and `radii` in voxels IJK."""
    starts = [int(np.floor(m - r)) for m, r in zip(middle, radii, strict=True)]
    stops = [int(np.ceil(m + r)) + 1 for m, r in zip(middle, radii, strict=True)]
    box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    i, j, k = ((np.arange(a, b) - m) / max(r, 0.5) for a, b, m, r in zip(starts, stops, middle, radii, strict=True))
    square = k[:, None, None] ** 2 + j[None, :, None] ** 2 + i[None, None, :] ** 2
    return box, (square <= 1.0) | (square == square.min())


def _dilate_mm(box: Box, mm: float, volume: Volume) -> Box:
    i, j, k = (max(1, round(mm / s)) for s in volume.spacing)
    (i0, j0, k0), (i1, j1, k1) = box.start, box.stop
    return Box((i0 - i, j0 - j, k0 - k), (i1 + i, j1 + j, k1 + k))


def _frame(region: Box, volume: Volume) -> BoolArray:
    """The outermost voxels of the region on the sides that lie inside the volume, or on all where none does."""
    frame = np.zeros(region.shape_kji, dtype=bool)
    whole = region == volume.box
    for axis, (start, stop, size) in enumerate(zip(region.start, region.stop, volume.shape_ijk, strict=True)):
        side: list[slice] = [slice(None)] * 3
        if start > 0 or whole:
            side[2 - axis] = slice(0, 1)
            frame[tuple(side)] = True
        if stop < size or whole:
            side[2 - axis] = slice(-1, None)
            frame[tuple(side)] = True
    return frame


def _local(box: Box, region: Box) -> Box:
    i, j, k = region.start
    return box.shift((-i, -j, -k))


def _clip(box: Box, covered: BoolArray, region: Box) -> tuple[Box, BoolArray]:
    inside = box.intersect(region)
    return inside, covered[_local(inside, box).slices]
