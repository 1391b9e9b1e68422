"""From the patch towards the voxels: borders of large objects follow the image, not the patch's coarser samples.

The fast guided filter (He and Sun, arXiv 1505.00996): around each sample the logits are a linear function of the grey
values, fitted on the patch; its coefficients vary slowly, so they are interpolated, and the image at half the step
gives the detail back. Where grey values explain nothing of the logits these stay. Written here, as libraries have it
for 2D images alone (OpenCV).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.cancellation import checkpoint
from KA2ERSegment.geometry import Box
from KA2ERSegment.preprocessing import Patch, sample_image, upsample
from KA2ERSegment.volume import Volume

FloatImage = npt.NDArray[np.float32]

RADIUS = 2
"""Of the neighbourhood in which logits are a linear function of grey values, in samples."""
SMOOTHNESS = 0.1
"""Grey values that vary by less than this share of the patch's standard deviation count as one."""
QUIET = 0.7
"""Standard deviation, in fine samples, of the Gaussian that takes the noise from the image: a patch's samples are means
of many voxels, fine ones of few."""
NOTHING, ENOUGH = 0.1, 0.3
"""Shares of the logits' variance that grey values explain: up to the first, which noise reaches, the logits stay; from
the second on the image is followed."""
LEVEL = 0.05
"""Variance of logits, added to theirs: what hardly varies has no border to move."""
UNSURE = 3.0
"""Logits beyond which, to both sides, the network's word stands."""
COARSE = 2.0
"""Patches with steps of up to this many voxels stay as they are: the image has hardly more to say than the network has
seen. On training items masks gained from steps above 2 (by a lot), and between 1 and 2 they lost a little."""
KEPT = 2
"""Patches whose guide is kept, about 12 MB each, and answers whose detail is, 8 MB each."""


@dataclass(frozen=True, slots=True, eq=False)
class Detail:
    """Logits on a grid at least as fine as the patch that the network saw.

    Args:
        patch: the grid; over the same part of the volume.
        logits: (n, n, n) float32, KJI.
    """

    patch: Patch
    logits: FloatImage

    def at_voxels(self, box: Box) -> FloatImage:
        """(K, J, I) float32 on the voxels of a box, linear between samples."""
        return upsample(self.logits, self.patch, box)

    def on(self, patch: Patch) -> FloatImage:
        """On the samples of the patch that it was made from: the mean of the finer ones."""
        times = self.patch.size // patch.size
        if times == 1:
            return self.logits
        return F.avg_pool3d(torch.from_numpy(self.logits)[None], times)[0].numpy()


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """What the image says on one patch, in its own standard deviations.

    Args:
        patch: that the network sees.
        fine: the same part of the volume at half the step.
        grey: (S, S, S) float32 on the patch.
        fine_grey: (2S, 2S, 2S) float32.
        mean: (S, S, S), of the neighbourhood.
        variance: (S, S, S), of the neighbourhood, and what counts as none.
    """

    patch: Patch
    fine: Patch
    grey: FloatImage
    fine_grey: FloatImage
    mean: FloatImage
    variance: FloatImage

    @classmethod
    def of(cls, canonical: Volume, patch: Patch) -> Guide | None:
        """Of a patch; None where it is about as fine as the volume, or all of one grey value."""
        if max(patch.step) <= COARSE:
            return None
        sampled, inside = sample_image(canonical.array_kji, patch)
        known = sampled.numpy()[inside.numpy()]
        if known.size == 0:
            return None
        low, high = (float(value) for value in np.percentile(known[::7], (0.5, 99.5)))
        scale = float(known.clip(low, high).std())
        if scale <= 0:
            return None
        grey = np.asarray((sampled.numpy().clip(low, high) - low) / scale, dtype=np.float32)
        checkpoint()
        fine = halved(patch)
        fine_values = (sample_image(canonical.array_kji, fine)[0].numpy().clip(low, high) - low) / np.float32(scale)
        checkpoint()
        fine_grey = _quiet(fine_values)
        checkpoint()
        mean = _mean(grey)
        variance = np.asarray((_mean(grey * grey) - mean * mean).clip(0) + SMOOTHNESS**2, dtype=np.float32)
        return cls(patch, fine, grey, fine_grey, mean, variance)

    def detail(self, logits: FloatImage, bound: Box | None = None) -> Detail:
        """The patch's logits at half its step.

        Args:
            logits: (S, S, S), KJI.
            bound: of voxels; nothing is added to the mask beyond it.
        """
        clipped = np.asarray(logits.clip(-UNSURE - 1, UNSURE + 1), dtype=np.float32)
        mean = _mean(clipped)
        shared = _mean(self.grey * clipped) - self.mean * mean
        fitted = shared / self.variance
        spread = (_mean(clipped * clipped) - mean * mean).clip(0) + LEVEL
        explained = _mean(((fitted * shared / spread - NOTHING) / (ENOUGH - NOTHING)).clip(0, 1))
        slope = explained * _mean(fitted)
        offset = explained * _mean(mean - fitted * self.mean) + (1 - explained) * clipped
        checkpoint()
        found = _doubled(logits)
        unsure = np.abs(found) < UNSURE
        guided = _doubled(slope)  # large arrays: worked on in place from here
        guided *= self.fine_grey
        guided += _doubled(offset)
        checkpoint()
        if bound is not None:
            np.minimum(guided, found, out=guided, where=self._beyond(bound))
        np.copyto(found, guided, where=unsure)
        return Detail(self.fine, found)

    def _beyond(self, bound: Box) -> npt.NDArray[np.bool_]:
        """(2S, 2S, 2S), samples that lie beyond a box of voxels."""
        inside = []
        for axis in (2, 1, 0):
            at = self.fine.origin[axis] + self.fine.step[axis] * np.arange(self.fine.size)
            inside.append((at > bound.start[axis] - 0.5) & (at < bound.stop[axis] - 0.5))
        return ~(inside[0][:, None, None] & inside[1][:, None] & inside[2])


class Refiner:
    """Finer logits of patches of a volume; keeps what the image says on the patches that it saw last.

    Args:
        canonical: the volume, in canonical axes.
        enabled: off: logits as the network gave them.
    """

    def __init__(self, canonical: Volume, enabled: bool = True) -> None:
        self._canonical, self._enabled = canonical, enabled
        self.forget()

    def forget(self) -> None:
        """Free what is kept."""
        self._guides: OrderedDict[Patch, Guide | None] = OrderedDict()
        self._details: OrderedDict[tuple[int, Patch, Box | None], tuple[FloatImage, Detail]] = OrderedDict()

    def detail(self, logits: FloatImage, patch: Patch, bound: Box | None = None) -> Detail:
        """As `Guide.detail`; the logits as they are where the patch is about as fine as the volume."""
        guide = self._guide(patch) if self._enabled else None
        if guide is None:
            return Detail(patch, logits)
        key = id(logits), patch, bound  # as long as the logits are kept, nothing else has their id
        if key not in self._details:
            self._details[key] = logits, guide.detail(logits, bound)
            if len(self._details) > KEPT:
                self._details.popitem(last=False)
        return self._details[key][1]

    def _guide(self, patch: Patch) -> Guide | None:
        if patch not in self._guides:
            self._guides[patch] = Guide.of(self._canonical, patch)
            if len(self._guides) > KEPT:
                self._guides.popitem(last=False)
        self._guides.move_to_end(patch)
        return self._guides[patch]


def halved(patch: Patch) -> Patch:
    """The same part of the volume at half the step."""
    (i, j, k), (di, dj, dk) = patch.origin, patch.step
    return Patch((i - di / 4, j - dj / 4, k - dk / 4), (di / 2, dj / 2, dk / 2), 2 * patch.size)


def _doubled(values: FloatImage) -> FloatImage:
    """(S, S, S) on the samples of the halved patch."""
    size = len(values)
    return upsample(values, Patch((0.5,) * 3, (2.0,) * 3, size), Box((0, 0, 0), (2 * size,) * 3))


def _mean(values: npt.NDArray[np.floating]) -> FloatImage:
    """Of each sample's neighbourhood."""
    width = 2 * RADIUS + 1
    return _filtered(values, (1 / width,) * width)


def _quiet(values: npt.NDArray[np.floating]) -> FloatImage:
    """Without noise: a Gaussian of deviation QUIET, three of them to each side."""
    reach = round(3 * QUIET)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / QUIET) ** 2)
    return _filtered(values, tuple((bell / bell.sum()).tolist()))


def _filtered(values: npt.NDArray[np.floating], kernel: tuple[float, ...]) -> FloatImage:
    """Convolved with a kernel along each axis: products with matrices, on a patch twice as quick as SciPy."""
    image = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    along = _matrix(len(values), kernel)
    image = (along @ image.flatten(1)).view_as(image)
    return (along @ image @ along.T).numpy()


@cache
def _matrix(size: int, kernel: tuple[float, ...]) -> Tensor:
    """(size, size), how much of each sample is in each filtered one; the outermost stand for what is beyond them."""
    reach = len(kernel) // 2
    at = (torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, at, torch.tensor(kernel).expand_as(at))
