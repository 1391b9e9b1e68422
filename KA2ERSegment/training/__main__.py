"""`python -m KA2ERSegment.training --config CONFIG [--resume]`: all stages, one after the other.

`stages_of` is the list of them. A stage begins from `--start` where it is given, else from what the stage before it
left in the output folder. One that is done is not run again; one that was interrupted goes on from its last checkpoint
with `--resume`. While a stage runs, the bundle so far is `bundle-unfinished`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.training import STARTED
from KA2ERSegment.training.amalgamation import train_amalgamation, train_foundation
from KA2ERSegment.training.calibrate import calibrate
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.experts import take_over_experts, train_expert
from KA2ERSegment.training.feeding import AUTO
from KA2ERSegment.training.gating import train_gate
from KA2ERSegment.training.items import TrainingItem, load_items, pack_where_missing, split_held_out
from KA2ERSegment.training.pretrained import foundation_weights
from KA2ERSegment.training.run import ACCELERATORS, BUNDLE, FOUNDATION, Clock, Run, Unfinished, base
from KA2ERSegment.training.sampling import ClassMap
from KA2ERSegment.training.specialists import train_specialists
from KA2ERSegment.training.voting import train_voting

logger = logging.getLogger("KA2ERSegment")


@dataclass(frozen=True, slots=True)
class StageToRun:
    """One stage, as the command runs it.

    Args:
        name: as `--stage` names it.
        train: trains it from a bundle, or from none; comes back at once where that is done.
        leaves: name of the bundle that it leaves in the output folder; "": none.
        whole: it trains the config's own plans: it begins from a bundle of these, or from none.
        only_asked: it is no part of a whole run.
    """

    name: str
    train: Callable[[Run, Any], object]
    leaves: str = BUNDLE
    whole: bool = False
    only_asked: bool = False


def stages_of(plans: Plans, settings: dict[str, Any]) -> list[StageToRun]:
    """All stages of a config in their order; of those after the amalgamation, the ones it has a section for."""
    tasks = zip(plans.experts, tasks_of(plans, settings), strict=True)
    after = {"specialists": train_specialists, "gate": train_gate, "voting": train_voting}
    return [
        *(_stage_of_expert(expert, task) for expert, task in tasks),
        StageToRun("foundation", train_foundation, leaves=FOUNDATION, whole=True),
        StageToRun("amalgamation", train_amalgamation, whole=True),
        *(StageToRun(name, train) for name, train in after.items() if name in settings),
        StageToRun("calibration", _train_calibration, only_asked=True),
    ]


def _stage_of_expert(expert: ExpertPlans, task: ClassMap) -> StageToRun:
    return StageToRun(expert.name, lambda run, _: train_expert(run, expert, task), leaves="", whole=True)


def _train_calibration(run: Run, start: Bundle) -> None:
    calibrate(start, run.items, run.held_out, run.bundle, run.device)


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
    settings, plans, public = _read(config, cache, with_public=start is None)
    stages = stages_of(plans, settings)
    _check("stage", stage, ["", *(each.name for each in stages)])
    _check("device", device, list(ACCELERATORS))
    first = load_bundle(start) if start is not None else None
    chosen = _chosen(stages, stage, first is not None)
    if first is not None and any(each.whole for each in chosen):
        _check_plans(first, plans)
    learning, held_out = split_held_out(_items(cache, data, settings), settings.get("held_out", 0))
    clock = Clock(begun, begun + 60 * stop_after if stop_after else math.inf)
    run = Run(
        settings, plans, learning, tasks_of(plans, settings), output, resume, device, ranks, minutes,
        workers, save_every, compact, clock, public, held_out,
    )  # fmt: skip
    if first is not None and any(each.whole for each in chosen):
        take_over_experts(run, first)
    try:
        for each in chosen:
            each.train(run, _left_before(each, stages, output) if first is None else first)
            if each.leaves:
                first = None  # the next stage goes on from what this one left
    except Unfinished as stopped:
        logger.info("the call's time is up, %s goes on with --resume", stopped)


def _read(config: Path, cache: Path, with_public: bool) -> tuple[dict[str, Any], Plans, dict[str, Tensor] | None]:
    """The config, its plans, and the public weights that it names, lest an hour be lost to some that do not fit."""
    try:
        settings = read_config(config)
        plans, public = Plans.from_json(settings["plans"]), None
        if with_public and "foundation_weights" in settings:
            wanted = settings["foundation_weights"]
            public = foundation_weights(wanted, plans.foundation, config.parent, cache.parent / "weights")
    except BundleError as error:
        raise typer.BadParameter(str(error)) from error
    return settings, plans, public


def _items(cache: Path, data: Path, settings: dict[str, Any]) -> list[TrainingItem]:
    """All items of the cache, which is made first where it is missing."""
    if names := pack_where_missing(cache, data, settings):
        logger.info("packed %d items into %s", len(names), cache)
    return load_items(cache)


def tasks_of(plans: Plans, settings: dict[str, Any]) -> list[ClassMap]:
    """The experts' tasks in their order, whose classes must be the expert's own."""
    tasks = []
    for expert in plans.experts:
        task = settings["tasks"].get(expert.name, {"items": "", "classes": {}})
        if tuple(task["classes"]) != expert.classes:
            message = (
                f"config: task {expert.name!r} must have the classes of its expert, {list(expert.classes)}, "
                f"got {list(task['classes'])}."
            )
            raise typer.BadParameter(message)
        tasks.append(ClassMap(expert.name, task["items"], task["classes"]))
    return tasks


def _chosen(stages: Sequence[StageToRun], name: str, from_bundle: bool) -> list[StageToRun]:
    """The stage of that name; without one a whole run, which begins with the amalgamation of a bundle to begin from."""
    if name:
        return [each for each in stages if each.name == name]
    done = [each.name for each in stages].index("amalgamation") if from_bundle else 0
    return [each for each in stages[done:] if not each.only_asked]


def _left_before(stage: StageToRun, stages: Sequence[StageToRun], output: Path) -> Bundle | None:
    """What the stage before this one left; None where there is nothing and none is needed."""
    at = stages.index(stage)
    folder = stages[at - 1].leaves if at else ""
    if stage.whole and not (folder and (output / folder).exists()):
        return None
    return load_bundle(output / folder)


def _check(option: str, value: str, known: list[str]) -> None:
    if value not in known:
        message = f"{option} must be one of {tuple(filter(None, known))}, got {value!r}."
        raise typer.BadParameter(message)


def _check_plans(bundle: Bundle, plans: Plans) -> None:
    if base(bundle.plans) != base(plans):
        message = f"--start must be a bundle of the config's plans; those of {str(bundle.folder)!r} differ."
        raise typer.BadParameter(message)


if __name__ == "__main__":
    typer.run(train)
