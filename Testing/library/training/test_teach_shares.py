"""Teaching level 3 whose image it sees: shares come to mean something, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import Content
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.training.teach_shares import SECTION, level_3, main, shares_loss, teach_bundle

KINDS = {"ct": "^ct", "mr": "^mr"}


@pytest.fixture(scope="module")
def a_start(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="module")
def a_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects each of smooth bright objects (ct), of stripes (mr), and of dark ones that are nobody's (us)."""
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    for kind in ("ct", "mr", "us"):
        for number in range(4):
            labels = np.zeros((30, 34, 38), dtype=np.int16)
            k, j, i = rng.integers(4, 14, 3)
            labels[k : k + 12, j : j + 14, i : i + 15] = 1
            stripes = 300 * (np.indices(labels.shape)[0] % 4 < 2)
            image = {"ct": labels * 400, "mr": stripes - labels * 300, "us": labels * -500}[kind]
            image = image + rng.normal(0, 20, labels.shape)
            about = {
                "id": f"{kind}{number}", "source": kind, "spacing": [1.0, 1.0, 1.0], "names": {"1": "thing"},
                "channels": 1, "licence": "CC0", "modality": kind, "region": "", "subject": f"{kind}{number}",
            }  # fmt: skip
            arrays: dict[str, Any] = {"labels": labels.astype(np.uint16), "image0": image.astype(np.int16)}
            np.savez_compressed(folder / f"{kind}{number}.npz", about=json.dumps(about), **arrays)
    return folder


@pytest.fixture(scope="module")
def a_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    tasks = {name: {"items": KINDS[kind], "classes": {"thing": "."}} for name, kind in
             (("tiny_trunk", "ct"), ("tiny_brain", "mr"))}  # fmt: skip
    sampling = {"real_images": 1.0, "lesions": 0.0, "parts": 0.0, "unions": 0.0}
    path.write_text(json.dumps({"manifests": [], "share_alike": False, "tasks": tasks, "sampling": sampling}))
    return path


def test_shares_come_to_say_whose_image_it_is(a_start: Bundle, a_cache: Path, a_config: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    words = [str(a_start.folder), str(tmp_path / "taught"), "--config", str(a_config), "--cache", str(a_cache)]
    result = CliRunner().invoke(app, [*words, "--cases", "36", "--held-out", "9", "--steps", "160", "--batch", "4"])
    assert result.exit_code == 0, result.output

    taught = load_bundle(tmp_path / "taught")
    assert taught.plans == a_start.plans
    before, after = a_start.weights(), taught.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model = build_model(a_start.plans, before)
    known = {id(parameter) for parameter in level_3(model)}
    allowed = {name for name, parameter in model.named_parameters() if id(parameter) in known}
    assert changed, "something was taught"
    assert changed <= allowed, "level 3 of the finest stride, and nothing else"
    card = (tmp_path / "taught" / "model_card.md").read_text()
    table = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in card.split(SECTION)[1].splitlines() if "%" in line
    }
    assert set(table) == {"tiny_trunk", "tiny_brain"}
    patches = sum(int(cells[0]) for cells in table.values())
    first = sum(int(cells[0]) * float(cells[4].strip(" %")) / 100 for cells in table.values())
    assert patches == 5
    assert first >= 4, "on images of subjects that it did not see, nearly always the own expert has the largest share"
    (nobody,) = (line for line in card.splitlines() if line.startswith("| none"))
    shares = [float(cell) for cell in nobody.split("|")[3:6]]
    assert max(shares) == shares[0], "where the image is nobody's, the foundation has"


def test_the_loss_asks_for_the_own_arm_inside_the_object() -> None:
    target = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    target[:, :4] = True
    weights = torch.full((2, 3, 2, 2, 2), 0.25)
    weights[:, 0] = 0.5
    weights[0, :, 0] = torch.tensor([0.1, 0.8, 0.1])[:, None, None]  # inside the first object: mostly arm 1

    loss = shares_loss(weights, torch.tensor([1, 0]), target)

    assert loss == pytest.approx((-np.log(0.8) - np.log(0.5)) / 2, abs=1e-5)


def test_a_bundle_without_level_3_is_refused(a_start: Bundle) -> None:
    plans = replace(a_start.plans, amalgamation=replace(a_start.plans.amalgamation, kind="concatenation"))
    bundle = replace(a_start, plans=plans)

    with pytest.raises(BundleError, match="hierarchical"):
        teach_bundle(bundle, [], [], [], steps=1, batch=1)
    assert Content.of(a_start).plans == a_start.plans
