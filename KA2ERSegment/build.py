"""`build_model`: every layer's size in one file."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from KA2ERSegment.amalgamation import STRIDES, Amalgamation
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.errors import BundleError
from KA2ERSegment.gate import Gate
from KA2ERSegment.mask_decoder import MaskDecoder
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.plans import Plans
from KA2ERSegment.prompt_encoder import PromptEncoder
from KA2ERSegment.voting import VotingHead


def build_model(plans: Plans, weights: dict[str, Tensor] | None = None) -> PromptableModel:
    """The network of a bundle.

    Args:
        plans: its sizes.
        weights: by parameter name; without them the network is as initialised.

    Raises:
        BundleError: weights whose names or shapes are not the network's.
    """
    try:
        model = _network(plans)
    except BundleError:
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message = f"plans: no network can be built from them: {error!r}."
        raise BundleError(message) from error
    if weights is not None:
        load_tensors(model, weights)
    return model.eval()


def _network(plans: Plans) -> PromptableModel:
    """All layers, as initialised."""
    foundation = Foundation(plans.foundation)
    experts = {expert.name: Expert(expert) for expert in plans.experts}
    for name, expert in experts.items():
        if not expert.channels.keys() >= set(STRIDES):
            message = f"expert {name!r} must have features at strides {STRIDES}, got strides {list(expert.channels)}."
            raise BundleError(message)
    amalgamation = {
        stride: Amalgamation(
            foundation.channels[stride],
            [expert.channels[stride] for expert in experts.values()],
            plans.width,
            plans.attention_heads,
            plans.amalgamation,
        )
        for stride in STRIDES
    }
    return PromptableModel(
        stem=nn.Sequential(
            nn.Conv3d(2, plans.stem_channels, 3, padding=1),
            nn.GroupNorm(4, plans.stem_channels),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(plans.stem_channels, plans.stem_channels, 3, padding=1),
            nn.GroupNorm(4, plans.stem_channels),
            nn.LeakyReLU(0.01, inplace=True),
        ),
        foundation=foundation,
        experts=experts,
        amalgamation=amalgamation,
        merge=nn.Conv3d(2 * plans.width, plans.width, 1),
        prompt_encoder=PromptEncoder(plans.width),
        mask_decoder=_decoder(plans, foundation),
        specialists={name: _decoder(plans, foundation) for name in (plans.gate.specialists if plans.gate else ())},
        gate=Gate(plans.width, plans.gate) if plans.gate else None,
        voting=None if plans.voting is None else VotingHead(plans.voting, plans.width, plans.decoder_channels[2]),
    )


def _decoder(plans: Plans, foundation: Foundation) -> MaskDecoder:
    """The general mask decoder, or a specialist of the same shape."""
    return MaskDecoder(
        plans.width,
        plans.attention_heads,
        skips=(foundation.channels[4], foundation.channels[2], plans.stem_channels),
        channels=plans.decoder_channels,
    )


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """What a bundle stores: every learnt tensor once.

    nnU-Net registers each layer under two names; `state_dict` lists both, safetensors refuses that. Integer buffers
    (Swin's index tables) follow from the plans and are left out.
    """
    tensors = dict(module.named_parameters())
    return tensors | {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def load_tensors(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill a module with the tensors that `tensors_by_name` gave.

    Raises:
        BundleError: names or shapes are not the module's; the module is left as it was.
    """
    tensors = tensors_by_name(module)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != given:
        wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        examples = ", ".join(f"{n} (plans {expected.get(n)}, weights {given.get(n)})" for n in wrong[:3])
        message = f"weights must have the names and shapes of the plans; {len(wrong)} differ: {examples}."
        raise BundleError(message)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
