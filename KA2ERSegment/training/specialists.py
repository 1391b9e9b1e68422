"""Stage `specialists`: copies of the general mask decoder, each finetuned on the task of one expert.

They are the experts of SAM-Med3D-MoE (arXiv 2407.04938), whose gate (`gating.py`) says when one is heard. Everything
else is frozen; the bundle that this stage leaves answers as before, as its gate listens to nobody yet.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.experts import Content
from KA2ERSegment.gate import Gate
from KA2ERSegment.mask_decoder import MaskDecoder
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.plans import GatePlans
from KA2ERSegment.training import losses
from KA2ERSegment.training.calibrate import uncalibrated
from KA2ERSegment.training.card import with_section
from KA2ERSegment.training.run import Run, digest, fit, made_for, on_first_rank, take_fitting
from KA2ERSegment.training.sampling import TargetDataset, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.stages import Stage, seeded

logger = logging.getLogger("KA2ERSegment")

LATER = ("specialists.", "gate.", "voting.")
"""Tensors that later stages add to a bundle."""
SECTION = "## Specialist decoders and their gate"
"""Of the model card."""


class SpecialistStage(Stage):
    """A mask decoder, finetuned on what a frozen model encodes.

    Args:
        model: all of it stays as it is.
        name: of the expert whose task this is; its arm always takes part.
        steps: at most.
        minutes: at most.
        learning_rate: at its peak.
        seed: of the random state.
        clicks: decoder passes after the first.
    """

    def __init__(
        self,
        model: PromptableModel,
        name: str,
        steps: int,
        minutes: float,
        learning_rate: float,
        seed: int,
        clicks: int = 2,
    ) -> None:
        super().__init__(steps, minutes, learning_rate, seed)
        self.model = model.requires_grad_(False)
        self.arm, self.clicks = model.arms.index(name), clicks
        former = dict(model.specialists.items()).get(name, model.mask_decoder)
        self.decoder = cast("MaskDecoder", copy.deepcopy(former)).requires_grad_(True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """First prompt, then clicks in the error; the patch is encoded once, without gradients."""
        self.model.eval()
        target = batch["target"]
        with torch.no_grad():
            features = encoded(self.model, batch, self.shown(batch), self._arms(len(target)))
        prompts = first_prompts(target, batch["box"], batch["outside"], self.generator)
        total = torch.zeros((), device=self.device)
        for click in range(self.clicks + 1):
            with torch.no_grad():
                inputs = self.model.decoder_inputs(features, prompts)
            decoded = self.model.run_decoder(self.decoder, inputs)
            loss = losses.mask_loss(decoded.logits, target)
            loss = loss + 0.2 * losses.quality_loss(decoded.quality, decoded.logits, target)
            total = total + loss.mean() / (self.clicks + 1)
            self.log(f"dice{click}", losses.soft_dice(decoded.logits, target).mean().detach(), prog_bar=True)
            if click < self.clicks:
                prompts = next_prompts(prompts, decoded.logits, target, self.generator)
        self.log("loss", total.detach(), prog_bar=True)
        return total

    def _arms(self, batch: int) -> Tensor:
        """All arms in half of the cases; else its own alone (an opinion) or with some of the others."""
        draw = torch.rand(batch, len(self.model.arms) + 1, device=self.device, generator=self.generator)
        present = (draw[:, :-1] < 0.5) & (draw[:, -1:] < 0.3)
        present = present | (draw[:, -1:] > 0.5)
        present[:, self.arm] = True
        return present


def train_specialists(run: Run, start: Bundle) -> None:
    """Finetune specialists around a bundle, and write `run.bundle` with them and a gate that hears nobody.

    Subjects that the gate is judged on are left out. Specialists that are done are not trained again. Temperatures are
    to be fitted again.

    Args:
        run: options; its settings have a section `specialists`: those of `SpecialistStage`, how it is fitted, and
            `names`, all experts with a task where it does not say.
        start: the bundle; all its tensors but those of former specialists and gate stay as they are.

    Raises:
        BundleError: a name that is none of the bundle's experts.
        VolumeError: an expert whose task covers no item.
    """
    options = run.budget("specialists")
    content, tasks = Content.of(start), [task.name for task in run.tasks]
    names = tuple(options.pop("names", [e.name for e in start.plans.experts if e.name in tasks]))
    gate = GatePlans(names, threshold=1.0)  # nobody is heard yet
    plans = replace(content.plans, gate=gate)  # refuses unknown names before anything is trained
    base = digest(content.tensors, LATER)
    files = {name: run.output / f"specialist-{name}.safetensors" for name in names}
    missing = [name for name, file in files.items() if not made_for(file, base)]
    for name in missing:
        _train(run, content, name, dict(options), files[name], base)

    def write() -> None:
        if not missing and _has_them(run.bundle, names, base):
            return
        kept = {n: t for n, t in content.tensors.items() if not n.startswith(("specialists.", "gate."))}
        for name, file in files.items():
            kept |= {f"specialists.{name}.{tensor}": values for tensor, values in load_file(file).items()}
        with seeded(int(options["seed"])):
            kept |= {f"gate.{n}": t.detach() for n, t in tensors_by_name(Gate(plans.width, gate)).items()}
        text = f"Copies of the mask decoder, each finetuned on one expert's task: {', '.join(names)}. Not heard yet."
        card = with_section(content.card, SECTION, text)
        changed = replace(content, plans=plans, tensors=kept, card=card)
        uncalibrated(changed).save(run.bundle, force=True)

    on_first_rank(write)


def _has_them(folder: Path, names: tuple[str, ...], base: str) -> bool:
    """Whether a bundle of these weights and specialists is there."""
    if not folder.exists():
        return False
    bundle = load_bundle(folder)
    gate = bundle.plans.gate
    return gate is not None and gate.specialists == names and digest(bundle.weights(), LATER) == base


def _train(run: Run, content: Content, name: str, options: dict[str, Any], file: Path, base: str) -> None:
    """One specialist, into a file that says what it was finetuned from."""
    how = take_fitting(options)
    task = next(task for task in run.tasks if task.name == name)
    own = [item for item in run.divided()[0] if task.covers(item)]
    module = SpecialistStage(build_model(content.plans, dict(content.tensors)), name, **options)
    folder = run.output / f"specialist-{name}-{base[:8]}"  # checkpoints of another base are not resumed
    trainer = fit(module, TargetDataset(own, run.sampling(content.plans), module.seed), folder, run, **how)
    if trainer.is_global_zero:
        logger.info("specialist %s: %d steps in %.1f minutes", name, module.global_step, module.minutes_spent)
        weights = {n: t.detach().cpu().contiguous() for n, t in tensors_by_name(module.decoder).items()}
        save_file(weights, file, {"base": base})
    trainer.strategy.barrier()  # the bundle is made of the files
