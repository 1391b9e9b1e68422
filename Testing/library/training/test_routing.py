"""Routing and forgetting: the same cases for all methods, tables whose means can be worked out by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import Content
from KA2ERSegment.plans import GatePlans
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.training.routing import GATED, Case, main, markdown, measure, report
from KA2ERSegment.training.sampling import SamplingOptions

if TYPE_CHECKING:
    from click.testing import Result

NAMES = ("tiny_trunk", "tiny_brain")
ROWS = ["general", *NAMES, GATED]


def a_bundle(folder: Path, **changes: Any) -> Bundle:
    """Its gate is sure that it is one of the specialists, whichever."""
    content = Content.of(tiny_bundle(folder, replace(tiny_plans(), gate=GatePlans(NAMES, hidden=8, **changes))))
    bias = content.tensors["gate.head.bias"] - torch.tensor([20.0, 0, 0])
    return replace(content, tensors={**content.tensors, "gate.head.bias": bias}).save(folder, force=True)


@pytest.fixture(scope="module")
def a_workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with an item of the first task, one of none (a label map), and one of split `train`; and a config."""
    folder = tmp_path_factory.mktemp("routing")
    data = folder / "data" / "permissive"
    data.mkdir(parents=True)
    labels = np.zeros((40, 36, 32), dtype=np.uint16)
    labels[6:22, 5:20, 4:18] = 1
    image = (labels * 400 + np.random.default_rng(0).normal(0, 30, labels.shape)).astype(np.int16)
    for name, array in (("lbl", labels), ("img", image)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.2, 2.0, 1.0])), data / f"{name}.nii.gz")
    common = {"modality": "CT", "body_region": "abdomen", "label": "lbl.nii.gz", "labels_json": "", "licence": "CC0"}
    rows = [
        {"id": "trunk", "split": "val", "images": "img.nii.gz", "source_repo": "a/repo", "share_alike": "no"},
        {"id": "alone", "split": "val", "images": "", "source_repo": "b/repo", "share_alike": "no"},
        {"id": "bound", "split": "val", "images": "", "source_repo": "b/repo", "share_alike": "yes"},
        {"id": "learnt", "split": "train", "images": "", "source_repo": "b/repo", "share_alike": "no"},
    ]
    with (data / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    tasks = {name: {"items": f"^{name[5:]}", "classes": {}} for name in NAMES}
    config = {"manifests": ["permissive/manifest.csv"], "share_alike": False, "tasks": tasks, "sampling": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(workplace: Path, bundle: Bundle, output: Path) -> Result:
    app = typer.Typer()
    app.command()(main)
    given = [bundle.folder, "--config", workplace / "config.json", "--data", workplace / "data", "--output", output]
    return CliRunner().invoke(app, [*map(str, given), "--patches", "2", "--clicks", "1", "--device", "cpu"])


def test_the_command_leaves_data_tables_and_a_picture(a_workplace: Path, tmp_path: Path) -> None:
    result = run(a_workplace, a_bundle(tmp_path / "bundle", threshold=0.0), tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "routing.json").read_text())

    assert found["families"] == {name: {"patches": 2, "subjects": 1} for name in ("tiny_trunk", "other")}
    assert {case["item"] for case in found["cases"]} == {"trunk", "alone"}, "split val, nothing share-alike"
    assert [case["real"] for case in found["cases"]] == [True, True, False, False]
    assert all(list(case["dice"]) == ROWS for case in found["cases"])
    assert all(len(case["heard"]) == len(case["dice"]["general"]) == 2 for case in found["cases"])
    for shares in found["routing"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["general"] == 0, "a specialist is always the top choice"
    assert "| gated |" in (tmp_path / "out" / "routing.md").read_text()
    assert (tmp_path / "out" / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_with_tau_of_one_the_gated_row_is_the_general_one(a_workplace: Path, tmp_path: Path) -> None:
    assert run(a_workplace, a_bundle(tmp_path / "bundle", threshold=1.0), tmp_path / "out").exit_code == 0
    found = json.loads((tmp_path / "out" / "routing.json").read_text())

    assert all(case["dice"][GATED] == case["dice"]["general"] for case in found["cases"])
    assert all(shares["general"] == 1 for shares in found["routing"].values())
    assert found["gated_less_general"]["other"] == [0, 0, 0]


def test_a_gate_that_is_switched_off_is_reported_as_if_it_were_on(a_workplace: Path, tmp_path: Path) -> None:
    for name, enabled in (("on", True), ("off", False)):
        bundle = a_bundle(tmp_path / f"{name}-bundle", threshold=0.0, enabled=enabled)
        assert run(a_workplace, bundle, tmp_path / name).exit_code == 0
    cases = [json.loads((tmp_path / name / "routing.json").read_text())["cases"] for name in ("on", "off")]

    assert cases[0] == cases[1]


def test_a_bundle_without_a_gate_is_refused() -> None:
    with pytest.raises(BundleError, match="the bundle has none"):
        measure(build_model(tiny_plans()), [], [], SamplingOptions(patch_size=32), 1, 1)


def a_case(family: str, source: str, subject: str, heard: list[str], **dice: list[float]) -> Case:
    return Case(subject, subject, source, family, True, dice, heard)


def test_tables_are_means_over_sources_and_shares_of_prompts() -> None:
    cases = [
        a_case("brain", "a", "1", ["brain", "brain"], general=[0.2, 0.4], brain=[0.4, 0.6], gated=[0.4, 0.6]),
        a_case("brain", "a", "2", ["general", "brain"], general=[0.4, 0.6], brain=[0.4, 0.8], gated=[0.4, 0.8]),
        a_case("brain", "b", "3", ["general", "general"], general=[0.9, 0.9], brain=[0.5, 0.5], gated=[0.9, 0.9]),
        a_case("other", "c", "4", ["general", "brain"], general=[0.7, 0.8], brain=[0.1, 0.2], gated=[0.7, 0.7]),
    ]
    found = report(cases[::-1])

    assert list(found["families"]) == ["brain", "other"]
    assert found["families"]["brain"] == {"patches": 3, "subjects": 3}
    assert found["routing"] == {
        "brain": {"general": 0.5, "brain": 0.5},
        "other": {"general": 0.5, "brain": 0.5},
    }
    assert found["dice"]["first"]["general"]["brain"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["dice"]["last"]["brain"] == pytest.approx({"brain": (0.7 + 0.5) / 2, "other": 0.2})
    mean, low, high = found["gated_less_general"]["brain"]
    assert mean == pytest.approx(0.4 / 3)
    assert low == pytest.approx(0.0)
    assert high == pytest.approx(0.2)
    text = markdown(found, "A bundle.")
    assert "| brain | 0.500 | 0.500 |" in text
    assert "| general | 0.700 | 0.800 |" in text
    assert "+0.133 [+0.000, +0.200]" in text
