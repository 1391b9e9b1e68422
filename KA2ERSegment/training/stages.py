"""The training stages as Lightning modules: one expert, then the promptable model around all of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import lightning
import torch
from torch import Tensor

from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.encoders.expert import Expert, build_network
from KA2ERSegment.model import PatchFeatures
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.preprocessing import normalise
from KA2ERSegment.training import losses, synthesis
from KA2ERSegment.training.distillation import Distillation, Overheard, overhear
from KA2ERSegment.training.sampling import IGNORE, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts

logger = logging.getLogger("KA2ERSegment")
Network = TypeVar("Network", bound=torch.nn.Module)
FOR_WRITING = 0.25
"""Minutes of a stage's budget that are kept for writing what it leaves; less where the budget is small."""


class Stage(lightning.LightningModule):
    """What all stages share: the device's random state, the images, and a schedule that ends on time.

    Args:
        steps: at most.
        minutes: at most; the learning rate falls to zero by whichever comes first.
        learning_rate: at its peak.
        seed: of the random state on the device.

    Attributes:
        started: when this call began to work for this stage (`time.monotonic`); all it does counts as time spent.
        stop_at: when this call must end, done or not.
        stopped: whether it ended for that.
    """

    def __init__(self, steps: int, minutes: float, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.steps, self.minutes, self.learning_rate, self.seed = steps, minutes, learning_rate, seed
        self.started, self.stop_at, self.stopped = time.monotonic(), math.inf, False
        self._minutes_before = 0.0
        self._generator: torch.Generator | None = None

    @property
    def generator(self) -> torch.Generator:
        """Random state on the device, one per rank."""
        if self._generator is None:
            self._generator = torch.Generator(self.device)
            self._generator.manual_seed(self.seed + 1000 * self.global_rank + self.global_step)
        return self._generator

    @property
    def minutes_spent(self) -> float:
        """Time of training, resumed runs included."""
        return self._minutes_before + (time.monotonic() - self.started) / 60

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0..1."""
        minutes = self.minutes - min(FOR_WRITING, 0.05 * self.minutes)
        return min(1.0, max(self.global_step / self.steps, self.minutes_spent / minutes))

    def shown(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, S, S, S): real images disturbed, the others made from their labels."""
        return shown_of(batch, self.generator)

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, 2, S, S, S): the same, normalised."""
        return normalise(self.shown(batch), batch["inside"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Set the learning rate, or stop when the budget is spent or this call must end."""
        progress, late = self.progress, float(time.monotonic() >= self.stop_at)
        if self.trainer.world_size > 1:  # all ranks must stop at the same step
            both = torch.tensor([progress, late], device=self.device)
            progress, late = self.trainer.strategy.reduce(both, reduce_op="mean").tolist()
        self.stopped = late > 0 and progress < 1.0
        if progress >= 1.0 or self.stopped:
            self.trainer.should_stop = True
            return -1
        warm = min(1.0, (self.global_step + 1) / 40)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        return None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave out a step whose gradient is not finite: it would make every weight so, for good."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            logger.warning("step %d is left out: its gradient is not finite", self.global_step)
            optimizer.zero_grad(set_to_none=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the time spent, so that a resumed run ends on time too."""
        checkpoint["minutes_spent"] = self.minutes_spent

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self._minutes_before = checkpoint["minutes_spent"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is not frozen."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=1e-4)


class ExpertStage(Stage):
    """A whole nnU-Net, trained on its own task with Dice and cross-entropy; its encoder becomes the expert."""

    def __init__(self, plans: ExpertPlans, steps: int, minutes: float, learning_rate: float, seed: int) -> None:
        super().__init__(steps, minutes, learning_rate, seed)
        with seeded(seed):
            network = build_network(plans, deep_supervision=False)
        self.network = _channels_last(network)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step."""
        loss = losses.multi_class_loss(self.network(self.images(batch)[:, :1]), batch["classes"], IGNORE)
        self.log("loss", loss, prog_bar=True)
        return loss

    def encoder_weights(self) -> dict[str, Tensor]:
        """What the bundle keeps: the encoder."""
        return tensors_by_name(cast("torch.nn.Module", self.network.encoder))

    def decoder_weights(self) -> dict[str, Tensor]:
        """What the amalgamation's training asks for predictions: the rest of the network."""
        return {name: t for name, t in tensors_by_name(self.network).items() if not name.startswith("encoder.")}


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
        self.model = _channels_last(self.model)
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
        route = losses.routing_loss(features.weights, task * features.present.all(1), target)
        self.log("route", route.detach())
        total = (0.05 if self.progress < 1 / 3 else 0.0) * route  # later routing may depart from the task's identity
        if self.features:
            taught = self.distillation.feature_loss(self.model, heard, task)
            self.log("features", taught.detach())
            total = total + self.features * taught
        return total


def draw_arms(batch: int, arms: int, generator: torch.Generator) -> Tensor:
    """Which arms each case may use: expert dropout, so that one set of weights serves with all, some or none.

    Args:
        batch: number of cases.
        arms: the foundation and the experts.
        generator: of the device.

    Returns:
        (batch, arms) bool, at least one true per case; all of them in about half of the cases.
    """
    draw = torch.rand(batch, arms + 1, device=generator.device, generator=generator)
    present = draw[:, :arms] < 0.75
    present = torch.where(draw[:, arms:] < 0.4, torch.ones_like(present), present)
    present[:, 0] |= ~present.any(1)
    return present


def shown_of(batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """(B, S, S, S): real images disturbed, the others made from their labels."""
    made = synthesis.make_image(batch["labels"], batch["target"], generator)
    image = torch.where(batch["real"][:, None, None, None], batch["image"], made)
    return synthesis.disturb(image, generator)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed, as for weights; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _channels_last(module: Network) -> Network:
    """The memory order that 3D convolutions are fastest in, on CPU and GPU; torch's own stubs do not know it."""
    return cast("Network", cast("Any", module).to(memory_format=torch.channels_last_3d))
