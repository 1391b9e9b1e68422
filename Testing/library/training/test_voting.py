"""Stage `voting`: the base stays as it was to the last bit, the head learns, and a report says what it brought."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.geometry import Box
from KA2ERSegment.plans import VotingPlans
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.training.held_out import compare, load_entropy
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.run import Run
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions
from KA2ERSegment.training.voting import SECTION, VotingStage, train_voting

SEMANTIC = ("tiny_trunk", "tiny_brain")
HEAD = {"semantic": list(SEMANTIC), "adaptive": 3, "width": 8, "prototypes": 4, "rank": 2}
TASKS = [ClassMap("tiny_trunk", "^ct", {"bright": "block"}), ClassMap("tiny_brain", "^mr", {"bright": "block"})]


def an_item(name: str, source: str) -> TrainingItem:
    labels = np.zeros((14, 18, 22), dtype=np.uint16)
    labels[3:10, 4:14, 5:17] = 1
    noise = np.random.default_rng(3).normal(0, 20, labels.shape)
    images = ((labels * 200 + noise).astype(np.int16),)
    boxes = {1: Box((5, 4, 3), (17, 14, 10))}
    return TrainingItem(name, source, labels, images, (1.0, 1.2, 2.5), {1: "block"}, boxes, "CC0", "CT", "abdomen")


def a_run(output: Path, **options: Any) -> Run:
    stage = {"steps": 3, "minutes": 5, "learning_rate": 1e-2, "seed": 1, "batch": 2, "clicks": 1, "compare": 3}
    items = [an_item(f"{kind}{n}", kind) for kind in ("ct", "mr") for n in range(4)]
    settings = {"voting": {"plans": HEAD, **stage, **options}, "sampling": {}}
    return Run(settings, tiny_plans(), items, TASKS, output, False, "cpu", 1, 0.0)


@pytest.fixture(scope="module")
def a_base(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def a_finished_run(tmp_path_factory: pytest.TempPathFactory, a_base: Bundle) -> Path:
    output = tmp_path_factory.mktemp("run")
    train_voting(a_run(output), a_base)
    return output


def fingerprints(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of every tensor by name."""
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in bundle.weights().items()}


def test_the_base_is_unchanged_to_the_last_bit_and_the_head_has_learnt(a_base: Bundle, a_finished_run: Path) -> None:
    voted = load_bundle(a_finished_run / "bundle")
    before, after = fingerprints(a_base), fingerprints(voted)

    assert len(before) > 100
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("voting.") for name in after.keys() - before.keys())
    weights = voted.weights()
    for out in ("basic_out", "semantic_out", "adaptive_out"):
        assert weights[f"voting.{out}"].abs().max() > 0
    assert weights["voting.load"].abs().max() > 0
    assert 0.5 <= float(weights["voting.temperature"]) < 1


def test_the_new_bundle_has_a_head_and_without_it_is_the_old_one(a_base: Bundle, a_finished_run: Path) -> None:
    voted = load_bundle(a_finished_run / "bundle")
    model = build_model(voted.plans, voted.weights())

    assert model.voters == ("basic", *SEMANTIC, "adaptive 1", "adaptive 2", "adaptive 3")
    assert replace(voted.plans, voting=None) == a_base.plans
    card = (voted.folder / "model_card.md").read_text()
    assert card.count(SECTION) == 1
    assert f"around bundle {a_base.identity}" in card
    assert "On 3 patches of subjects held out" in " ".join(card.split())
    assert not (a_finished_run / "bundle-unfinished").exists()


def test_the_report_says_what_the_vote_brought_and_how_the_load_is_spread(a_finished_run: Path) -> None:
    report = json.loads((a_finished_run / "voting.json").read_text())

    assert report["steps"] == 3
    assert report["cases"] == 3
    assert report["loss_after"] != report["loss_before"]
    assert 0 <= report["dice_after"] <= 1
    assert 0 < report["load_entropy"] <= 1
    assert sum(report["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert report["shares_of_task"].keys() == set(SEMANTIC)


def test_a_card_does_not_call_held_out_what_was_learnt_from(a_base: Bundle, tmp_path: Path) -> None:
    run = a_run(tmp_path, steps=1, clicks=0, compare=1)
    train_voting(replace(run, items=[item for item in run.items if item.name in ("ct0", "mr0")]), a_base)

    card = " ".join((tmp_path / "bundle" / "model_card.md").read_text().split())
    assert "On 1 patches of items that it learnt from" in card
    assert "subjects held out" not in card


def test_items_without_labels_are_nothing_to_compare_on(a_finished_run: Path) -> None:
    voted = load_bundle(a_finished_run / "bundle")
    model = build_model(voted.plans, voted.weights())
    nothing = [replace(an_item("ct0", "ct"), boxes={})]

    with pytest.raises(VolumeError, match="got 1 items without"):
        compare(model, nothing, SamplingOptions(32), TASKS, 1, 0)


def test_entropy_of_the_load() -> None:
    assert load_entropy(torch.full((5,), 0.2)) == pytest.approx(1)
    assert load_entropy(torch.tensor([1.0, 0, 0])) == pytest.approx(0, abs=1e-6)


def test_a_head_of_the_same_plans_goes_on_and_another_begins_anew(a_finished_run: Path, tmp_path: Path) -> None:
    voted = load_bundle(a_finished_run / "bundle")
    train_voting(a_run(tmp_path / "same", learning_rate=0.0), voted)
    train_voting(a_run(tmp_path / "other", learning_rate=0.0, plans=HEAD | {"adaptive": 2}), voted)
    name = "voting.basic_out"

    assert torch.equal(load_bundle(tmp_path / "same" / "bundle").weights()[name], voted.weights()[name])
    assert not load_bundle(tmp_path / "other" / "bundle").weights()[name].any()
    assert (tmp_path / "same" / "bundle" / "model_card.md").read_text().count(SECTION) == 1


def test_what_is_done_is_not_done_again(a_base: Bundle, a_finished_run: Path) -> None:
    before = (a_finished_run / "voting.json").stat().st_mtime_ns
    train_voting(a_run(a_finished_run), a_base)

    assert (a_finished_run / "voting.json").stat().st_mtime_ns == before


def test_plans_of_no_head_are_refused_before_anything_is_written(a_base: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="at most voting"):
        train_voting(a_run(tmp_path / "run", plans=HEAD | {"top": 9}), a_base)
    assert not (tmp_path / "run").exists()


def a_stage(base: Bundle, vote: str = "voxel", **options: Any) -> VotingStage:
    voting = VotingPlans(**HEAD | {"semantic": SEMANTIC, "vote": vote})
    return VotingStage(replace(base.plans, voting=voting), base.weights(), SEMANTIC, 2, 1, 1e-3, 0, clicks=0, **options)


def a_batch() -> dict[str, torch.Tensor]:
    """Two cases, of both tasks, with a bright block each."""
    target = torch.zeros(2, 32, 32, 32, dtype=torch.bool)
    target[:, 8:20, 10:22, 6:24] = True
    nothing = torch.zeros_like(target)
    return {
        "image": target * 100.0 + torch.randn(target.shape, generator=torch.Generator().manual_seed(0)),
        "labels": target.long(),
        "inside": ~nothing,
        "target": target,
        "box": target,
        "outside": nothing,
        "real": torch.ones(2, dtype=torch.bool),
        "task": torch.tensor([1, 2]),
    }


@pytest.mark.parametrize(
    "options", [{}, {"vote": "mean"}, {"vote": "case"}, {"balance": 0.0}, {"contrast": 0.0}], ids=str
)
def test_every_ablation_can_be_trained(
    a_base: Bundle, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = a_stage(a_base, **options)
    monkeypatch.setattr(stage, "log", lambda *given, **more: None)
    monkeypatch.setattr(VotingStage, "progress", 0.2)
    before = {name: tensor.clone() for name, tensor in tensors_by_name(stage.model).items()}
    loss = stage.training_step(a_batch(), 0)
    loss.backward()
    optimizer = stage.configure_optimizers()
    optimizer.step()
    moved = {name for name, tensor in tensors_by_name(stage.model).items() if not torch.equal(tensor, before[name])}

    assert loss.isfinite()
    assert moved
    assert all(name.startswith("voting.") for name in moved)
    assert ("voting.load" in moved) == ("balance" not in options)
    assert bool(stage.contrast.known.any()) == ("contrast" not in options)
    assert ("voting.route_case.2.weight" in moved) == (options.get("vote") != "mean"), "nobody asks the router"


def test_the_cases_own_semantic_expert_is_asked_for_in_the_first_third(
    a_base: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on that alone, each task's cases hear its own expert more."""
    stage = a_stage(a_base, consistency=0.0, balance=0.0, contrast=0.0, route=100.0)
    monkeypatch.setattr(stage, "log", lambda *given, **more: None)
    monkeypatch.setattr(VotingStage, "progress", 0.0)
    optimizer = torch.optim.Adam(stage.head.parameters(), lr=3e-3)
    batch = a_batch()
    batch["image"][1] *= -1  # the two tasks do not look alike
    for _ in range(25):
        optimizer.zero_grad()
        stage.training_step(batch, 0).backward()
        optimizer.step()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(stage, "_about_the_vote", lambda ballot, *_: seen.append(ballot.weights.mean(2)) or 0.0)
    stage.training_step(batch, 0)

    assert seen[0][0, 1] > 0.5 > seen[0][0, 2]
    assert seen[0][1, 2] > 0.5 > seen[0][1, 1]
