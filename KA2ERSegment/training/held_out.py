"""What the vote brings on items that the head did not see: answers with and without it, and how the load is spread."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.training import losses, synthesis
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, draw_case, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts

SEED = 0
"""Of the cases and their prompts: the same at each call."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The vote on cases held out, after a prompt and after each click; paired, with the same prompts.

    Args:
        cases: number of patches.
        loss_before: mean of `losses.mask_loss` without the vote.
        loss_after: the same with it.
        dice_before: mean Dice of the mask without the vote.
        dice_after: the same with it.
        dice_gain_error: standard error of the mean difference of Dice over cases.
        shares: mean weight of each expert by name.
        shares_of_task: the same for the cases of each task that occurred.
        load_entropy: of the shares, 0 (one expert is heard) to 1 (all alike).
    """

    cases: int
    loss_before: float
    loss_after: float
    dice_before: float
    dice_after: float
    dice_gain_error: float
    shares: dict[str, float]
    shares_of_task: dict[str, dict[str, float]]
    load_entropy: float

    def sentence(self, whose: str) -> str:
        """For people; `whose` says what the patches are of."""
        return (
            f"On {self.cases} patches of {whose}, mean loss {self.loss_before:.4f} without and {self.loss_after:.4f} "
            f"with the vote, Dice {self.dice_before:.4f} and {self.dice_after:.4f} (standard error of the difference "
            f"{self.dice_gain_error:.4f}); load entropy {self.load_entropy:.2f} of 1."
        )


@torch.no_grad()
def compare(
    model: PromptableModel,
    items: Sequence[TrainingItem],
    options: SamplingOptions,
    tasks: Sequence[ClassMap],
    patches: int,
    clicks: int,
) -> Comparison:
    """The answer with and without the vote; the clicks are those that the answer without it needs.

    Both without the prior of domains, which sessions alone have (`sampling.encoded`).

    Args:
        model: with a voting head.
        items: that the head did not see.
        options: how cases are drawn.
        tasks: by which the shares are told apart.
        patches: number of cases.
        clicks: after the first prompt.

    Raises:
        VolumeError: no item has an object to draw a patch around.
    """
    if not any(item.boxes for item in items):
        message = f"the vote is compared on items with labels, got {len(items)} items without."
        raise VolumeError(message)
    head = model.eval().voting
    assert head is not None, "there is nothing to compare without a head"
    device = head.load.device
    generator = torch.Generator(device)
    generator.manual_seed(SEED)
    rows, shares, of_task = [], [], []
    for _, drawn in islice(cases_in_turn(items, options, tasks), patches):
        batch = {key: value[None].to(device) for key, value in drawn.items()}
        target, image = batch["target"], batch["image"]
        if not bool(drawn["real"]):
            image = synthesis.make_image(batch["labels"], target, generator)
        features = encoded(model, batch, image)
        prompts = first_prompts(target, batch["box"], batch["outside"], generator)
        row, share = torch.zeros(4), torch.zeros(len(head.names))
        for click in range(clicks + 1):
            base, maps = model.decode_base(features, prompts)
            ballot = head.ballot(features.embedding, base, maps)
            voted = head.answer(base, ballot)
            measured = [losses.mask_loss(base.logits, target), losses.mask_loss(voted, target)]
            measured += [losses.dice(base.logits > 0, target), losses.dice(voted > 0, target)]
            row += torch.cat(measured).cpu() / (clicks + 1)
            share += ballot.of_all(len(share)).mean((0, 2)).cpu() / (clicks + 1)
            if click < clicks:
                prompts = next_prompts(prompts, base.logits, target, generator)
        rows.append(row)
        shares.append(share)
        of_task.append(int(drawn["task"]))
    measures, gain = torch.stack(rows).mean(0), torch.stack([row[3] - row[2] for row in rows])
    mean = torch.stack(shares).mean(0)
    by_task = {
        task.name: torch.stack([share for share, at in zip(shares, of_task, strict=True) if at == n]).mean(0)
        for n, task in enumerate(tasks, start=1)
        if n in of_task
    }
    return Comparison(
        cases=len(rows),
        loss_before=float(measures[0]),
        loss_after=float(measures[1]),
        dice_before=float(measures[2]),
        dice_after=float(measures[3]),
        dice_gain_error=float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else 0.0,
        shares=_named(head.names, mean),
        shares_of_task={name: _named(head.names, share) for name, share in by_task.items()},
        load_entropy=load_entropy(mean),
    )


def load_entropy(shares: Tensor) -> float:
    """Entropy of shares (E,) that sum to 1, from 0 (one expert has all) to 1 (all have the same)."""
    return float(-(shares * shares.clamp_min(1e-12).log()).sum() / math.log(len(shares)))


def _named(names: Sequence[str], shares: Tensor) -> dict[str, float]:
    return {name: round(float(share), 4) for name, share in zip(names, shares, strict=True)}


def cases_in_turn(
    items: Sequence[TrainingItem], options: SamplingOptions, tasks: Sequence[ClassMap]
) -> Iterator[tuple[TrainingItem, dict[str, Tensor]]]:
    """Items and cases of them without end, the same at each call: one item of each source in turn."""
    rng = np.random.default_rng(SEED)
    sources: dict[str, list[TrainingItem]] = {}
    for item in items:
        sources.setdefault(item.source, []).append(item)
    for turn in count():
        for members in sources.values():
            item = members[turn % len(members)]
            case = draw_case(item, options, rng, tasks)
            if case is not None:
                yield item, case
