"""A lab that trains an nnU-Net: run as a program, so that nnU-Net's own environment variables stay its own.

`python nnunet_lab.py FOLDER` writes FOLDER/nnUNet_raw, FOLDER/nnUNet_preprocessed and FOLDER/nnUNet_results. Planning,
preprocessing, training and every checkpoint are nnU-Net v2's own work: one plain network is trained for an epoch of two
iterations on tiny images; the other networks are initialised and saved without training.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

DATASET = "Dataset901_Beads"
CLASSES = ("bead", "shell")
SPACING = (1.1, 0.9, 0.9)  # mm, KJI
SHAPE = (72, 64, 68)


def write_raw(raw: Path, cases: int = 5) -> None:
    """Images of a bright bead in a shell over noise, and their labels, as nnU-Net wants them."""
    import nibabel

    folder = raw / DATASET
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    affine = np.diag([*SPACING[::-1], 1.0])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    for case in range(cases):
        centre = np.array(SHAPE) * rng.uniform(0.4, 0.6, 3)
        distance = np.linalg.norm((grid - centre) * SPACING, axis=-1)
        labels = (distance < 20).astype(np.uint8) * 2
        labels[distance < 11] = 1
        image = rng.normal(0, 10, SHAPE) + 100 * (labels == 1) + 60 * (labels == 2)
        nibabel.save(nibabel.Nifti1Image(image.T.astype(np.float32), affine), folder / f"imagesTr/b{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels.T, affine), folder / f"labelsTr/b{case}.nii.gz")
    about = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, **{name: value for value, name in enumerate(CLASSES, start=1)}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def main(folder: Path) -> None:
    """Everything, in a few dozen seconds."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
        (folder / name).mkdir()
    os.environ.update(nnUNet_n_proc_DA="1", nnUNet_compile="f")
    write_raw(folder / "nnUNet_raw")

    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Trainer(nnUNetTrainer):
        """nnU-Net's own, for one short epoch."""

        def __init__(self, plans: Any, configuration: Any, fold: Any, dataset_json: Any, device: Any) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

        def plot_network_architecture(self) -> None:
            """No picture."""

    number = int(DATASET[7:10])
    extract_fingerprints([number], num_processes=1, check_dataset_integrity=True)
    plans_name = plan_experiments([number])
    preprocess([number], plans_name, configurations=("3d_fullres",), num_processes=(1,))
    os.environ.update(nnUNet_n_proc_DA="0")  # planning refuses 0, loading data in this process needs it
    prepared = folder / "nnUNet_preprocessed" / DATASET
    plans = json.loads((prepared / f"{plans_name}.json").read_text())
    about = json.loads((prepared / "dataset.json").read_text())
    shutil.copytree(prepared / f"{plans_name}_3d_fullres", prepared / f"{plans_name}_2d")  # for its kind of files
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4 * (n + 1) for n in range(kwargs["n_stages"])]  # else a minute and 130 MB

    def trainer(plans: dict[str, Any], fold: int | str, configuration: str = "3d_fullres") -> nnUNetTrainer:
        given = {**copy.deepcopy(plans), "continue_training": False}
        return Trainer(given, configuration, fold, copy.deepcopy(about), torch.device("cpu"))

    trainer(plans, 0).run_training()

    def untrained(name: str, change: Any, configuration: str = "3d_fullres") -> None:
        """Another network of nnU-Net's library, saved by nnU-Net as it was initialised."""
        changed = copy.deepcopy(plans)
        changed["plans_name"] = name
        change(changed["configurations"])
        other = trainer(changed, "all", configuration)
        other.initialize()
        results = Path(other.output_folder_base)
        (results / "plans.json").write_text(json.dumps(changed))
        (results / "dataset.json").write_text(json.dumps(about))
        other.save_checkpoint(str(Path(other.output_folder) / "checkpoint_final.pth"))

    untrained("residual", _residual)
    untrained("anisotropic", _anisotropic)
    untrained("flat", lambda configurations: None, "2d")


def _residual(configurations: dict[str, Any]) -> None:
    architecture = configurations["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    stages = kwargs["n_stages"]
    kwargs["n_blocks_per_stage"] = [1, 2, *[1] * (stages - 2)]
    kwargs["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    del kwargs["n_conv_per_stage"]


def _anisotropic(configurations: dict[str, Any]) -> None:
    """As nnU-Net plans for thick slices: the first axis starts late, and the last stage halves two axes only."""
    kwargs = configurations["3d_fullres"]["architecture"]["arch_kwargs"]
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    kwargs.update(
        n_stages=6,
        strides=strides,
        kernel_sizes=[[1, 3, 3], *[[3, 3, 3]] * 5],
        features_per_stage=[4, 4, 8, 8, 12, 12],
        n_conv_per_stage=[1] * 6,
        n_conv_per_stage_decoder=[1] * 5,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
