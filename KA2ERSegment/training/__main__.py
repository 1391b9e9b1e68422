"""`python -m KA2ERSegment.training --config CONFIG [--resume]`: all stages, one after the other.

Data are packed first where the cache is missing. A stage that is done is not run again; a stage that was
interrupted goes on from its last checkpoint with `--resume`. The last stage writes a bundle.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
import typer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from KA2ERSegment.build import load_tensors, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.training.card import write_bundle
from KA2ERSegment.training.items import TrainingItem, pack
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, TargetDataset
from KA2ERSegment.training.stages import ExpertStage, PromptableStage, Stage

logger = logging.getLogger("KA2ERSegment")

ACCELERATORS = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
"""Lightning's word for each device."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all stages of one call share: the config's settings and the options of `train`."""

    settings: dict[str, Any]
    output: Path
    resume: bool
    device: str
    ranks: int
    minutes: float
    start: Bundle | None

    def budget(self, stage: str) -> dict[str, Any]:
        """A stage's steps, minutes, batch and so on: the config's, with `--minutes` before it."""
        return {**self.settings[stage], **({"minutes": self.minutes} if self.minutes else {})}


def train(
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSON, as in training/configs.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the bundle.")] = Path("runs/first"),
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    start: Annotated[Path | None, typer.Option(help="Bundle of the same plans to begin from.")] = None,
    stage: Annotated[str, typer.Option(help="Only this stage: an expert's name, or 'promptable'.")] = "",
    data: Annotated[Path, typer.Option(help="Folder that holds the manifests' folders.")] = Path("../shared/data"),
    cache: Annotated[Path, typer.Option(help="Folder of packed items; made where missing.")] = Path("cache/train"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    ranks: Annotated[int, typer.Option(help="Processes (CPU) or GPUs to train on.")] = 1,
    minutes: Annotated[float, typer.Option(help="Budget of each stage; overrides the config.")] = 0.0,
) -> None:
    """Train the stages of a config."""
    torch.set_float32_matmul_precision("high")
    if device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    settings = json.loads(config.read_text(encoding="utf-8"))
    plans = Plans.from_json(settings["plans"])
    stages = ("", *(expert.name for expert in plans.experts), "promptable")
    if stage not in stages:
        message = f"stage must be one of {stages[1:]}, got {stage!r}."
        raise typer.BadParameter(message)
    if device not in ACCELERATORS:
        message = f"device must be one of {tuple(ACCELERATORS)}, got {device!r}."
        raise typer.BadParameter(message)
    if not any(cache.glob("*.npz")):
        names = pack([data / name for name in settings["manifests"]], cache, settings["share_alike"])
        logger.info("packed %d items into %s", len(names), cache)
    items = [TrainingItem.load(path) for path in sorted(cache.glob("*.npz"))]
    tasks = [_task(expert, settings["tasks"]) for expert in plans.experts]
    run = Run(settings, output, resume, device, ranks, minutes, _begin(start, plans, output))
    for expert, task in zip(plans.experts, tasks, strict=True):
        if stage in ("", expert.name) and not _weights(output, expert).exists():
            _train_expert(run, plans, expert, task, items)
    if stage in ("", "promptable") and (resume or not (output / "bundle").exists()):
        _train_promptable(run, plans, tasks, items)


def _begin(folder: Path | None, plans: Plans, output: Path) -> Bundle | None:
    """The bundle to begin from; its experts are laid where their stages would leave them, so those are not run."""
    if folder is None:
        return None
    bundle = load_bundle(folder)
    if bundle.plans != plans:
        message = f"--start must be a bundle of the config's plans; those of {str(folder)!r} differ."
        raise typer.BadParameter(message)
    weights = bundle.weights()
    output.mkdir(parents=True, exist_ok=True)
    for expert in plans.experts:
        prefix = f"experts.{expert.name}.encoder."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not _weights(output, expert).exists():
            save_file(own, _weights(output, expert))
    return bundle


def _task(expert: ExpertPlans, tasks: dict[str, Any]) -> ClassMap:
    """The expert's task, whose classes must be the expert's own."""
    task = tasks.get(expert.name, {"items": "", "classes": {}})
    if tuple(task["classes"]) != expert.classes:
        message = (
            f"config: task {expert.name!r} must have the classes of its expert, {list(expert.classes)}, "
            f"got {list(task['classes'])}."
        )
        raise typer.BadParameter(message)
    return ClassMap(expert.name, task["items"], task["classes"])


def _train_expert(run: Run, plans: Plans, expert: ExpertPlans, task: ClassMap, items: list[TrainingItem]) -> None:
    options = run.budget("expert")
    batch = options.pop("batch")
    own = [item for item in items if task.covers(item)]
    module = ExpertStage(expert, **options)
    sampling = SamplingOptions(plans.patch_size, plans.margin, lesions=0.0, parts=0.0, unions=0.0)
    dataset = TargetDataset(own, sampling, module.seed, [task])
    trainer = _fit(module, dataset, batch, run.output / expert.name, run)
    if trainer.is_global_zero:
        weights = {name: tensor.detach().contiguous() for name, tensor in module.encoder_weights().items()}
        save_file(weights, _weights(run.output, expert))
    trainer.strategy.barrier()  # the next stage reads the file


def _train_promptable(run: Run, plans: Plans, tasks: list[ClassMap], items: list[TrainingItem]) -> None:
    options = run.budget("promptable")
    batch = options.pop("batch")
    experts = {expert.name: load_file(_weights(run.output, expert)) for expert in plans.experts}
    module = PromptableStage(plans, experts, **options)
    share = float(run.settings.get("shrink", 1.0))
    if run.start is not None:  # bundles hold the learnt part scaled
        load_tensors(module.model, run.start.weights())
        module.model.mask_decoder.shrink(1 / share)
    sampling = SamplingOptions(**{"patch_size": plans.patch_size, "margin": plans.margin, **run.settings["sampling"]})
    dataset = TargetDataset(items, sampling, module.seed, tasks)
    trainer = _fit(module, dataset, batch, run.output / "promptable", run)
    if trainer.is_global_zero:
        module.model.mask_decoder.shrink(share)
        hardware = describe(trainer.strategy.root_device, run.ranks)
        before = f"begun from bundle {run.start.identity}; " if run.start else ""
        about = (
            f"{before}{module.global_step} steps of {batch * run.ranks} patches, {module.minutes_spent:.0f} minutes on "
            f"{hardware}, after the experts. The learnt part of the logits is scaled by {share:g} against the "
            "geodesic prior."
        )
        tensors = tensors_by_name(module.model)
        write_bundle(run.output / "bundle", plans, tensors, items, about, run.settings["share_alike"])


def _fit(module: Stage, dataset: TargetDataset, batch: int, folder: Path, run: Run) -> lightning.Trainer:
    checkpoint = ModelCheckpoint(
        dirpath=folder,
        save_last=True,
        every_n_train_steps=100,
        save_top_k=0,
        enable_version_counter=False,  # a second run in this folder would write last-v1.ckpt, and --resume miss it
    )
    trainer = lightning.Trainer(
        accelerator=ACCELERATORS[run.device],
        devices=run.ranks,
        strategy="ddp_find_unused_parameters_true" if run.ranks > 1 else "auto",
        precision="bf16-mixed",
        max_steps=module.steps,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[checkpoint, TQDMProgressBar(refresh_rate=10)],
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    dataset.seed += 7919 * trainer.global_rank
    last = folder / "last.ckpt"
    loader = DataLoader(dataset, batch_size=batch)
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


def _weights(output: Path, expert: ExpertPlans) -> Path:
    return output / f"{expert.name}.safetensors"


if __name__ == "__main__":
    typer.run(train)
