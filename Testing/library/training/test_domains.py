"""Domains from packed items: whose volumes an expert knows, what an unseen source makes of it, and level shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.domain import TRUST, Fingerprint, log_prior
from KA2ERSegment.plans import GatePlans, Plans
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.training import domains
from KA2ERSegment.training.domains import (
    SECTION,
    LeftOut,
    cross_entropies,
    each_left_out,
    fingerprint_of,
    fit_domain,
    main,
    own_first,
    with_domains,
)
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.sampling import ClassMap
from KA2ERSegment.training.thin import thin

TASKS = [ClassMap("tiny_trunk", "^ct", {"thing": "."}), ClassMap("tiny_brain", "^mr", {"thing": "."})]
SPACINGS = {"ct": (0.8, 0.8, 3.0), "mr": (1.0, 1.0, 1.0), "us": (0.3, 0.3, 0.3)}
MODALITIES = {"ct": "label map (CT-derived)", "mr": "MR T1", "us": "ultrasound"}


def pack(folder: Path) -> None:
    """Two sources of four subjects for each kind; CT comes without images, so the manifest alone says what it is."""
    rng = np.random.default_rng(0)
    for kind, spacing in SPACINGS.items():
        for number in range(8):
            source = f"{kind}/{number % 2}"
            shape = tuple((np.array([30, 36, 40]) * rng.uniform(0.8, 1.2, 3)).astype(int))
            labels = np.zeros(shape, dtype=np.uint16)
            labels[6:18, 8:22, 9:24] = 1
            about = {
                "id": f"{kind}{number}", "source": source, "names": {"1": "thing"},
                "spacing": [mm * (1 + 0.05 * (number % 2)) for mm in spacing], "channels": int(kind != "ct"),
                "licence": "CC0", "modality": MODALITIES[kind], "region": "", "subject": f"{kind}{number}",
            }  # fmt: skip
            arrays: dict[str, Any] = {"labels": labels}
            if kind != "ct":
                arrays["image0"] = (labels * 300 + rng.integers(0, 50, shape)).astype(np.int16)
            np.savez_compressed(folder / f"{kind}{number}.npz", about=json.dumps(about), **arrays)


@pytest.fixture(scope="module")
def a_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    pack(folder)
    return folder


@pytest.fixture(scope="module")
def items(a_cache: Path) -> list[TrainingItem]:
    return [TrainingItem.load(path) for path in sorted(a_cache.glob("*.npz"))]


def test_an_item_without_an_image_is_ct_where_the_manifest_says_so(items: list[TrainingItem]) -> None:
    units = {item.name[:2]: fingerprint_of(item).hounsfield for item in items}
    assert units == {"ct": True, "mr": False, "us": False}
    spacings = {item.name: fingerprint_of(item).spacing for item in items}
    assert spacings["ct0"] == (0.8, 0.8, 3.0)
    k, j, i = items[0].labels.shape
    assert fingerprint_of(items[0]).extent == pytest.approx((0.8 * i, 0.8 * j, 3.0 * k))


def test_a_source_of_many_subjects_does_not_drown_one_of_few() -> None:
    many = [Fingerprint((1.0, 1.0, 1.0), (100.0, 100.0, 100.0), False)] * 100
    few = [Fingerprint((4.0, 4.0, 4.0), (100.0, 100.0, 100.0), True)]
    domain = fit_domain([*many, *few], [*["many"] * 100, "few"])
    assert domain.mean[0] == pytest.approx(np.log(4) / (1 + 12**0.5), abs=1e-3)
    assert 0.15 < domain.hounsfield < 0.5
    assert min(domain.std) == 0.35


def test_experts_know_their_volumes_and_one_without_items_keeps_what_it_has(items: list[TrainingItem]) -> None:
    plans = with_domains(tiny_plans(), [item for item in items if not item.name.startswith("mr")], TASKS)
    trunk, brain = plans.experts
    assert trunk.domain is not None
    assert brain.domain is None
    assert trunk.domain.hounsfield > 0.8
    assert np.exp(trunk.domain.mean[1]) == pytest.approx(3.75, rel=0.01)


def test_of_sources_left_out_the_own_expert_comes_first(items: list[TrainingItem]) -> None:
    found = each_left_out(items, tiny_plans(), TASKS)
    assert len(found) == len(items)
    assert own_first(found, [task.name for task in TASKS]) == {"tiny_trunk": (8, 8), "tiny_brain": (8, 8)}
    losses = cross_entropies(found)
    assert losses[0.0] == pytest.approx(np.log(3))
    assert losses[0.5] < losses[0.25] < losses[0.0]


def test_the_only_source_of_a_task_is_left_out_by_halves(items: list[TrainingItem]) -> None:
    """Of a task with one source only, half of its subjects are left out; more sources are left out whole."""
    alone = [item for item in items if item.source != "ct/1"]
    found = [one for one in each_left_out(alone, tiny_plans(), TASKS) if one.family == 1]
    assert sorted(one.subject for one in found) == ["ct0", "ct2", "ct4", "ct6"]
    assert all(one.prior[1.0].argmax() == 1 for one in found), "the other half was enough to know them"


def test_a_task_with_other_sources_is_left_out_with_the_whole_source(items: list[TrainingItem]) -> None:
    """Only of the task that has no other source some subjects stay: half of ct, none of mr."""
    mixed = [replace(item, source="one") for item in items if item.source in ("ct/0", "mr/0")]
    mixed += [item for item in items if item.source in ("mr/1", "us/0")]
    stayed: list[list[str]] = []

    def watched(plans: Plans, chosen: Sequence[TrainingItem], tasks: Sequence[ClassMap]) -> Plans:
        stayed.append([item.name for item in chosen if item.source == "one"])
        return with_domains(plans, chosen, tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domains, "with_domains", watched)
        found = each_left_out(mixed, tiny_plans(), TASKS)
    everything = [item.name for item in mixed if item.source == "one"]
    assert sorted(stayed, key=len) == [["ct2", "ct6"], ["ct0", "ct4"], everything, everything]
    assert sorted(one.subject for one in found) == sorted(item.subject for item in mixed)


def test_what_the_plans_knew_before_is_not_asked(items: list[TrainingItem]) -> None:
    """It may come from the very source that is left out."""
    plans = with_domains(tiny_plans(), items, TASKS)
    one_each = [item for item in items if item.name in ("ct0", "mr0", "mr1")]
    told, untold = (each_left_out(one_each, each, TASKS) for each in (plans, tiny_plans()))
    for one, other in zip(told, untold, strict=True):
        np.testing.assert_array_equal(one.prior[1.0], other.prior[1.0])


def test_subjects_of_two_sources_may_have_one_name() -> None:
    prior = {TRUST: np.log([0.2, 0.5, 0.3])}
    found = [LeftOut("a", "s1", 1, prior), LeftOut("b", "s1", 1, {TRUST: np.log([0.2, 0.3, 0.5])})]
    assert own_first(found, ["one", "two"]) == {"one": (1, 2)}


def test_a_thin_cache_has_the_fingerprints_of_its_cache(a_cache: Path, tmp_path: Path) -> None:
    thin(a_cache, tmp_path / "thin", 10)
    thin(tmp_path / "thin", tmp_path / "thinner", 10)
    for name in ("ct0", "mr1"):
        items = [
            TrainingItem.load(folder / f"{name}.npz") for folder in (a_cache, tmp_path / "thin", tmp_path / "thinner")
        ]
        assert items[1].labels.size < items[0].labels.size or name == "mr1"
        assert fingerprint_of(items[0]) == fingerprint_of(items[1]) == fingerprint_of(items[2])


def test_heads_that_were_fitted_before_are_kept_only_when_asked(a_cache: Path, tmp_path: Path) -> None:
    start = tiny_bundle(tmp_path / "start", replace(tiny_plans(), gate=GatePlans(("tiny_trunk",))))
    refused = told(start.folder, tmp_path / "told", a_cache)
    assert refused.exit_code != 0
    assert "the gate and its specialists" in str(refused.exception)
    assert not (tmp_path / "told").exists()

    kept = told(start.folder, tmp_path / "told", a_cache, "--keep-heads")
    assert kept.exit_code == 0, kept.output
    card = (tmp_path / "told" / "model_card.md").read_text().split(SECTION)[1]
    assert "The gate and its specialists were fitted before that" in " ".join(card.split())
    before, after = start.weights(), load_bundle(tmp_path / "told").weights()
    assert all(before[name].equal(after[name]) for name in before if not name.startswith("amalgamation."))


def told(start: Path, output: Path, cache: Path, *more: str) -> Result:
    tasks = {task.name: {"items": task.items, "classes": task.names} for task in TASKS}
    config = output.parent / "tiny.json"
    config.write_text(json.dumps({"manifests": [], "share_alike": False, "tasks": tasks, "sampling": {}}))
    app = typer.Typer()
    app.command()(main)
    words = [str(start), str(output), "--config", str(config), "--cache", str(cache), "--cases", "12"]
    return CliRunner().invoke(app, [*words, *more])


def test_the_command_tells_the_plans_and_levels_the_shares(a_cache: Path, tmp_path: Path) -> None:
    start = tiny_bundle(tmp_path / "start")
    result = told(start.folder, tmp_path / "told", a_cache)
    assert result.exit_code == 0, result.output
    assert "after: [0.3333, 0.3333, 0.3333]" in result.output

    new = load_bundle(tmp_path / "told")
    assert new.plans.without("domains") == start.plans
    prior = log_prior(new.plans, Fingerprint((1.0, 1.0, 1.0), (40.0, 36.0, 30.0), False))
    assert prior is not None
    assert prior.argmax() == 2
    before, after = start.weights(), new.weights()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"amalgamation.8.bias", "amalgamation.16.bias"}
    card = (tmp_path / "told" / "model_card.md").read_text()
    assert "| tiny_brain | 8 of 8 |" in card.split(SECTION)[1]
