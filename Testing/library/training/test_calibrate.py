"""Temperatures fitted on simulated sessions, and what they change in a bundle: plans and card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.experts import Content
from KA2ERSegment.geometry import Box
from KA2ERSegment.plans import GatePlans, VotingPlans
from KA2ERSegment.prompts import PointPrompt
from KA2ERSegment.session import Session
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.training.calibrate import ITEMS, Samples, calibrate, collect, fit, items_to_fit_on, with_calibration
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.volume import Volume


def an_item(name: str = "one", source: str = "a/repo", image: bool = True) -> TrainingItem:
    labels = np.zeros((14, 18, 22), dtype=np.uint16)
    labels[3:10, 4:14, 5:17] = 1
    noise = np.random.default_rng(3).normal(0, 20, labels.shape)
    images = ((labels * 200 + noise).astype(np.int16),) if image else ()
    boxes = {1: Box((5, 4, 3), (17, 14, 10))}
    return TrainingItem(name, source, labels, images, (1.0, 1.2, 2.5), {1: "block"}, boxes, "CC0", "CT", "abdomen")


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def some_samples(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True logits, truth drawn from them, and which of six predictions each belongs to."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, 30000)
    return logits, rng.random(30000) < 1 / (1 + np.exp(-logits)), np.arange(30000) % 6


def test_each_column_gets_its_own_temperature_back() -> None:
    logits, truth, prediction = some_samples()
    columns = np.stack([2 * logits, 0.5 * logits], axis=1).astype(np.float32)
    names, sources = ("mask", "foundation"), ("a", "b", "a", "c", "c", "b")
    found = fit(Samples(names, columns, truth, np.ones(30000), prediction, sources))
    assert found.temperatures == found.fitted == pytest.approx({"mask": 2.0, "foundation": 0.5}, rel=0.05)
    assert found.error_after["mask"] < 0.02 < found.error_before["mask"]
    assert (found.sources, found.predictions) == (3, 6)
    assert "temperatures before they are probabilities (mask 2.0" in found.note


def test_a_temperature_that_does_not_help_on_another_source_is_not_kept() -> None:
    """Two sources are right as they are; in the third the mask is sure of what has nothing to do with the truth."""
    logits, truth, prediction = some_samples()
    columns = np.stack([logits, 2 * logits], axis=1).astype(np.float32)
    lost = prediction >= 4
    columns[lost, 0] = np.where(np.arange(lost.sum()) % 2, 6.0, -6.0)
    sources = ("a", "a", "b", "b", "c", "c")
    found = fit(Samples(("mask", "one"), columns, truth, np.ones(30000), prediction, sources))
    assert found.fitted["mask"] > 2
    assert found.error_after["mask"] > found.error_before["mask"]
    assert found.temperatures == {"one": pytest.approx(2.0, rel=0.05)}
    assert "no temperature is kept for mask" in found.note


def test_what_is_left_out_together_is_a_source_or_a_prediction() -> None:
    logits, truth, prediction = some_samples()
    columns = logits[:, None].astype(np.float32)
    several = Samples(("mask",), columns, truth, np.ones(30000), prediction, ("b", "b", "a", "a", "c", "c"))
    np.testing.assert_array_equal(several.folds, np.array([1, 1, 0, 0, 2, 2])[prediction])
    np.testing.assert_array_equal(replace(several, sources=("a",) * 6).folds, prediction)


def test_samples_are_near_the_object_and_sources_count_the_same(a_bundle: Bundle) -> None:
    items = [an_item(), an_item("two"), an_item("three", "b/repo"), an_item("four", "c/repo", image=False)]
    samples = collect(a_bundle, items, clicks=1)
    assert samples.names == ("mask", "foundation", "tiny_trunk", "tiny_brain")
    assert samples.logits.shape == (len(samples.truth), 4)
    assert samples.sources.count("a/repo") == 2 * samples.sources.count("b/repo") == 8  # box and click, first and last
    assert samples.weights.sum() == pytest.approx(2)
    assert 0.1 < samples.truth.mean() < 0.9
    again = collect(a_bundle, items[:1], clicks=1)  # what is drawn of an item does not depend on the others
    np.testing.assert_array_equal(samples.logits[samples.prediction < again.prediction.max() + 1], again.logits)
    with pytest.raises(KA2ERError, match="items with image and labels"):
        collect(a_bundle, [an_item(image=False)])


def test_decoders_and_voters_have_temperatures_too(tmp_path: Path) -> None:
    names = ("tiny_trunk", "tiny_brain")
    voting = VotingPlans(names, prototypes=4, adaptive=1, top=1, rank=2, width=8)
    plans = replace(tiny_plans(), gate=GatePlans(names, hidden=8), voting=voting)
    bundle = tiny_bundle(tmp_path / "tiny", plans)
    samples = collect(bundle, [an_item()], clicks=0)
    decoders, voters = ("general", *names), ("basic", *names, "adaptive 1")
    others = (*(f"decoder {name}" for name in decoders), *(f"head {name}" for name in voters))

    assert samples.names == ("mask", "foundation", *names, *others)
    assert samples.logits.shape == (len(samples.truth), 11)
    columns = dict(zip(samples.names, samples.logits.T, strict=True))
    assert not np.allclose(columns["decoder tiny_trunk"], columns["decoder tiny_brain"], atol=1e-2)
    found = samples.logits[:, samples.names.index("head basic")]
    session = Session(bundle, device="cpu")
    volume = Volume(an_item().images[0], np.diag([1.0, 1.2, 2.5, 1.0]))
    session.bundle = replace(bundle, plans=replace(plans, calibration={"head basic": 4.0, "decoder general": 2.0}))
    session.set_volume(volume)
    prediction = session.add(PointPrompt.from_ijk((10, 9, 6), volume))
    for name, temperature in (("head basic", 4.0), ("decoder general", 2.0), ("decoder tiny_brain", 1.0)):
        read = prediction.patch.read_by(prediction.canonical.shape_kji)
        expected = 1 / (1 + np.exp(-prediction.logits_of(name) / temperature)) * read
        np.testing.assert_allclose(prediction.opinion_on_patch(name)[0], expected, atol=1e-5)
    assert found.std() > 0.01


def test_held_out_items_come_first_and_small_sources_lend_some_that_were_learnt_from() -> None:
    learning = [an_item(f"a{n}") for n in range(9)] + [an_item(f"b{n}", "b/repo") for n in range(9)]
    held_out = [an_item("a9"), an_item("c0", "c/repo", image=False)]
    names = [item.name for item in items_to_fit_on(learning, held_out)]
    assert names == ["a9", *(f"b{n}" for n in range(ITEMS))]


def test_a_calibrated_bundle_has_the_same_weights_and_says_so_in_its_card(a_bundle: Bundle, tmp_path: Path) -> None:
    found = calibrate(a_bundle, [an_item()], [an_item("two", "b/repo")], tmp_path / "warm")
    warm = load_bundle(tmp_path / "warm")
    assert warm.plans == replace(a_bundle.plans, calibration=found.temperatures)
    assert found.fitted.keys() == {"mask", "foundation", "tiny_trunk", "tiny_brain"}
    assert warm.checksums["weights.safetensors"] == a_bundle.checksums["weights.safetensors"]
    card = (warm.folder / "model_card.md").read_text()
    assert f"## Known limits\n{found.note} The items" in card
    assert "The items of 1 of these sources were trained on too." in card
    again = with_calibration(Content.of(warm), replace(found, predictions=77), 0)
    assert again.card.count("- Calibration:") == 1
    assert "77 predictions" in again.card
