"""Variants of the amalgamation around the same frozen encoders, and how one is trained on encoded patches."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.convolution import SoundConvolution
from KA2ERSegment.experts import Content
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.plans import AmalgamationPlans, Plans
from KA2ERSegment.training import losses
from KA2ERSegment.training.amalgamation import draw_arms, shares_of_all
from KA2ERSegment.training.distillation import Distillation, overhear
from KA2ERSegment.training.encoded import EncodedBatch, EncodedCase, together
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.stages import seeded

FRESH, FURTHER = 1e-3, 3e-4
"""Learning rates of what begins anew and of what goes on."""
DECAY = 0.98
"""Of the moving average of the weights, which is what a variant leaves."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table.

    Args:
        plans: how experts' features meet the foundation's.
        features: weight of feature distillation.
    """

    plans: AmalgamationPlans
    features: float = 0.5


VARIANTS = {
    "foundation": Variant(AmalgamationPlans("foundation"), features=0.0),
    "concatenation": Variant(AmalgamationPlans("concatenation")),
    "cross_attention": Variant(AmalgamationPlans("cross_attention")),
    "hierarchical": Variant(AmalgamationPlans("hierarchical")),
    "without_no_expert": Variant(AmalgamationPlans("hierarchical", no_expert=False)),
    "without_features": Variant(AmalgamationPlans("hierarchical"), features=0.0),
}
"""In the order in which they are trained."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What each variant may use.

    Args:
        steps: of the optimizer.
        batch: cases of one step.
        minutes: at most; a variant that needs more stops early, which its line says. 0: no limit.
        seed: of first weights, cases and prompts.
    """

    steps: int
    batch: int = 2
    minutes: float = 0.0
    seed: int = 0


def variant_plans(start: Plans, variant: Variant) -> Plans:
    """The plans of a bundle with another amalgamation; no gate, no vote, and no experts where none is asked."""
    experts = () if variant.plans.kind == "foundation" else start.experts
    return replace(start, amalgamation=variant.plans, experts=experts, gate=None, voting=None, calibration={})


def variant_model(start: Content, variant: Variant, seed: int) -> PromptableModel:
    """The model of a bundle with another amalgamation, which begins anew; all else begins as the bundle has it."""
    with seeded(seed):  # the largest: layers that others share begin alike
        fresh = tensors_by_name(build_model(variant_plans(start.plans, VARIANTS["hierarchical"])))
    with seeded(seed):
        model = build_model(variant_plans(start.plans, variant))
    own = tensors_by_name(model)
    for name, tensor in own.items():
        given = fresh if name.startswith(("amalgamation.", "merge.")) else start.tensors
        own[name] = given[name] if name in given and given[name].shape == tensor.shape else tensor
    load_tensors(model, own)
    for frozen in (model.stem, model.foundation, model.experts):
        frozen.requires_grad_(False)
    return model


def train_variant(
    model: PromptableModel,
    variant: Variant,
    cases: Sequence[EncodedCase],
    budget: Budget,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[PromptableModel, int]:
    """Train amalgamation, prompt encoder and mask decoder on encoded cases.

    Args:
        model: as `variant_model` gives it, on its device.
        variant: to train.
        cases: to learn from.
        budget: steps and so on.
        on_step: called with steps made and the last loss.

    Returns:
        A model with the averaged weights, and the number of steps.
    """
    device = next(model.parameters()).device
    generator, rng = torch.Generator(device), np.random.default_rng(budget.seed)
    generator.manual_seed(budget.seed)
    with seeded(budget.seed):
        teacher = Distillation(model.arms, model.merge.out_channels).to(device)  # type: ignore[arg-type]
    average = copy.deepcopy(model)
    optimizer = _optimizer(model, teacher)
    pairs = [(a, p) for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    begin, step = time.monotonic(), 0
    for step in range(1, budget.steps + 1):
        spent = (time.monotonic() - begin) / 60 / budget.minutes if budget.minutes else 0.0
        done = max((step - 1) / budget.steps, spent)
        if done >= 1:
            step -= 1
            break
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * done))
        batch = together(model, [cases[n] for n in rng.integers(len(cases), size=budget.batch)], device)
        clicks = int(rng.choice(3, p=(0.4, 0.35, 0.25)))
        optimizer.zero_grad()
        with SoundConvolution(), torch.autocast(device.type, torch.bfloat16):
            loss = _loss(model, variant, teacher, batch, clicks, generator, routed=done < 1 / 3)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        if bool(norm.isfinite()):
            optimizer.step()
        with torch.no_grad():
            share = 1 - min(DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_([a.data for a, _ in pairs], [p.data for _, p in pairs], share)
        if on_step is not None:
            on_step(step, float(loss.detach()))
    return average.eval(), step


def _optimizer(model: PromptableModel, teacher: Distillation) -> torch.optim.AdamW:
    fresh = [*model.amalgamation.parameters(), *model.merge.parameters(), *teacher.parameters()]
    further = [*model.prompt_encoder.parameters(), *model.mask_decoder.parameters()]
    groups = [{"params": fresh, "peak": FRESH}, {"params": further, "peak": FURTHER}]
    return torch.optim.AdamW(groups, weight_decay=1e-4)


def _loss(
    model: PromptableModel,
    variant: Variant,
    teacher: Distillation,
    batch: EncodedBatch,
    clicks: int,
    generator: torch.Generator,
    routed: bool,
) -> Tensor:
    """Of the answer after some clicks; with expert dropout, and what experts teach."""
    count = 1 + len(batch.features.experts)  # of the cases; a variant without experts draws the same random numbers
    present = draw_arms(len(batch.target), count, generator)[:, : len(model.arms)]
    present[:, 0] |= ~present.any(1)
    with overhear(model) as heard:
        features = batch.amalgamated(model, present)
    prompts = first_prompts(batch.target, batch.box, batch.outside, generator)
    for _ in range(clicks):
        with torch.no_grad():
            logits = model.decode(features, prompts).logits
        prompts = next_prompts(prompts, logits, batch.target, generator)
    decoded = model.decode(features, prompts)
    loss = losses.mask_loss(decoded.logits, batch.target)
    loss = loss + 0.2 * losses.quality_loss(decoded.quality, decoded.logits, batch.target)
    total = loss.mean()
    if routed and variant.plans.kind == "hierarchical":
        total = total + 0.05 * losses.routing_loss(shares_of_all(model, features), batch.task, batch.target)
    if variant.features:
        total = total + variant.features * teacher.feature_loss(model, heard, batch.task)
    return total
