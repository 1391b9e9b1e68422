"""Slicer's Grow from seeds, driven by the same prompts as a session: the classical tool to compare with.

The one file of the library that may import slicer: `vtkImageGrowCutSegment` is the filter behind the effect of
that name in Slicer's Segment Editor, here from the package `slicer-core` (extra `slicer`). The filter labels each
voxel by the seed from which it is reached over the least change of intensity; what matters is where the seeds are.
Prompts become the seeds that a user of Slicer would paint with the same knowledge, see `GrowCut`.

It must be no straw man, so the seeds were tuned on items of split `train`, by Dice AUC (at most 4) as mean over
their sources:

    box, 69 objects       box_core 0.25, 0.5, 0.7: 2.29, 2.31, 2.20; click_radius 1, 2, 3: 2.28, 2.31, 2.32
    box, 53 objects       locality 0.005, 0.02: 2.38, 2.37; no core once there is a positive click: 2.14
    box, 38 objects       plain core 2.33; core_spread 2, 1: 2.35, 2.37; and wipe 0.25, 0.35, 0.5: 2.40, 2.39, 2.36;
                          and box_core 0.35 with wipe 0.25: 2.41
    clicks, 53 objects    reach 5, 7, 10, 15, 20, 30: 1.42, 1.38, 1.28, 1.15, 1.04, 0.98;
                          growth 1.5, 2 from 7: 1.40, 1.24 (from 5: 1.33, 1.17)

Reach 5 alone scores best with clicks because small objects are many; it can never leave an object of 20 mm, so
reach 7 that grows, the best for large and small ones together, was taken.
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

    - A positive box: everything just outside it is background. The ellipsoid in its middle is object where its
      intensity is near to its median, as a brush with an intensity range would paint it, and is wiped around a
      negative click, which says that the guess was wrong there.
    - A click: a ball of its polarity, as a brush leaves it; a later prompt paints over an earlier one.
    - Without a box: a frame around all clicks, `reach` mm away, is background. Every positive click after the first
      says that the object is larger than thought, and moves the frame farther out. Where a side of the frame would
      lie outside the volume there is none; where all would, the border of the volume takes its place.
    - Scribbles, lassos and masks are seeds as they are.

    Args:
        click_radius: of the ball of a click, in voxels of the finest axis (so it is round in mm).
        box_core: axes of the ellipsoid in the middle of a box, as a share of the box's edges.
        core_spread: how near to the median, in robust standard deviations of the ellipsoid.
        wipe: radius around a negative click, as a share of the box's shortest edge.
        reach: mm from the first click to the frame where there is no box.
        growth: factor on the reach for each further positive click.
        locality: Slicer's "seed locality": what a distance of 1 mm counts for, as a share of the range of intensities
            (1st to 99th percentile of what is computed, so that CT and MR are treated alike).
    """

    def __init__(
        self,
        *,
        click_radius: float = 2.0,
        box_core: float = 0.35,
        core_spread: float = 1.0,
        wipe: float = 0.25,
        reach: float = 7.0,
        growth: float = 1.5,
        locality: float = 0.01,
    ) -> None:
        self._filter_class = _filter_class()
        self._click_radius = click_radius
        self._box_core = box_core
        self._core_spread = core_spread
        self._wipe = wipe
        self._reach = reach
        self._growth = growth
        self._locality = locality
        self._volume: Volume | None = None
        self._prompts: tuple[Prompt, ...] = ()
        settings = (
            f"click_radius={click_radius}, box_core={box_core}, core_spread={core_spread}, wipe={wipe}, "
            f"reach={reach}, growth={growth}, locality={locality}"
        )
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
        positive = sum(prompt.polarity is Polarity.POSITIVE for prompt in self._prompts)
        reach = self._reach * self._growth ** max(0, positive - 1)
        for prompt in self._prompts:
            covered, _ = prompt.region(volume)
            box = covered.dilate(_SHELL) if boxed else _dilate_mm(covered, reach, volume)
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
            return self._core(prompt.box(volume), volume)
        return prompt.region(volume)

    def _core(self, box: Box, volume: Volume) -> tuple[Box, BoolArray]:
        """What to paint for a box of which nothing more is known: its middle, less what is unlike or was denied."""
        middle = tuple((a + b - 1) / 2 for a, b in zip(box.start, box.stop, strict=True))
        edges = tuple(b - a for a, b in zip(box.start, box.stop, strict=True))
        core, inside = _clip(*_ellipsoid(middle, tuple(max(0.5, self._box_core * e / 2) for e in edges)), volume.box)
        intensity = core.crop(volume.array_kji).astype(np.float64)
        unlike = np.abs(intensity - np.median(intensity[inside]))
        inside &= unlike <= self._core_spread * 1.4826 * np.median(unlike[inside])  # 1.4826: as a standard deviation
        radius = self._wipe * min(e * s for e, s in zip(edges, volume.spacing, strict=True))
        for prompt in self._prompts:
            if isinstance(prompt, PointPrompt) and prompt.polarity is Polarity.NEGATIVE:
                ball, denied = _clip(*_ellipsoid(prompt.ijk(volume), tuple(radius / s for s in volume.spacing)), core)
                inside[_local(ball, core).slices][denied] = False
        return core, inside


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
