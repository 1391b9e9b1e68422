"""A patch as an nnU-Net reads it: normalised by its own plans, at its own spacing, in its own order of axes.

After nnU-Net v2's preprocessing (Isensee et al., 2021): the same schemes with the same numbers. What differs: the grid
covers the patch exactly, in a number of samples that the network can halve as often as it does, so the spacing is that
of the plans to the nearest such number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from KA2ERSegment.plans import ExpertPlans, Normalisation
from KA2ERSegment.preprocessing import RawPatch, resample

Shape = tuple[int, int, int]

MAX_SAMPLES = 96
"""Along each axis of what an expert reads: a patch that needs more is read more coarsely, so that a CPU keeps up."""
_LEAST = 1e-8
"""Smallest deviation that nnU-Net divides by."""


def network_input(plans: ExpertPlans, raw: RawPatch, deepest: Shape) -> Tensor:
    """One patch as the network reads it.

    Args:
        plans: with a spacing, a normalisation for each channel, and an order of axes.
        raw: one patch, B = 1.
        deepest: total stride of the network's last stage, along its own axes.

    Returns:
        (1, channels, ...) float32, along the network's own axes.
    """
    values = torch.stack([normalised(raw, channel) for channel in plans.normalisation], dim=1)
    extent = (raw.step[0] * values.shape[-1]).tolist()
    axes = _axes(plans)
    shape = [samples(extent[axis], plans.spacing_kji[axis], stride) for axis, stride in zip(axes, deepest, strict=True)]
    values = values.permute(0, 1, *(axis + 2 for axis in axes))
    return resample(values, (shape[0], shape[1], shape[2]))


def on_patch(values: Tensor, plans: ExpertPlans, size: int) -> Tensor:
    """What the network gave, (1, C, ...) along its own axes, on (1, C, size, size, size) samples of the patch (KJI)."""
    axes = _axes(plans)
    return resample(values.permute(0, 1, *(axes.index(axis) + 2 for axis in range(3))), (size, size, size))


def samples(extent: float, spacing: float, stride: int) -> int:
    """Number of samples along an axis.

    Args:
        extent: of the patch, mm.
        spacing: of the plans, mm.
        stride: the number is a multiple of it, at least twice as large, and at most `MAX_SAMPLES` where it can be.
    """
    most = max(MAX_SAMPLES // stride, 2)
    return stride * min(max(round(extent / spacing / stride), 2), most)


def normalised(raw: RawPatch, channel: Normalisation) -> Tensor:
    """Grey values by one of nnU-Net's schemes, (B, S, S, S) float32; 0 outside the volume, as nnU-Net pads.

    An image without a unit, made from labels, is moved to where the scheme expects values: by its own z-score.
    """
    values = raw.values
    mean, std, tissue_mean, tissue_std, low, high = (number[:, None, None, None] for number in raw.statistics.unbind(1))
    if channel.scheme == "ZScoreNormalization":
        if channel.use_mask:
            found = (values - tissue_mean) / tissue_std.clamp_min(_LEAST) * (values != 0)
        else:
            found = (values - mean) / std.clamp_min(_LEAST)
    elif channel.scheme == "RescaleTo01Normalization":
        found = (values - low) / (high - low).clamp_min(_LEAST)
    elif channel.scheme == "RGBTo01Normalization":
        found = values.clamp(0, 255) / 255
    elif channel.scheme == "CTNormalization":
        zscore = (values - mean) / std.clamp_min(_LEAST)
        unit = raw.has_unit[:, None, None, None]
        values = torch.where(unit, values, zscore * channel.std + channel.mean)
        found = (values.clamp(channel.percentile_00_5, channel.percentile_99_5) - channel.mean) / channel.std
    else:
        found = values
    return found * raw.inside


def _axes(plans: ExpertPlans) -> tuple[int, ...]:
    return plans.axes or (0, 1, 2)
