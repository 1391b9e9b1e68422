"""Which share of the learnt logits answers best: measured as it is used, on subjects held out, and written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.experts import Content
from KA2ERSegment.plans import GatePlans, Plans
from KA2ERSegment.prompt_encoder import POSITIVE, PatchPrompts
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.training import shrinking
from KA2ERSegment.training.items import TrainingItem, load_items, split_held_out
from KA2ERSegment.training.sampling import SamplingOptions
from KA2ERSegment.training.shrinking import (
    SECTION,
    SHARES,
    Measured,
    answered,
    main,
    measure,
    measured_on,
    share_of,
    with_share,
)

SIZE = tiny_plans().patch_size
SAMPLING = SamplingOptions(patch_size=SIZE, margin=1 / 3, real_images=1.0, lesions=0.0, parts=0.0, unions=0.0)
LEARNT = ("mask_decoder.token_to_filter.2.", "mask_decoder.bias.")
"""What `MaskDecoder.shrink` scales."""


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """It holds the share 0.8; it has learnt nothing, so the less of that the better."""
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", replace(tiny_plans(), shrink=0.8))


@pytest.fixture(scope="module")
def a_cache(pack_pictures: Callable[[Sequence[str], int], Path]) -> Path:
    return pack_pictures(("ct", "mr"), 4)


@pytest.fixture(scope="module")
def a_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    sampling = {"real_images": 1.0, "lesions": 0.0, "parts": 0.0, "unions": 0.0}
    tasks = {"tiny_trunk": {"items": "ct", "classes": {"bright": ".", "dark": "^$"}}}
    path.write_text(json.dumps({"manifests": [], "share_alike": False, "tasks": tasks, "sampling": sampling}))
    return path


def run(bundle: Bundle, cache: Path, config: Path, *words: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    given = [str(bundle.folder), "--config", str(config), "--cache", str(cache), "--held-out", "4", "--clicks", "1"]
    return CliRunner().invoke(app, [*given, "--patches", "4", *words])


def a_click() -> PatchPrompts:
    nowhere = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.bool)
    positive = nowhere.clone()
    positive[:, 15, 15, 12] = True
    points, labels = torch.tensor([[[15.0, 15.0, 12.0]]]), torch.full((1, 1), POSITIVE)
    return PatchPrompts(points, labels, positive, nowhere, nowhere, nowhere, torch.full(positive.shape, 0.5))


@torch.no_grad()
def test_what_is_measured_is_what_a_shrunk_decoder_answers(a_bundle: Bundle) -> None:
    model = build_model(a_bundle.plans, a_bundle.weights())
    image = torch.randn(1, 2, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    features, whole = model.encode(image), answered(model, model.encode(image), a_click(), 1.0)
    found = answered(model, features, a_click(), 0.5)
    model.mask_decoder.shrink(0.5)
    expected = model.run_decoder(model.mask_decoder, model.decoder_inputs(features, a_click())).logits

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, expected, atol=1e-2)


def test_the_best_share_goes_into_weights_plans_and_card(
    a_bundle: Bundle, a_cache: Path, a_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainingItem] = []
    take = shrinking.cases_in_turn
    monkeypatch.setattr(
        shrinking,
        "cases_in_turn",
        lambda items, *others: seen.extend(items) or take(items, *others),
    )
    result = run(a_bundle, a_cache, a_config, "--output", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    assert {item.subject for item in seen} == {item.subject for item in split_held_out(load_items(a_cache), 4)[1]}
    assert 0 < len({item.subject for item in seen}) < 4

    new = load_bundle(tmp_path / "new")
    assert new.plans == replace(a_bundle.plans, shrink=0.5)
    assert Plans.from_json(new.plans.to_json()) == new.plans
    before, after = a_bundle.weights(), new.weights()
    for name in before:
        expected = before[name] * (0.5 / 0.8) if name.startswith(LEARNT) else before[name]
        torch.testing.assert_close(after[name], expected, atol=1e-3, rtol=1e-3)  # stored as float16
    assert any(name.startswith(LEARNT[0]) for name in before)
    card = (new.folder / "model_card.md").read_text()
    assert "scaled by 0.5 against the geodesic prior (before: 0.8)" in card
    assert "| 1 |" in card
    assert "subjects seen in training: the bundle has learnt from them" in " ".join(card.split())
    assert "held out" not in card.split(SECTION)[1], "as the config holds nobody out"
    assert "The config holds nobody out" in result.output
    assert "best: 0.5" in result.output
    assert run(a_bundle, a_cache, a_config, "--output", str(tmp_path / "new")).exit_code != 0, "it is there already"


def test_what_cannot_be_written_is_not_measured(
    a_bundle: Bundle, a_cache: Path, a_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(shrinking, "measure", lambda *given: measured.append(given))
    (tmp_path / "there").mkdir()
    result = run(a_bundle, a_cache, a_config, "--output", str(tmp_path / "there"))
    assert "must not exist yet" in str(result.exception)
    gated = replace(tiny_plans(), shrink=0.8, gate=GatePlans(("tiny_trunk",)))
    result = run(tiny_bundle(tmp_path / "gated", gated), a_cache, a_config, "--output", str(tmp_path / "new"))
    assert "before gate and voting head" in str(result.exception)
    assert not measured


def test_who_is_held_out_is_said_once() -> None:
    assert measured_on({}, None) == (8, True)
    assert measured_on({}, 4) == (4, True)
    assert measured_on({"held_out": 5}, None) == measured_on({"held_out": 5}, 5) == (5, False)
    with pytest.raises(BundleError, match="holds out one in 5 subjects, got --held-out 4"):
        measured_on({"held_out": 5}, 4)


def test_without_output_nothing_is_written(a_bundle: Bundle, a_cache: Path, a_config: Path, tmp_path: Path) -> None:
    """And who is held out is said by the config, where it says so."""
    a_config = shutil.copy(a_config, tmp_path / "held_out.json")
    a_config.write_text(json.dumps(json.loads(a_config.read_text()) | {"held_out": 4}))
    before = {path.name: path.read_bytes() for path in a_bundle.folder.iterdir()}
    result = run(a_bundle, a_cache, a_config)

    assert result.exit_code == 0, result.output
    assert "0.5 less 0.8: +" in result.output
    assert "holds nobody out" not in result.output
    assert {path.name: path.read_bytes() for path in a_bundle.folder.iterdir()} == before


def test_a_decoder_that_knows_more_than_its_prior_keeps_all_of_it(a_bundle: Bundle, a_cache: Path) -> None:
    """Its prior says the opposite of the truth, and what it has learnt outweighs that only as a whole."""
    model = build_model(a_bundle.plans, a_bundle.weights()).requires_grad_(False)
    gain = float(model.mask_decoder.prior_gain)
    model.mask_decoder.prior_gain.fill_(-gain)
    truthful = model.run_decoder

    def against_the_prior(decoder: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> object:
        decoded = truthful(decoder, inputs)
        return replace(decoded, logits=0.1 * gain * inputs[-1][:, shrinking.PRIOR])

    model.run_decoder = against_the_prior  # type: ignore[assignment]
    measured = measure(model, 1.0, load_items(a_cache), SAMPLING, (), 4, 0)

    assert measured.best == 1.0
    assert measured.means[1.0] > measured.means[0.5] + 0.1


def test_of_equals_the_largest_share_is_taken() -> None:
    dice = torch.tensor([[[0.4, 0.5]], [[0.5, 0.6]], [[0.5, 0.6]]]).expand(3, 2, 2)
    measured = Measured((0.5, 0.8, 1.0), dice + torch.tensor([0.0, 0.02])[None, :, None], 1)

    assert measured.best == 1.0
    assert measured.gain(1.0, 0.5) == (pytest.approx(0.1), pytest.approx(0, abs=1e-6))
    assert "| 0.5 | 0.410 | 0.510 | 0.460 |" in measured.table


def test_the_share_is_chosen_before_a_gate_is_trained(a_bundle: Bundle) -> None:
    content = Content.of(a_bundle)
    gated = replace(content, plans=replace(content.plans, gate=GatePlans(("tiny_trunk",))))
    with pytest.raises(BundleError, match="before gate and voting head"):
        with_share(gated, 0.8, Measured(SHARES, torch.zeros(len(SHARES), 2, 1), 2), learnt=False)


def test_somebody_must_say_which_share_a_bundle_holds(a_bundle: Bundle, tmp_path: Path) -> None:
    silent = tiny_bundle(tmp_path / "silent")
    assert "shrink" not in silent.plans.to_json(), "older versions read such a bundle"
    assert (share_of(a_bundle, None), share_of(a_bundle, 0.8), share_of(silent, 0.5)) == (0.8, 0.8, 0.5)
    with pytest.raises(BundleError, match="--now"):
        share_of(silent, None)
    with pytest.raises(BundleError, match=r"holds the share 0\.8, got --now 1"):
        share_of(a_bundle, 1.0)
    with pytest.raises(BundleError, match="shrink must be a number above zero"):
        replace(tiny_plans(), shrink=0.0)


def test_shares_are_not_measured_on_nothing(a_bundle: Bundle) -> None:
    with pytest.raises(VolumeError, match="got 0 items"):
        measure(build_model(a_bundle.plans), 1.0, [], SAMPLING, (), 2, 0)
