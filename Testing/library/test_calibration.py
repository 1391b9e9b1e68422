"""Temperatures, reliability and ranks against constructed cases and against scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from KA2ERSegment.bundle import Bundle
from KA2ERSegment.calibration import (
    BINS,
    Reliability,
    area_under_roc,
    expected_calibration_error,
    fit_temperature,
    near_object,
    spearman,
)
from KA2ERSegment.errors import BundleError, KA2ERError
from KA2ERSegment.plans import GatePlans, Plans, VotingPlans
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity
from KA2ERSegment.session import Session
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.volume import Volume


def drawn(logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Truth of which these are the true logits."""
    return np.random.default_rng(seed).random(logits.shape) < 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.5])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(0.5, 2, 40000)
    assert fit_temperature(temperature * logits, drawn(logits)) == pytest.approx(temperature, rel=0.03)


def test_a_voxel_of_weight_two_counts_as_two() -> None:
    logits = np.random.default_rng(2).normal(0, 3, 500)
    truth = drawn(logits / 2)
    twice = np.arange(500) < 120
    repeated = fit_temperature(np.r_[logits, logits[twice]], np.r_[truth, truth[twice]])
    assert fit_temperature(logits, truth, 1.0 + twice) == pytest.approx(repeated, rel=1e-3)


def test_a_temperature_needs_both_sides() -> None:
    with pytest.raises(KA2ERError, match="inside and outside"):
        fit_temperature(np.zeros(4), np.ones(4, dtype=bool))


def test_right_probabilities_have_next_to_no_calibration_error_and_hot_ones_the_error_they_are_made_with() -> None:
    logits = np.random.default_rng(3).normal(0, 2, 200000)
    truth = drawn(logits)
    probability = 1 / (1 + np.exp(-logits))
    assert expected_calibration_error(probability, truth) < 0.005
    assert expected_calibration_error(1 / (1 + np.exp(-4 * logits)), truth) > 0.1
    assert expected_calibration_error(np.full(1000, 0.9), np.arange(1000) < 700) == pytest.approx(0.2)


def test_reliability_adds_scales_and_comes_back_from_json() -> None:
    rng = np.random.default_rng(4)
    probability, truth = rng.random(1000), rng.random(1000) < 0.3
    both = Reliability.of(probability[:300], truth[:300]) + Reliability.of(probability[300:], truth[300:])
    whole = Reliability.of(probability, truth)
    np.testing.assert_allclose(both.promised, whole.promised)
    assert both.error == pytest.approx(whole.error)
    assert whole.scaled(0.01).error == pytest.approx(whole.error)
    assert Reliability.from_json(whole.to_json()).error == whole.error
    assert len(whole.bins) == BINS
    assert sum(share for _, _, share in whole.bins) == pytest.approx(1)
    one = Reliability.of(np.array([1.0]), np.array([True]))  # 1.0 is in the last bin, not beyond it
    assert one.bins == [(1.0, 1.0, 1.0)]


def test_area_under_roc_is_the_mann_whitney_statistic_with_ties() -> None:
    rng = np.random.default_rng(5)
    score, positive = rng.integers(0, 6, 80) / 5, rng.random(80) < 0.4
    u = stats.mannwhitneyu(score[positive], score[~positive]).statistic
    assert area_under_roc(score, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert area_under_roc(score, positive) == pytest.approx(np.mean(pairs))
    assert area_under_roc(score, np.ones(80, dtype=bool)) is None


def test_spearman_is_scipys_and_undefined_where_there_is_nothing_to_rank() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=30), rng.integers(0, 4, 30)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([0.1, 0.2, 0.3], [1, 2, 9]) == pytest.approx(1)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 2, 3], [4, 4, 4]) is None


def test_near_an_object_is_measured_in_mm_along_each_axis() -> None:
    truth = np.zeros((9, 30, 40), dtype=bool)
    truth[4, 15, 20] = True
    box, near = near_object(truth, (1.0, 2.0, 4.0), 8.0)
    k, j, i = np.indices(truth.shape)
    expected = ((i - 20) * 1.0) ** 2 + ((j - 15) * 2.0) ** 2 + ((k - 4) * 4.0) ** 2 <= 64
    found = np.zeros_like(truth)
    box.paste(near, found)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(KA2ERError, match="at least one voxel"):
        near_object(truth & ~truth, (1.0, 1.0, 1.0))


# -- in use -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def test_calibration_changes_probabilities_and_no_mask(a_bundle: Bundle, a_volume: Volume) -> None:
    heat = {"mask": 2.5, "tiny_brain": 0.5}
    plain = Session(a_bundle)
    warm = Session(replace(a_bundle, plans=replace(a_bundle.plans, calibration=heat)), model=plain.model)
    prompts = [
        PointPrompt.from_ijk((14, 11, 6), a_volume, Polarity.POSITIVE),
        BoxPrompt.from_ijk((6, 4, 2), (24, 18, 11), a_volume),
        PointPrompt.from_ijk((7, 5, 3), a_volume, Polarity.NEGATIVE),
    ]
    for session in (plain, warm):
        session.set_volume(a_volume)
    for prompt in prompts:
        before, after = plain.add(prompt), warm.add(prompt)
        np.testing.assert_array_equal(before.mask, after.mask)
        np.testing.assert_array_equal(before.logits, after.logits)
        np.testing.assert_array_equal(before.probability > 0.5, after.probability > 0.5)
    mask, probability = after.on_patch()
    followed = mask == (after.logits > 0)
    expected = 1 / (1 + np.exp(-after.logits.astype(float) / 2.5))
    np.testing.assert_allclose(probability[followed], expected[followed], rtol=1e-4, atol=1e-6)
    assert np.abs(before.probability - after.probability).max() > 0.01
    assert before.quality != after.quality
    opinion = after.opinion(after.arms.index("tiny_brain"))
    read = after.patch.read_by(after.canonical.shape_kji)
    sure = 1 / (1 + np.exp(-opinion.astype(float) / 0.5))
    np.testing.assert_allclose(after.opinion_on_patch("tiny_brain")[0], sure * read, rtol=1e-3, atol=1e-6)
    for arm in ("foundation", "tiny_trunk"):
        np.testing.assert_array_equal(before.opinion_on_patch(arm)[0], after.opinion_on_patch(arm)[0])
    assert not np.array_equal(before.disagreement, after.disagreement)


def test_plans_without_a_system_have_it_off_and_all_else_as_it_was() -> None:
    gate, voting = GatePlans(("tiny_brain",)), VotingPlans(("b",))
    plans = replace(tiny_plans(), gate=gate, voting=voting, calibration={"mask": 2.0})
    off = plans.without("experts", "gate", "voting", "calibration")
    assert not off.amalgamation.enabled
    assert off.gate == replace(gate, enabled=False)
    assert off.voting == replace(voting, enabled=False)
    assert off.calibration == {}
    assert replace(plans, calibration={}) == plans.without("calibration")
    assert Plans().without("gate", "voting", "calibration") == Plans()
    with pytest.raises(BundleError, match="'growcut'"):
        plans.without("growcut")
