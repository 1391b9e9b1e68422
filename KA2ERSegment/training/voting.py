"""Stage `voting`: the voting head around a bundle that stays as it is, to the last bit.

Nothing but the head is trained, so a step needs no gradient of foundation, experts and decoders. After IC-MoE (arXiv
2510.17684):  L = Dice and cross-entropy of the answer + 0.5 L_cons + 0.01 L_bal + 0.1 L_sgc, the last one after a tenth
of the training (`losses.vote_loss`, `losses.balance_loss`, `contrast.Contrast`). In the first third the semantic
expert of the case's own group is asked for, else nothing would make it one.

Ablations are options of the config's section `voting`: `plans.vote` "mean" or "case", `balance` 0, `contrast` 0.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.experts import Content
from KA2ERSegment.plans import FORMAT, Plans, VotingPlans
from KA2ERSegment.training import losses
from KA2ERSegment.training.calibrate import uncalibrated
from KA2ERSegment.training.card import with_section
from KA2ERSegment.training.contrast import BACKGROUND, Contrast
from KA2ERSegment.training.held_out import compare
from KA2ERSegment.training.run import Run, describe, digest, fit, take_fitting
from KA2ERSegment.training.sampling import TargetDataset, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.stages import Stage, seeded
from KA2ERSegment.voting import STRIDE, Ballot, VotingHead

SECTION = "## Voting head"
"""In the model card."""
COLDEST = 0.5
"""Temperature of the vote at the end of training; it begins at 1."""


class VotingStage(Stage):
    """The voting head; everything else is frozen.

    Args:
        plans: of the model, with `voting`.
        weights: of the bundle that it begins from, by name; a head of the same plans goes on from there.
        tasks: names of the tasks, in the order of `TargetDataset`.
        steps: at most.
        minutes: at most.
        learning_rate: at its peak.
        seed: of the random state.
        clicks: decoder passes after the first.
        consistency: weight of L_cons.
        balance: weight of L_bal; 0: the load is not balanced at all.
        contrast: weight of L_sgc; 0: none.
        route: weight of asking for the case's own semantic expert, in the first third.
    """

    def __init__(
        self,
        plans: Plans,
        weights: dict[str, Tensor],
        tasks: Sequence[str],
        steps: int,
        minutes: float,
        learning_rate: float,
        seed: int,
        clicks: int = 2,
        consistency: float = 0.5,
        balance: float = 0.01,
        contrast: float = 0.1,
        route: float = 0.05,
    ) -> None:
        super().__init__(steps, minutes, learning_rate, seed)
        assert plans.voting is not None, "the stage is made for plans with a head"
        with seeded(seed):
            self.model = build_model(plans)
            self.contrast = Contrast(plans.voting.width, len(plans.voting.semantic) + 2)
        load_tensors(self.model, {**tensors_by_name(self.model), **weights})
        self.model.requires_grad_(False)
        self.head.requires_grad_(True)
        self.clicks, self.consistency, self.balance = clicks, consistency, balance
        self.contrast_weight, self.route = contrast, route
        names = plans.voting.semantic
        groups = [names.index(task) + 1 if task in names else 0 for task in tasks]
        self.register_buffer("groups", torch.tensor([0, *groups]), persistent=False)

    groups: Tensor

    @property
    def head(self) -> VotingHead:
        """What is trained."""
        assert self.model.voting is not None, "checked when it was built"
        return self.model.voting

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """First prompt, then clicks in the error, each with a vote of its own."""
        self.model.eval()
        self.head.temperature.fill_(1 - (1 - COLDEST) * self.progress)
        with torch.autocast("cpu", enabled=False):  # as in use; and bfloat16 is no quicker there
            return self._step(batch)

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        target, group = batch["target"], self.groups[batch["task"]]
        truth = F.avg_pool3d(target[:, None].float(), STRIDE).flatten(1)
        told = torch.rand(len(target), device=self.device, generator=self.generator) < 0.5
        with torch.no_grad():
            features = encoded(self.model, batch, self.shown(batch))
        prompts = first_prompts(target, batch["box"], batch["outside"], self.generator)
        total = torch.zeros((), device=self.device)
        for click in range(self.clicks + 1):
            with torch.no_grad():
                base, maps = self.model.decode_base(features, prompts)
            ballot = self.head.ballot(features.embedding, base, maps, truth, told)
            logits = self.head.answer(base, ballot)
            gain = losses.mask_loss(base.logits, target) - losses.mask_loss(logits.detach(), target)
            self.log(f"gain{click}", gain.mean(), prog_bar=True)
            loss = losses.mask_loss(logits, target).mean()
            total = total + (loss + self._about_the_vote(ballot, truth, group)) / (self.clicks + 1)
            if click < self.clicks:
                prompts = next_prompts(prompts, logits.detach(), target, self.generator)
        self.log("loss", total.detach(), prog_bar=True)
        return total

    def _about_the_vote(self, ballot: Ballot, truth: Tensor, group: Tensor) -> Tensor:
        """All losses but the answer's own; observes the load."""
        consistency = losses.vote_loss(ballot.weights, ballot.opinions, truth).mean()
        total = self.consistency * consistency
        self.log("consistency", consistency.detach())
        if self.balance:
            self.head.observe(ballot)
            total = total + self.balance * losses.balance_loss(ballot.of_all(len(self.head.names)))
        if self.route and self.progress < 1 / 3:  # basic comes first in a ballot, then the semantic ones in order
            total = total + self.route * losses.routing_loss(ballot.weights, group)
        if self.contrast_weight:
            foreground = torch.where(group > 0, group, len(self.contrast.prototypes) - 1)
            classes = torch.where(truth > 0.5, foreground[:, None], BACKGROUND)
            probability = (ballot.base + ballot.correction).sigmoid().detach()
            contrast = self.contrast(ballot.features, classes, probability, self.generator)
            self.log("contrast", contrast.detach())
            total = total + (self.contrast_weight if self.progress > 0.1 else 0.0) * contrast
        return total


def train_voting(run: Run, start: Bundle) -> None:
    """Train the head of a bundle and write it into `run.bundle`; nothing where that was done for this base.

    The head is compared on `run.divided()[1]`, of which the bundle itself may have learnt where the config holds
    nothing out. Temperatures are to be fitted again.

    Args:
        run: options; its settings have a section `voting`: those of `VotingStage`, `plans` as in `VotingPlans`,
            `compare` (number of patches) and how it is fitted.
        start: the bundle; all its tensors but those of a head stay as they are. A head of the same plans goes on.

    Raises:
        BundleError: `plans` are none of a head.
    """
    options, content = run.budget("voting"), uncalibrated(Content.of(start))
    how, given, count = take_fitting(options), options.pop("plans", {}), int(options.pop("compare", 48))
    voting = Plans.from_json({"format": FORMAT, "voting": given}).voting
    base = digest(content.tensors, ("voting.",))
    this = {"base": base, "plans": asdict(cast("VotingPlans", voting))}
    folder, report = run.output / f"voting-{base[:8]}", run.output / "voting.json"
    if not run.resume and report.exists() and json.loads(report.read_text()).items() >= _as_json(this).items():
        return
    former, plans = start.plans.voting, replace(content.plans, voting=voting)
    goes_on = former is not None and voting is not None and replace(former, enabled=True, vote=voting.vote) == voting
    weights = {name: value for name, value in content.tensors.items() if goes_on or not name.startswith("voting.")}
    module = VotingStage(plans, weights, [task.name for task in run.tasks], **options)
    sampling = run.sampling(plans)
    learning, apart = run.divided()
    dataset = TargetDataset(learning, sampling, module.seed, run.tasks)
    patches = how["batch"] * how.get("accumulate", 1) * run.ranks
    unfinished = run.unfinished

    def leave(bundle: Path, spent: float | None = None, comparison: str = "") -> None:
        """Write a bundle of the model as it is now."""
        minutes = module.minutes_spent if spent is None else spent
        about = (
            f"Experts that vote on the answer (after IC-MoE, arXiv 2510.17684): {', '.join(module.head.names)}. "
            f"Trained for {module.global_step} steps of {patches} patches, {minutes:.0f} minutes on "
            f"{describe(module.device, run.ranks)}, around bundle {start.identity}, whose own tensors are unchanged. "
            f"{comparison}"
        )
        card = with_section(content.card, SECTION, about)
        changed = replace(content, plans=plans, tensors=tensors_by_name(module.model), card=card)
        changed.save(bundle, force=True)

    trainer = fit(module, dataset, folder, run, **how, leave=partial(leave, unfinished))
    if trainer.is_global_zero:
        spent = module.minutes_spent
        module.to(trainer.strategy.root_device)
        as_is = replace(sampling, real_images=1.0, lesions=0.0, parts=0.0)
        comparison = compare(module.model, apart or learning, as_is, run.tasks, count, module.clicks)
        told = comparison.sentence("subjects held out" if apart else "items that it learnt from, as none are held out")
        typer.echo(told)
        leave(run.bundle, spent, told)
        shutil.rmtree(unfinished, ignore_errors=True)
        found = {**this, "steps": module.global_step, "minutes": spent, **asdict(comparison)}
        report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    trainer.strategy.barrier()  # the next stage reads the bundle
    run.clock.began = time.monotonic()


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it is once it was written and read: tuples are lists."""
    read: dict[str, Any] = json.loads(json.dumps(value))
    return read
