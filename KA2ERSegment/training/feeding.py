"""Cases for training, drawn by worker processes while the device computes; and how well that keeps it fed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from KA2ERSegment.training.sampling import TargetDataset

AUTO = -1
"""Workers: as many as the machine has cores to spare."""


def workers_for(gpu: bool, wanted: int, ranks: int) -> int:
    """Number of worker processes of one rank; on a CPU none unless asked for: training itself takes all cores."""
    if wanted != AUTO:
        return wanted
    return max(1, min(14, (os.cpu_count() or 1) // ranks - 2)) if gpu else 0


class Feed(DataLoader[dict[str, Tensor]]):
    """Batches of one stage on one rank. Counts the seconds that training waits for them.

    Args:
        dataset: its cases.
        batch: cases of one batch.
        workers: processes that draw them; 0: drawn between the steps.
        gpu: whether one trains; its batches lie in pinned memory.
        stream: asked when training begins: numbers that no other rank has, nor the run that this one goes on from. Each
            worker of each such stream draws cases of its own.
    """

    def __init__(
        self,
        dataset: TargetDataset,
        batch: int,
        workers: int = 0,
        gpu: bool = False,
        stream: Callable[[], tuple[int, ...]] = lambda: (0, 0),
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            pin_memory=gpu,
        )
        self.stream, self.waited = stream, 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # torch promises its own class
        """Batches without end."""
        assert isinstance(self.dataset, TargetDataset)
        self.dataset.stream = self.stream()
        batches = super().__iter__()
        while True:
            begin = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - begin
            yield batch


class Throughput(Callback):
    """Patches per second, and the share of the time in which training waited for cases.

    The first batch is left out: it waits for the workers to start. On a GPU the share is an upper bound of its idle
    time, as it may still be busy with the step before.

    Args:
        feed: what training is fed by.
    """

    def __init__(self, feed: Feed) -> None:
        self.feed, self.batches = feed, 0
        self.begin = self.end = self.begin_waited = self.end_waited = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Count."""
        self.end, self.end_waited = time.monotonic(), self.feed.waited
        if self.batches == 0:
            self.begin, self.begin_waited = self.end, self.end_waited
        self.batches += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the GPU, which may be behind."""
        if pl_module.device.type == "cuda" and self.batches:
            torch.cuda.synchronize(pl_module.device)
            self.end = time.monotonic()

    def summary(self, ranks: int) -> dict[str, float]:
        """What the run's log keeps; no rates of a run of less than two batches."""
        seconds = self.end - self.begin
        if self.batches < 2 or seconds <= 0:
            return {}
        patches = (self.batches - 1) * (self.feed.batch_size or 1) * ranks
        return {
            "patches_per_second": round(patches / seconds, 3),
            "waiting_for_data": round((self.end_waited - self.begin_waited) / seconds, 4),
        }
