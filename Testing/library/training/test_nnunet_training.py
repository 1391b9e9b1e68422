"""`expert train`: nnU-Net trains itself on a manifest's items of split train, and the result becomes an expert."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from KA2ERSegment.cli import app
from KA2ERSegment.encoders.nnunet import NnUNet, read_results
from KA2ERSegment.errors import KA2ERError, VolumeError
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.training import nnunet
from KA2ERSegment.training.nnunet import read_task, splits, write_raw_dataset
from KA2ERSegment.training.raw_dataset import RawDataset
from KA2ERSegment.training.sampling import ClassMap

SPACING = (1.4, 1.0, 1.2)  # mm, IJK
SHAPE = (40, 52, 44)  # KJI
CLASSES = {"bone": "rib|femur", "fluid": "csf", "liver": "^liver"}
TASK = {"items": "^ct_.*abdomen", "classes": CLASSES}
NAMES = {"1": "liver", "2": "femur_left", "3": "rib_3", "4": "skin"}


def no_progress(text: str, share: float) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def a_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six CT items of four subjects stored left to right, and what must not be used."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    rows = []

    def item(name: str, **changes: str) -> None:
        labels = np.zeros(SHAPE, dtype=np.uint8)
        for value, centre in enumerate(((14, 16, 12), (24, 34, 30), (30, 14, 34), (4, 46, 40)), start=1):
            labels[np.linalg.norm((grid - centre) * SPACING[::-1], axis=-1) < 8] = value
        image = (labels * 60 + rng.normal(0, 10, SHAPE)).astype(np.int16)
        affine = np.diag([*SPACING, 1.0])
        affine[0, 0] *= -1  # stored from right to left
        for kind, array in (("img", image), ("lbl", labels)):
            nibabel.save(nibabel.Nifti1Image(array[:, :, ::-1].T, affine), folder / f"{name}_{kind}.nii.gz")
        row = {
            "id": name, "split": "train", "modality": "CT", "body_region": "abdomen", "images": f"{name}_img.nii.gz",
            "label": f"{name}_lbl.nii.gz", "labels_json": "names.json", "subject": name[:-1], "licence": "CC0",
            "share_alike": "no",
        }  # fmt: skip
        rows.append(row | changes)

    for name in ("ct_1a", "ct_1b", "ct_2a", "ct_2b", "ct_3a", "ct_4a"):
        item(name)
    item("ct_5a", split="val")
    item("ct_6a", share_alike="yes", licence="CC-BY-SA-4.0")
    item("ct_7a", body_region="head")
    item("mr_8a")
    item("ct_9a", images="")
    (folder / "names.json").write_text(json.dumps(NAMES))
    with (folder / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "tasks.json").write_text(json.dumps({"belly": TASK}))
    return folder / "manifest.csv"


def test_only_the_tasks_items_of_split_train_are_prepared(a_manifest: Path, tmp_path: Path) -> None:
    raw = tmp_path / "Dataset500_belly"
    write_raw_dataset(ClassMap("belly", **renamed(TASK)), a_manifest, raw, False, no_progress)
    about = json.loads((raw / "dataset.json").read_text())
    dataset = RawDataset.open(raw)
    item = dataset.read(0)

    assert [name for name, _, _ in dataset.cases] == ["ct_1a", "ct_1b", "ct_2a", "ct_2b", "ct_3a", "ct_4a"]
    assert sorted(path.name for path in (raw / "imagesTr").iterdir()) == [
        f"{n}_0000.nii.gz" for n, _, _ in dataset.cases
    ]
    assert about["labels"] == {"background": 0, "bone": 1, "liver": 2}  # nobody shows fluid
    assert about["channel_names"] == {"0": "CT"}
    assert about["licences"] == ["CC0"]
    assert item.spacing == pytest.approx(SPACING)
    centres = {value: tuple(np.argwhere(item.labels == value).mean(axis=0).round(1)) for value in (1, 2)}
    assert centres[2] == (14, 16, 12)  # canonical axes, whatever way it was stored
    assert float(item.images[0][item.labels == 2].mean()) == pytest.approx(60, abs=3)


def test_share_alike_items_are_used_when_asked_for(a_manifest: Path, tmp_path: Path) -> None:
    write_raw_dataset(ClassMap("belly", **renamed(TASK)), a_manifest, tmp_path / "raw", True, no_progress)
    about = json.loads((tmp_path / "raw" / "dataset.json").read_text())

    assert about["numTraining"] == 7
    assert about["licences"] == ["CC-BY-SA-4.0", "CC0"]


@pytest.mark.parametrize("change", [{"items": "^nothing"}, {"classes": {"heart": "heart"}}])
def test_a_task_without_items_or_labels_is_refused(a_manifest: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(VolumeError, match="task 'belly' must have items of split 'train'"):
        write_raw_dataset(ClassMap("belly", **renamed(TASK | change)), a_manifest, tmp_path / "raw", False, no_progress)
    assert not (tmp_path / "raw" / "dataset.json").exists()


def renamed(task: dict[str, Any]) -> dict[str, Any]:
    return {"items": task["items"], "names": task["classes"]}


def test_no_subject_is_on_both_sides_of_a_fold() -> None:
    subjects = {f"case{n}": f"subject{n // 2}" for n in range(14)}
    folds = splits(subjects)

    assert len(folds) == 5
    for fold in folds:
        assert {subjects[c] for c in fold["train"]}.isdisjoint(subjects[c] for c in fold["val"])
        assert sorted(fold["train"] + fold["val"]) == sorted(subjects)
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(subjects)
    assert len(splits({"a": "x", "b": "y"})) == 2
    assert splits({"a": "x", "b": "x"}) == []


def test_tasks_have_names(a_manifest: Path, tmp_path: Path) -> None:
    assert tuple(read_task("heart_mr").names) == ("left ventricle",)
    assert read_task("belly", a_manifest.with_name("tasks.json")).names == CLASSES
    with pytest.raises(KA2ERError, match=r"one of \['brain_mr', 'heart_mr', 'trunk_ct'\] in 'cpu.json', got 'belly'"):
        read_task("belly")
    wrong = tmp_path / "wrong.json"
    for text, words in (("{", "readable JSON"), ('{"belly": {"items": "a"}}', "with 'items' and 'classes'")):
        wrong.write_text(text)
        with pytest.raises(KA2ERError, match=words):
            read_task("belly", wrong)


def command(manifest: Path, output: Path, *options: str) -> Any:
    fixed = ["expert", "train", "belly", "--manifest", str(manifest), "--output", str(output), "--device", "cpu"]
    return CliRunner().invoke(app, [*fixed, "--tasks", str(manifest.with_name("tasks.json")), *options])


def test_without_nnunet_the_command_says_how_to_get_it(
    a_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(nnunet.importlib.util, "find_spec", lambda name: None if name == "nnunetv2" else find(name))
    done = command(a_manifest, tmp_path / "trained", "--json")

    assert done.exit_code == 1
    assert "pip install 'ka2ersegment[nnunet]'" in json.loads(done.stdout)["error"]
    assert not (tmp_path / "trained").exists()


def test_what_cannot_be_trained_is_refused_before_any_work(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("words")

    for output, options, words in (
        ("taken", (), "must be empty"),
        ("fold", ("--fold", "7"), "one of all, 0, 1"),
        ("fold", ("--fold", "4"), "fold 4 must be one of 4: there are not more subjects"),
    ):
        done = command(a_manifest, tmp_path / output, *options, "--json")
        assert done.exit_code == 1
        assert words in json.loads(done.stdout)["error"]
    assert not (tmp_path / "fold" / "nnunet.log").exists()


@pytest.mark.slow
def test_the_command_trains_and_the_result_becomes_an_expert(a_manifest: Path, tmp_path: Path) -> None:
    """nnU-Net itself plans, preprocesses and trains: two epochs of one step, on the CPU."""
    pytest.importorskip("nnunetv2")
    output = tmp_path / "trained"
    done = command(a_manifest, output, "--epochs", "1", "--iterations", "1", "--channels", "4", "--fold", "0", "--json")

    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["cases"] == 6
    assert result["classes"] == ["bone", "liver"]
    shares = [float(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("progress ")]
    assert shares == sorted(shares)
    assert "training, epoch 1 of 1" in done.stderr
    found = read_results(Path(result["results"]))
    assert found.plans.classes == ("bone", "liver")
    assert found.plans.normalisation[0].scheme == "CTNormalization"
    assert found.plans.spacing_kji == pytest.approx(SPACING[::-1])
    assert NnUNet.load(Path(result["results"])).outputs == ("background", "bone", "liver")
    held_out = json.loads((output / "nnUNet_preprocessed" / "Dataset500_belly" / "splits_final.json").read_text())[0]
    assert held_out["val"] == ["ct_1a", "ct_1b"]

    again = command(a_manifest, output, "--epochs", "2", "--iterations", "1", "--fold", "0", "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert "training, epoch 2 of 2" in again.stderr
    assert "epoch 1 of 2" not in again.stderr
    bundle = tiny_bundle(tmp_path / "tiny")
    options = ["--to", str(bundle.folder), "--output", str(tmp_path / "larger"), "--name", "belly", "--json"]
    added = CliRunner().invoke(app, ["expert", "add", result["results"], *options])
    assert added.exit_code == 0, added.output
    assert json.loads(added.stdout)["expert"]["classes"] == ["bone", "liver"]
