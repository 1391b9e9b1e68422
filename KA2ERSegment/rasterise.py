"""From prompts in patient space to what the network sees of them on one patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.prediction import FloatImage, PackedMask
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompt_encoder import BOX_START, BOX_STOP, NEGATIVE, POSITIVE, PatchPrompts
from KA2ERSegment.prompts import BoxPrompt, MaskPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.volume import Volume

MAX_POINTS = 16
"""Newest clicks that become tokens; all of them are on the maps."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The prompts of one object as voxels of the canonical volume, oldest first.

    Args:
        clicks: voxel and sign of each point prompt.
        regions: covered voxels (box, crop) and sign of scribbles, lassos and negative boxes.
        box: of the newest positive box, None without one.
        flat: the axis along which that box is drawn on one slice, None for a 3D box.
        start: the newest mask to start from, None without one.
    """

    clicks: tuple[tuple[Ijk, int], ...] = ()
    regions: tuple[tuple[Box, BoolArray, int], ...] = ()
    box: Box | None = None
    flat: int | None = None
    start: PackedMask | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt], volume: Volume) -> Evidence:
        """Read prompts on a canonical volume; raises as `plus` does."""
        evidence = cls()
        for prompt in prompts:
            evidence = evidence.plus(prompt, volume)
        return evidence

    def plus(self, prompt: Prompt, volume: Volume) -> Evidence:
        """With one more prompt.

        Raises:
            PromptError: a prompt outside the volume, a mask without a voxel or on another grid, or a click on the
                voxel of one of the other polarity.
        """
        if not isinstance(prompt, Prompt):
            message = f"a prompt must be one of the library's prompts, got {type(prompt).__name__}."
            raise PromptError(message)
        sign = 1 if prompt.polarity is Polarity.POSITIVE else -1
        match prompt:
            case PointPrompt():
                ijk = prompt.ijk(volume)
                if (ijk, -sign) in self.clicks:
                    message = (
                        f"the clicks on one voxel must agree; voxel IJK {ijk} of volume {volume.name!r} (axes "
                        f"towards R, A, S) has a click of the other polarity. Undo that one, or click beside it."
                    )
                    raise PromptError(message)
                return replace(self, clicks=(*(click for click in self.clicks if click[0] != ijk), (ijk, sign)))
            case BoxPrompt() if sign > 0:
                return replace(self, box=prompt.box(volume), flat=prompt.planar_axis(volume))
            case MaskPrompt() if prompt.box.size == 0:
                message = "a mask prompt must mark at least one voxel, got an empty one. Leave it out."
                raise PromptError(message)
            case MaskPrompt() if sign > 0:
                return replace(self, start=PackedMask.pack(*prompt.region(volume)))
            case _:
                return replace(self, regions=(*self.regions, (*prompt.region(volume), sign)))

    def under(self, mask: PackedMask) -> Evidence:
        """What is left of it once a hand has drawn the object's mask: nothing that contradicts it.

        The mask is what the network starts from. Clicks on the wrong side of it no longer count, nor does that part of
        a region, nor a box that it leaves.
        """
        clicks = tuple((ijk, sign) for ijk, sign in self.clicks if mask.contains(ijk) == (sign > 0))
        regions = []
        for box, crop, sign in self.regions:
            inside = mask.on(box)
            agreeing = crop & (inside if sign > 0 else ~inside)
            if agreeing.any():
                regions.append((box, agreeing, sign))
        start = mask if mask.box.size else None
        if self.box is None or start is None or self.box.intersect(mask.box) != mask.box:
            return Evidence(clicks, tuple(regions), start=start)
        return Evidence(clicks, tuple(regions), self.box, self.flat, start)

    def extent(self) -> Box | None:
        """Smallest box around everything positive; None where nothing is."""
        boxes = [Box(ijk, (ijk[0] + 1, ijk[1] + 1, ijk[2] + 1)) for ijk, sign in self.clicks if sign > 0]
        boxes += [box for box, _, sign in self.regions if sign > 0]
        boxes += [box for box in (self.box, self.start.box if self.start else None) if box is not None]
        extent = boxes[0] if boxes else None
        for box in boxes[1:]:
            extent = box.union(extent) if extent is not None else box
        return extent


def patch_prompts(
    evidence: Evidence, patch: Patch, previous: FloatImage | None, others: Sequence[PackedMask]
) -> PatchPrompts:
    """The prompts of one object on a patch, a batch of one.

    Args:
        evidence: the object's prompts.
        patch: where the network looks.
        previous: (S, S, S) probability of the mask so far, or None.
        others: masks of the other objects; they count as outside.
    """
    size = patch.size
    positive = np.zeros((size, size, size), dtype=bool)
    negative = np.zeros_like(positive)
    for other in others:
        negative |= samples_in(other, patch)
    for box, crop, sign in evidence.regions:  # the newest wins
        covered = _on_patch(box, crop, patch)
        (positive if sign > 0 else negative)[covered] = True
        (negative if sign > 0 else positive)[covered] = False
    points: list[npt.NDArray[np.float64]] = []
    labels: list[int] = []
    inside, outside = np.zeros_like(positive), np.zeros_like(positive)
    if evidence.box is not None:
        inside, outside = _box_maps(evidence.box, evidence.flat, patch)
        points += [patch.to_patch(np.array(corner) - 0.5)[::-1] for corner in (evidence.box.start, evidence.box.stop)]
        labels += [BOX_START, BOX_STOP]
    seen = [(ijk, sign) for ijk, sign in evidence.clicks if patch.contains(ijk)]
    for ijk, sign in seen:
        sample = patch.to_patch(ijk)[::-1]
        k, j, i = np.clip(np.round(sample).astype(int), 0, size - 1)
        positive[k, j, i], negative[k, j, i] = sign > 0, sign < 0
    for ijk, sign in seen[-MAX_POINTS:]:
        points.append(patch.to_patch(ijk)[::-1])
        labels.append(POSITIVE if sign > 0 else NEGATIVE)
    for box, crop, sign in evidence.regions:  # a token for the middle voxel of a region
        covered_voxels = np.flatnonzero(crop)
        kji = np.unravel_index(covered_voxels[len(covered_voxels) // 2], crop.shape)
        middle = np.array(kji[::-1]) + np.array(box.start)
        if patch.contains(middle):
            points.append(patch.to_patch(middle)[::-1])
            labels.append(POSITIVE if sign > 0 else NEGATIVE)
    coordinates = np.array(points, dtype=np.float32).reshape(1, -1, 3)
    if previous is None:
        previous = np.full(positive.shape, 0.5, dtype=np.float32)
    return PatchPrompts(
        points=torch.from_numpy(coordinates),
        labels=torch.tensor([labels], dtype=torch.long).reshape(1, -1),
        positive=torch.from_numpy(positive)[None],
        negative=torch.from_numpy(negative)[None],
        box=torch.from_numpy(inside)[None],
        outside=torch.from_numpy(outside)[None],
        previous=torch.from_numpy(np.ascontiguousarray(previous, dtype=np.float32))[None],
    )


def mask_on_patch(mask: PackedMask, patch: Patch) -> FloatImage:
    """A mask to start from, as a probability (S, S, S): nearly sure, so that clicks can still change it."""
    return np.where(samples_in(mask, patch), 0.95, 0.05).astype(np.float32)


def samples_in(mask: PackedMask, patch: Patch) -> BoolArray:
    """(S, S, S), samples of a patch that a mask covers; a part thinner than a sample covers the nearest one."""
    if not _touches(mask.box, patch):
        return np.zeros((patch.size,) * 3, dtype=bool)
    return _on_patch(mask.box, mask.unpack(), patch)


def _on_patch(box: Box, crop: BoolArray, patch: Patch) -> BoolArray:
    """Samples of the patch that a region covers: nearest voxel, and every voxel's own sample where that is coarser."""
    covered = np.zeros((patch.size,) * 3, dtype=bool)
    if not _touches(box, patch):
        return covered
    voxels_of, samples_of = [], []
    for axis in (2, 1, 0):
        nearest = np.floor(patch.origin[axis] + patch.step[axis] * np.arange(patch.size) + 0.5).astype(int)
        inside = np.flatnonzero((nearest >= box.start[axis]) & (nearest < box.stop[axis]))
        samples_of.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0))
        voxels_of.append(nearest[inside] - box.start[axis])
    covered[tuple(samples_of)] = crop[np.ix_(*voxels_of)]
    if max(patch.step) > 1 and crop.sum() < 100_000:  # thin regions fall between samples
        voxels = np.argwhere(crop)[:, ::-1] + np.array(box.start)
        samples = np.round(patch.to_patch(voxels)).astype(int)
        samples = samples[((samples >= 0) & (samples < patch.size)).all(axis=1)]
        covered[samples[:, 2], samples[:, 1], samples[:, 0]] = True
    return covered


def _touches(box: Box, patch: Patch) -> bool:
    """Whether a region of that box can cover a sample of a patch."""
    start, stop = patch.faces
    return bool(box.size and (stop > box.start).all() and (start < box.stop).all())


def _box_maps(box: Box, flat: int | None, patch: Patch) -> tuple[BoolArray, BoolArray]:
    """Inside of a box, and where it says "outside": everywhere, or only in its own slice for a flat one."""
    inside = np.ones((patch.size,) * 3, dtype=bool)
    slab = np.ones_like(inside)
    start, stop = patch.to_patch(np.array(box.start) - 0.5), patch.to_patch(np.array(box.stop) - 0.5)
    at = np.arange(patch.size)
    for axis in range(3):
        within = (at >= start[axis]) & (at < stop[axis])
        if not within.any():  # thinner than a sample
            within[int(np.clip(round((start[axis] + stop[axis]) / 2), 0, patch.size - 1))] = True
        within = within.reshape([-1 if a == 2 - axis else 1 for a in range(3)])
        inside &= within
        if axis == flat:
            slab &= within
    return inside, slab & ~inside
