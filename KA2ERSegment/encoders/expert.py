"""Experts: the encoders of nnU-Nets, each trained for a task of its own, frozen ever after.

The network is built from the words of nnU-Net's own plans by nnU-Net's own library
(`dynamic_network_architectures`), so the shapes are those that nnU-Net plans.
"""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn as nn
from torch import Tensor

from KA2ERSegment.encoders.reading import network_input, on_patch
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans
from KA2ERSegment.preprocessing import RawPatch

_NAMED_IN_PLANS = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""The arguments that nnU-Net writes as dotted names (`_kw_requires_import` in its plans)."""
_ALLOWED_PACKAGES = ("torch.nn.", "dynamic_network_architectures.")


class FeatureEncoder(Protocol):
    """What the amalgamation asks of an expert."""

    channels: dict[int, int]
    """Channels of the features at each stride."""

    def __call__(self, image: Tensor) -> dict[int, Tensor]:
        """(B, 1, S, S, S) z-score to {stride: (B, C, S/stride, ...)}."""
        ...


class Expert(nn.Module):
    """The encoder of an nnU-Net v2 (Isensee et al., 2021), plain or residual, built from its plans.

    Args:
        plans: name, task and the network in nnU-Net's own words.
    """

    def __init__(self, plans: ExpertPlans) -> None:
        super().__init__()
        network = build_network(plans, deep_supervision=False)
        encoder = getattr(network, "encoder", None)
        strides, channels = stage_strides(plans.arch_kwargs), plans.arch_kwargs["features_per_stage"]
        if not isinstance(encoder, nn.Module) or not isinstance(channels, (list, tuple)):
            message = f"expert {plans.name!r}: its plans must name a U-Net with a list of features_per_stage."
            raise BundleError(message)
        self.plans = plans
        self.encoder = encoder
        self.strides = strides
        self.channels = {max(stride): count for stride, count in zip(strides, channels, strict=True)}
        if plans.reads_raw:  # `read` lays any stage on any grid
            self.channels |= {stride: channels[stage_at(strides, stride)] for stride in (8, 16)}

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Features by stride.

        Args:
            image: (B, 1, S, S, S) float32, z-score.

        Returns:
            {stride: (B, C, S/stride, ...)} for every stage of the encoder. A stage that is finer along some axes is
            averaged to the stride of its coarsest one; of several stages of one stride the last counts.
        """
        return {max(stride): _evened(f, stride) for stride, f in zip(self.strides, self.encoder(image), strict=True)}

    @property
    def reads_raw(self) -> bool:
        """Whether it reads grey values in their own unit (`read`) instead of the bundle's z-score (`forward`)."""
        return self.plans.reads_raw

    def read(self, raw: RawPatch, strides: Sequence[int]) -> dict[int, Tensor]:
        """Features of patches that are read by the expert's own plans: normalisation, spacing and order of axes.

        Args:
            raw: (B, S, S, S) grey values.
            strides: of the patch, for which features are wanted.

        Returns:
            {stride: (B, C, S/stride, ...)} on the patch's own grid (KJI), whatever grid the expert read it on.
        """
        return features_on_patch(self.encoder, self.strides, self.plans, raw, strides)


def features_on_patch(
    encoder: nn.Module,
    stages: Sequence[tuple[int, int, int]],
    plans: ExpertPlans,
    raw: RawPatch,
    strides: Sequence[int],
) -> dict[int, Tensor]:
    """Features of an nnU-Net's encoder at strides of the patch, from `stage_at`; `Expert.read` for any encoder."""
    size = raw.values.shape[-1]
    found: dict[int, list[Tensor]] = {stride: [] for stride in strides}
    for case in range(len(raw.values)):  # each has a grid of its own
        maps = encoder(network_input(plans, raw.case(case), stages[-1]))
        for stride in strides:
            found[stride].append(on_patch(maps[stage_at(stages, stride)], plans, size // stride))
    return {stride: torch.cat(cases) for stride, cases in found.items()}


def stage_at(stages: Sequence[tuple[int, int, int]], stride: int) -> int:
    """The stage whose features stand for a stride: the last one that is not coarser; the first where all are."""
    return max([n for n, total in enumerate(stages) if max(total) <= stride], default=0)


def build_network(plans: ExpertPlans, deep_supervision: bool, outputs: int = 0) -> nn.Module:
    """The whole U-Net of an expert, as nnU-Net builds it for its training.

    Args:
        plans: with one normalisation for each input channel; none is one channel.
        deep_supervision: outputs at several strides, as for training.
        outputs: of the network; by default one for each class and one for the background.

    Raises:
        BundleError: a class outside torch and nnU-Net's own library, or arguments that it refuses.
    """
    arguments = dict(plans.arch_kwargs)
    for key in _NAMED_IN_PLANS:
        if isinstance(arguments.get(key), str):
            arguments[key] = _locate(arguments[key], plans.name)
    network_class = _locate(plans.network_class_name, plans.name)
    try:
        network = network_class(
            input_channels=max(1, len(plans.normalisation)),
            num_classes=outputs or len(plans.classes) + 1,
            deep_supervision=deep_supervision,
            **arguments,
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message = f"expert {plans.name!r}: nnU-Net's library refuses its plans: {error}"
        raise BundleError(message) from error
    return cast("nn.Module", network)


def _locate(name: str, expert: str) -> Any:
    """A class by its dotted name; only from torch.nn and nnU-Net's own library, as a bundle is not to run code."""
    try:
        found = pydoc.locate(name) if name.startswith(_ALLOWED_PACKAGES) else None
    except pydoc.ErrorDuringImport:
        found = None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        message = f"expert {expert!r}: its plans name {name!r}, which is no network class of torch.nn or nnU-Net."
        raise BundleError(message)
    return found


def _evened(features: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Features of one stride along all axes."""
    if len(set(stride)) == 1:
        return features
    return nn.functional.avg_pool3d(features, [max(stride) // n for n in stride])


def stage_strides(arch_kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Stride of each stage's features against the input along K, J, I; nnU-Net may write one number or one per axis."""
    total, strides = (1, 1, 1), []
    stages = arch_kwargs["strides"]
    if not isinstance(stages, (list, tuple)):
        message = f"expert strides must be a list with one entry for each stage, got {stages!r}."
        raise BundleError(message)
    for stage in stages:
        steps = list(stage) if isinstance(stage, (list, tuple)) else [stage] * 3
        if len(steps) != 3 or not all(isinstance(step, int) and step > 0 for step in steps):
            message = f"expert strides must be whole numbers along three axes, got {stage!r} in {stages}."
            raise BundleError(message)
        total = (total[0] * steps[0], total[1] * steps[1], total[2] * steps[2])
        if any(max(total) % stride for stride in total):
            message = f"expert strides must divide each other along the axes of a stage, got {total} from {stages}."
            raise BundleError(message)
        strides.append(total)
    return strides
