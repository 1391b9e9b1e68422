"""`python -m KA2ERSegment.training --config CONFIG [--resume]`: all stages, one after the other.

Data are packed first where the cache is missing. A stage that is done is not run again; a stage that was
interrupted goes on from its last checkpoint with `--resume`. The last stage writes a bundle; while it runs, the
bundle so far is `bundle-unfinished`.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import shutil
import time
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast

import torch
import torch.nn as nn
import typer
from safetensors.torch import load_file, save_file

from KA2ERSegment.build import load_tensors, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.encoders.expert import build_network
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.training import STARTED
from KA2ERSegment.training.calibrate import calibrate
from KA2ERSegment.training.card import write_bundle
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.feeding import AUTO
from KA2ERSegment.training.gating import train_gate
from KA2ERSegment.training.items import load_items, pack, split_held_out
from KA2ERSegment.training.pretrained import foundation_weights
from KA2ERSegment.training.run import ACCELERATORS, Clock, Run, Unfinished, base, describe, fit, take_fitting
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, TargetDataset
from KA2ERSegment.training.specialists import train_specialists
from KA2ERSegment.training.stages import ExpertStage, PromptableStage
from KA2ERSegment.training.voting import train_voting

logger = logging.getLogger("KA2ERSegment")

LATER = {"specialists": train_specialists, "gate": train_gate, "voting": train_voting}
"""Stages that go on from a bundle, in their order; a whole run has those that its config has a section for."""


def train(
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSON, as in training/configs.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the bundle.")] = Path("runs/first"),
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="Bundle to begin from; of the config's plans, where it is to be trained whole.")
    ] = None,
    stage: Annotated[
        str, typer.Option(help="Only this stage: an expert's name, 'foundation', 'amalgamation', 'gate', ...")
    ] = "",
    data: Annotated[Path, typer.Option(help="Folder that holds the manifests' folders.")] = Path("../shared/data"),
    cache: Annotated[Path, typer.Option(help="Folder of packed items; made where missing.")] = Path("cache/train"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    ranks: Annotated[int, typer.Option(help="Processes (CPU) or GPUs to train on.")] = 1,
    minutes: Annotated[
        float, typer.Option(help="Budget of each stage, start-up included; overrides the config.")
    ] = 0.0,
    stop_after: Annotated[float, typer.Option(help="Minutes after which this call ends, done or not; 0: none.")] = 0.0,
    save_every: Annotated[float, typer.Option(help="Minutes between two checkpoints.")] = 5.0,
    compact: Annotated[bool, typer.Option(help="Small checkpoints, to be carried to another machine.")] = False,
    workers: Annotated[int, typer.Option(help="Processes of each rank that draw cases; -1: what fits.")] = AUTO,
) -> None:
    """Train the stages of a config."""
    begun = STARTED if __name__ == "__main__" else time.monotonic()
    torch.set_float32_matmul_precision("high")
    if device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    try:
        settings = read_config(config)
        plans = Plans.from_json(settings["plans"])
        public = None
        if "foundation_weights" in settings and start is None:  # read first: no hour is lost where they do not fit
            wanted = settings["foundation_weights"]
            public = foundation_weights(wanted, plans.foundation, config.parent, cache.parent / "weights")
    except BundleError as error:
        raise typer.BadParameter(str(error)) from error
    last = ("foundation", "amalgamation", *(name for name in LATER if name in settings), "calibration")
    stages = ("", *(expert.name for expert in plans.experts), *last)
    if stage not in stages:
        message = f"stage must be one of {stages[1:]}, got {stage!r}."
        raise typer.BadParameter(message)
    if device not in ACCELERATORS:
        message = f"device must be one of {tuple(ACCELERATORS)}, got {device!r}."
        raise typer.BadParameter(message)
    if not any(cache.glob("*.npz")):
        names = pack([data / name for name in settings["manifests"]], cache, settings["share_alike"])
        logger.info("packed %d items into %s", len(names), cache)
    items = load_items(cache)
    tasks = [_task(expert, settings["tasks"]) for expert in plans.experts]
    begin = _begin(start, plans if stage not in LATER else None)
    learning, held_out = split_held_out(items, settings.get("held_out", 0))
    clock = Clock(begun, begun + 60 * stop_after if stop_after else math.inf)
    run = Run(
        settings, plans, learning, tasks, output, resume, device, ranks, minutes, begin,
        workers, save_every, compact, clock, public, held_out,
    )  # fmt: skip
    if stage not in LATER:
        _take_over_experts(run)
    try:
        for expert, task in zip(plans.experts, tasks, strict=True):
            if stage in ("", expert.name) and not run.expert_weights(expert).exists():
                _train_expert(run, expert, task)
        if (stage == "foundation" or (not stage and begin is None)) and not run.foundation.exists():
            _train_promptable(run, "foundation")
        if stage in ("", "amalgamation") and (resume or not (output / "bundle").exists()):
            _train_promptable(run, "amalgamation")
        for name, train_later in LATER.items():
            if stage == name or (not stage and name in settings):
                train_later(run, begin if stage and begin else load_bundle(output / "bundle"))
        if stage == "calibration":
            calibrate(begin or load_bundle(output / "bundle"), learning, held_out, output / "bundle", device)
    except Unfinished as stopped:
        logger.info("the call's time is up, %s goes on with --resume", stopped)


def _begin(folder: Path | None, plans: Plans | None) -> Bundle | None:
    """The bundle to begin from; of these plans, where there are any."""
    if folder is None:
        return None
    bundle = load_bundle(folder)
    if plans is not None and base(bundle.plans) != base(plans):
        message = f"--start must be a bundle of the config's plans; those of {str(folder)!r} differ."
        raise typer.BadParameter(message)
    return bundle


def _take_over_experts(run: Run) -> None:
    """The experts of the bundle to begin from are laid where their stages would leave them, so those are not run."""
    if run.start is None:
        return
    weights = run.start.weights()
    run.output.mkdir(parents=True, exist_ok=True)
    for expert in run.plans.experts:
        prefix = f"experts.{expert.name}.encoder."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not run.expert_weights(expert).exists():
            save_file(own, run.expert_weights(expert))


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


def _train_expert(run: Run, expert: ExpertPlans, task: ClassMap) -> None:
    options = run.budget("expert")
    fitting = take_fitting(options)
    own = [item for item in run.items if task.covers(item)]
    module = ExpertStage(expert, **options)
    sampling = SamplingOptions(run.plans.patch_size, run.plans.margin, lesions=0.0, parts=0.0, unions=0.0)
    trainer = fit(module, TargetDataset(own, sampling, module.seed, [task]), run.output / expert.name, run, **fitting)
    if trainer.is_global_zero:
        weights = {name: tensor.detach().contiguous() for name, tensor in module.encoder_weights().items()}
        save_file({n: t.detach().contiguous() for n, t in module.decoder_weights().items()}, run.expert_decoder(expert))
        save_file(weights, run.expert_weights(expert))
    trainer.strategy.barrier()  # the next stage reads the file


def _train_promptable(run: Run, stage: str) -> None:
    """The stage 'foundation', without experts, or 'amalgamation', from there or from the bundle to begin from."""
    options = run.budget(stage)
    fitting = take_fitting(options)
    plans = run.plans.without("experts") if stage == "foundation" else run.plans
    trained = [expert for expert in plans.experts if run.expert_weights(expert).exists() or stage == "amalgamation"]
    experts = {expert.name: load_file(run.expert_weights(expert)) for expert in trained}
    decoders = _decoders(run) if stage == "amalgamation" and options.get("predictions", 1) else {}
    module = PromptableStage(plans, experts, **options, decoders=decoders)
    share = float(run.settings.get("shrink", 1.0))
    start = load_bundle(run.foundation) if stage == "amalgamation" and run.foundation.exists() else run.start
    if start is None and run.public is not None:
        load_tensors(module.model.foundation, run.public)
    if start is not None:  # bundles hold the learnt part scaled
        known = tensors_by_name(module.model)  # a gate or a voting head is made anew after this stage
        own = {name: tensor for name, tensor in known.items() if name.startswith("experts.")}
        load_tensors(module.model, {n: t for n, t in start.weights().items() if n in known} | own)
        module.model.mask_decoder.shrink(1 / share)
    sampling = SamplingOptions(**{"patch_size": plans.patch_size, "margin": plans.margin, **run.settings["sampling"]})
    dataset = TargetDataset(run.items, sampling, module.seed, run.tasks)
    patches = fitting["batch"] * fitting.get("accumulate", 1) * run.ranks
    unfinished = run.output / "bundle-unfinished"

    def leave(folder: Path) -> None:
        """Write a bundle of the model as it is now."""
        hardware = describe(module.device, run.ranks)
        before = f"begun from bundle {start.identity}; " if start else ""
        if start is None and run.public is not None:
            wanted = run.settings["foundation_weights"]
            name = PurePosixPath(wanted.get("file", wanted.get("url"))).name
            before = f"the foundation begun from MONAI's {name} (SHA-256 {wanted['sha256'][:12]}); "
        about = (
            f"{before}stage {stage!r}: {module.global_step} steps of {patches} patches, {module.minutes_spent:.0f} "
            f"minutes on {hardware}, after the experts. The learnt part of the logits is scaled by {share:g} against "
            "the geodesic prior."
        )
        model = copy.deepcopy(module.model)
        model.mask_decoder.shrink(share)
        write_bundle(folder, plans, tensors_by_name(model), run.items, about, run.settings["share_alike"])

    trainer = fit(module, dataset, run.output / stage, run, **fitting, leave=functools.partial(leave, unfinished))
    if trainer.is_global_zero:
        leave(run.foundation if stage == "foundation" else run.output / "bundle")
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.strategy.barrier()  # the next stage reads the bundle


def _decoders(run: Run) -> dict[str, nn.Module]:
    """Of the experts whose whole network was trained here: only their predictions can be distilled."""
    decoders = {}
    for expert in run.plans.experts:
        if not run.expert_decoder(expert).exists():
            logger.warning("expert %s has no decoder in %s: its predictions are not distilled", expert.name, run.output)
            continue
        network = build_network(expert, deep_supervision=False)
        encoder = {f"encoder.{name}": tensor for name, tensor in load_file(run.expert_weights(expert)).items()}
        load_tensors(network, encoder | load_file(run.expert_decoder(expert)))
        decoders[expert.name] = cast("nn.Module", network.decoder)
    return decoders


if __name__ == "__main__":
    typer.run(train)
