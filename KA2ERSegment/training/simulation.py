"""Prompts as users give them, simulated on the device: a box or not, then clicks in the error."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.prompt_encoder import BOX_START, BOX_STOP, NEGATIVE, NOT_A_POINT, POSITIVE, PatchPrompts


def first_prompts(target: Tensor, box: Tensor, outside: Tensor, generator: torch.Generator) -> PatchPrompts:
    """What the user gives before there is a mask: the box where there is one, else a click.

    Args:
        target: (B, S, S, S) bool.
        box: (B, S, S, S) bool, all false without box.
        outside: (B, S, S, S) bool, known outside of the box.
        generator: of the device.
    """
    batch = len(target)
    empty = torch.zeros_like(target)
    prompts = PatchPrompts(
        points=torch.zeros(batch, 0, 3, device=target.device),
        labels=torch.zeros(batch, 0, dtype=torch.long, device=target.device),
        positive=empty,
        negative=empty,
        box=box,
        outside=outside,
        previous=torch.full(target.shape, 0.5, device=target.device),
    )
    has_box = box.flatten(1).any(1)
    start, stop = box_corners(box)
    prompts = _with_points(prompts, start, torch.where(has_box, BOX_START, NOT_A_POINT))
    prompts = _with_points(prompts, stop, torch.where(has_box, BOX_STOP, NOT_A_POINT))
    return _with_click(prompts, target & ~has_box[:, None, None, None], empty, generator)


def next_prompts(prompts: PatchPrompts, logits: Tensor, target: Tensor, generator: torch.Generator) -> PatchPrompts:
    """One more click, in the middle of the thickest error; cases without error get none.

    Args:
        prompts: so far.
        logits: (B, S, S, S), the answer to them.
        target: (B, S, S, S) bool.
        generator: of the device.
    """
    mask = logits > 0
    prompts = replace(prompts, previous=logits.detach().float().sigmoid())
    return _with_click(prompts, target & ~mask, mask & ~target, generator)


def box_corners(box: Tensor) -> tuple[Tensor, Tensor]:
    """First and last corner of boxes (B, S, S, S) as sample index KJI, (B, 3) float32 each; outer faces."""
    starts, stops = [], []
    for axis in (1, 2, 3):
        extent = box.amax(dim=[a for a in (1, 2, 3) if a != axis]).float()  # (B, S)
        starts.append(extent.argmax(1) - 0.5)
        stops.append(extent.shape[1] - extent.flip(1).argmax(1) - 0.5)
    return torch.stack(starts, dim=1), torch.stack(stops, dim=1)


def _with_click(
    prompts: PatchPrompts, misses: Tensor, false_positives: Tensor, generator: torch.Generator
) -> PatchPrompts:
    errors = misses | false_positives
    depth = _depth(misses) + _depth(false_positives)
    # the deepest sample, mostly; now and then any sample of the error, as hands are no distance transforms
    noise = torch.rand(depth.shape, device=depth.device, generator=generator)
    sloppy = torch.rand(len(depth), 1, 1, 1, device=depth.device, generator=generator) < 0.25
    score = torch.where(sloppy, noise, depth + 0.02 * noise) * errors
    at = score.flatten(1).argmax(1)
    size = errors.shape[-1]
    point = torch.stack([at // size**2, at // size % size, at % size], dim=1)
    has_error = errors.flatten(1).any(1)
    is_miss = misses.flatten(1).gather(1, at[:, None])[:, 0]
    label = torch.where(has_error, torch.where(is_miss, POSITIVE, NEGATIVE), NOT_A_POINT)
    seeds = torch.zeros_like(errors).flatten(1).scatter(1, at[:, None], has_error[:, None]).view_as(errors)
    is_positive = (label == POSITIVE)[:, None, None, None]
    prompts = replace(
        prompts, positive=prompts.positive | (seeds & is_positive), negative=prompts.negative | (seeds & ~is_positive)
    )
    return _with_points(prompts, point.float(), label)


def _depth(error: Tensor) -> Tensor:
    """A cheap stand-in for the distance transform: how full of error three neighbourhoods are, 0..3."""
    values = error[:, None].float()
    depth = torch.zeros_like(values)
    for n in (3, 7, 13):
        pooled = values
        for axis in range(3):  # one axis at a time: a whole 13^3 window costs fifty times as much on a CPU
            window = [n if a == axis else 1 for a in range(3)]
            pooled = F.avg_pool3d(pooled, window, stride=1, padding=[w // 2 for w in window])
        depth = depth + pooled
    return depth[:, 0] * error


def _with_points(prompts: PatchPrompts, points: Tensor, labels: Tensor) -> PatchPrompts:
    return replace(
        prompts,
        points=torch.cat([prompts.points, points[:, None]], dim=1),
        labels=torch.cat([prompts.labels, labels[:, None]], dim=1),
    )
