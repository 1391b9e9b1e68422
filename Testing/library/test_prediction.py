"""Predictions as values: packed masks, probability and opinions on the volume's own grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from KA2ERSegment.geometry import Box
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.volume import Volume

SHAPE = (5, 6, 7)  # KJI


def a_random_mask(seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random(SHAPE) < share


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.tuples(*[st.integers(-4, 4)] * 3))
def test_a_packed_mask_comes_back_on_any_box(seed: int, share: float, start: tuple[int, int, int]) -> None:
    mask = a_random_mask(seed, share)
    box = Box.of_shape(SHAPE).shift(start)
    packed = PackedMask.pack(box, mask)
    np.testing.assert_array_equal(packed.on(box), mask)
    np.testing.assert_array_equal(packed.on(box.dilate(2))[2:-2, 2:-2, 2:-2], mask)
    np.testing.assert_array_equal(packed.on(box.dilate(-1)), mask[1:-1, 1:-1, 1:-1])
    assert packed.unpack().sum() == packed.on(box.dilate(3)).sum() == mask.sum()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.6]))
def test_a_packed_mask_answers_for_each_voxel(seed: int, share: float) -> None:
    mask = a_random_mask(seed, share)
    packed = PackedMask.pack(Box.of_shape(SHAPE).shift((10, 20, 30)), mask)
    for k, j, i in np.ndindex(SHAPE):
        assert packed.contains((10 + i, 20 + j, 30 + k)) == mask[k, j, i]
    assert not packed.contains((0, 0, 0))
    assert not packed.contains((17, 20, 30))


def test_a_packed_mask_is_cropped_and_one_bit_per_voxel() -> None:
    mask = np.zeros((40, 40, 40), dtype=bool)
    mask[10:18, 11:19, 12:20] = True
    packed = PackedMask.pack(Box.of_shape(mask.shape), mask)
    assert packed.box == Box((12, 11, 10), (20, 19, 18))
    assert packed.bits.nbytes == 64
    assert PackedMask.pack(Box((1, 2, 3), (4, 5, 6)), np.zeros((3, 3, 3), dtype=bool)).box.size == 0


def a_prediction(volume: Volume, mask: np.ndarray | None = None) -> Prediction:
    """On a patch of 8^3 samples, two voxels apart, from canonical voxel (4, 2, 1) on."""
    canonical = volume.canonical()
    patch = Patch((4.0, 2.0, 1.0), (2.0, 2.0, 1.0), 8)
    logits = np.random.default_rng(0).normal(0, 40, (8, 8, 8)).astype(np.float32)
    box = patch.box(canonical.shape_kji)
    if mask is None:
        mask = np.random.default_rng(1).random(box.shape_kji) < 0.4
    weight = np.full((8, 8, 8), 0.25, dtype=np.float32)
    return Prediction(
        volume=volume,
        canonical=canonical,
        name="liver",
        patch=patch,
        logits=logits,
        packed=PackedMask.pack(box, mask),
        changed=volume.from_canonical_box(box),
        quality=0.8,
        arms=("foundation", "expert"),
        opinion=lambda arm: (np.full((8, 8, 8), float(arm), dtype=np.float32), weight * (1 + 2 * arm)),
    )


def test_mask_and_probability_lie_on_the_volumes_own_grid(any_volume: Volume) -> None:
    prediction = a_prediction(any_volume)
    patch = prediction.patch.box(prediction.canonical.shape_kji)
    mask = any_volume.to_canonical(prediction.mask)
    assert mask.shape == prediction.canonical.shape_kji
    np.testing.assert_array_equal(mask[patch.slices], prediction.packed.on(patch))
    assert mask.sum() == prediction.packed.unpack().sum()
    around = Box.around(prediction.mask)
    assert around == prediction.box
    probability = prediction.probability
    assert probability.dtype == np.float32
    assert np.isfinite(probability).all()
    np.testing.assert_array_equal(probability > 0.5, prediction.mask)
    outside = np.ones_like(mask)
    outside[patch.slices] = False
    assert not any_volume.to_canonical(probability)[outside].any()


def test_masks_and_probabilities_are_the_callers_own(a_volume: Volume) -> None:
    prediction = a_prediction(a_volume)
    logits = prediction.logits.copy()
    first = prediction.probability
    prediction.mask[:] = False
    first[:] = 0
    assert prediction.mask.any()
    assert prediction.probability.any()
    np.testing.assert_array_equal(prediction.logits, logits)


def test_an_empty_mask_has_an_empty_box_and_no_voxel_above_one_half(any_volume: Volume) -> None:
    prediction = a_prediction(any_volume, np.zeros((8, 15, 15), dtype=bool))
    assert prediction.box.size == 0
    assert not prediction.mask.any()
    assert prediction.probability.max() == np.float32(0.5)
    weights = [opinion.mean_weight for opinion in prediction.experts.values()]
    assert weights == pytest.approx([0.25, 0.75])  # over the patch, where there is no mask


def test_an_opinion_is_zero_outside_the_patch(any_volume: Volume) -> None:
    prediction = a_prediction(any_volume)
    opinion = prediction.experts["expert"]
    inside = np.zeros(any_volume.shape_kji, dtype=bool)
    any_volume.to_canonical(inside)[prediction.patch.box(prediction.canonical.shape_kji).slices] = True
    np.testing.assert_allclose(opinion.probability[inside], 1 / (1 + np.exp(-1)), rtol=1e-5)
    np.testing.assert_allclose(opinion.weight[inside], 0.75, rtol=1e-6)
    assert not opinion.probability[~inside].any()
    assert not opinion.weight[~inside].any()
    assert opinion.mean_weight == pytest.approx(0.75)
