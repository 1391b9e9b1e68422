"""Where the next click is expected to help most."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from KA2ERSegment.geometry import BoolArray, Ijk, apply_affine
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompts import Polarity, Suggestion
from KA2ERSegment.rasterise import samples_in
from KA2ERSegment.volume import Volume

DOUBT = 0.15
"""Expected error of a sample below which it is not worth a look."""
WORTH = 0.002
"""Gain in Dice below which a click is not worth its while."""
APART = 2.0
"""Samples between a suggestion and a click that was made, at least."""


def suggest(prediction: Prediction, clicks: Iterable[Ijk], taken: Iterable[PackedMask]) -> Suggestion | None:
    """The middle of the region in which most volume is expected to be wrong; None where that is next to nothing.

    A sample is wrong with probability min(p, 1 - p) if the probabilities are right; it counts up to twice as much
    where the arms share the decision as where one of them is trusted alone. Every boundary is in doubt: only what is
    thicker than a sample is a region.

    Args:
        prediction: of the object.
        clicks: voxels with a click of any object, on the canonical volume.
        taken: masks in which no click is wanted.
    """
    mask, probability = prediction.on_patch()
    patch, canonical = prediction.patch, prediction.canonical
    if not mask.any():
        return None
    wrong = np.minimum(probability, 1 - probability)
    allowed = _in_volume(patch, canonical)
    for other in taken:
        allowed &= ~samples_in(other, patch)
    for click in clicks:
        _keep_away(allowed, patch, click)
    doubt = wrong * (0.5 + 0.5 * prediction.division_on_patch())
    size = float(probability.sum()) + int(mask.sum())
    best: tuple[float, Ijk, bool] | None = None
    for side in (False, True):  # beside the mask, in the mask
        thick = ndimage.binary_erosion((wrong > DOUBT) & (mask == side))
        components, count = ndimage.label(thick & allowed)
        if count == 0:
            continue
        sums = ndimage.sum_labels(doubt, components, np.arange(1, count + 1))
        worst = int(np.argmax(sums))
        gain = float(sums[worst]) / size
        if gain > WORTH and (best is None or gain > best[0]):
            depth = ndimage.distance_transform_edt(
                np.pad(components == worst + 1, 1), np.array(patch.step[::-1]) * canonical.spacing[::-1]
            )
            k, j, i = np.unravel_index(int(np.argmax(depth[1:-1, 1:-1, 1:-1])), mask.shape)
            best = gain, (int(i), int(j), int(k)), side
    if best is None:
        return None
    gain, sample, side = best
    voxel = np.floor(np.array(patch.origin) + np.array(patch.step) * sample + 0.5)
    r, a, s = apply_affine(canonical.ijk_to_ras, voxel).tolist()
    return Suggestion((r, a, s), Polarity.NEGATIVE if side else Polarity.POSITIVE, gain)


def _in_volume(patch: Patch, canonical: Volume) -> BoolArray:
    inside = []
    for origin, step, size in zip(patch.origin, patch.step, canonical.shape_ijk, strict=True):
        voxel = np.floor(origin + step * np.arange(patch.size) + 0.5)
        inside.append((voxel >= 0) & (voxel < size))
    i, j, k = inside
    together: BoolArray = k[:, None, None] & j[:, None] & i
    return together


def _keep_away(allowed: BoolArray, patch: Patch, click: Ijk) -> None:
    """No suggestion within APART samples of a click, nor on its voxel."""
    reach = np.maximum(APART, 1 / np.array(patch.step))
    at = patch.to_patch(click)
    start, stop = np.maximum(np.ceil(at - reach), 0).astype(int), np.floor(at + reach).astype(int) + 1
    if (stop > 0).all():
        allowed[tuple(slice(a, b) for a, b in zip(start[::-1], stop[::-1], strict=True))] = False
