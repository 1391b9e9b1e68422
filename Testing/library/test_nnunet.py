"""A lab's own nnU-Net: what nnU-Net v2 wrote in this test run becomes an expert, anything else is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.cli import app
from KA2ERSegment.encoders.expert import Expert, build_network
from KA2ERSegment.encoders.nnunet import FoundExpert, NnUNet, read_results
from KA2ERSegment.encoders.reading import normalised
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.experts import Content, arm_tensors, with_expert
from KA2ERSegment.plans import Normalisation
from KA2ERSegment.preprocessing import RawPatch, image_statistics, normalise
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.training.arm import train_arm
from KA2ERSegment.training.raw_dataset import RawDataset

pytestmark = pytest.mark.slow

LAB = Path(__file__).with_name("nnunet_lab.py")
DATASET = "Dataset901_Beads"
TRAINED = "Trainer__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def a_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where nnU-Net planned, trained and wrote: half a minute."""
    pytest.importorskip("nnunetv2")
    folder = tmp_path_factory.mktemp("lab")
    done = subprocess.run([sys.executable, str(LAB), str(folder)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def a_results_folder(a_lab: Path) -> Path:
    return a_lab / "nnUNet_results" / DATASET / TRAINED


@pytest.fixture(scope="module")
def a_found_expert(a_results_folder: Path) -> FoundExpert:
    return read_results(a_results_folder, licence="CC0")


@pytest.fixture
def a_copy(a_results_folder: Path, tmp_path: Path) -> Path:
    """Results to spoil."""
    return Path(shutil.copytree(a_results_folder, tmp_path / DATASET / TRAINED))


@pytest.fixture
def a_raw_dataset(a_lab: Path) -> RawDataset:
    return RawDataset.open(a_lab / "nnUNet_raw" / DATASET)


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def checkpoint_of(results: Path) -> Path:
    return next(results.glob("fold_*/checkpoint_final.pth"))


def results_of(lab: Path, plans: str) -> Path:
    return lab / "nnUNet_results" / DATASET / f"Trainer__{plans}__3d_fullres"


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def configuration(plans: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plans["configurations"]["3d_fullres"]
    return found


def quiet(text: str, share: float) -> None:
    """Progress that nobody watches."""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["expert", *arguments])


def test_what_nnunet_trained_becomes_an_expert(a_found_expert: FoundExpert, a_results_folder: Path) -> None:
    plans = a_found_expert.plans

    assert plans.name == "beads"
    assert plans.classes == ("bead", "shell")
    assert plans.origin == f"{DATASET}, {TRAINED}, fold_0, checkpoint_final.pth"
    assert len(plans.sha256) == 64
    assert plans.spacing_kji == pytest.approx((1.1, 0.9, 0.9))
    assert plans.normalisation == (Normalisation("ZScoreNormalization"),)
    assert plans.axes == ()
    assert plans.domain is not None, "nnU-Net's plans hold the medians of what it was trained on"
    assert np.exp(plans.domain.mean[:2]) == pytest.approx((0.9, 1.1 / 0.9), rel=0.01)
    assert plans.domain.hounsfield < 0.1


@pytest.mark.parametrize("name", ["nnUNetPlans", "residual", "anisotropic", "pair", "regions"])
def test_it_says_what_nnunets_own_predictor_says(a_lab: Path, name: str) -> None:
    """Of an image of another spacing with an empty rim: crop, normalisation, resampling, windows, and back."""
    folder = results_of(a_lab, name)
    network = NnUNet.load(folder)
    with np.load(folder / "expected.npz") as stored:
        image, spacing, expected = (stored[key] for key in ("image", "spacing", "probabilities"))
    found = network.probabilities(image, spacing.tolist())

    assert found.shape == (len(network.outputs), *image.shape)
    assert np.abs(found - expected).max() < 5e-3  # nnU-Net adds windows up in half precision
    assert expected.std(axis=(1, 2, 3)).min() > 0.02
    assert network.outputs == (("whole", "bead") if name == "regions" else ("background", "bead", "shell"))


def test_axes_spacing_and_window_are_those_of_the_plans(a_lab: Path) -> None:
    """nnU-Net wrote 4 mm along its first axis, which is the images' second."""
    plans = read_results(results_of(a_lab, "anisotropic")).plans

    assert plans.axes == (1, 0, 2)
    assert plans.spacing_kji == (1.1, 4.0, 0.9)
    written = json.loads((results_of(a_lab, "anisotropic") / "plans.json").read_text())
    numbers = written["foreground_intensity_properties_per_channel"]["0"]
    window = {key: numbers[key] for key in ("percentile_00_5", "percentile_99_5", "mean", "std")}
    assert plans.normalisation == (Normalisation("CTNormalization", **window),)
    assert plans.domain is not None
    assert plans.domain.hounsfield > 0.9
    spacing = sorted(written["original_median_spacing_after_transp"])
    assert np.exp(plans.domain.mean[:2]) == pytest.approx((spacing[0], spacing[2] / spacing[0]), rel=0.01)


@pytest.mark.parametrize("name", ["pair", "anisotropic"])
def test_a_patch_is_told_by_one_pass(a_lab: Path, name: str) -> None:
    """Where the patch's grid is the plans' own, the network's own answer; features lie on the same grid."""
    network = NnUNet.load(results_of(a_lab, name))
    axes = network.plans.axes or (0, 1, 2)
    values = torch.randn(2, 64, 64, 64, generator=torch.Generator().manual_seed(0)) * 40 + 70
    steps = torch.tensor([network.plans.spacing_kji] * 2)
    inside = torch.ones_like(values, dtype=torch.bool)
    statistics = torch.stack([image_statistics(case.numpy()) for case in values])
    raw = RawPatch(values, inside, steps, statistics, torch.ones(2, dtype=torch.bool))
    found, features = network.patch_probabilities(raw), network.features(raw, (4, 8, 16))
    seen = torch.stack([normalised(raw, channel) for channel in network.plans.normalisation], dim=1)
    seen = seen.permute(0, 1, *(axis + 2 for axis in axes))
    with torch.no_grad():
        expected = network.network(seen).softmax(dim=1)

    torch.testing.assert_close(found.permute(0, 1, *(axis + 2 for axis in axes)), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 64, 64, 64))
    assert {stride: tuple(f.shape[2:]) for stride, f in features.items()} == {s: (64 // s,) * 3 for s in (4, 8, 16)}
    bundled = read_results(results_of(a_lab, name))
    expert = Expert(bundled.plans).eval()
    expert.encoder.load_state_dict(bundled.tensors, strict=False)
    with torch.no_grad():
        cut = expert.read(raw, (8, 16))
    if name == "pair":  # the other one's last stage, beyond stride 16, decides on how many samples there are
        for stride in (8, 16):
            torch.testing.assert_close(cut[stride], features[stride])


def test_a_volume_that_the_network_cannot_see_is_refused(a_results_folder: Path) -> None:
    network = NnUNet.load(a_results_folder)
    image = np.random.default_rng(0).normal(size=(20, 20, 20))

    with pytest.raises(VolumeError, match=r"planned for, 1.1 x 0.9 x 0.9 mm \(K, J, I\), got 25 x 1 x 1 mm"):
        network.probabilities(image, (25.0, 1.0, 1.0))
    for wrong in (image[0], image * 0, image * np.nan):
        with pytest.raises(VolumeError, match="3D image"):
            network.probabilities(wrong, (1.0, 1.0, 1.0))


def test_a_card_says_that_all_channels_see_one_image(a_lab: Path, a_bundle: Bundle) -> None:
    found = read_results(results_of(a_lab, "pair"))
    card = with_expert(Content.of(a_bundle), found.plans, found.tensors).card

    assert "Each of its 2 channels sees the same image" in card
    assert "CTNormalization, ZScoreNormalization" in card
    assert "1.1 x 0.9 x 0.9 mm" in card


@pytest.mark.parametrize("results", [TRAINED, "Trainer__residual__3d_fullres", "Trainer__anisotropic__3d_fullres"])
def test_the_expert_sees_what_nnunets_own_network_sees(a_lab: Path, results: str) -> None:
    """Stage by stage, against the whole network built from nnU-Net's plans with the whole checkpoint."""
    folder = a_lab / "nnUNet_results" / DATASET / results
    found = read_results(folder)
    expert = Expert(found.plans).eval()
    expert.encoder.load_state_dict(found.tensors, strict=False)
    architecture = configuration(json.loads((folder / "plans.json").read_text()))["architecture"]
    whole = type(found.plans)("whole", "", architecture["network_class_name"], architecture["arch_kwargs"], ("a", "b"))
    network = build_network(whole, deep_supervision=True).eval()
    trusted = torch.load(checkpoint_of(folder), weights_only=False, map_location="cpu")  # written by this test run
    network.load_state_dict(trusted["network_weights"])
    image = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, features = network.encoder(image), expert(image)

    for stride in (8, 16):
        assert features[stride].shape[2:] == (64 // stride,) * 3
    for stage, (stride, maps) in enumerate(zip(expert.strides, expert.encoder(image), strict=True)):
        assert torch.equal(maps, expected[stage]), stage
        if len(set(stride)) == 1 and stride[0] in (8, 16):
            assert torch.equal(features[stride[0]], expected[stage])


def test_files_in_another_order_turn_spacing_and_axes(a_lab: Path, a_raw_dataset: RawDataset, tmp_path: Path) -> None:
    """Sagittal slices: the files' K runs to the right, J up, I to the front."""
    folder = Path(shutil.copytree(a_raw_dataset.folder, tmp_path / DATASET))
    path = folder / "imagesTr" / "b0_0000.nii.gz"
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 0], affine[2, 1], affine[3, 3] = -3.0, 1.0, 1.0, 1.0
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), affine), path)
    found = read_results(results_of(a_lab, "anisotropic"))  # of files with 1.1, 4 and 0.9 mm, the second axis first
    turned = found.stored_along(RawDataset.open(folder).canonical_axes())

    assert a_raw_dataset.canonical_axes() == (0, 1, 2)
    assert RawDataset.open(folder).canonical_axes() == (2, 0, 1)
    assert turned.plans.spacing_kji == (4.0, 0.9, 1.1)
    assert turned.plans.axes == (0, 2, 1)  # S was their J, R their K, A their I
    assert found.stored_along((0, 1, 2)) == found
    stored = torch.arange(24.0).reshape(2, 3, 4)  # K, J, I of a file
    canonical = stored.permute(1, 2, 0)  # S, A, R
    assert torch.equal(canonical.permute(turned.plans.axes), stored.permute(found.plans.axes))


def test_thick_slices_are_averaged_to_the_stride_of_the_other_axes(a_lab: Path) -> None:
    found = read_results(a_lab / "nnUNet_results" / DATASET / "Trainer__anisotropic__3d_fullres")
    expert = Expert(found.plans).eval()
    image = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last, features = expert.encoder(image)[-1], expert(image)[16]

    assert last.shape[2:] == (16, 4, 4)
    assert expert.strides[-1] == (4, 16, 16)
    assert torch.allclose(features, last.unflatten(2, (4, 4)).mean(3), atol=1e-6)


def test_stages_beyond_stride_16_are_left_out(a_lab: Path) -> None:
    folder = a_lab / "nnUNet_results" / DATASET / "Trainer__anisotropic__3d_fullres"

    assert (
        configuration(json.loads((folder / "plans.json").read_text()))["architecture"]["arch_kwargs"]["n_stages"] == 6
    )
    assert read_results(folder).plans.arch_kwargs["n_stages"] == 5


def test_an_encoder_of_few_stages_is_read_at_both_strides_all_the_same(a_copy: Path, a_bundle: Bundle) -> None:
    """Of small images nnU-Net plans networks that end early; here, at stride 4."""
    kwargs = json.loads((a_copy / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"][
        "arch_kwargs"
    ]
    flat = [[1, 1, 1], [2, 2, 2], [2, 2, 2], *[[1, 1, 1]] * (kwargs["n_stages"] - 3)]
    rewrite_json(a_copy / "plans.json", lambda p: configuration(p)["architecture"]["arch_kwargs"].update(strides=flat))
    found = read_results(a_copy)
    content = with_expert(Content.of(a_bundle), found.plans, found.tensors)
    values = torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    raw = RawPatch.without_unit(values, torch.ones_like(values, dtype=torch.bool), torch.ones(1, 3))
    with torch.no_grad():
        features = build_model(content.plans, dict(content.tensors)).encode(normalise(values, raw.inside), raw=raw)

    assert {stride: f.shape[2] for stride, f in features.experts[-1].items()} == {8: 4, 16: 2}
    assert features.embedding.isfinite().all()


def test_plans_of_nnunet_before_2_4_are_read_too(a_copy: Path, a_found_expert: FoundExpert) -> None:
    def to_former(plans: dict[str, Any]) -> None:
        settings = configuration(plans)
        kwargs = settings.pop("architecture")["arch_kwargs"]
        settings |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 4,
            "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            "num_pool_per_axis": [4, 4, 4],
            "pool_op_kernel_sizes": kwargs["strides"],
            "conv_kernel_sizes": kwargs["kernel_sizes"],
            "unet_max_num_features": 320,
        }

    rewrite_json(a_copy / "plans.json", to_former)
    with pytest.raises(BundleError, match="two trainings"):  # widths double there, here they do not
        read_results(a_copy)
    rewrite_json(a_copy / "plans.json", lambda plans: configuration(plans).update(UNet_class_name="SwinUNETR"))
    with pytest.raises(BundleError, match="PlainConvUNet or ResidualEncoderUNet"):
        read_results(a_copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: configuration(p).update(spacing=[20000.0, 0.9, 0.9]), "spacing of 0.01 to 50"),
        (lambda p: configuration(p).update(spacing=[float("nan"), 1, 1]), "spacing of 0.01 to 50"),
        (lambda p: configuration(p).update(spacing=[1.0, 1.0]), "spacing of 0.01 to 50"),
        (lambda p: configuration(p).update(previous_stage="3d_lowres"), "second stage of a cascade"),
        (lambda p: p["configurations"].pop("3d_fullres"), "must have configuration '3d_fullres'"),
        (lambda p: configuration(p).update(inherits_from="3d_fullres", patch_size=None), "3D configuration"),
        (lambda p: p.pop("configurations"), "'configurations'"),
        (lambda p: configuration(p)["architecture"].update(network_class_name="os.system"), "no network class"),
        (lambda p: configuration(p)["architecture"]["arch_kwargs"].update(strides=[[1, 1]] * 5), "three axes"),
        (
            lambda p: configuration(p)["architecture"]["arch_kwargs"]["features_per_stage"].__setitem__(0, 8),
            "two train",
        ),
        (lambda p: configuration(p).update(architecture={}), "architecture is a U-Net"),
        (lambda p: p.update(transpose_forward=[0, 0, 2]), "transpose_forward is 0, 1 and 2 in some order"),
        (lambda p: configuration(p).pop("normalization_schemes"), "one normalisation scheme for each input channel"),
        (lambda p: configuration(p).update(normalization_schemes=["Ours"]), "channels are normalised by one of CTN"),
        (
            lambda p: (
                configuration(p).update(normalization_schemes=["CTNormalization"]),
                p.pop("foreground_intensity_properties_per_channel"),
            ),
            "must have percentile_00_5, percentile_99_5, mean, std",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(a_copy: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    rewrite_json(a_copy / "plans.json", change)

    with pytest.raises(BundleError, match=words):
        read_results(a_copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(channel_names={"0": "T1", "1": "T2"}), "one normalisation scheme for each input channel"),
        (lambda d: d.pop("channel_names"), "one normalisation scheme for each input channel, got channels None"),
        (lambda d: d["labels"].update(third=3), "as many outputs as dataset.json has classes, 4"),
        (lambda d: d["labels"].update(whole=[1, 2]), "as many outputs as dataset.json has classes, 3|2 with"),
        (lambda d: d.update(labels={"0": "background"}), "names at least one class"),
        (lambda d: d.update(labels=3), "'labels' from name to value"),
    ],
)
def test_a_dataset_description_that_does_not_fit_is_refused(
    a_copy: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    rewrite_json(a_copy / "dataset.json", change)
    if "whole" in (a_copy / "dataset.json").read_text():
        assert read_results(a_copy).plans.classes == ("bead", "shell", "whole")  # three regions, three outputs
        return

    with pytest.raises(BundleError, match=words):
        read_results(a_copy)


def test_flat_networks_are_refused(a_lab: Path) -> None:
    with pytest.raises(BundleError, match="3D configuration, got '2d'"):
        read_results(a_lab / "nnUNet_results" / DATASET / "Trainer__flat__2d")


def test_a_fold_that_is_missing_is_named_with_those_that_are_there(a_copy: Path) -> None:
    with pytest.raises(BundleError, match=r"fold '3' must be in .* has \['0'\]"):
        read_results(a_copy, fold="3")
    checkpoint_of(a_copy).unlink()
    assert read_results(a_copy).plans.origin.endswith("checkpoint_best.pth")
    (a_copy / "fold_0" / "checkpoint_best.pth").unlink()
    with pytest.raises(BundleError, match="it has neither"):
        read_results(a_copy)


def test_folders_that_are_no_results_say_what_they_are(a_results_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=TRAINED):
        read_results(a_results_folder.parent)
    with pytest.raises(BundleError, match=r"has none\. Give the folder TRAINER__PLANS"):
        read_results(tmp_path)
    with pytest.raises(BundleError, match="must be a folder"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "plans.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match="nnU-Net v1"):
        read_results(tmp_path)


class Shout:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "kind", ["code in torch's form", "code in a plain pickle", "text", "cut", "another checkpoint"]
)
def test_a_file_that_is_no_plain_checkpoint_is_refused_and_not_run(a_copy: Path, tmp_path: Path, kind: str) -> None:
    path, trace = checkpoint_of(a_copy), tmp_path / "it ran"
    if kind == "code in torch's form":
        torch.save({"network_weights": {}, "logging": Shout(trace)}, path)
    elif kind == "code in a plain pickle":
        path.write_bytes(pickle.dumps(Shout(trace)))
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({"state_dict": {}}, path)

    with pytest.raises(BundleError, match="must be a checkpoint") as refused:
        read_results(a_copy)
    assert not trace.exists()
    assert "weights_only" not in str(refused.value), "torch's advice to trust it"


def test_weights_that_are_not_finite_are_refused(a_copy: Path) -> None:
    path = checkpoint_of(a_copy)
    checkpoint = torch.load(path, weights_only=False)
    next(iter(checkpoint["network_weights"].values())).fill_(float("nan"))
    torch.save(checkpoint, path)

    with pytest.raises(BundleError, match="must be finite"):
        read_results(a_copy)


def test_training_moves_the_arm_and_nothing_else(
    a_bundle: Bundle, a_found_expert: FoundExpert, a_raw_dataset: RawDataset
) -> None:
    content = with_expert(Content.of(a_bundle), a_found_expert.plans, a_found_expert.tensors)
    told: list[float] = []
    trained = train_arm(content, "beads", a_raw_dataset, 0.08, lambda text, share: told.append(share))

    own = arm_tensors(content.plans, "beads")
    for name, tensor in content.tensors.items():
        moved = trained.tensors[name] != tensor
        row = own.get(name)
        if name not in own:
            assert not moved.any(), name
        elif row is not None:
            assert moved[row].any(), name
            assert not moved[:row].any(), name
        else:
            assert moved.any(), name
    assert trained.steps > 0
    assert 1 <= trained.images <= 5  # as many as the time allows
    assert 0 < trained.share < 1
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize(
    ("spacing", "words"), [((25.0, 25.0, 25.0), "25 x 25 x 25"), ((0.9, 0.9, 23.0), "0.9 x 0.9 x 23")]
)
def test_images_of_quite_another_spacing_are_refused(
    a_bundle: Bundle,
    a_found_expert: FoundExpert,
    a_raw_dataset: RawDataset,
    spacing: tuple[float, float, float],
    words: str,
) -> None:
    plans = replace(a_found_expert.plans, spacing_kji=spacing)
    content = with_expert(Content.of(a_bundle), plans, a_found_expert.tensors)

    with pytest.raises(VolumeError, match=f"about the spacing that the expert was planned for, {words} mm"):
        train_arm(content, "beads", a_raw_dataset, 0.01, quiet)


def test_raw_data_sets_are_read_with_their_labels(a_raw_dataset: RawDataset) -> None:
    item = a_raw_dataset.read(0)

    assert len(a_raw_dataset.cases) == 5
    assert item.names == {1: "bead", 2: "shell"}
    assert item.boxes.keys() == {1, 2}
    assert item.spacing == pytest.approx((0.9, 0.9, 1.1))
    assert item.images[0].shape == item.labels.shape == (72, 64, 68)
    bead, shell, rest = (float(item.images[0][item.labels == value].mean()) for value in (1, 2, 0))
    assert bead > shell > rest


def test_folders_that_are_no_raw_data_set_are_refused(a_lab: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="raw data set of nnU-Net"):
        RawDataset.open(tmp_path)
    with pytest.raises(VolumeError, match="preprocessed one: give the raw one"):
        RawDataset.open(a_lab / "nnUNet_preprocessed" / DATASET)


def test_labels_on_another_grid_are_refused(a_raw_dataset: RawDataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(a_raw_dataset.folder, tmp_path / DATASET))
    path = folder / "labelsTr" / "b0.nii.gz"
    labels = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels.dataobj), np.diag([2.0, 1.0, 1.0, 1.0])), path)

    with pytest.raises(VolumeError, match="case 'b0': image and label map must lie on one grid"):
        RawDataset.open(folder).read(0)


def test_the_command_adds_trains_lists_and_removes(
    a_lab: Path, a_results_folder: Path, a_bundle: Bundle, tmp_path: Path
) -> None:
    larger, smaller = tmp_path / "larger", tmp_path / "smaller"
    raw = a_lab / "nnUNet_raw" / DATASET
    before = dict(a_bundle.checksums)
    done = run(
        "add", str(a_results_folder), "--to", str(a_bundle.folder), "--output", str(larger), "--license", "CC0",
        "--images", str(raw), "--minutes", "0.05", "--json",
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["trained"]
    assert result["expert"]["sha256"] == load_bundle(larger).plans.experts[-1].sha256
    assert result["megabytes"] == pytest.approx(sum(p.stat().st_size for p in larger.iterdir()) / 1e6, abs=0.02)
    shares = [float(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("progress ")]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert dict(load_bundle(a_bundle.folder).checksums) == before
    listed = json.loads(run("list", str(larger), "--json").stdout)["experts"]
    assert [expert["name"] for expert in listed] == ["tiny_trunk", "tiny_brain", "beads"]
    assert "minutes" in listed[-1]["note"]
    removed = run("remove", "beads", "--from", str(larger), "--output", str(smaller), "--json")
    assert removed.exit_code == 0, removed.output
    assert load_bundle(smaller).checksums["weights.safetensors"] == before["weights.safetensors"]


def test_without_images_the_command_says_that_the_expert_does_not_count(
    a_results_folder: Path, a_bundle: Bundle, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    done = run("add", str(a_results_folder), "--to", str(a_bundle.folder), "--output", str(larger))

    assert done.exit_code == 0, done.output
    assert "does not count until its arm is trained" in done.stderr
    assert "not trained" in (larger / "model_card.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder, _: (folder / "plans.json").unlink(), "plans.json"),
        (lambda folder, _: (folder / "dataset.json").unlink(), "dataset.json"),
        (lambda folder, _: ((folder / "plans.json").unlink(), (folder / "plans.pkl").touch()), "nnU-Net v1"),
        (lambda folder, trace: checkpoint_of(folder).write_bytes(pickle.dumps(Shout(trace))), "must be a checkpoint"),
        (
            lambda folder, _: rewrite_json(
                folder / "dataset.json", lambda d: d.update(channel_names={"0": "T1", "1": "T2"})
            ),
            "one normalisation scheme for each input channel",
        ),
        (
            lambda folder, _: rewrite_json(
                folder / "plans.json", lambda p: configuration(p).update(spacing=[25.0, 25.0, 25.0])
            ),
            "about the spacing that the expert was planned for",
        ),
    ],
    ids=["no plans", "no dataset", "nnU-Net v1", "a pickle that is code", "other channels", "spacing of 20 times"],
)
def test_a_refused_expert_leaves_no_bundle(
    a_copy: Path,
    a_bundle: Bundle,
    a_raw_dataset: RawDataset,
    tmp_path: Path,
    spoil: Callable[[Path, Path], Any],
    words: str,
) -> None:
    spoil(a_copy, tmp_path / "it ran")
    given = ("--to", str(a_bundle.folder), "--output", str(tmp_path / "larger"), "--json")
    done = run("add", str(a_copy), *given, "--images", str(a_raw_dataset.folder), "--minutes", "0.01")

    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert words in said["error"]
    assert said["kind"] in ("BundleError", "VolumeError")
    assert [p.name for p in tmp_path.iterdir()] == [DATASET], "no bundle, and no code was run"
    assert load_bundle(a_bundle.folder).checksums == a_bundle.checksums
