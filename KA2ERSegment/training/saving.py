"""What a stage leaves while it runs: a checkpoint to go on from and, where it makes one, a bundle to use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor


class Average(WeightAveraging):
    """A moving average of the weights, which is what a stage leaves.

    The first steps count more than the decay says, so that an average of few steps is not mostly the beginning.

    Args:
        decay: of one step, below 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=_moving_average(decay))

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """The module has the averaged weights for a while."""
        self._swap_models(module)  # Lightning's own, of which validation makes use; there is no public one
        try:
            yield
        finally:
            self._swap_models(module)


def _moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        count = float(updates)
        share = 1 - min(decay, (1 + count) / (10 + count))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, share)

    return update


class Safeguard(Callback):
    """Writes the checkpoint, and what the stage has so far, every few minutes: a run that is killed leaves both.

    Args:
        checkpoint: file to write.
        minutes: between two writes.
        leave: writes what there is so far.
        average: whose weights are what is left.
    """

    def __init__(
        self, checkpoint: Path, minutes: float, leave: Callable[[], None] | None, average: Average | None
    ) -> None:
        self.checkpoint, self.minutes, self.leave, self.average = checkpoint, minutes, leave, average
        self.written = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time, between two steps of the optimizer."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        since = time.monotonic() - self.written
        if trainer.world_size > 1:  # all ranks save at the same step
            since = float(trainer.strategy.reduce(torch.tensor(since, device=pl_module.device), reduce_op="mean"))
        if since >= 60 * self.minutes:
            self.write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write at the end, before averages take the weights' place."""
        trainer.save_checkpoint(self.checkpoint)

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        """Write both."""
        trainer.save_checkpoint(self.checkpoint)
        if self.leave is not None and trainer.is_global_zero:
            if self.average is None:
                self.leave()
            else:
                with self.average.applied(module):
                    self.leave()
        self.written = time.monotonic()


class CompactCheckpoints(TorchCheckpointIO):
    """Checkpoints a fifth as large, to be carried to another machine.

    Frozen weights are left out: the run that goes on has them from its bundle or its experts. So is Adam's first
    moment, which builds up again within some ten steps. Weights are stored as float16, the second moment as bfloat16.

    Args:
        module: the stage.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Leave out and round."""
        frozen = {
            name for name, value in self.module.named_parameters(remove_duplicate=False) if not value.requires_grad
        }
        integers = {name for name, value in self.module.named_buffers() if not value.is_floating_point()}
        halves: dict[int, Tensor] = {}  # nnU-Net has each layer under two names; it is stored once

        def half(value: Tensor) -> Tensor:
            if not value.is_floating_point() or value.ndim == 0:
                return value
            return halves.setdefault(value.data_ptr(), value.to(torch.float16))

        small = dict(checkpoint)
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                small[key] = {k: half(v) for k, v in checkpoint[key].items() if k not in frozen | integers}
        small["optimizer_states"] = [
            {**optimizer, "state": {n: _without_first_moment(state) for n, state in optimizer["state"].items()}}
            for optimizer in checkpoint["optimizer_states"]
        ]
        super().save_checkpoint(small, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Fill in what was left out."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        own = self.module.state_dict()
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = {**own, **{name: value.float() for name, value in checkpoint[key].items()}}
        for optimizer in checkpoint["optimizer_states"]:
            for state in optimizer["state"].values():
                state["exp_avg_sq"] = state["exp_avg_sq"].float()
                state.setdefault("exp_avg", torch.zeros_like(state["exp_avg_sq"]))
        return checkpoint


def _without_first_moment(state: dict[str, Any]) -> dict[str, Any]:
    state = {key: value for key, value in state.items() if key != "exp_avg"}
    return {**state, "exp_avg_sq": state["exp_avg_sq"].to(torch.bfloat16)}
