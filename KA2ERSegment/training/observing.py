"""What a gate learns from: of each simulated prompt what the gate reads, and how good every decoder's answer is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from KA2ERSegment.gate import gate_query
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.training import losses
from KA2ERSegment.training.sampling import encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.stages import shown_of

SHARPNESS = 0.05
"""Dice that makes one decoder e times as good a label as another."""
MIXTURES = torch.linspace(0, 1, 21)
"""Weights of a specialist at which the Dice of the fused mask is measured; between them it is interpolated."""


@dataclass(frozen=True, slots=True)
class Observations:
    """What was seen on N prompts.

    Args:
        query: (N, 3 width + MAPS) float32, what the gate reads.
        dice: (N, K, len(MIXTURES)) float32, Dice of each specialist fused with the general decoder at these weights: at
            0 the general decoder's own, at 1 the specialist's.
        family: (N,) int64, number of the task from 1, 0 for items that no expert covers.
        click: (N,) int64, 0 the first prompt, then clicks in the error.
    """

    query: Tensor
    dice: Tensor
    family: Tensor
    click: Tensor

    def __len__(self) -> int:
        return len(self.query)

    @property
    def alone(self) -> Tensor:
        """(N, K+1) Dice of the general decoder and of each specialist."""
        return torch.cat([self.dice[:, :1, 0], self.dice[:, :, -1]], dim=1)

    @property
    def labels(self) -> Tensor:
        """(N, K+1) soft labels."""
        return (self.alone / SHARPNESS).softmax(dim=1)

    def fused(self, weights: Tensor, heard: Tensor) -> Tensor:
        """(N,) Dice of the masks that the gate's weights (N, K+1) and choice (N,) give."""
        at = weights.gather(1, heard[:, None])[:, 0].clamp(0, 1) * (len(MIXTURES) - 1)
        low = at.floor().long().clamp_max(len(MIXTURES) - 2)
        curve = self.dice[torch.arange(len(self)), (heard - 1).clamp_min(0)]
        left, right = (curve.gather(1, (low + n)[:, None])[:, 0] for n in (0, 1))
        mixed = left + (at - low) * (right - left)
        return torch.where(heard > 0, mixed, self.dice[:, 0, 0])

    @classmethod
    def joined(cls, parts: Sequence[Observations]) -> Observations:
        """All of them in one."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@torch.no_grad()
def observe(
    model: PromptableModel, batch: dict[str, Tensor], clicks: int, generator: torch.Generator
) -> Iterator[Observations]:
    """The first prompt and the clicks after it, in the error of a decoder that is drawn for each case.

    Args:
        model: with specialists.
        batch: cases as `sampling.draw_case` makes them, B at once, on the model's device.
        clicks: after the first prompt.
        generator: of that device.

    Yields:
        B observations for each prompt, on the CPU.
    """
    target = batch["target"]
    features = encoded(model, batch, shown_of(batch, generator))
    prompts = first_prompts(target, batch["box"], batch["outside"], generator)
    followed = torch.randint(len(model.specialists) + 1, (len(target),), device=target.device, generator=generator)
    for click in range(clicks + 1):
        inputs = model.decoder_inputs(features, prompts)
        embedding, _, tokens, ignore, maps = inputs
        decoders = [model.mask_decoder, *model.specialists.values()]
        logits = torch.stack([model.run_decoder(decoder, inputs).logits for decoder in decoders], dim=1)
        yield Observations(
            query=gate_query(embedding, tokens, ignore, maps, prompts).cpu(),
            dice=torch.stack([_fused_dice(logits[:, 0], own, target) for own in logits.unbind(1)[1:]], dim=1).cpu(),
            family=batch["task"].cpu(),
            click=torch.full((len(target),), click),
        )
        answers = logits[torch.arange(len(target), device=target.device), followed]
        prompts = next_prompts(prompts, answers, target, generator)


def _fused_dice(general: Tensor, specialist: Tensor, target: Tensor) -> Tensor:
    """(B, len(MIXTURES)) Dice of both fused at each weight; logits and target (B, S, S, S)."""
    one, other = specialist.sigmoid(), general.sigmoid()
    masks = (weight * one + (1 - weight) * other > 0.5 for weight in MIXTURES.tolist())
    return torch.stack([losses.dice(mask, target) for mask in masks], dim=1)
