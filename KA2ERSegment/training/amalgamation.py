"""Stages `foundation` and `amalgamation`: the promptable model, without its experts and then around them.

After KA2ER (arXiv 2410.21085), whose second stage amalgamates frozen experts into the foundation; losses and expert
dropout are this project's own design (`distillation.py`, `losses.routing_loss`, `draw_arms`).
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import cast

import torch
from torch import Tensor

from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.errors import BundleError
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import Plans
from KA2ERSegment.training import losses
from KA2ERSegment.training.card import write_bundle
from KA2ERSegment.training.distillation import Distillation, Overheard, overhear
from KA2ERSegment.training.domains import with_domains
from KA2ERSegment.training.experts import trained_decoders, trained_encoders
from KA2ERSegment.training.run import Run, describe, fit, take_fitting
from KA2ERSegment.training.sampling import TargetDataset, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.stages import Stage, channels_last, seeded

NOBODY, DROPPED, WITHOUT_FOUNDATION = 0.25, 1 / 3, 0.25
"""Expert dropout: cases without any expert; of the others, experts that are dropped, and cases without c_0."""


class PromptableStage(Stage):
    """Foundation, amalgamation, prompt encoder and mask decoder around frozen experts.

    With plans whose amalgamation is off it is the stage 'foundation': experts are not asked and their arms not trained.
    Else it is the stage 'amalgamation', with expert dropout, a routing loss in its first third, and distillation.

    Args:
        plans: of the model.
        experts: encoder weights by expert name; frozen.
        steps: at most.
        minutes: at most.
        learning_rate: at its peak.
        seed: of the random state.
        clicks: decoder passes after the first.
        features: weight of feature distillation.
        predictions: weight of prediction distillation.
        decoders: of the experts' nnU-Nets, by expert name; predictions of experts without one are not distilled.
    """

    def __init__(
        self,
        plans: Plans,
        experts: dict[str, dict[str, Tensor]],
        steps: int,
        minutes: float,
        learning_rate: float,
        seed: int,
        clicks: int = 2,
        features: float = 0.5,
        predictions: float = 0.5,
        decoders: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        super().__init__(steps, minutes, learning_rate, seed)
        self.amalgamates = plans.amalgamation.enabled and plans.amalgamation.kind != "foundation"
        self.features, self.predictions = (features, predictions) if self.amalgamates else (0.0, 0.0)
        with seeded(seed):
            self.model = build_model(plans)
            self.distillation = Distillation(self.model.arms, plans.width, decoders if self.predictions else None)
        for name, weights in experts.items():
            load_tensors(cast("Expert", self.model.experts[name]).encoder, weights)
        self.model = channels_last(self.model)
        self.clicks = clicks

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """First prompt, then clicks in the error; the patch is encoded once, as in use."""
        self.model.experts.eval()
        self.distillation.decoders.eval()
        shown, target = self.shown(batch), batch["target"]
        with overhear(self.model, self.distillation.decoders.keys()) as heard:
            arms = draw_arms(len(shown), len(self.model.arms), self.generator)
            features = encoded(self.model, batch, shown, arms)
        taught = self.distillation.taught(heard, batch["task"], batch["classes"], target) if self.predictions else None
        prompts = first_prompts(target, batch["box"], batch["outside"], self.generator)
        total = torch.zeros((), device=self.device)
        for click in range(self.clicks + 1):
            decoded = self.model.decode(features, prompts)
            loss = losses.mask_loss(decoded.logits, target)
            loss = loss + 0.2 * losses.quality_loss(decoded.quality, decoded.logits, target)
            if taught is not None:
                loss = loss + self.predictions * losses.prediction_loss(decoded.logits, *taught)
            total = total + loss.mean() / (self.clicks + 1)
            self.log(f"dice{click}", losses.soft_dice(decoded.logits, target).mean().detach(), prog_bar=True)
            if click < self.clicks:
                prompts = next_prompts(prompts, decoded.logits, target, self.generator)
        if self.amalgamates:
            total = total + self._from_experts(features, heard, batch["task"], target)
        self.log("loss", total.detach(), prog_bar=True)
        return total

    def _from_experts(self, features: PatchFeatures, heard: Overheard, task: Tensor, target: Tensor) -> Tensor:
        """Losses on the embedding: which expert is heard, and what its features teach."""
        total = torch.zeros((), device=self.device)
        if self.progress < 1 / 3:  # later routing may depart from the task's identity
            route = losses.routing_loss(shares_of_all(self.model, features), task, target)
            self.log("route", route.detach())
            total = total + 0.05 * route
        if self.features:
            taught = self.distillation.feature_loss(self.model, heard, task)
            self.log("features", taught.detach())
            total = total + self.features * taught
        return total


def draw_arms(batch: int, arms: int, generator: torch.Generator) -> Tensor:
    """Which arms each case may use: expert dropout, so that one set of weights serves with all, some or none.

    A quarter of the cases hears no expert at all. In the others each expert is dropped with one third, but never the
    last one. So of three or more experts each misses about half of all cases (49 % of three), of two 46 %, and a single
    one a quarter. "No expert" is left out of a quarter of those that hear an expert, as an expert alone is asked for
    its opinion. With three experts all are heard in 22 % of the cases, all arms in 17 %.

    Args:
        batch: number of cases.
        arms: the foundation and the experts.
        generator: of the device.

    Returns:
        (batch, arms) bool, at least one true per case.
    """
    draw = torch.rand(batch, arms + 1, device=generator.device, generator=generator)
    alone, own, experts = draw[:, arms:] < NOBODY, draw[:, :1], draw[:, 1:arms]
    if not experts.shape[1]:
        return torch.ones_like(own, dtype=torch.bool)
    heard = (experts > DROPPED) | (experts == experts.amax(1, keepdim=True))
    return torch.cat([alone | (own >= WITHOUT_FOUNDATION), heard & ~alone], dim=1)


def shares_of_all(model: PromptableModel, features: PatchFeatures) -> Tensor:
    """Shares (B, K+1, n, n, n) of the arms as if none was dropped: the routing loss asks one among all others."""
    if bool(features.present.all()):
        return features.weights
    everyone = torch.ones_like(features.present)
    return model.amalgamate(features.foundation, features.experts, everyone, features.prior)[1]


def train_foundation(run: Run, start: Bundle | None) -> None:
    """Train the model without experts and write the bundle `run.foundation`; nothing where that is there.

    Args:
        run: options; its settings have a section `foundation`.
        start: bundle of the config's plans to begin from; None: from `run.public`, or from scratch.
    """
    if not run.foundation.exists():
        _train(run, "foundation", start)


def train_amalgamation(run: Run, start: Bundle | None) -> None:
    """Train the model around its experts and write `run.bundle`; nothing where that is there and not to be resumed.

    Args:
        run: options; its settings have a section `amalgamation`, and its experts are trained.
        start: as in `train_foundation`; its experts do not count.

    Raises:
        BundleError: an expert is missing.
    """
    if run.resume or not run.bundle.exists():
        _train(run, "amalgamation", start)


def _train(run: Run, stage: str, start: Bundle | None) -> None:
    options = run.budget(stage)
    fitting = take_fitting(options)
    around_experts = stage == "amalgamation"
    plans = run.plans if around_experts else run.plans.without("experts")
    experts = trained_encoders(run, must=around_experts)
    decoders = trained_decoders(run) if around_experts and options.get("predictions", 1) else {}
    module = PromptableStage(plans, experts, **options, decoders=decoders)
    share = float(run.settings.get("shrink", 1.0))
    if start is not None:
        _begin_from(module, start, run.settings.get("shrink"))
    elif run.public is not None:
        load_tensors(module.model.foundation, run.public)
    dataset = TargetDataset(run.items, run.sampling(plans), module.seed, run.tasks)
    patches = fitting["batch"] * fitting.get("accumulate", 1) * run.ranks

    def leave(folder: Path) -> None:
        """Write a bundle of the model as it is now."""
        about = (
            f"{_begun_from(run, start)}stage {stage!r}: {module.global_step} steps of {patches} patches, "
            f"{module.minutes_spent:.0f} minutes on {describe(module.device, run.ranks)}, after the experts. The "
            f"learnt part of the logits is scaled by {share:g} against the geodesic prior."
        )
        model = copy.deepcopy(module.model)
        model.mask_decoder.shrink(share)
        told = with_domains(plans, run.items, run.tasks) if around_experts else plans
        noted = replace(told, shrink=share)
        write_bundle(folder, noted, tensors_by_name(model), run.items, about, run.settings["share_alike"])

    leave_unfinished = functools.partial(leave, run.unfinished)
    trainer = fit(module, dataset, run.output / stage, run, **fitting, leave=leave_unfinished)
    if trainer.is_global_zero:
        leave(run.bundle if around_experts else run.foundation)
        shutil.rmtree(run.unfinished, ignore_errors=True)
    trainer.strategy.barrier()  # the next stage reads the bundle


def _begin_from(module: PromptableStage, start: Bundle, share: float | None) -> None:
    """Give the model a bundle's weights, but for its experts, and for a gate or a head: those are made anew later.

    Args:
        module: the stage.
        start: the bundle.
        share: of the learnt logits that it holds where its plans do not say; None: the config does not say either.

    Raises:
        BundleError: nobody says which share the bundle holds.
    """
    held = share if start.plans.shrink is None else start.plans.shrink
    if held is None:
        message = (
            f"the plans of bundle {start.identity} or the config must say which share of the learnt logits it holds, "
            'got nothing. Write "shrink" into either: 1 where nothing was scaled, 0.5 for the first ones of ours.'
        )
        raise BundleError(message)
    own = tensors_by_name(module.model)
    kept = {name: tensor for name, tensor in own.items() if name.startswith("experts.")}
    given = {name: tensor for name, tensor in start.weights().items() if name in own}
    load_tensors(module.model, given | kept)
    module.model.mask_decoder.shrink(1 / held)  # bundles hold the learnt part scaled


def _begun_from(run: Run, start: Bundle | None) -> str:
    """For the model card; "" for a stage that began from scratch."""
    if start is not None:
        return f"begun from bundle {start.identity}; "
    if run.public is None:
        return ""
    wanted = run.settings["foundation_weights"]
    name = PurePosixPath(wanted.get("file", wanted.get("url"))).name
    return f"the foundation begun from MONAI's {name} (SHA-256 {wanted['sha256'][:12]}); "
