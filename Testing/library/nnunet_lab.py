"""A lab that trains an nnU-Net: run as a program, so that nnU-Net's own environment variables stay its own.

`python nnunet_lab.py FOLDER` writes FOLDER/nnUNet_raw, FOLDER/nnUNet_preprocessed and FOLDER/nnUNet_results. Planning,
preprocessing, training and every checkpoint are nnU-Net v2's own work: one plain network is trained for an epoch of two
iterations on tiny images; the other networks are initialised and saved without training. Beside each checkpoint lies
`expected.npz`: what nnU-Net's own predictor says of an image of another spacing.
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
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Trainer(nnUNetTrainer):
        """nnU-Net's own, for one short epoch."""

        def __init__(self, plans: Any, configuration: Any, fold: Any, dataset_json: Any, device: Any) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

        def plot_network_architecture(self) -> None:
            """No picture."""

        def perform_actual_validation(self, save_probabilities: bool = False) -> None:
            """None: nobody reads it."""

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

    def trainer(
        plans: dict[str, Any], fold: int | str, configuration: str = "3d_fullres", **described: Any
    ) -> nnUNetTrainer:
        given = {**copy.deepcopy(plans), "continue_training": False}
        return Trainer(given, configuration, fold, copy.deepcopy(about) | described, torch.device("cpu"))

    def predict(of: nnUNetTrainer) -> None:
        """Probabilities by nnU-Net's own predictor, of an image with thick slices, an empty rim and a unit."""
        rng = np.random.default_rng(1)
        image = rng.normal(300, 200, (30, 41, 38)).astype(np.float32)
        image[:, :3], image[..., -2:] = 0, 0
        spacing = (2.0, 1.3, 1.2)  # KJI
        predictor = nnUNetPredictor(use_mirroring=False, perform_everything_on_device=False, device=of.device)
        weights = {name: tensor.clone() for name, tensor in of.network.state_dict().items()}
        of.set_deep_supervision_enabled(False)
        predictor.manual_initialization(
            of.network, of.plans_manager, of.configuration_manager, [weights], of.dataset_json, "Trainer", None
        )
        channels = np.stack([image] * len(of.dataset_json["channel_names"]))
        _, found = predictor.predict_single_npy_array(channels, {"spacing": spacing}, None, None, True)
        np.savez(Path(of.output_folder_base) / "expected.npz", image=image, spacing=spacing, probabilities=found)

    trained = trainer(plans, 0)
    trained.run_training()
    predict(trained)

    def untrained(name: str, change: Any, configuration: str = "3d_fullres", **described: Any) -> None:
        """Another network of nnU-Net's library, saved by nnU-Net as it was initialised."""
        changed = copy.deepcopy(plans)
        changed["plans_name"] = name
        change(changed)
        other = trainer(changed, "all", configuration, **described)
        other.initialize()
        results = Path(other.output_folder_base)
        (results / "plans.json").write_text(json.dumps(changed))
        (results / "dataset.json").write_text(json.dumps(about | described))
        other.save_checkpoint(str(Path(other.output_folder) / "checkpoint_final.pth"))
        if configuration != "2d":
            predict(other)

    untrained("residual", _residual)
    untrained("anisotropic", _anisotropic, channel_names={"0": "CT"})
    untrained("pair", _pair, channel_names={"0": "CT", "1": "MR"})
    regions = {"background": 0, "whole": [1, 2], "bead": 1}
    untrained("regions", lambda plans: None, labels=regions, regions_class_order=[1, 2])
    untrained("flat", lambda plans: None, "2d")


def _residual(plans: dict[str, Any]) -> None:
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    stages = kwargs["n_stages"]
    kwargs["n_blocks_per_stage"] = [1, 2, *[1] * (stages - 2)]
    kwargs["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    del kwargs["n_conv_per_stage"]


def _anisotropic(plans: dict[str, Any]) -> None:
    """As nnU-Net plans for thick slices, here along J: that axis comes first, starts late, and the last stages halve
    the other two axes only. Its images are CT."""
    plans["transpose_forward"], plans["transpose_backward"] = [1, 0, 2], [1, 0, 2]
    settings = plans["configurations"]["3d_fullres"]
    settings.update(spacing=[4.0, 1.1, 0.9], patch_size=[16, 64, 64], normalization_schemes=["CTNormalization"])
    settings["architecture"]["arch_kwargs"].update(
        n_stages=6,
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]],
        kernel_sizes=[[1, 3, 3], *[[3, 3, 3]] * 5],
        features_per_stage=[4, 4, 8, 8, 12, 12],
        n_conv_per_stage=[1] * 6,
        n_conv_per_stage_decoder=[1] * 5,
    )


def _pair(plans: dict[str, Any]) -> None:
    """Two channels: a CT window, and z-scores of what is not 0."""
    settings = plans["configurations"]["3d_fullres"]
    settings.update(normalization_schemes=["CTNormalization", "ZScoreNormalization"], use_mask_for_norm=[False, True])
    windows = plans["foreground_intensity_properties_per_channel"]
    windows["1"] = windows["0"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
