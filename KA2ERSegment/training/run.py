"""What all stages of one training share: settings, items, where each leaves what, and how a stage is fitted."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
import typer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors import safe_open
from torch import Tensor

from KA2ERSegment.convolution import SoundConvolution
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.training.feeding import Feed, Throughput, workers_for
from KA2ERSegment.training.items import TrainingItem, split_held_out
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, TargetDataset
from KA2ERSegment.training.saving import Average, CompactCheckpoints, Safeguard
from KA2ERSegment.training.stages import Stage

ACCELERATORS = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
"""Lightning's word for each device."""
FOUNDATION, BUNDLE = "bundle-foundation", "bundle"
"""In the output folder: what the stage 'foundation' leaves, and what all later ones do."""
LOG = "log.json"
"""In the output folder: a line for each stage of each call, with steps, minutes, speed and what data cost."""


class Unfinished(Exception):  # noqa: N818  # nothing failed
    """A call's time is up before its stage is done; what it takes to go on is written."""


@dataclass(slots=True)
class Clock:
    """When the current stage began: the first one with the call itself, each other one where the one before ended."""

    began: float = field(default_factory=time.monotonic)
    stop_at: float = math.inf


@dataclass(frozen=True, slots=True)
class Run:
    """What all stages of one call share: the config's settings and the options of `train`.

    Args:
        settings: the config.
        plans: of the bundle to train.
        items: of split `train`, to learn from.
        tasks: of the experts.
        output: folder for checkpoints, logs and the bundle.
        resume: go on from the last checkpoint of a stage.
        device: auto, cpu or cuda.
        ranks: processes or GPUs.
        minutes: budget of each stage; 0: the config's.
        workers: processes of each rank that draw cases; `feeding.AUTO`: what the machine has.
        save_every: minutes between two checkpoints.
        compact: whether checkpoints are made small enough to be carried about.
        clock: of the call.
        public: tensors that the foundation begins from, where the config names some.
        held_out: items of split `train` of other subjects, which no stage learns from.
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
    workers: int = 0
    save_every: float = 5.0
    compact: bool = False
    clock: Clock = field(default_factory=Clock)
    public: dict[str, Tensor] | None = None
    held_out: list[TrainingItem] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU trains."""
        return self.device != "cpu" and torch.cuda.is_available()

    def budget(self, stage: str) -> dict[str, Any]:
        """A stage's steps, minutes, batch and so on: the config's, with `--minutes` before it."""
        return {**self.settings[stage], **({"minutes": self.minutes} if self.minutes else {})}

    def expert_weights(self, expert: ExpertPlans) -> Path:
        """Where an expert's stage leaves its encoder."""
        return self.output / f"{expert.name}.safetensors"

    def expert_decoder(self, expert: ExpertPlans) -> Path:
        """Where it leaves the rest of its network, which the bundle does not need."""
        return self.output / f"{expert.name}-decoder.safetensors"

    @property
    def foundation(self) -> Path:
        """The bundle that the stage 'foundation' leaves: experts are switched off in it."""
        return self.output / FOUNDATION

    @property
    def bundle(self) -> Path:
        """The bundle that every stage after it leaves."""
        return self.output / BUNDLE

    @property
    def unfinished(self) -> Path:
        """What there is of that bundle while a stage runs."""
        return self.output / "bundle-unfinished"

    def sampling(self, plans: Plans) -> SamplingOptions:
        """How cases are drawn: as the config says, on patches as the plans have them."""
        return SamplingOptions(**{"patch_size": plans.patch_size, "margin": plans.margin, **self.settings["sampling"]})

    def divided(self) -> tuple[list[TrainingItem], list[TrainingItem]]:
        """Items to learn from, and items of other subjects; where the config holds none out, one subject in four."""
        return (self.items, self.held_out) if self.held_out else split_held_out(self.items, 4)


def fit(
    module: Stage,
    dataset: TargetDataset,
    folder: Path,
    run: Run,
    batch: int,
    accumulate: int = 1,
    average: float = 0.0,
    leave: Callable[[], None] | None = None,
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
        leave: writes what the stage has so far; called every `run.save_every` minutes on the first rank, and where the
            call stops before the stage is done, while the module has the weights that it would leave.

    Raises:
        KeyboardInterrupt: somebody stopped it; `run.resume` goes on from there.
        Unfinished: the call's time is up; `run.resume` goes on from there.
    """
    last = folder / "last.ckpt"
    averages = [Average(average)] if average else []
    guard = Safeguard(last, run.save_every, leave, averages[0] if averages else None)
    workers = workers_for(run.on_gpu, run.workers, run.ranks)
    feed = Feed(dataset, batch, workers, run.on_gpu, lambda: (trainer.global_rank, trainer.global_step))
    speed = Throughput(feed)
    trainer = lightning.Trainer(
        accelerator=ACCELERATORS[run.device],
        devices=run.ranks,
        strategy="ddp_find_unused_parameters_true" if run.ranks > 1 else "auto",
        precision="bf16-mixed",
        max_steps=module.steps,
        accumulate_grad_batches=accumulate,
        logger=_logger(folder),
        callbacks=[TQDMProgressBar(refresh_rate=10), *averages, guard, speed],
        plugins=[CompactCheckpoints(module)] if run.compact else [],
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module.started, module.stop_at = run.clock.began, run.clock.stop_at
    with nullcontext() if run.on_gpu else SoundConvolution():
        trainer.fit(module, feed, ckpt_path=last if run.resume and last.exists() else None)
    if trainer.interrupted:  # older releases of Lightning return after Ctrl-C, as if the stage were done
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        if module.stopped and leave is not None:
            leave()
        about = {
            "stage": folder.name,
            "finished": not module.stopped,
            "steps": module.global_step,
            "minutes": round(module.minutes_spent, 4),
            **speed.summary(run.ranks),
            "batch": batch,
            "accumulate": accumulate,
            "workers": workers,
            "ranks": run.ranks,
            "hardware": describe(trainer.strategy.root_device, run.ranks),
        }
        if run.on_gpu:
            about["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        _log(run.output / LOG, about)
    run.clock.began = time.monotonic()
    if module.stopped:
        raise Unfinished(folder.name)
    return trainer


def _log(path: Path, about: dict[str, Any]) -> None:
    """Add one stage of one call to the log, and show it."""
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.write_text(json.dumps([*lines, about], indent=1) + "\n", encoding="utf-8")
    state = "done" if about["finished"] else "stopped, go on with --resume"
    speed = ""
    if "patches_per_second" in about:
        speed = f", {about['patches_per_second']:g} patches/s, {about['waiting_for_data']:.1%} of it waiting for data"
    typer.echo(f"{about['stage']}: {state}; {about['steps']} steps, {about['minutes']:.2f} minutes{speed}")


def _logger(folder: Path) -> Logger:
    """TensorBoard's where it is installed."""
    if find_spec("tensorboard") is not None:
        return TensorBoardLogger(folder, name="", version="")
    return CSVLogger(folder, name="", version="")


def take_fitting(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a stage's options those that say how it is fitted, not what it is."""
    return {key: options.pop(key) for key in ("batch", "accumulate", "average") if key in options}


def base(plans: Plans) -> Plans:
    """The plans with experts switched off, and without what later stages add: what a bundle is begun from."""
    return replace(plans.without("experts", "domains"), gate=None, voting=None, calibration={}, shrink=None)


def digest(tensors: Mapping[str, Tensor], without: tuple[str, ...]) -> str:
    """SHA-256 of tensors as a bundle stores them, but for those whose names begin with `without`.

    By it a stage knows whether what lies there was made for these weights.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        if not name.startswith(without):
            found.update(name.encode() + tensors[name].detach().cpu().half().contiguous().numpy().tobytes())
    return found.hexdigest()


def made_for(file: Path, base: str) -> bool:
    """Whether a safetensors file is there and was made for the weights of this digest."""
    if not file.exists():
        return False
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("base") == base


def on_rank_zero() -> bool:
    """Whether this process is the one that writes; also right before and between fits."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def on_first_rank(work: Callable[[], None]) -> None:
    """Let the first rank do something alone, and the others wait. What ends it ends the call on all of them."""
    failed: Exception | None = None
    if on_rank_zero():
        try:
            work()
        except Exception as error:
            failed = error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        told = [None if failed is None else (isinstance(failed, Unfinished), str(failed))]
        torch.distributed.broadcast_object_list(told)  # a barrier too
        if failed is None and told[0] is not None:
            unfinished, text = told[0]
            failed = Unfinished(text) if unfinished else KA2ERError(f"the first rank failed: {text}")
    if failed is not None:
        raise failed


def describe(device: torch.device, ranks: int) -> str:
    """The hardware in words, for the model card."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    return f"a CPU ({ranks * torch.get_num_threads()} threads), no GPU"
