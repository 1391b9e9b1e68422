"""What runs in nnU-Net's own process: plan, preprocess and train, by nnU-Net v2 itself (Isensee et al., 2021)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASET_ID = 500
CONFIGURATION = "3d_fullres"
PLANNING = 0.15
"""Share of the progress bar for planning and preprocessing."""
TOLD = "ka2ersegment-progress "
"""How the lines begin that tell the progress."""


@dataclass(frozen=True, slots=True)
class Options:
    """How nnU-Net trains.

    Args:
        epochs: nnU-Net's own number is 1000.
        iterations: of an epoch; nnU-Net's own number is 250.
        fold: "all" images to learn from, or "0" to "4" of a cross-validation by subject.
        device: "cpu" or "cuda".
        channels: of the first stage; later stages double it, up to ten times as many. nnU-Net's own number is 32.
        memory_gb: of the GPU that it plans for; smaller patches where it is less. None: nnU-Net's own.
        resume: go on from the folder's last checkpoint.
    """

    epochs: int = 1000
    iterations: int = 250
    fold: str = "all"
    device: str = "cpu"
    channels: int = 32
    memory_gb: float | None = None
    resume: bool = False


def _work(prepared: Path, options: Options, folds: list[Any]) -> None:
    """Plan, preprocess and train; what is there already is not done again."""
    if not (prepared / "splits_final.json").is_file():
        _plan(prepared, options)
        (prepared / "splits_final.json").write_text(json.dumps(folds, indent=1), encoding="utf-8")
    _train(prepared, options)


def _plan(prepared: Path, options: Options) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    workers = max(1, min(4, (os.cpu_count() or 1) - 1))
    _tell("looking at the images", 0.0)
    extract_fingerprints([DATASET_ID], num_processes=workers, check_dataset_integrity=True)
    _tell("planning", PLANNING / 2)
    name = plan_experiments([DATASET_ID], gpu_memory_target_in_gb=options.memory_gb)
    path = prepared / f"{name}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    for settings in plans["configurations"].values():
        kwargs = settings.get("architecture", {}).get("arch_kwargs", {})
        if "features_per_stage" in kwargs:
            most = 10 * options.channels
            kwargs["features_per_stage"] = [min(options.channels * 2**n, most) for n in range(kwargs["n_stages"])]
    path.write_text(json.dumps(plans, indent=1), encoding="utf-8")
    _tell("preprocessing", PLANNING / 2)
    preprocess([DATASET_ID], name, configurations=(CONFIGURATION,), num_processes=(workers,))


def _train(prepared: Path, options: Options) -> None:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = json.loads((prepared / "nnUNetPlans.json").read_text(encoding="utf-8"))
    about = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    if (os.cpu_count() or 1) <= 2:  # loading in processes beside the training would only cost memory
        os.environ.update(nnUNet_n_proc_DA="0")
    fold = "all" if options.fold == "all" else int(options.fold)
    given = {**plans, "continue_training": options.resume}
    trainer = nnUNetTrainer(given, CONFIGURATION, fold, about, torch.device(options.device))
    trainer.num_epochs, trainer.num_iterations_per_epoch = options.epochs, options.iterations
    trainer.num_val_iterations_per_epoch = max(1, options.iterations // 5)  # as nnU-Net's 50 to 250
    trainer.save_every = max(1, min(50, options.epochs // 20))
    step, done = trainer.train_step, 0

    def told(batch: Any) -> Any:
        nonlocal done
        now = trainer.current_epoch * options.iterations + done % options.iterations
        share = now / (options.epochs * options.iterations)
        epoch = f"epoch {trainer.current_epoch + 1} of {options.epochs}"
        _tell(f"training, {epoch}, step {done % options.iterations + 1}", PLANNING + (1 - PLANNING) * share)
        done += 1
        return step(batch)

    trainer.train_step = told
    trainer.plot_network_architecture = lambda: None  # it needs a package that nnU-Net does not bring
    former = [Path(trainer.output_folder) / f"checkpoint_{name}.pth" for name in ("final", "latest", "best")]
    there = [path for path in former if options.resume and path.is_file()]
    if there:
        trainer.load_checkpoint(str(there[0]))
    trainer.run_training()
    _tell("done", 1.0)


def _tell(text: str, share: float) -> None:
    sys.stdout.write(f"{TOLD}{share:.4f} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    output, dataset, options, folds = sys.argv[1:]
    _work(Path(output) / "nnUNet_preprocessed" / dataset, Options(**json.loads(options)), json.loads(folds))
