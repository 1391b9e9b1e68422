"""Predictions as values: packed masks, probability and opinions on the volume's own grid."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from KA2ERSegment.geometry import Box, apply_affine
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch, upsample
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
    weights = np.full((2, 4, 4, 4), 0.25, dtype=np.float32)
    weights[1] *= 3
    return Prediction(
        volume=volume,
        canonical=canonical,
        name="liver",
        patch=patch,
        logits=logits,
        packed=PackedMask.pack(box, mask),
        changed=volume.from_canonical_box(box),
        arms=("foundation", "expert"),
        weights=weights,
        opinion=lambda arm: np.full((8, 8, 8), float(arm), dtype=np.float32),
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


def test_whole_opinions_are_not_kept_by_the_prediction(any_volume: Volume) -> None:
    prediction = a_prediction(any_volume)
    kept = [weakref.ref(opinion.weight) for opinion in prediction.experts.values()]
    gc.collect()
    assert len(kept) == 2
    assert not any(each() is not None for each in kept[:1]), "16 experts of a large volume would be gigabytes"


# -- crops, quality, shares, disagreement ------------------------------------------------------------------------------


def with_mask_and_logits(volume: Volume, mask: np.ndarray, logits: np.ndarray, **more: Any) -> Prediction:
    prediction = a_prediction(volume)
    packed = PackedMask.pack(prediction.patch.box(prediction.canonical.shape_kji), mask)
    return replace(prediction, packed=packed, logits=logits.astype(np.float32), **more)


def test_crops_are_the_images_in_their_box(any_volume: Volume) -> None:
    prediction = a_prediction(any_volume)
    opinion = prediction.experts["expert"]
    box, probability, weight = prediction.opinion_crop("expert")
    for name, (crop_box, crop), image in (
        ("probability", prediction.probability_crop(), prediction.probability),
        ("mask", prediction.mask_crop(), prediction.mask),
        ("disagreement", prediction.disagreement_crop(), prediction.disagreement),
        ("opinion", (box, probability), opinion.probability),
        ("weight", (box, weight), opinion.weight),
    ):
        np.testing.assert_array_equal(crop, image[crop_box.slices], err_msg=name)
        rest = image.copy()
        rest[crop_box.slices] = 0
        assert not rest.any(), name
    with pytest.raises(KeyError):
        prediction.opinion_crop("nobody")


@pytest.mark.parametrize("origin", [(4.0, 2.0, 1.0), (-7.3, -3.6, -5.2)])
def test_opinions_on_the_patch_say_at_their_places_what_the_crops_say(
    any_volume: Volume, origin: tuple[float, float, float]
) -> None:
    """Whole inside the volume, and sticking out of it on three sides."""
    rng = np.random.default_rng(2)
    weights = rng.random((2, 4, 4, 4)).astype(np.float32)
    weights /= weights.sum(axis=0)
    logits = rng.normal(0, 3, (2, 8, 8, 8)).astype(np.float32)
    patch = Patch(origin, (3.1, 2.3, 1.7), 8)
    prediction = replace(a_prediction(any_volume), patch=patch, weights=weights, opinion=lambda arm: logits[arm])
    kept = logits.copy()
    box, probability, weight = prediction.opinion_crop("expert")
    on_patch = prediction.opinion_on_patch("expert")
    samples = (*on_patch, prediction.disagreement_on_patch())
    crops = (probability, weight, prediction.disagreement_crop()[1])
    assert box.size
    kji = np.argwhere(np.ones(box.shape_kji, dtype=bool))
    ras = apply_affine(any_volume.ijk_to_ras, kji[:, ::-1] + box.start)
    at = apply_affine(np.linalg.inv(prediction.patch_to_ras), ras)[:, ::-1].T
    for values, crop in zip(samples, crops, strict=True):
        assert values.shape == (8, 8, 8)
        assert values.dtype == np.float32
        assert crop.std() > 0.02
        np.testing.assert_allclose(map_coordinates(values, at, order=1, mode="nearest"), crop[tuple(kji.T)], atol=1e-5)
    np.testing.assert_allclose(sum(prediction.opinion_crop(arm)[2] for arm in prediction.arms), 1, atol=1e-5)
    np.testing.assert_array_equal(logits, kept)
    with pytest.raises(KeyError):
        prediction.opinion_on_patch("nobody")


def test_opinions_on_the_patch_are_zero_off_the_volume(any_volume: Volume) -> None:
    patch = Patch((-7.3, -3.6, -5.2), (3.1, 2.3, 1.7), 8)
    prediction = replace(a_prediction(any_volume), patch=patch)
    ijk = np.moveaxis(np.indices((8, 8, 8)), 0, -1)[..., ::-1]
    at = apply_affine(any_volume.ras_to_ijk, apply_affine(prediction.patch_to_ras, ijk))
    stop = np.array(any_volume.shape_ijk)
    inside = ((at > -0.5) & (at < stop - 0.5)).all(axis=-1)
    step = np.linalg.norm(prediction.patch_to_ras[:3, :3], axis=0).max() / min(any_volume.spacing)
    far = ((at < -step) | (at > stop - 1 + step)).any(axis=-1)
    assert inside.any()
    assert far.any()
    for values in prediction.opinion_on_patch("expert"):
        assert values[inside].all()
        assert not values[far].any()
    assert not prediction.disagreement_on_patch()[far].any()


def test_an_opinion_of_a_volume_thinner_than_the_samples_is_all_there(an_affine: np.ndarray) -> None:
    """No sample lies in its only slice, and two beside it."""
    volume = Volume(np.random.default_rng(0).random((1, 22, 30)), an_affine)
    prediction = replace(a_prediction(volume, np.zeros((1, 15, 15), bool)), patch=Patch((4, 2, -3.5), (2, 2, 1), 8))
    thin = replace(prediction, patch=Patch((4, 2, -7), (2, 2, 2), 8))
    for one in (prediction, thin):
        np.testing.assert_allclose(one.opinion_crop("expert")[2], 0.75, rtol=1e-5)


def test_quality_is_the_dice_that_the_probabilities_promise(a_volume: Volume) -> None:
    shape = a_prediction(a_volume).patch.box(a_volume.shape_kji).shape_kji
    logits = np.full((8, 8, 8), -50.0)
    logits[2:6, 2:6, 2:6] = 50.0
    template = a_prediction(a_volume)
    mask = upsample(logits.astype(np.float32), template.patch, template.patch.box(a_volume.shape_kji)) > 0
    assert with_mask_and_logits(a_volume, mask, logits).quality == pytest.approx(1, abs=1e-3)
    unsure = with_mask_and_logits(a_volume, mask, logits / 50 * np.log(3))  # right with probability 3/4
    inside = 64
    assert unsure.quality == pytest.approx(
        2 * 0.75 * inside / (0.75 * inside + 0.25 * (512 - inside) + inside), abs=0.02
    )
    assert with_mask_and_logits(a_volume, np.zeros(shape, dtype=bool), logits).quality == 0
    # what differs from the network was decided by a click or a hand, and is right
    by_hand = with_mask_and_logits(a_volume, mask, -logits)
    assert by_hand.quality == pytest.approx(1, abs=1e-3)


def test_shares_are_the_mean_weights_inside_the_mask(any_volume: Volume) -> None:
    weights = np.random.default_rng(0).random((2, 4, 4, 4)).astype(np.float32)
    weights /= weights.sum(axis=0)
    prediction = replace(a_prediction(any_volume), weights=weights)
    assert list(prediction.shares) == ["foundation", "expert"]
    assert sum(prediction.shares.values()) == pytest.approx(1, abs=1e-5)
    for name, opinion in prediction.experts.items():
        assert prediction.shares[name] == pytest.approx(float(opinion.weight[prediction.mask].mean()), abs=0.05)
    corner = np.zeros((8, 15, 15), dtype=bool)
    corner[:2, :4, :4] = True  # one cell
    one = replace(prediction, packed=PackedMask.pack(prediction.patch.box(prediction.canonical.shape_kji), corner))
    assert one.shares["expert"] == pytest.approx(float(weights[1, 0, 0, 0]), abs=1e-5)


@pytest.mark.parametrize(
    ("logits", "weights", "expected"),
    [
        ((3.0, 3.0), (0.5, 0.5), 0.0),
        ((30.0, -30.0), (0.5, 0.5), 1.0),
        ((30.0, -30.0), (1.0, 0.0), 0.0),
        ((30.0, -30.0), (0.8, 0.2), 0.8),  # twice the root of 0.8 x 0.2
    ],
)
def test_disagreement_is_twice_the_weighted_deviation(
    any_volume: Volume, logits: tuple[float, float], weights: tuple[float, float], expected: float
) -> None:
    shares = np.stack([np.full((4, 4, 4), w, dtype=np.float32) for w in weights])
    prediction = replace(
        a_prediction(any_volume),
        weights=shares,
        opinion=lambda arm: np.full((8, 8, 8), logits[arm], dtype=np.float32),
    )
    _, crop = prediction.disagreement_crop()
    np.testing.assert_allclose(crop, expected, atol=1e-3)


def test_a_prediction_without_arms_has_no_opinions(a_volume: Volume) -> None:
    """As after an edit of an object that the network has never seen."""
    prediction = replace(a_prediction(a_volume), arms=(), weights=np.zeros((0, 1, 1, 1), dtype=np.float32))
    assert prediction.shares == {}
    assert list(prediction.experts) == []
    assert not prediction.disagreement.any()


def test_what_a_hand_drew_outside_the_patch_is_in_the_probability(any_volume: Volume) -> None:
    prediction = a_prediction(any_volume)
    whole = Box.of_shape(prediction.canonical.shape_kji)
    mask = np.zeros(whole.shape_kji, dtype=bool)
    mask[0, 0, 0] = mask[-1, -1, -1] = True
    drawn = replace(prediction, packed=PackedMask.pack(whole, mask))
    np.testing.assert_array_equal(drawn.probability > 0.5, drawn.mask)
    assert drawn.mask.sum() == 2


def test_arms_that_say_the_same_do_not_disagree_by_rounding(a_volume: Volume) -> None:
    same = np.random.default_rng(5).normal(0, 3, (8, 8, 8)).astype(np.float32)
    prediction = replace(a_prediction(a_volume), opinion=lambda arm: same)
    assert prediction.disagreement_on_patch().max() < 1e-6
    apart = replace(prediction, opinion=lambda arm: same + np.float32(1e-3 * arm))
    probability = 1 / (1 + np.exp(-same.astype(float)))
    read = prediction.patch.read_by(prediction.canonical.shape_kji)
    expected = 2 * np.sqrt(0.25 * 0.75) * 1e-3 * probability * (1 - probability) * read
    np.testing.assert_allclose(apart.disagreement_on_patch(), expected, rtol=0.02, atol=2e-7)
