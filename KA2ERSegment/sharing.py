"""From the network's answer to an object's final mask: clicks honoured, a hand's edits kept, neighbours respected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from KA2ERSegment.cancellation import checkpoint
from KA2ERSegment.constraints import SPECK, click_reach, honour, remove_specks
from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.prediction import FloatImage, PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch, upsample
from KA2ERSegment.rasterise import Evidence
from KA2ERSegment.refinement import Detail
from KA2ERSegment.states import NO_MASK, NOTHING, Drawing, ObjectState
from KA2ERSegment.steps import Neighbours
from KA2ERSegment.volume import Volume
from KA2ERSegment.zoom import Answer, mask_voxels

Others = Sequence[tuple[str, ObjectState, Prediction]]

HELD = 3.0
"""Samples of the patch: how far around what a hand changed the mask is held as well."""
NEAR = 12.0
"""Samples of the patch: how far from a prompt it may change what a hand drew."""
BY_HAND = np.float32(10.0)
"""Logit of a voxel that a hand has set."""


def refuse_claimed(newest: Evidence, mine: PackedMask, others: Others, neighbours: Neighbours, name: str) -> None:
    """A positive click may take a voxel from another object, but not from a locked one nor another's own click.

    Args:
        newest: the newest prompt alone.
        mine: the object's mask so far: what it shares already, it takes from nobody.
        others: with a mask.
        neighbours: what they may lose.
        name: of the object.

    Raises:
        PromptError: it would, or the neighbours keep their voxels.
    """
    if neighbours is Neighbours.OVERLAP:
        return
    clicks = [ijk for ijk, sign in newest.clicks if sign > 0]
    for other, state, prediction in others:
        claimed = set(_positive(state))
        for ijk in clicks:
            if not prediction.packed.contains(ijk):
                continue
            if state.locked:
                message = (
                    f"a positive click must lie outside locked objects; the click lies in {other!r}. "
                    f"Unlock {other!r}, or click beside it."
                )
                raise PromptError(message)
            if ijk in claimed:
                message = (
                    f"a voxel can only belong to one object; the click for {name!r} lies on the voxel of "
                    f"a positive click for {other!r}. Undo that one, or click beside it."
                )
                raise PromptError(message)
            if neighbours is Neighbours.KEEP and not mine.contains(ijk):
                message = (
                    f"a positive click must lie outside other objects; its voxel belongs to {other!r} and neighbours "
                    f"keep their voxels. Choose that neighbours compete or overlap, or click beside it."
                )
                raise PromptError(message)


def seen_as_outside(own: ObjectState, others: Others, neighbours: Neighbours) -> list[PackedMask]:
    """What the network is told of the other objects: their voxels, but for those that are this object's too."""
    if neighbours is Neighbours.OVERLAP:
        return []
    return [_without(prediction.packed, own.mask) for _, _, prediction in others]


def final_mask(
    own: ObjectState,
    answer: Answer,
    detail: Detail,
    others: Others,
    neighbours: Neighbours,
    before: PackedMask,
    canonical: Volume,
) -> PackedMask:
    """The mask at the volume's own resolution.

    Each voxel that another object has goes to the more probable of the two; where neighbours keep theirs, and to
    locked objects, it is not given. What this object had before is no longer contested.

    Args:
        own: the object, its evidence with the newest prompt.
        answer: the network's, finished.
        detail: its logits on a finer grid, where there is one.
        others: with a mask.
        neighbours: what they may lose.
        before: the object's mask so far.
        canonical: the volume.
    """
    domain = answer.patch.box(canonical.shape_kji)
    if neighbours is Neighbours.OVERLAP:
        others = []
    clicks = list(own.evidence.clicks)
    for _, state, prediction in others:
        clicks += [
            (ijk, -1) for ijk in _positive(state) if prediction.packed.contains(ijk) and not before.contains(ijk)
        ]
    clicks = list(dict.fromkeys(clicks))
    candidates = mask_voxels(answer).intersect(domain)
    box = candidates if own.drawing is None else candidates.union(own.drawing.mask.box)
    for ijk, sign in clicks:
        near = click_reach(answer.patch, ijk).dilate(SPECK).intersect(domain)
        if sign > 0 or near.intersect(candidates).size:
            box = box.union(near)
    checkpoint()
    logits = detail.at_voxels(box)
    drawn = None if own.drawing is None else _draw(own.drawing, answer.patch, logits, box, canonical)
    blocked = np.zeros(box.shape_kji, dtype=bool)
    for _, state, prediction in others:
        checkpoint()
        common = prediction.packed.box.intersect(box)
        if common.size == 0:
            continue
        theirs = prediction.packed.on(common)
        if before.box.intersect(common).size:
            theirs &= ~before.on(common)
        contested = Box.around(theirs)
        if contested is None:
            continue
        theirs, common = contested.crop(theirs), contested.shift(common.start)
        inside = common.within(box).slices
        if state.locked or neighbours is Neighbours.KEEP:
            blocked[inside] |= theirs
        else:  # by how much this object is the more probable one
            lead = np.maximum(prediction.at_voxels(common), 0)
            logits[inside] -= np.where(theirs, lead, 0)
    checkpoint()
    return PackedMask.pack(box, honour(logits, box, answer.patch, clicks, blocked, drawn))


def losers(
    mine: PackedMask, before: PackedMask, others: Others, canonical: Volume
) -> tuple[Mapping[str, ObjectState], Box]:
    """Other objects that lose voxels to what a mask gained, and a canonical box around all that they lose.

    What is left of them has no new specks. Locked objects lose nothing. What a hand drew of them is lost as well: their
    own next prompt does not take it back.
    """
    changed: dict[str, ObjectState] = {}
    touched = NOTHING
    for name, state, other in others:
        common = other.packed.box.intersect(mine.box)
        if state.locked or common.size == 0:
            continue
        gained = other.packed.on(common) & mine.on(common)
        if before.box.intersect(common).size:
            gained &= ~before.on(common)
        lost = Box.around(gained)
        if lost is None:
            continue
        checkpoint()
        box = other.packed.box
        rest = other.packed.unpack()
        rest[common.within(box).slices] &= ~gained
        near = lost.shift(common.start).dilate(1).intersect(box)
        remove_specks(rest, box, near, _positive(state))
        reach = near.dilate(SPECK).intersect(box)
        packed = PackedMask.pack(box, rest)
        shrunk = replace(other, packed=packed, changed=other.volume.from_canonical_box(reach))
        drawing = state.drawing and replace(
            state.drawing, mask=_without(state.drawing.mask, _without(other.packed, packed))
        )
        changed[name] = replace(state, prediction=shrunk, drawing=drawing)
        touched = touched.union(reach)
    return changed, touched


# -- edits by hand -----------------------------------------------------------------------------------------------------


def by_hand(mask: PackedMask, others: Others, neighbours: Neighbours) -> PackedMask:
    """What of a mask drawn by hand is the object's: all of it, but for voxels that others keep."""
    if neighbours is Neighbours.OVERLAP:
        return mask
    for _, state, prediction in others:
        if state.locked or neighbours is Neighbours.KEEP:
            mask = _without(mask, prediction.packed)
    return mask


def drawing_of(own: ObjectState, mask: PackedMask, answer: Answer, detail: Detail, canonical: Volume) -> Drawing:
    """What a hand made of an object that looked as `own` until then.

    Args:
        own: the object before.
        mask: the object's after.
        answer: that the mask stands for, finished.
        detail: of its logits.
        canonical: the volume.
    """
    held = own.drawing.held if own.drawing else NO_MASK
    both = own.mask.box.union(mask.box)
    touched = own.mask.on(both) != mask.on(both)
    extent = Box.around(touched)
    if extent is not None:
        reach = _voxels(HELD, answer.patch)
        wide = _grown(extent.shift(both.start), reach).intersect(Box.of_shape(canonical.shape_kji))
        around = np.zeros(wide.shape_kji, dtype=bool)
        extent.shift(both.start).within(wide).paste(extent.crop(touched), around)
        whole = wide.union(held.box)
        voxels = held.on(whole)
        wide.within(whole).crop(voxels)[...] |= _widened(around, reach)
        held = PackedMask.pack(whole, voxels)
    logits = answer.logits if detail.patch == answer.patch else detail.logits.astype(np.float16)  # kept for undo
    return Drawing(mask, held, detail.patch, logits)


def close_to(newest: Evidence, patch: Patch) -> tuple[Box, ...]:
    """Where a prompt may change what a hand drew: on it, and a little around it."""
    boxes = [Box(ijk, (ijk[0] + 1, ijk[1] + 1, ijk[2] + 1)) for ijk, _ in newest.clicks]
    boxes += [box for box, _, _ in newest.regions]
    boxes += [newest.box] if newest.box is not None else []
    return tuple(_grown(box, _voxels(NEAR, patch)) for box in boxes)


def _voxels(samples: float, patch: Patch) -> Ijk:
    """So many samples of a patch in voxels, never fewer than so many voxels."""
    i, j, k = (int(np.ceil(samples * max(step, 1.0))) for step in patch.step)
    return i, j, k


def _grown(box: Box, reach: Ijk) -> Box:
    (i0, j0, k0), (i1, j1, k1), (i, j, k) = box.start, box.stop, reach
    return Box((i0 - i, j0 - j, k0 - k), (i1 + i, j1 + j, k1 + k))


def _draw(drawing: Drawing, patch: Patch, logits: FloatImage, box: Box, canonical: Volume) -> BoolArray:
    """Put a hand's mask into the logits of a box, but for what the network changed since.

    Returns:
        (K, J, I), voxels that are as the hand left them and held so.
    """
    checkpoint()
    then = upsample(drawing.logits.astype(np.float32), drawing.patch, box) > 0
    then &= _within(drawing.patch.box(canonical.shape_kji), box)
    held = drawing.held.on(box)
    free = ~held
    for near in drawing.near:
        free |= _within(near, box)
    # outside its patch the network says nothing, and changes nothing
    changed = ((logits > 0) != then) & free & _within(patch.box(canonical.shape_kji), box)
    np.copyto(logits, np.where(drawing.mask.on(box), BY_HAND, -BY_HAND), where=~changed)
    return np.asarray(held & ~changed)


def _within(part: Box, box: Box) -> BoolArray:
    """(K, J, I), voxels of a box that lie in a part of it."""
    inside = np.zeros(box.shape_kji, dtype=bool)
    common = part.intersect(box)
    if common.size:
        common.within(box).crop(inside)[...] = True
    return inside


def _without(mask: PackedMask, other: PackedMask) -> PackedMask:
    common = mask.box.intersect(other.box)
    if common.size == 0:
        return mask
    both = mask.on(common) & other.on(common)
    if not both.any():
        return mask
    rest = mask.unpack()
    common.within(mask.box).crop(rest)[...] &= ~both
    return PackedMask.pack(mask.box, rest)


def _widened(voxels: BoolArray, reach: Sequence[int]) -> BoolArray:
    """Grown by a box of `reach` voxels (I, J, K) to each side."""
    for axis, steps in zip((2, 1, 0), reach, strict=True):
        done = 0
        while done < steps:  # twice as far each time
            step = min(done + 1, steps - done)
            wide = voxels.copy()
            length = voxels.shape[axis] - step
            if length <= 0:
                wide[...] = voxels.any(axis=axis, keepdims=True)
            else:
                low, high = _ends(axis, step)
                wide[low] |= voxels[high]
                wide[high] |= voxels[low]
            voxels, done = wide, done + step
    return voxels


def _ends(axis: int, step: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """All but the last `step` planes along an axis, and all but the first."""
    low, high = [slice(None)] * 3, [slice(None)] * 3
    low[axis], high[axis] = slice(None, -step), slice(step, None)
    return tuple(low), tuple(high)


def _positive(state: ObjectState) -> list[Ijk]:
    return [ijk for ijk, sign in state.evidence.clicks if sign > 0]
