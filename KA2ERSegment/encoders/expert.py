"""Experts: the encoders of nnU-Nets, each trained for a task of its own, frozen ever after.

The network is built from the words of nnU-Net's own plans by nnU-Net's own library
(`dynamic_network_architectures`), so the shapes are those that nnU-Net plans.
"""

from __future__ import annotations

import pydoc
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch.nn as nn
from torch import Tensor

from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans

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
        strides, channels = _strides(plans.arch_kwargs), plans.arch_kwargs["features_per_stage"]
        if not isinstance(encoder, nn.Module) or not isinstance(channels, (list, tuple)):
            message = f"expert {plans.name!r}: its plans must name a U-Net with a list of features_per_stage."
            raise BundleError(message)
        self.encoder = encoder
        self.channels = dict(zip(strides, channels, strict=True))

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Features by stride.

        Args:
            image: (B, 1, S, S, S) float32, z-score.

        Returns:
            {stride: (B, C, S/stride, ...)} for every stage of the encoder.
        """
        return dict(zip(self.channels, self.encoder(image), strict=True))


def build_network(plans: ExpertPlans, deep_supervision: bool) -> nn.Module:
    """The whole U-Net of an expert, as nnU-Net builds it for its training.

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
            input_channels=1, num_classes=len(plans.classes) + 1, deep_supervision=deep_supervision, **arguments
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


def _strides(arch_kwargs: Mapping[str, Any]) -> list[int]:
    """Stride of each stage's features against the input; nnU-Net may write one number or one per axis."""
    total, strides = 1, []
    stages = arch_kwargs["strides"]
    if not isinstance(stages, (list, tuple)):
        message = f"expert strides must be a list with one entry for each stage, got {stages!r}."
        raise BundleError(message)
    for stride in stages:
        steps = stride if isinstance(stride, (list, tuple)) else [stride]
        if len(set(steps)) != 1:
            message = f"expert strides must be the same along all axes, got {stages}."
            raise BundleError(message)
        total *= int(steps[0])
        strides.append(total)
    return strides
