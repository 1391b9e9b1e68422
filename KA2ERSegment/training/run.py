"""What all stages of one training share: settings, items, the weights to begin from, and how a stage is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from KA2ERSegment.bundle import Bundle
from KA2ERSegment.convolution import SoundConvolution
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.sampling import ClassMap, TargetDataset
from KA2ERSegment.training.stages import Stage

ACCELERATORS = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
"""Lightning's word for each device."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all stages of one call share: the config's settings and the options of `train`.

    Args:
        settings: the config.
        plans: of the bundle to train.
        items: of split `train`.
        tasks: of the experts.
        output: folder for checkpoints, logs and the bundle.
        resume: go on from the last checkpoint of a stage.
        device: auto, cpu or cuda.
        ranks: processes or GPUs.
        minutes: budget of each stage; 0: the config's.
        start: bundle to begin from.
    """

    settings: dict[str, Any]
    plans: Plans
    items: list[TrainingItem]
    tasks: list[ClassMap]
    output: Path
    resume: bool
    device: str
    ranks: int
    minutes: float
    start: Bundle | None

    def budget(self, stage: str) -> dict[str, Any]:
        """A stage's steps, minutes, batch and so on: the config's, with `--minutes` before it."""
        return {**self.settings[stage], **({"minutes": self.minutes} if self.minutes else {})}

    def expert_weights(self, expert: ExpertPlans) -> Path:
        """Where an expert's stage leaves its encoder."""
        return self.output / f"{expert.name}.safetensors"


def fit(
    module: Stage,
    dataset: TargetDataset,
    folder: Path,
    run: Run,
    batch: int,
    accumulate: int = 1,
    average: float = 0.0,
) -> lightning.Trainer:
    """Train one stage until its budget is spent.

    Args:
        module: the stage.
        dataset: its cases.
        folder: for its checkpoints and logs.
        run: options.
        batch: cases of one forward pass on one rank.
        accumulate: forward passes of one step of the optimizer.
        average: decay of a moving average of the weights, which is what the stage leaves; 0: the last weights.

    Raises:
        KeyboardInterrupt: somebody stopped it; `run.resume` goes on from there.
    """
    checkpoint = ModelCheckpoint(
        dirpath=folder,
        save_last=True,
        every_n_train_steps=100,
        save_top_k=0,
        enable_version_counter=False,  # a second run in this folder would write last-v1.ckpt, and --resume miss it
    )
    callbacks: list[Callback] = [checkpoint, TQDMProgressBar(refresh_rate=10)]
    if average:
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=average))
    trainer = lightning.Trainer(
        accelerator=ACCELERATORS[run.device],
        devices=run.ranks,
        strategy="ddp_find_unused_parameters_true" if run.ranks > 1 else "auto",
        precision="bf16-mixed",
        max_steps=module.steps,
        accumulate_grad_batches=accumulate,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=callbacks,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    dataset.seed += 7919 * trainer.global_rank
    last = folder / "last.ckpt"
    loader = DataLoader(dataset, batch_size=batch)
    with SoundConvolution():
        trainer.fit(module, loader, ckpt_path=last if run.resume and last.exists() else None)
    if trainer.interrupted:  # older releases of Lightning return after Ctrl-C, as if the stage were done
        raise KeyboardInterrupt
    trainer.save_checkpoint(last)
    return trainer


def describe(device: torch.device, ranks: int) -> str:
    """The hardware in words, for the model card."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    return f"a CPU ({ranks * torch.get_num_threads()} threads), no GPU"
