"""Promises that no network keeps by itself: clicks are honoured, specks removed, edits stay where they are asked for.

What `honour` promises, whatever the logits are: each positive click lies in the mask and each negative one does not.
Near a click (`click_reach`) no component of the mask has fewer than SPECK voxels, unless it holds a positive click,
and no hole has, unless it holds a negative click or voxels that are not to be had. The part that holds a click is
itself no speck, unless clicks of the other sign crowd it. Components and holes are 6-connected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from KA2ERSegment.cancellation import checkpoint
from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.steps import Finish

FloatImage = npt.NDArray[np.float32]

MARGIN = 0.5
"""Logit that a click is raised to, at least."""
RADIUS = 1.5
"""Of the ball that a click gives or takes where the network does not follow it, in samples of the patch and at least
in voxels: 19 of them."""
REACH = 3.0
"""Radii beyond which a click bends nothing."""
SURE = 6.0
"""Logit beyond which nothing is surer."""
SPECK = 8
"""Voxels under which a component near a click is a speck."""
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


def finished(logits: FloatImage, positive: BoolArray, spacing: npt.ArrayLike, finish: Finish) -> FloatImage:
    """Logits as an object's finishing leaves them; the logits themselves where it does nothing.

    Args:
        logits: (S, S, S).
        positive: (S, S, S), samples known to be inside.
        spacing: of the samples, mm (I, J, K).
        finish: what to do.
    """
    if finish.smoothing_mm > 0:
        sigma = finish.smoothing_mm / np.asarray(spacing, dtype=float)[::-1]
        # far from the boundary logits say how sure the network is, not where the boundary lies
        logits = ndimage.gaussian_filter(logits.clip(-SURE, SURE), sigma, mode="nearest")
    if not finish.islands:
        components, count = ndimage.label(logits > 0)
        kept = np.zeros(count + 1, dtype=bool)
        kept[np.unique(components[positive])] = True
        if count and not kept[1:].any():  # a box alone touches no part more than another
            kept[1 + np.bincount(components.ravel())[1:].argmax()] = True
        kept[0] = True
        logits = np.where(kept[components], logits, np.minimum(-logits, np.float32(-0.1)))
    return logits


def keep_in_box(logits: FloatImage, inside: BoolArray, positive: BoolArray) -> FloatImage:
    """Nothing lies beyond a 3D box, but for what a hand misses: a twentieth of its extent, and a sample.

    A positive prompt farther out takes the bound away: the user has said that the box is too small.

    Args:
        logits: (S, S, S).
        inside: (S, S, S), samples in the box.
        positive: (S, S, S), samples known to be inside the object.
    """
    box = Box.around(inside)
    if box is None:
        return logits
    bounds = []
    for axis in range(3):
        start, stop = box.start[2 - axis], box.stop[2 - axis]
        slack = 1 + math.ceil(0.05 * (stop - start))
        bounds.append(slice(max(0, start - slack), stop + slack))
    beyond = np.ones_like(inside)
    beyond[tuple(bounds)] = False
    if (positive & beyond).any():
        return logits
    return np.where(beyond, np.minimum(logits, np.float32(-MARGIN)), logits)


def honour(
    logits: FloatImage,
    box: Box,
    patch: Patch,
    clicks: Sequence[tuple[Ijk, int]],
    blocked: BoolArray | None = None,
    drawn: BoolArray | None = None,
) -> BoolArray:
    """The mask of a crop with every positive click inside and every negative one outside, without specks near them.

    A click that the network did not follow bends the logits around it, so that the mask gains or loses a small ball
    and never a single voxel. Between clicks of both signs, each has its say over the voxels nearer to it.

    Args:
        logits: (K, J, I) float32 on the box's voxels; changed in place.
        box: of the crop, on the canonical volume; outside it the mask is empty.
        patch: the logits came from; its step sets the balls' size.
        clicks: voxel and sign (+1 or -1), oldest first; no voxel with both signs. One outside the box bends nothing,
            but what it reaches is kept free of specks.
        blocked: (K, J, I), voxels that belong to somebody else for good; no positive click lies on one.
        drawn: (K, J, I), voxels whose logits a hand has set: a part or hole that holds one is meant, however small.

    Returns:
        (K, J, I) bool.
    """
    if blocked is None:
        blocked = np.zeros(logits.shape, dtype=bool)
    as_drawn = None if drawn is None else np.where(drawn, np.sign(logits), 0).astype(np.int8)
    radius = _radius(patch)
    reaches = [click_reach(patch, ijk).intersect(box) for ijk, _ in clicks]  # also of clicks beside the crop
    clicks = [(ijk, sign) for ijk, sign in clicks if box.contains(ijk)]
    for ijk, sign in clicks:
        checkpoint()
        _bend(logits, box, ijk, sign, _opposing(clicks, sign), radius)
    mask = (logits > 0) & ~blocked
    parts, holes = None, blocked
    if as_drawn is not None:
        parts, holes = mask & (as_drawn > 0), blocked | (~mask & (as_drawn < 0))
    for ijk, sign in clicks:
        at = _index(box, ijk)
        if as_drawn is not None and as_drawn[at] == sign:
            continue
        if _part_size(mask, box, ijk) < SPECK:
            _stamp_ball(mask, box, ijk, sign, _opposing(clicks, sign), radius, blocked)
    for near in _groups(reaches):
        checkpoint()
        _flip_specks(mask, box, near, True, [at for at, sign in clicks if sign > 0], parts)
        _flip_specks(mask, box, near, False, [at for at, sign in clicks if sign < 0], holes)
    return mask


def click_reach(patch: Patch, ijk: Ijk) -> Box:
    """Voxels around a click that `honour` may change and keeps free of specks; may go beyond the volume."""
    return _around(ijk, REACH * _radius(patch))


def remove_specks(mask: BoolArray, box: Box, near: Box, keep: Iterable[Ijk]) -> None:
    """Drop components of fewer than SPECK voxels that reach into a part of a crop.

    Args:
        mask: (K, J, I) on the box's voxels; changed in place.
        box: of the crop.
        near: the part, inside the box.
        keep: voxels whose component stays.
    """
    _flip_specks(mask, box, [near], True, keep, None)


def _flip_specks(
    mask: BoolArray, box: Box, near: Sequence[Box], value: bool, keep: Iterable[Ijk], stay: BoolArray | None
) -> None:
    around = _union(near)
    if around.size == 0:
        return
    # A component that reaches into `near` and is cut off by this window has SPECK voxels within the window alone, so
    # each that looks small is seen whole.
    outer = around.dilate(SPECK).intersect(box)
    window = _view(mask, box, outer)
    like = window == value
    if not like.any() or (like.size >= SPECK and like.all()):  # deep inside or far outside: most clicks
        return
    components, count = ndimage.label(like)
    small = np.bincount(components.ravel(), minlength=count + 1) < SPECK
    small[0] = False
    if not small.any():
        return
    reached = np.zeros(components.shape, dtype=bool)
    for part in near:
        _view(reached, outer, part)[...] = True
    drop = small & (np.bincount(components[reached], minlength=count + 1) > 0)
    if not drop.any():
        return
    for ijk in keep:
        if outer.contains(ijk):
            drop[components[_index(outer, ijk)]] = False
    if stay is not None:
        drop[components[_view(stay, box, outer)]] = False
    drop[0] = False
    window[drop[components]] = not value


def _groups(boxes: Sequence[Box]) -> list[list[Box]]:
    """Boxes to look at together: those whose windows, looked at one by one, hold more voxels than one around all."""
    groups: list[tuple[list[Box], Box]] = []
    for box in boxes:
        if box.size == 0:
            continue
        for n, (members, window) in enumerate(groups):
            together = window.union(box)
            apart = window.dilate(SPECK).size + box.dilate(SPECK).size
            if together.dilate(SPECK).size <= apart:
                groups[n] = [*members, box], together
                break
        else:
            groups.append(([box], box))
    return [members for members, _ in groups]


def _union(boxes: Iterable[Box]) -> Box:
    together = Box((0, 0, 0), (0, 0, 0))
    for box in boxes:
        together = together.union(box)
    return together


def _bend(
    logits: FloatImage, box: Box, ijk: Ijk, sign: int, opposing: Sequence[Ijk], radius: npt.NDArray[np.float64]
) -> None:
    """Add a bump that lifts the click, and what is like it within a radius, over the margin."""
    lack = MARGIN - sign * float(logits[_index(box, ijk)])
    if lack <= 0:
        return
    near = _around(ijk, REACH * radius).intersect(box)
    distance = _distance(near, ijk, radius)
    bump = np.exp(-0.5 * distance)
    bump /= np.exp(-0.5)  # one radius away the bump still is what the click lacks
    bump[_nearer_to(opposing, near, distance, radius)] = 0
    _view(logits, box, near)[...] += np.float32(sign * lack) * bump


def _part_size(mask: BoolArray, box: Box, ijk: Ijk) -> int:
    """Voxels of the component of mask or background that holds a voxel; right where they are fewer than SPECK."""
    near = _around(ijk, np.full(3, float(SPECK))).intersect(box)
    at = _index(near, ijk)
    window = _view(mask, box, near)
    like = window == window[at]
    if like.all():
        return int(like.size)
    components, _ = ndimage.label(like)
    return int((components == components[at]).sum())


def _stamp_ball(
    mask: BoolArray,
    box: Box,
    ijk: Ijk,
    sign: int,
    opposing: Sequence[Ijk],
    radius: npt.NDArray[np.float64],
    blocked: BoolArray,
) -> None:
    near = _around(ijk, radius).intersect(box)
    distance = _distance(near, ijk, radius)
    ball = (distance <= 1) & ~_nearer_to(opposing, near, distance, radius)
    if sign > 0:
        ball &= ~_view(blocked, box, near)
    _view(mask, box, near)[ball] = sign > 0


def _distance(box: Box, ijk: Ijk, radius: npt.NDArray[np.float64]) -> FloatImage:
    """(K, J, I) squared distance from a voxel, in radii."""
    i, j, k = (
        (((np.arange(a, b) - x) / r) ** 2).astype(np.float32)
        for a, b, x, r in zip(box.start, box.stop, ijk, radius, strict=True)
    )
    return np.asarray(k[:, None, None] + j[:, None] + i)


def _nearer_to(others: Sequence[Ijk], box: Box, distance: FloatImage, radius: npt.NDArray[np.float64]) -> BoolArray:
    """(K, J, I), voxels of a box that are nearer to any of the others than `distance` says."""
    nearer = np.zeros(distance.shape, dtype=bool)
    for other in others:
        # twice the box's reach away the other cannot be the nearer one of any voxel in it
        if box.dilate(max(box.shape_kji)).contains(other):
            nearer |= _distance(box, other, radius) < distance
    return nearer


def _opposing(clicks: Sequence[tuple[Ijk, int]], sign: int) -> list[Ijk]:
    return [ijk for ijk, other in clicks if other != sign]


def _radius(patch: Patch) -> npt.NDArray[np.float64]:
    """Of a click's ball, in voxels (I, J, K)."""
    return np.asarray(np.maximum(np.asarray(patch.step) * RADIUS, RADIUS))


def _around(ijk: Ijk, reach: npt.NDArray[np.float64]) -> Box:
    start = np.floor(np.asarray(ijk) - reach).astype(int)
    stop = np.ceil(np.asarray(ijk) + reach).astype(int) + 1
    (i0, j0, k0), (i1, j1, k1) = start.tolist(), stop.tolist()
    return Box((i0, j0, k0), (i1, j1, k1))


def _index(box: Box, ijk: Ijk) -> tuple[int, int, int]:
    i, j, k = (x - a for x, a in zip(ijk, box.start, strict=True))
    return k, j, i


def _view(array: npt.NDArray[Any], box: Box, part: Box) -> npt.NDArray[Any]:
    return array[part.within(box).slices]
