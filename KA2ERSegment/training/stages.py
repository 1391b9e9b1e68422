"""What all stages are as Lightning modules: the device's random state, the images, and a schedule that ends on time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import lightning
import torch
from torch import Tensor

from KA2ERSegment.preprocessing import normalise
from KA2ERSegment.training import synthesis

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


def channels_last(module: Network) -> Network:
    """The memory order that 3D convolutions are fastest in, on CPU and GPU; torch's own stubs do not know it."""
    return cast("Network", cast("Any", module).to(memory_format=torch.channels_last_3d))
