"""The variants of the amalgamation: the same beginning, the same cases, a table and bundles that say what they are."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import VolumeError
from KA2ERSegment.experts import UNHEARD, Content
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.training import encoded as encoded_module
from KA2ERSegment.training.ablation import ablate, held_out_dice
from KA2ERSegment.training.encoded import EncodedCase, encode_cases, together
from KA2ERSegment.training.items import ItemName
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions
from KA2ERSegment.training.shares import share_table
from KA2ERSegment.training.simulation import first_prompts
from KA2ERSegment.training.variants import VARIANTS, Budget, train_variant, variant_model

TASKS = [ClassMap("tiny_trunk", "^ct", {"bright": "."}), ClassMap("tiny_brain", "^mr", {"bright": "."})]
SAMPLING = SamplingOptions(32, 1 / 3, real_images=1.0, lesions=0.0, parts=0.0, unions=0.0)


@pytest.fixture(scope="module")
def a_start(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="module")
def a_cache(pack_pictures: Callable[[Sequence[str], int], Path]) -> Path:
    """Five subjects each."""
    return pack_pictures(("ct", "mr"), 5)


def encoded(bundle: Bundle, cache: Path, count: int, seed: int, **options: Any) -> list[EncodedCase]:
    items = [(ItemName.read(path), path) for path in sorted(cache.glob("*.npz"))]
    model = build_model(bundle.plans, bundle.weights())
    return encode_cases(model, items, TASKS, SAMPLING, count, seed, options.pop("most_bytes", 1e9), **options)


@pytest.fixture(scope="module")
def some_cases(a_start: Bundle, a_cache: Path) -> list[EncodedCase]:
    return encoded(a_start, a_cache, 24, seed=1)


@pytest.fixture(scope="module")
def other_cases(a_start: Bundle, a_cache: Path) -> list[EncodedCase]:
    return encoded(a_start, a_cache, 16, seed=2, disturbed=False)


def model_of(start: Bundle, name: str) -> PromptableModel:
    return variant_model(Content.of(start), VARIANTS[name], seed=3)


def test_encoded_cases_are_what_the_model_encodes(a_start: Bundle, some_cases: list[EncodedCase]) -> None:
    model = build_model(a_start.plans, a_start.weights())
    batch = together(model, some_cases[:2], torch.device("cpu"))
    everyone = torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        found, expected = batch.amalgamated(model, everyone), model.encode(batch.features.image)

    torch.testing.assert_close(found.embedding, expected.embedding, atol=2e-2, rtol=2e-2)  # float16
    torch.testing.assert_close(found.stem, expected.stem)
    assert [case.task for case in some_cases[:4]] in ([1, 1, 2, 2], [2, 2, 1, 1]), "sources take turns"
    assert {case.item.source for case in some_cases if case.task == 1} == {"ct"}


def test_encoded_cases_stay_within_their_memory(a_start: Bundle, a_cache: Path, some_cases: list[EncodedCase]) -> None:
    few = encoded(a_start, a_cache, 24, seed=1, most_bytes=6.5 * some_cases[0].nbytes)

    assert len(few) == 6


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_begin_alike(a_start: Bundle, name: str) -> None:
    """Encoders and decoder are the bundle's; the amalgamation is nobody's, but the same wherever layers are."""
    model, full = model_of(a_start, name), model_of(a_start, "hierarchical")
    given, own, others = a_start.weights(), tensors_by_name(model), tensors_by_name(full)
    for tensor, values in own.items():
        if tensor.startswith(("amalgamation.", "merge.")):
            shared = tensor in others and others[tensor].shape == values.shape
            assert not shared or torch.equal(values, others[tensor]), tensor
        else:
            assert torch.equal(values, given[tensor]), tensor
    assert not torch.equal(own["merge.weight"], given["merge.weight"])
    assert bool(model.experts) == (name != "foundation")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_around_frozen_encoders(a_start: Bundle, some_cases: list[EncodedCase], name: str) -> None:
    model = model_of(a_start, name)
    before = {key: tensor.clone() for key, tensor in tensors_by_name(model).items()}
    trained, steps = train_variant(model, VARIANTS[name], some_cases, Budget(3, batch=2))
    after = tensors_by_name(trained)

    assert steps == 3
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert not [key for key in moved if key.startswith(("experts.", "foundation.", "stem."))]
    assert {key.split(".")[0] for key in moved} == {"amalgamation", "merge", "mask_decoder", "prompt_encoder"}
    dice, shares = held_out_dice(trained, some_cases[:5], clicks=2)
    assert dice.shape == (5, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))


def test_the_same_seed_trains_the_same_variant(a_start: Bundle, some_cases: list[EncodedCase]) -> None:
    one, other = (
        train_variant(model_of(a_start, "hierarchical"), VARIANTS["hierarchical"], some_cases, Budget(2))[0]
        for _ in range(2)
    )

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def knowing(case: EncodedCase) -> EncodedCase:
    """The case's own expert knows where the object is; the other one's features stay those of random weights."""
    experts = [dict(expert) for expert in case.experts]
    for stride, values in experts[case.task - 1].items():
        values = values.clone()
        values[0] = 4 * F.avg_pool3d(case.target[None].float(), stride)[0]
        experts[case.task - 1][stride] = values
    return replace(case, experts=experts)


@pytest.fixture(scope="module")
def a_trained_model(a_start: Bundle, some_cases: list[EncodedCase]) -> PromptableModel:
    cases = [knowing(case) for case in some_cases]
    return train_variant(model_of(a_start, "hierarchical"), VARIANTS["hierarchical"], cases, Budget(90, batch=2))[0]


def test_on_images_of_its_task_an_expert_has_the_largest_weight(
    a_trained_model: PromptableModel, other_cases: list[EncodedCase]
) -> None:
    """Inside the object, on images that were not trained on, in most cases."""
    _, shares = held_out_dice(a_trained_model, [knowing(case) for case in other_cases], clicks=0)
    table = share_table(a_trained_model.arms, shares, [TASKS[case.task - 1].name for case in other_cases])

    for name in ("tiny_trunk", "tiny_brain"):
        assert table.cases[name] == 8
        assert table.largest_expert[name][name] >= 0.6, str(table)
        assert table.largest[name][name] >= 0.6, str(table)


@torch.no_grad()
@pytest.mark.parametrize(("bias", "least"), [(2.0, 1.5), (4.0, 5.0), (-UNHEARD, math.inf)])
def test_an_expert_switched_off_changes_the_answer_by_what_it_was_heard(
    a_trained_model: PromptableModel, other_cases: list[EncodedCase], bias: float, least: float
) -> None:
    """The more one expert is heard, the more it is missed, and the less the other one is; not heard, not at all."""
    model = copy.deepcopy(a_trained_model)
    batch = together(model, other_cases[:6], torch.device("cpu"))
    prompts = first_prompts(batch.target, batch.box, batch.outside, torch.Generator())

    def logits(*present: bool) -> Tensor:
        arms = torch.tensor([present] * len(batch.target))
        return model.decode(batch.amalgamated(model, arms), prompts).logits

    for heard in (1, 2):
        for level in model.amalgamation.values():
            level.bias.copy_(torch.zeros(3).index_fill(0, torch.tensor([heard]), bias))
        full = logits(True, True, True)
        without = [logits(True, arm != 1, arm != 2) for arm in (1, 2)]
        missed = [(answer - full).abs().mean((1, 2, 3)) for answer in without]
        assert ((without[heard - 1] > 0) != (full > 0)).any(), "the mask changes"
        assert (missed[heard - 1] > 0).all()
        assert missed[heard - 1].mean() / missed[2 - heard].mean() >= least


def run(start: Bundle, cache: Path, output: Path, *options: str) -> Result:
    config = output.parent / "config.json"
    tasks = {task.name: {"items": task.items, "classes": task.names} for task in TASKS}
    config.write_text(json.dumps({"tasks": tasks, "manifests": [], "share_alike": False, "sampling": {}}))
    app = typer.Typer()
    app.command()(ablate)
    fixed = ["--start", start.folder, "--cache", cache, "--output", output, "--config", config]
    sizes = ["--cases", "6", "--held-out", "4", "--steps", "1"]
    return CliRunner().invoke(app, [*map(str, fixed), *sizes, *options])


def test_the_command_leaves_a_bundle_and_a_line_for_each_variant_once(
    a_start: Bundle, a_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ablation"
    assert run(a_start, a_cache, output, "--only", "foundation").exit_code == 0
    first = json.loads((output / "ablation.json").read_text())
    written = (output / "foundation" / "plans.json").stat().st_mtime_ns
    result = run(a_start, a_cache, output)
    assert result.exit_code == 0, result.output
    table = json.loads((output / "ablation.json").read_text())

    assert list(first) == ["about", "foundation"]
    assert table["foundation"] == first["foundation"]
    assert (output / "foundation" / "plans.json").stat().st_mtime_ns == written, "trained again"
    assert set(table) == {"about", *VARIANTS}
    for name, variant in VARIANTS.items():
        line, bundle = table[name], load_bundle(output / name)
        assert bundle.plans.amalgamation == variant.plans
        assert line["parameters"] == sum(t.numel() for t in bundle.weights().values())
        assert len(line["dice"]) == 6
        assert len(line["cases"]) == 4
        assert min(line["seconds_per_patch"], line["seconds_per_click"]) > 0
        assert "## A variant" in (output / name / "model_card.md").read_text()
    assert table["about"]["subjects_held_out"] == 2, "one of each source"
    assert "| hierarchical |" in result.output
    assert run(a_start, a_cache, output).output.strip() == "all variants are there"


def add_label_maps(cache: Path, source: str, subjects: int) -> None:
    """Items without an image, as training makes one for them."""
    for number in range(subjects):
        name = f"{source}{number}"
        with np.load(cache / f"ct{number}.npz") as stored:
            labels, about = stored["labels"], json.loads(str(stored["about"]))
        about |= {"id": name, "source": source, "subject": name, "channels": 0}
        np.savez_compressed(cache / f"{name}.npz", about=json.dumps(about), labels=labels)


def test_variants_are_measured_on_subjects_of_every_source_that_has_two_and_trained_on_the_others(
    a_start: Bundle, a_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label maps among them, with a made image; a source of one subject is all learnt from."""
    cache = Path(shutil.copytree(a_cache, tmp_path / "cache"))
    add_label_maps(cache, "maps", 2)
    add_label_maps(cache, "lonely", 1)
    drawn: list[tuple[bool, set[str]]] = []

    def recorded(model: PromptableModel, items: Any, *rest: Any) -> list[EncodedCase]:
        drawn.append((rest[5], {name.subject for name, _ in items}))  # whether images are disturbed: for training
        return encode_cases(model, items, *rest)

    monkeypatch.setattr(encoded_module, "encode_cases", recorded)
    result = run(a_start, cache, tmp_path / "ablation", "--only", "foundation", "--held-out", "12")
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "ablation" / "ablation.json").read_text())["foundation"]
    subjects = dict(drawn)

    assert not subjects[True] & subjects[False]
    assert {name.rstrip("0123456789") for name in subjects[False]} == {"ct", "mr", "maps"}
    assert {name.rstrip("0123456789") for name in subjects[True]} == {"ct", "mr", "maps", "lonely"}
    assert {case["subject"] for case in line["cases"]} == subjects[False]
    assert {case["source"] for case in line["cases"] if not case["real"]} == {"maps"}
    assert {case["source"] for case in line["cases"] if case["real"]} == {"ct", "mr"}
    assert len(line["dice_made_images"]) == len(line["dice_real_images"]) == 6


def test_without_another_subject_nothing_is_measured(a_start: Bundle, a_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("ct0", "mr0"):
        shutil.copy(a_cache / f"{name}.npz", tmp_path / "cache")
    result = run(a_start, tmp_path / "cache", tmp_path / "ablation")

    assert isinstance(result.exception, VolumeError)
    assert "measured on other subjects" in str(result.exception)
    assert not (tmp_path / "ablation").exists()


@pytest.mark.parametrize(("option", "words"), [("--steps", "other settings"), ("--only", "must be one of")])
def test_what_would_not_compare_is_refused(
    a_start: Bundle, a_cache: Path, tmp_path: Path, option: str, words: str
) -> None:
    (tmp_path / "ablation").mkdir()
    about = {"cases": 6, "held_out": 4, "steps": 1, "batch": 2, "minutes": 0.0, "seed": 0, "start": a_start.identity}
    (tmp_path / "ablation" / "ablation.json").write_text(json.dumps({"about": about}))
    result = run(a_start, a_cache, tmp_path / "ablation", option, "9")

    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
