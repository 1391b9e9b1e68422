"""Train the arm of an expert that was added to a bundle: its projections, codes and biases, and nothing else.

Patches are drawn from the expert's own data set and encoded once; on these cached features the amalgamation and the
mask decoder run as in use, with prompts simulated as for the bundle itself. Some of the images are made from the label
maps, so that the arm also learns when not to speak. Held-out cases say what it brought.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.encoders.nnunet import MAX_SPACING_RATIO
from KA2ERSegment.errors import VolumeError
from KA2ERSegment.experts import Content, arm_tensors
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import Plans
from KA2ERSegment.training import losses, synthesis
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.raw_dataset import RawDataset
from KA2ERSegment.training.sampling import SamplingOptions, draw_case, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of all is done, 0..1."""

CASES = 64
"""Patches to draw in all; a quarter of them is held out."""
CACHE_BYTES = 1_500_000_000
"""Memory for their features; fewer patches are drawn where they need more."""
PREPARING, COMPARING = 0.4, 0.1
"""Shares of the time for reading and encoding, and for the held-out cases."""
FIRST_BIAS = 0.0
"""Where the arm begins: heard like the others, else it would not learn in minutes."""
LEARNING_RATE, BIAS_RATE = 3e-3, 3e-2


@dataclass(frozen=True, slots=True)
class TrainedArm:
    """What training gave.

    Args:
        tensors: of the whole model by name; those of the arm are new.
        images: that were used.
        steps: of the optimizer.
        minutes: in all.
        dice_with: mean Dice of held-out cases after a prompt and a click, with the arm.
        dice_without: the same without it.
        share: mean weight of the arm inside the held-out objects, 0..1.
    """

    tensors: dict[str, Tensor]
    images: int
    steps: int
    minutes: float
    dice_with: float
    dice_without: float
    share: float

    @property
    def note(self) -> str:
        """For plans and card."""
        return (
            f"Its arm was trained for {self.minutes:.1f} minutes ({self.steps} steps) on {self.images} images of its "
            f"data set; on patches held out, Dice after a prompt and a click is {self.dice_with:.3f} with it and "
            f"{self.dice_without:.3f} without it, its share inside the objects {self.share:.2f}"
        )


@dataclass(frozen=True, slots=True)
class _Case:
    """One patch that was encoded; (1, S, S, S) each."""

    features: PatchFeatures
    target: Tensor
    box: Tensor
    outside: Tensor
    real: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """What all parts of one training share."""

    model: PromptableModel
    plans: Plans
    generator: torch.Generator
    rng: np.random.Generator
    progress: Progress


def train_arm(
    content: Content,
    name: str,
    dataset: RawDataset,
    minutes: float,
    progress: Progress,
    seed: int = 0,
    device: str = "cpu",
) -> TrainedArm:
    """Train the arm of one expert.

    Args:
        content: of a bundle that has the expert.
        name: of the expert.
        dataset: with images of its task.
        minutes: for all of it; at least one step is made.
        progress: is told where it stands.
        seed: of cases, prompts and steps.
        device: to train on.

    Raises:
        VolumeError: images that cannot be read, or of quite another spacing than the expert's.
    """
    begin = time.monotonic()
    model = build_model(content.plans, dict(content.tensors)).to(device)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    run = _Run(model, content.plans, generator, np.random.default_rng(seed), progress)
    expert = next(expert for expert in content.plans.experts if expert.name == name)
    held_out, learning, images = _draw(run, dataset, expert.spacing_kji, begin + PREPARING * 60 * minutes)
    steps = _train(run, name, learning, begin + (1 - COMPARING) * 60 * minutes)
    progress("comparing with and without it", 1 - COMPARING)
    at = model.arms.index(name)
    with_it, without_it = ([_dice(run, at, case, used) for case in held_out] for used in (True, False))
    progress("done", 1.0)
    return TrainedArm(
        tensors={tensor: values.detach().cpu() for tensor, values in tensors_by_name(model).items()},
        images=images,
        steps=steps,
        minutes=(time.monotonic() - begin) / 60,
        dice_with=float(np.mean([dice for dice, _ in with_it])),
        dice_without=float(np.mean([dice for dice, _ in without_it])),
        share=float(np.mean([share for _, share in with_it])),
    )


def _draw(
    run: _Run, dataset: RawDataset, spacing: tuple[float, ...], deadline: float
) -> tuple[list[_Case], list[_Case], int]:
    """Cases held out (of images of their own where there are several), cases to learn from, number of images.

    One image is in memory at a time; what was drawn of it stays, encoded.
    """
    order = [int(n) for n in run.rng.permutation(len(dataset.cases))][:CASES]
    apart = math.ceil(len(order) / 4) if len(order) > 1 else 0
    held_out: list[_Case] = []
    learning: list[_Case] = []
    images = 0
    for number, index in enumerate(order):
        run.progress(f"reading image {number + 1} of {len(order)}", PREPARING * number / len(order))
        item = dataset.read(index)
        _check_spacing(item, spacing)
        test = number < apart
        found = _cases(run, item, math.ceil(CASES / len(order)), test, deadline)
        (held_out if test else learning).extend(found)
        images += bool(found)
        held = sum(case.features.nbytes for case in (*held_out, *learning))
        if learning and (time.monotonic() > deadline or held > CACHE_BYTES):
            break
    if not held_out:  # other patches of the same image at least
        held_out, learning = learning[::4], [case for n, case in enumerate(learning) if n % 4]
    if not held_out or not learning:
        message = (
            f"data set {str(dataset.folder)!r} must have labelled objects to learn from and to test with, got patches "
            f"of {images} of {len(order)} images. Give one with more."
        )
        raise VolumeError(message)
    return held_out, learning, images


def _check_spacing(item: TrainingItem, spacing_kji: tuple[float, ...]) -> None:
    """In the order of size: images may have been turned. An expert without a spacing reads any."""
    if not spacing_kji:
        return
    ratios = [given / own for given, own in zip(sorted(item.spacing), sorted(spacing_kji), strict=True)]
    if not all(1 / MAX_SPACING_RATIO < ratio < MAX_SPACING_RATIO for ratio in ratios):
        own, given = (" x ".join(f"{mm:g}" for mm in three) for three in (spacing_kji, item.spacing[::-1]))
        message = (
            f"case {item.name!r} must have about the spacing that the expert was planned for, {own} mm (K, J, I), "
            f"got {given} mm. Give the expert's own data set."
        )
        raise VolumeError(message)


def _cases(run: _Run, item: TrainingItem, wanted: int, test: bool, deadline: float) -> list[_Case]:
    """Encoded patches of one image; to learn from some have a made image, and all are disturbed."""
    options = SamplingOptions(
        run.plans.patch_size, run.plans.margin, real_images=1.0 if test else 0.7, lesions=0.0, parts=0.0
    )
    cases: list[_Case] = []
    for _ in range(4 * wanted):  # a draw may come out empty
        if len(cases) == wanted or (cases and time.monotonic() > deadline):
            break
        drawn = draw_case(item, options, run.rng)
        if drawn is None:
            continue
        batch = {key: value[None].to(run.generator.device) for key, value in drawn.items()}
        image = batch["image"]
        if not test:
            image = (
                image if bool(drawn["real"]) else synthesis.make_image(batch["labels"], batch["target"], run.generator)
            )
            image = synthesis.disturb(image, run.generator)
        with torch.no_grad():
            features = encoded(run.model, batch, image)
        cases.append(_Case(features, batch["target"], batch["box"], batch["outside"], bool(drawn["real"])))
    return cases


def _train(run: _Run, name: str, cases: list[_Case], deadline: float) -> int:
    """Steps on the cached features until the deadline; their number."""
    groups = _only_the_arm(run.model, arm_tensors(run.plans, name))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # decay would move the other arms' rows
    at = run.model.arms.index(name)
    begin, steps = time.monotonic(), 0
    while steps == 0 or time.monotonic() < deadline:
        # the first step counts even where reading the images took all the time
        done = min(1.0, (time.monotonic() - begin) / max(deadline - begin, 1e-9)) if steps else 0.0
        run.progress(f"training the arm, step {steps + 1}", PREPARING + (1 - PREPARING - COMPARING) * done)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        for index in run.rng.integers(len(cases), size=2):
            _backward(run, at, cases[index], routed=done < 1 / 3)
        optimizer.step()
        steps += 1
    return steps


def _only_the_arm(model: PromptableModel, arm: dict[str, int | None]) -> list[dict[str, Any]]:
    """Make the arm's tensors the only trainable ones; of a tensor that all arms share, its row. Optimizer's groups."""
    parameters = dict(model.requires_grad_(False).named_parameters())
    groups: list[dict[str, Any]] = []
    for name, row in arm.items():
        parameter = parameters[name].requires_grad_(True)
        is_bias = row is not None and name.endswith(".bias")
        groups.append({"params": [parameter], "peak": BIAS_RATE if is_bias else LEARNING_RATE})
        if row is not None:
            only = torch.zeros_like(parameter)
            only[row] = 1
            hooked: Any = parameter  # torch's hooks have no types
            hooked.register_hook(only.mul)
        if is_bias:
            parameter.data[row] = FIRST_BIAS
    return groups


def _backward(run: _Run, at: int, case: _Case, routed: bool) -> None:
    """The first prompt or the click after it, with the arm and some of the others.

    `routed`: also ask for the arm's share on real images, which are of its own task, as the bundle's training does in
    its first third.
    """
    present = torch.from_numpy(run.rng.random((1, len(run.model.arms))) < 0.75).to(case.target.device)
    present[:, 0] = present[:, at] = True
    features = _amalgamated(run.model, case, present)
    prompts = first_prompts(case.target, case.box, case.outside, run.generator)
    if run.rng.random() < 0.5:
        with torch.no_grad():
            logits = run.model.decode(features, prompts).logits
        prompts = next_prompts(prompts, logits, case.target, run.generator)
    loss = losses.mask_loss(run.model.decode(features, prompts).logits, case.target).mean()
    if routed and case.real:
        loss = loss + 0.05 * losses.routing_loss(features.weights, torch.tensor([at], device=loss.device), case.target)
    loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _dice(run: _Run, at: int, case: _Case, used: bool) -> tuple[float, float]:
    """Dice after a prompt and a click with all other arms, and the arm's share inside the object."""
    present = torch.ones(1, len(run.model.arms), dtype=torch.bool, device=case.target.device)
    present[:, at] = used
    generator = torch.Generator(case.target.device)
    generator.manual_seed(0)  # the same prompts with and without
    features = _amalgamated(run.model, case, present)
    prompts = first_prompts(case.target, case.box, case.outside, generator)
    prompts = next_prompts(prompts, run.model.decode(features, prompts).logits, case.target, generator)
    score = losses.dice(run.model.decode(features, prompts).logits > 0, case.target)
    return float(score), float(losses.shares_inside(features.weights, case.target)[0, at])


def _amalgamated(model: PromptableModel, case: _Case, present: Tensor) -> PatchFeatures:
    embedding, weights = model.amalgamate(case.features.foundation, case.features.experts, present)
    return replace(case.features, embedding=embedding, weights=weights, present=present)
