"""Promises that no network keeps by itself: clicks are honoured, specks removed, edits stay where they were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.preprocessing import Patch

FloatImage = npt.NDArray[np.float32]

MARGIN = 0.5
"""Logit that a click is raised to, at least."""
RADIUS = 1.5
"""Reach of a click that the network did not follow, in samples of the patch (and in voxels at least)."""
SPECK = 8
"""Voxels under which a lone component near a click is a speck."""
EVERYWHERE = np.ones((3, 3, 3), dtype=bool)


def keep_change_local(logits: FloatImage, before: FloatImage, clicks: Sequence[tuple[int, int, int]]) -> FloatImage:
    """Accept a change of the mask only where it is connected to the newest prompt.

    Finished far-away parts stay as they are (the idea is VISTA3D's: an edit touches the components that hold the
    click).

    Args:
        logits: (S, S, S) after the prompt.
        before: (S, S, S) before it.
        clicks: samples (K, J, I) of the newest prompt.
    """
    change = (logits > 0) != (before > 0)
    components, count = ndimage.label(change, EVERYWHERE)
    if count == 0:
        return logits
    near = np.zeros_like(change)
    for click in clicks:
        near[tuple(slice(max(0, x - 2), x + 3) for x in click)] = True
    kept = np.zeros(count + 1, dtype=bool)
    kept[np.unique(components[near])] = True
    kept[0] = True  # no change of sign there: the newer logits may stand
    return np.where(kept[components], logits, before)


def remove_islands(logits: FloatImage, positive: BoolArray, share: float = 0.02) -> FloatImage:
    """Drop components of the mask that are small beside the largest one and hold no positive prompt.

    Args:
        logits: (S, S, S).
        positive: (S, S, S), samples known to be inside.
        share: of the largest component's size, under which a component is dropped.
    """
    components, count = ndimage.label(logits > 0)
    if count < 2:
        return logits
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    drop = sizes < share * sizes.max()
    drop[np.unique(components[positive])] = False
    drop[0] = False
    return np.where(drop[components], np.minimum(-logits, -0.1), logits).astype(np.float32)


def honour(logits: FloatImage, box: Box, patch: Patch, clicks: Sequence[tuple[Ijk, int]]) -> BoolArray:
    """The mask of a crop, with every positive click inside and every negative one outside, without specks.

    A click that the network did not follow bends the logits around it, over about one and a half samples of the
    patch, so that the mask gains or loses a small ball and never a single voxel.

    Args:
        logits: (K, J, I) float32 on the box's voxels; changed in place.
        box: of the crop, on the canonical volume.
        patch: the logits came from; its step sets the balls' size.
        clicks: voxel and sign (+1 or -1), oldest first; no voxel with both signs.
    """
    scale = np.maximum(np.asarray(patch.step) * RADIUS, RADIUS)
    inside = [(ijk, sign) for ijk, sign in clicks if box.contains(ijk)]
    for shrink in (1.0, 0.5, 0.25):
        for ijk, sign in inside:
            _bend(logits, box, ijk, sign, scale * shrink)
        if all(sign * _at(logits, box, ijk) > 0 for ijk, sign in inside):
            break
    else:  # clicks of both signs side by side: their own voxels are what is left
        for ijk, sign in inside:
            logits[_index(box, ijk)] = sign * MARGIN
    mask = logits > 0
    for ijk, _ in inside:
        _remove_specks(mask, box, inside, _around(ijk, 3 * scale).intersect(box))
    return mask


def _bend(logits: FloatImage, box: Box, ijk: Ijk, sign: int, scale: npt.NDArray[np.float64]) -> None:
    """Add a bump that lifts the click, and what lies within `scale` voxels of it, over the margin."""
    lack = MARGIN - sign * _at(logits, box, ijk)
    if lack <= 0:
        return
    near = _around(ijk, 3 * scale).intersect(box)
    axes = [
        np.exp(-0.5 * ((np.arange(near.start[a], near.stop[a]) - ijk[a]) / scale[a]) ** 2).astype(np.float32)
        for a in range(3)
    ]
    bump = axes[2][:, None, None] * axes[1][:, None] * axes[0]
    # e^0.5: one scale away the bump still is what the click lacks
    _view(logits, box, near)[...] += np.float32(sign * lack * 1.65) * bump


def _remove_specks(mask: BoolArray, box: Box, clicks: Sequence[tuple[Ijk, int]], near: Box) -> None:
    """Flip components of under SPECK voxels that lie wholly in a window and hold no click of their own sign."""
    window = _view(mask, box, near)
    for value in (True, False):
        components, count = ndimage.label(window == value)
        if count < 2 and value:
            continue
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        drop = sizes < SPECK
        drop[0] = False
        for face in (components[:1], components[-1:], components[:, :1], components[:, -1:], components[..., :1], components[..., -1:]):  # fmt: skip
            drop[np.unique(face)] = False  # may be larger beyond the window
        for ijk, sign in clicks:
            if near.contains(ijk) and (sign > 0) == value:
                drop[components[_index(near, ijk)]] = False
        window[drop[components]] = not value


def _around(ijk: Ijk, reach: npt.NDArray[np.float64]) -> Box:
    start = np.floor(np.asarray(ijk) - reach).astype(int)
    stop = np.ceil(np.asarray(ijk) + reach).astype(int) + 1
    (i0, j0, k0), (i1, j1, k1) = start.tolist(), stop.tolist()
    return Box((i0, j0, k0), (i1, j1, k1))


def click_reach(patch: Patch, ijk: Ijk) -> Box:
    """Voxels that honouring one click may change."""
    return _around(ijk, 3 * np.maximum(np.asarray(patch.step) * RADIUS, RADIUS))


def _index(box: Box, ijk: Ijk) -> tuple[int, int, int]:
    i, j, k = (x - a for x, a in zip(ijk, box.start, strict=True))
    return k, j, i


def _at(logits: FloatImage, box: Box, ijk: Ijk) -> float:
    return float(logits[_index(box, ijk)])


def _view(array: npt.NDArray[np.generic], box: Box, part: Box) -> npt.NDArray[np.generic]:
    i, j, k = box.start
    return array[part.shift((-i, -j, -k)).slices]
