"""Stages `specialists` and `gate`: nothing that was there is changed, and the gate learns when to hear whom."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.experts import Content
from KA2ERSegment.gate import Gate, choose, gate_query
from KA2ERSegment.geometry import Box
from KA2ERSegment.plans import GatePlans
from KA2ERSegment.preprocessing import normalise
from KA2ERSegment.prompt_encoder import POSITIVE, PatchPrompts
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.training.gating import (
    FORGETTING,
    Trial,
    best_trial,
    fit_temperature,
    gate_loss,
    learn,
    sweep,
    train_gate,
)
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.observing import MIXTURES, Observations, observe
from KA2ERSegment.training.run import Clock, Run, Unfinished
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, draw_case
from KA2ERSegment.training.specialists import SECTION, train_specialists

NAMES = ("tiny_trunk", "tiny_brain")
TASKS = [ClassMap("tiny_trunk", "^trunk", {}), ClassMap("tiny_brain", "^brain", {})]
STAGE = {"steps": 2, "minutes": 5, "learning_rate": 1e-3, "seed": 1, "batch": 1, "clicks": 1}
SETTINGS: dict[str, Any] = {
    "sampling": {},
    "specialists": STAGE | {"average": 0.5},
    "gate": STAGE | {"cases": 4, "hidden": 8, "epochs": 3},
}


def an_item(name: str) -> TrainingItem:
    shape = (20, 24, 28)
    k, j, i = np.indices(shape)
    labels = (((k - 9) / 6) ** 2 + ((j - 12) / 7) ** 2 + ((i - 13) / 8) ** 2 < 1).astype(np.uint16)
    image = (labels * 300 + np.random.default_rng(len(name)).normal(0, 20, shape)).astype(np.int16)
    box = Box.around(labels == 1)
    assert box is not None
    return TrainingItem(
        name, f"a/{name[:5]}", labels, (image,), (1.0, 1.2, 2.0), {1: "it"}, {1: box}, "CC0", "CT", "abdomen"
    )


ITEMS = [an_item(f"{family}_{n}") for family in ("trunk", "brain", "other") for n in range(2)]


def a_run(output: Path, start: Bundle | None, **changes: Any) -> Run:
    plans = start.plans if start else tiny_plans()
    given = {"settings": SETTINGS, "items": ITEMS[::2], "held_out": ITEMS[1::2], "resume": False, **changes}
    given |= {"ranks": 1, "minutes": 0.0, "output": output}
    return Run(plans=replace(plans, gate=None), tasks=TASKS, device="cpu", **given)


def digests(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of each tensor."""
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in bundle.weights().items()}


@pytest.fixture(scope="module")
def a_start(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="module")
def with_specialists(a_start: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What stage `specialists` leaves."""
    output = tmp_path_factory.mktemp("run")
    train_specialists(a_run(output, a_start), a_start)
    return load_bundle(output / "bundle")


@pytest.fixture(scope="module")
def with_gate(with_specialists: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What stage `gate` leaves, begun from the other's bundle."""
    output = tmp_path_factory.mktemp("gate")
    train_gate(a_run(output, with_specialists), with_specialists)
    return load_bundle(output / "bundle")


# -- nothing that was there is changed -------------------------------------------------------------------------------


def test_specialists_are_finetuned_copies_and_the_general_model_stays(
    a_start: Bundle, with_specialists: Bundle
) -> None:
    before, after = digests(a_start), digests(with_specialists)
    weights = with_specialists.weights()

    assert {name: after[name] for name in before} == before
    new = {name.partition(".")[0] for name in after.keys() - before.keys()}
    assert new == {"specialists", "gate"}
    for name in NAMES:
        own = {n: t for n, t in weights.items() if n.startswith(f"specialists.{name}.")}
        general = {n: weights[f"mask_decoder.{n.split('.', 2)[2]}"] for n in own}
        assert any(not torch.equal(own[n], general[n]) for n in own), "it learnt"
        assert all((own[n] - general[n]).abs().max() < 0.05 for n in own), "from the general decoder"


@torch.no_grad()
def test_until_its_gate_is_trained_a_bundle_answers_as_before(a_start: Bundle, with_specialists: Bundle) -> None:
    assert with_specialists.plans.gate == GatePlans(NAMES, threshold=1.0)
    image, prompts = pictures("blob", 2), a_click(2)
    answers = []
    for bundle in (a_start, with_specialists):
        model = build_model(bundle.plans, bundle.weights())
        answers.append(model.decode(model.encode(image), prompts))

    assert torch.equal(answers[0].logits, answers[1].logits)
    assert torch.equal(answers[0].quality, answers[1].quality)


def test_training_the_gate_changes_no_tensor_of_general_model_and_specialists(
    with_specialists: Bundle, with_gate: Bundle
) -> None:
    before, after = digests(with_specialists), digests(with_gate)

    assert {n: d for n, d in after.items() if not n.startswith("gate.")} == {
        n: d for n, d in before.items() if not n.startswith("gate.")
    }
    plans = with_gate.plans.gate
    assert plans is not None
    assert (plans.specialists, plans.hidden) == (NAMES, 8)
    card = (with_gate.folder / "model_card.md").read_text()
    assert card.count(SECTION) == 1
    assert "of training subjects held out" in " ".join(card.split())


def test_what_was_found_lies_beside_the_bundle_and_a_stage_that_is_done_is_not_run_again(
    with_specialists: Bundle, tmp_path: Path
) -> None:
    train_gate(a_run(tmp_path, with_specialists), with_specialists)
    found = json.loads((tmp_path / "gate.json").read_text())
    plans, checksums = load_bundle(tmp_path / "bundle").plans.gate, load_bundle(tmp_path / "bundle").checksums

    assert plans is not None
    assert (found["temperature"], found["threshold"]) == (plans.temperature, plans.threshold)
    assert found["learning"] == 6, "three cases, a prompt and a click each"
    assert found["held_out"] == 4
    assert [trial["threshold"] for trial in found["trials"]][::20] == [0.0, 1.0]
    assert found["trials"][-1]["heard"] == 0
    train_gate(a_run(tmp_path, with_specialists), with_specialists)
    assert load_bundle(tmp_path / "bundle").checksums == checksums
    (tmp_path / "gate.json").unlink()
    nothing_to_observe = [replace(ITEMS[0], boxes={})]
    run = a_run(tmp_path, with_specialists, resume=True, items=nothing_to_observe, held_out=nothing_to_observe)
    train_gate(run, with_specialists)  # from what was observed before
    assert load_bundle(tmp_path / "bundle").checksums["weights.safetensors"] == checksums["weights.safetensors"]


def test_specialists_that_are_done_are_not_trained_again(a_start: Bundle, tmp_path: Path) -> None:
    train_specialists(a_run(tmp_path, a_start), a_start)
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("specialist-*.safetensors")}
    train_specialists(a_run(tmp_path, None), load_bundle(tmp_path / "bundle"))

    assert sorted(written) == ["specialist-tiny_brain.safetensors", "specialist-tiny_trunk.safetensors"]
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("specialist-*.safetensors")} == written


ONE_OF_TWO_RANKS = """
import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

tests, folder, bundle, rank = sys.argv[1:]
sys.path.insert(0, tests)
from test_gating import Clock, Unfinished, a_run, load_bundle, train_gate

meet = (Path(folder) / "meet").as_uri()
torch.distributed.init_process_group(
    "gloo", init_method=meet, rank=int(rank), world_size=2, timeout=timedelta(seconds=120)
)
rank_zero_only.rank = int(rank)
start = load_bundle(bundle)
try:
    train_gate(a_run(Path(folder) / "run", start, clock=Clock(stop_at=0.0)), start)
except Unfinished as stopped:
    print("unfinished:", stopped)
"""


def test_several_ranks_end_together_where_the_call_must_end(with_specialists: Bundle, tmp_path: Path) -> None:
    """The second one has nothing to do, and would wait for the first one for ever."""
    given = [str(Path(__file__).parent), str(tmp_path), str(with_specialists.folder)]
    command = [sys.executable, "-c", ONE_OF_TWO_RANKS, *given]
    ranks = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in "01"]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]

    assert ["unfinished: gate" in each for each in said] == [True, True]
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_stages_without_what_they_need_say_so(a_start: Bundle, with_specialists: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Run stage 'specialists' first"):
        train_gate(a_run(tmp_path / "b", a_start), a_start)
    with pytest.raises(VolumeError, match="items that no specialist is for"):
        train_gate(a_run(tmp_path / "c", with_specialists, held_out=ITEMS[:4]), with_specialists)
    settings = SETTINGS | {"specialists": STAGE | {"names": ["nobody"]}}
    with pytest.raises(BundleError, match=r"gate\.specialists"):
        train_specialists(a_run(tmp_path / "d", a_start, settings=settings), a_start)
    assert not (tmp_path / "d" / "bundle").exists()


def test_a_call_that_must_end_leaves_no_half_trained_gate(with_specialists: Bundle, tmp_path: Path) -> None:
    run = a_run(tmp_path, with_specialists, clock=Clock(stop_at=0.0))

    with pytest.raises(Unfinished, match="gate"):
        train_gate(run, with_specialists)
    assert not (tmp_path / "bundle").exists()


# -- learning --------------------------------------------------------------------------------------------------------


def a_click(batch: int) -> PatchPrompts:
    nothing = torch.zeros(batch, 32, 32, 32, dtype=torch.bool)
    positive = nothing.clone()
    positive[:, 16, 16, 16] = True
    points = torch.full((batch, 1, 3), 16.0)
    half = torch.full(positive.shape, 0.5)
    return PatchPrompts(points, torch.full((batch, 1), POSITIVE), positive, nothing, nothing, nothing, half)


def pictures(kind: str, count: int, seed: int = 0) -> Tensor:
    """(count, 2, 32, 32, 32), normalised: images of one kind, each a little different."""
    random = torch.Generator().manual_seed(seed)
    k, j, i = torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij")
    images = []
    for _ in range(count):
        a, b = (1 + 0.1 * torch.randn(2, generator=random)).tolist()
        image = {
            "blob": 8 * torch.exp(-((k - 16) ** 2 + (j - 16 * a) ** 2 + (i - 16) ** 2) / (60 * b)),
            "stripes": 4 * torch.sin((k - 16) * a),
            "slope": 0.3 * (j * a + i * b),
            "noise": torch.zeros(32, 32, 32),
            "checkers": 4 * torch.sin((j - 16) * a) * torch.sin((i - 16) * b) * torch.cos(k - 16),
            "shells": 3 * torch.sin(((k - 16) ** 2 + (j - 16) ** 2 + (i - 16) ** 2).sqrt() * a),
        }[kind]
        images.append(image + 0.5 * torch.randn(32, 32, 32, generator=random))
    values = torch.stack(images)
    return normalise(values, torch.ones_like(values, dtype=torch.bool))


def seen(family: int, query: Tensor, count: int = 2) -> Observations:
    """Observations in which the family's own specialist is good, all others bad, the general decoder in between."""
    dice = (0.7 - 0.3 * MIXTURES).expand(len(query), count, -1).clone()
    if family:
        dice[:, family - 1] = 0.7 + 0.2 * MIXTURES
    numbers = torch.full((len(query),), family)
    return Observations(query, dice, numbers, torch.zeros_like(numbers))


@torch.no_grad()
def queries(model: Any, kind: str, count: int, seed: int) -> Tensor:
    features, prompts = model.encode(pictures(kind, count, seed)), a_click(count)
    embedding, _, tokens, ignore, maps = model.decoder_inputs(features, prompts)
    return gate_query(embedding, tokens, ignore, maps, prompts)


def test_the_gate_sends_each_task_to_its_specialist_and_an_unknown_image_to_the_general_decoder(
    a_start: Bundle,
) -> None:
    model, plans = build_model(a_start.plans, a_start.weights()), GatePlans(NAMES, hidden=32)
    families = {"blob": 1, "stripes": 2, "slope": 0, "noise": 0, "shells": 0}
    learning = Observations.joined([seen(f, queries(model, kind, 24, 1)) for kind, f in families.items()])
    held = Observations.joined([seen(f, queries(model, kind, 12, 2)) for kind, f in families.items()])
    torch.manual_seed(0)
    gate = learn(Gate(36, plans), learning, epochs=60, learning_rate=3e-3)
    temperature = fit_temperature(gate, held)
    best = best_trial(sweep(gate, held, temperature, special=(1, 2)))

    assert best.forgotten <= FORGETTING
    assert best.specific > 0.85
    for kind, family in {**families, "checkers": 0}.items():  # the last one it never saw
        query = queries(model, kind, 12, 3)
        _, heard = choose(gate(query), torch.ones(12, 2, dtype=torch.bool), temperature, best.threshold)
        assert (heard == family).float().mean() >= 0.9, kind


def test_labels_do_not_prefer_a_specialist_that_is_no_better() -> None:
    equal = replace_dice(torch.full((1, 2, len(MIXTURES)), 0.8))
    better = replace_dice(torch.stack([0.8 + 0.1 * MIXTURES, 0.8 - 0.1 * MIXTURES])[None])

    torch.testing.assert_close(equal.labels, torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(better.labels[0], (torch.tensor([0.8, 0.9, 0.7]) / 0.05).softmax(0))


def replace_dice(dice: Tensor, family: int = 1) -> Observations:
    numbers = torch.full((len(dice),), family)
    return Observations(torch.zeros(len(dice), 3 * 36 + 8), dice, numbers, torch.zeros_like(numbers))


def test_dice_at_a_weight_is_read_between_those_that_were_measured() -> None:
    curve = MIXTURES**2
    observations = replace_dice(torch.stack([0.5 * torch.ones_like(curve), curve])[None].repeat(4, 1, 1))
    weights = torch.tensor([[0.5, 0.1, 0.4], [0.0, 0.0, 1.0], [0.9, 0.075, 0.025], [0.2, 0.8, 0.0]])
    dice = observations.fused(weights, torch.tensor([2, 2, 2, 0]))

    torch.testing.assert_close(dice, torch.tensor([0.16, 1.0, 0.5 * 0.05**2, 0.5]))


def test_the_loss_adds_the_expected_regret_to_the_cross_entropy() -> None:
    dice = torch.tensor([[0.6, 0.9, 0.4]])
    labels = torch.tensor([[0.0, 1.0, 0.0]])
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()

    expected = -np.log(0.5) + 0.1 * (0.2 * 0.3 + 0.3 * 0.5)
    assert gate_loss(logits, labels, dice).item() == pytest.approx(expected, abs=1e-5)


def test_temperature_takes_back_what_a_gate_is_too_sure_of() -> None:
    gate = Gate(36, GatePlans(NAMES, hidden=8))
    held = Observations.joined([seen(1, torch.zeros(30, 116)), seen(0, torch.zeros(10, 116))])
    wanted = held.labels.mean(0).log()
    for sure in (0.5, 4.0):
        gate.forward = lambda query, sure=sure: (sure * wanted).expand(len(query), -1)  # type: ignore[method-assign]
        assert fit_temperature(gate, held) == pytest.approx(sure, rel=0.02)


def test_tau_is_the_best_for_the_specialists_tasks_among_those_that_forget_little() -> None:
    trials = [
        Trial(0.1, 0.600, 0.100, 0.90, 0.9),
        Trial(0.4, 0.696, 0.004, 0.85, 0.5),
        Trial(0.5, 0.698, 0.002, 0.85, 0.5),
        Trial(0.8, 0.700, 0.000, 0.80, 0.2),
        Trial(1.0, 0.700, 0.000, 0.70, 0.0),
    ]

    assert best_trial(trials).threshold == 0.5
    assert best_trial([trials[0], trials[-1]]).threshold == 1.0


def test_a_gate_whose_specialists_bring_nothing_hears_nobody() -> None:
    worse = Observations.joined(
        [replace_dice((0.7 - 0.3 * MIXTURES).expand(20, 2, -1), family) for family in (0, 1, 2)]
    )
    gate = learn(Gate(36, GatePlans(NAMES, hidden=8)), worse, epochs=5, learning_rate=1e-3)

    assert best_trial(sweep(gate, worse, 1.0, (1, 2))).threshold == 1.0


@torch.no_grad()
def test_what_is_observed_is_what_the_model_would_answer(with_gate: Bundle) -> None:
    model = build_model(with_gate.plans, with_gate.weights())
    rng = np.random.default_rng(0)
    drawn = [draw_case(ITEMS[n], SamplingOptions(patch_size=32), rng, TASKS) for n in (0, 2, 4)]
    cases = [case for case in drawn if case is not None]
    batch = {key: torch.stack([case[key] for case in cases]) for key in cases[0]}
    first, second = observe(model, batch, 1, torch.Generator().manual_seed(0))

    assert first.query.shape == second.query.shape == (len(cases), 116)
    assert first.dice.shape == (len(cases), 2, len(MIXTURES))
    assert torch.equal(first.dice[:, 0, 0], first.dice[:, 1, 0]), "at weight 0 both are the general decoder"
    assert (first.click.tolist(), second.click.tolist()) == ([0] * len(cases), [1] * len(cases))
    assert first.family.tolist() == batch["task"].tolist()
    assert not torch.equal(first.query, second.query)
    assert first.dice.min() >= 0
    assert first.dice.max() <= 1


def test_where_the_config_holds_nothing_out_one_subject_in_four_is(with_specialists: Bundle, tmp_path: Path) -> None:
    items = [an_item(f"{family}_{n}") for family in ("trunk", "other") for n in range(8)]
    learning, held = a_run(tmp_path, with_specialists, items=items, held_out=[]).divided()

    assert sorted(item.name[:5] for item in held) == ["other"] * 2 + ["trunk"] * 2
    assert len(learning) == 12
    assert a_run(tmp_path, None).divided() == (ITEMS[::2], ITEMS[1::2])


def test_temperatures_of_the_former_answers_are_not_kept(a_start: Bundle, tmp_path: Path) -> None:
    content = Content.of(a_start)
    card = f"{content.card}\n## Known limits\n- Calibration: logits are divided.\n"
    warm = replace(content, plans=replace(content.plans, calibration={"mask": 2.0}), card=card)
    start = warm.save(tmp_path / "warm")
    train_specialists(a_run(tmp_path, start), start)
    left = load_bundle(tmp_path / "bundle")

    assert left.plans.calibration == {}
    assert "Calibration:" not in (left.folder / "model_card.md").read_text()
