"""From prompts in patient space to what the network sees of them on one patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.prediction import FloatImage, PackedMask
from KA2ERSegment.preprocessing import Patch, sample_nearest
from KA2ERSegment.prompt_encoder import BOX_START, BOX_STOP, NEGATIVE, POSITIVE, PatchPrompts
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, MaskPrompt, PointPrompt, Polarity, Prompt, ScribblePrompt
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
        """Read all prompts on a canonical volume.

        Raises:
            PromptError: a prompt outside the volume, a mask on another grid, or two clicks of both polarities on
                one voxel.
        """
        clicks: dict[Ijk, int] = {}
        regions: list[tuple[Box, BoolArray, int]] = []
        box: Box | None = None
        flat: int | None = None
        start: PackedMask | None = None
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                message = f"a prompt must be one of the library's prompts, got {type(prompt).__name__}."
                raise PromptError(message)
            sign = 1 if prompt.polarity is Polarity.POSITIVE else -1
            match prompt:
                case PointPrompt():
                    ijk = prompt.ijk(volume)
                    if clicks.pop(ijk, sign) != sign:
                        message = (
                            f"the clicks on one voxel must agree; voxel IJK {ijk} of volume {volume.name!r} (axes "
                            f"towards R, A, S) has a click of the other polarity. Undo that one, or click beside it."
                        )
                        raise PromptError(message)
                    clicks[ijk] = sign
                case BoxPrompt() if sign > 0:
                    box, flat = prompt.box(volume), prompt.planar_axis(volume)
                case MaskPrompt() if sign > 0:
                    start = PackedMask.pack(*prompt.region(volume))
                case ScribblePrompt() | LassoPrompt() | BoxPrompt() | MaskPrompt():
                    regions.append((*prompt.region(volume), sign))
        return cls(tuple(clicks.items()), tuple(regions), box, flat, start)

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
        negative |= _on_patch(other.box, other.unpack(), patch)
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
    return np.where(_on_patch(mask.box, mask.unpack(), patch), 0.95, 0.05).astype(np.float32)


def _on_patch(box: Box, crop: BoolArray, patch: Patch) -> BoolArray:
    """Samples of the patch that a region covers: nearest voxel, and every voxel's own sample where that is coarser."""
    if box.size == 0:
        return np.zeros((patch.size,) * 3, dtype=bool)
    i, j, k = (float(o - a) for o, a in zip(patch.origin, box.start, strict=True))
    covered: BoolArray = sample_nearest(crop, Patch((i, j, k), patch.step, patch.size), outside=False)
    if max(patch.step) > 1 and crop.sum() < 100_000:  # thin regions fall between samples
        voxels = np.argwhere(crop)[:, ::-1] + np.array(box.start)
        samples = np.round(patch.to_patch(voxels)).astype(int)
        samples = samples[((samples >= 0) & (samples < patch.size)).all(axis=1)]
        covered[samples[:, 2], samples[:, 1], samples[:, 0]] = True
    return covered


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
