"""Train an nnU-Net v2 (Isensee et al., 2021) from a manifest: its own planning, preprocessing and training.

nnU-Net runs in a process of its own (`nnunet_process.py`), so that its environment variables stay its own. One folder
holds all of it: `nnUNet_raw`, `nnUNet_preprocessed`, `nnUNet_results`, and its words in `nnunet.log`.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import KA2ERError, VolumeError
from KA2ERSegment.training.nnunet_process import CONFIGURATION, DATASET_ID, TOLD, Options
from KA2ERSegment.training.sampling import ClassMap
from KA2ERSegment.volume import Volume

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of all is done, 0..1."""

TASKS = Path(__file__).parent / "configs" / "cpu.json"
"""The tasks that have names."""
FOLDS = ("all", "0", "1", "2", "3", "4")
PREPARING = 0.05
"""Share of the progress bar for the raw data set."""


@dataclass(frozen=True, slots=True)
class TrainedNnUNet:
    """What training left.

    Args:
        folder: the results folder, as `expert add` takes it.
        raw: the raw data set, as `expert add --images` takes it.
        cases: to learn from.
        classes: that were found in them.
        licences: of the cases.
    """

    folder: Path
    raw: Path
    cases: int
    classes: tuple[str, ...]
    licences: tuple[str, ...]


def read_task(name: str, file: Path | None = None) -> ClassMap:
    """A task by its name.

    Args:
        name: of the task.
        file: JSON with "tasks" as a training config has them, or these tasks alone: {name: {"items": regular expression
            on "id modality region", "classes": {class: regular expression on a label's name}}}. Default: those of the
            package's own config.

    Raises:
        KA2ERError: the file or the task is not there, or is none.
    """
    path = file or TASKS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"the tasks' file {str(path)!r} must be readable JSON: {error}."
        raise KA2ERError(message) from error
    tasks = data.get("tasks", data) if isinstance(data, dict) else {}
    task = tasks.get(name) if isinstance(tasks, dict) else None
    if task is None:
        message = f"the task must be one of {sorted(tasks)} in {path.name!r}, got {name!r}. Name another file of tasks."
        raise KA2ERError(message)
    plain = isinstance(task, dict) and isinstance(task.get("items"), str) and isinstance(task.get("classes"), dict)
    if not plain or not task["classes"] or not name.isidentifier():
        message = f"task {name!r} in {path.name!r} must be a word with 'items' and 'classes', got {task!r}."
        raise KA2ERError(message)
    return ClassMap(name, task["items"], task["classes"])


def train_nnunet(
    task: ClassMap, manifest: Path, output: Path, options: Options, progress: Progress, share_alike: bool = False
) -> TrainedNnUNet:
    """Prepare, plan, preprocess and train.

    Args:
        task: which items, and which of their labels make up its classes.
        manifest: its items of split `train` with an image are used; nothing of another split is read.
        output: folder for everything.
        options: of the training.
        progress: is told where it stands.
        share_alike: also take items under a share-alike licence; weights trained on them may inherit it.

    Raises:
        KA2ERError: nnU-Net is not installed, no item fits, the folder is taken, or nnU-Net gave up.
    """
    if importlib.util.find_spec("nnunetv2") is None:
        message = "training an nnU-Net needs the package nnunetv2. Install it: pip install 'ka2ersegment[nnunet]'."
        raise KA2ERError(message)
    if options.fold not in FOLDS:
        message = f"the fold must be one of {', '.join(FOLDS)}, got {options.fold!r}."
        raise KA2ERError(message)
    if output.exists() and any(output.iterdir()) and not options.resume:
        message = f"the output folder must be empty, got {str(output)!r}. Choose another one, or resume what is there."
        raise KA2ERError(message)
    raw = output / "nnUNet_raw" / f"Dataset{DATASET_ID}_{task.name}"
    if not (raw / "dataset.json").is_file():
        write_raw_dataset(task, manifest, raw, share_alike, lambda text, share: progress(text, PREPARING * share))
    about = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    folds = splits(about["subjects"])
    if options.fold not in ("all", *map(str, range(len(folds)))):
        message = f"fold {options.fold} must be one of {len(folds)}: there are not more subjects. Train on all."
        raise KA2ERError(message)
    _run_nnunet(
        output,
        raw.name,
        folds,
        options,
        lambda text, share: progress(text, PREPARING + (1 - PREPARING) * share),
    )
    folder = output / "nnUNet_results" / raw.name / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    classes = tuple(name for name in about["labels"] if name != "background")
    return TrainedNnUNet(folder, raw, about["numTraining"], classes, tuple(about["licences"]))


def write_raw_dataset(task: ClassMap, manifest: Path, raw: Path, share_alike: bool, progress: Progress) -> None:
    """The task's items of split `train` in nnU-Net's raw format, on canonical axes; of several images the first.

    A class that no item shows is left out. `dataset.json` comes last: with it the data set is whole.

    Raises:
        VolumeError: no item fits, or an item's image and label map do not lie on one grid.
    """
    try:
        with manifest.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == "train" and row["images"]]
        rows = [row for row in rows if share_alike or row["share_alike"] != "yes"]
        rows = [row for row in rows if task.matches(row["id"], row["modality"], row["body_region"])]
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        message = f"manifest {str(manifest)!r} must be a CSV file as in the data sets' README: {error!r}."
        raise KA2ERError(message) from error
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, str]] = []
    present: set[int] = set()
    for number, row in enumerate(rows):
        progress(f"preparing item {number + 1} of {len(rows)}", number / len(rows))
        label, image = (
            Volume.read(manifest.parent / row[key].split(";")[0]).canonical() for key in ("label", "images")
        )
        if not label.same_grid(image.shape_kji, image.ijk_to_ras):
            message = f"item {row['id']!r}: image and label map must lie on one grid, got {image} and {label}."
            raise VolumeError(message)
        names = json.loads((manifest.parent / row["labels_json"]).read_text(encoding="utf-8"))
        table = task.table({int(value): name for value, name in names.items()})
        classes = table[label.array_kji.astype(np.uint16)].astype(np.uint8)
        if not classes.any():
            continue
        present |= set(np.unique(classes).tolist()) - {0}
        kept.append(row)
        _write(raw / "imagesTr" / f"{row['id']}_0000.nii.gz", image.array_kji, image.spacing)
        _write(raw / "labelsTr" / f"{row['id']}.nii.gz", classes, image.spacing)
    if not kept:
        message = (
            f"task {task.name!r} must have items of split 'train' with an image and labels of its classes in "
            f"{str(manifest)!r}, got {len(rows)} items that match {task.items!r} and none with such labels."
        )
        raise VolumeError(message)
    shown = [name for value, name in enumerate(task.names, start=1) if value in present]
    if len(shown) < len(task.names):  # nnU-Net wants values without a gap
        new = np.zeros(len(task.names) + 1, dtype=np.uint8)
        new[sorted(present)] = np.arange(1, len(present) + 1)
        for row in kept:
            path = raw / "labelsTr" / f"{row['id']}.nii.gz"
            label = Volume.read(path)
            _write(path, new[label.array_kji.astype(np.uint8)], label.spacing)
    about = {
        "channel_names": {"0": _channel([row["modality"] for row in kept])},
        "labels": {"background": 0, **{name: value for value, name in enumerate(shown, start=1)}},
        "numTraining": len(kept),
        "file_ending": ".nii.gz",
        "licences": sorted({row["licence"] for row in kept}),
        "subjects": {row["id"]: row.get("subject") or row["id"] for row in kept},
    }
    (raw / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _channel(modalities: list[str]) -> str:
    """nnU-Net's name of the channel: "CT" is normalised by a window, anything else by z-score."""
    return (
        "CT" if all(words.startswith("CT") for words in modalities) else modalities[0].split(" ")[0].replace("CT", "")
    )


def _write(path: Path, array_kji: npt.NDArray[Any], spacing: tuple[float, float, float]) -> None:
    make: Any = nibabel.Nifti1Image  # it has no types
    nibabel.save(make(array_kji.T, np.diag([*spacing, 1.0])), path)


def _run_nnunet(output: Path, dataset: str, folds: list[Any], options: Options, progress: Progress) -> None:
    """nnU-Net in its own process; its words go to a file, its progress is told."""
    folders = {name: str(output / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir(exist_ok=True)
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 1)))
    environment = {"nnUNet_n_proc_DA": workers, "nnUNet_compile": "f", **os.environ, **folders}
    command = [sys.executable, "-u", "-m", "KA2ERSegment.training.nnunet_process", str(output), dataset]
    command += [json.dumps(asdict(options)), json.dumps(folds)]
    log = output / "nnunet.log"
    with log.open("a", encoding="utf-8") as words, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                if line.startswith(TOLD):
                    share, _, text = line.removeprefix(TOLD).partition(" ")
                    progress(text.strip(), float(share))
                else:
                    words.write(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
    if process.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        message = f"nnU-Net gave up: {last[0] if last else 'without a word'}. All it said is in {str(log)!r}."
        raise KA2ERError(message)


def splits(subjects: dict[str, str]) -> list[dict[str, list[str]]]:
    """Folds of a cross-validation in which no subject is on both sides.

    Args:
        subjects: by case.

    Returns:
        For each of at most five folds {"train": cases, "val": cases}; none where there is one subject.
    """
    names = sorted(set(subjects.values()))
    count = min(5, len(names)) if len(names) > 1 else 0
    folds = []
    for fold in range(count):
        held_out = set(names[fold::count])
        cases = {"train": [c for c, s in subjects.items() if s not in held_out]}
        folds.append({**cases, "val": [c for c, s in subjects.items() if s in held_out]})
    return folds
