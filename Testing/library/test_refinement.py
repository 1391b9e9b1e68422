"""Masks of large objects follow the image between the patch's samples, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.evaluation import dice, surface_dice
from KA2ERSegment.geometry import Box
from KA2ERSegment.plans import Plans
from KA2ERSegment.prediction import Prediction
from KA2ERSegment.preprocessing import Patch, sample_image, upsample
from KA2ERSegment.prompts import BoxPrompt
from KA2ERSegment.refinement import QUIET, RADIUS, UNSURE, Guide, Refiner, _mean, _quiet, halved
from KA2ERSegment.session import Session
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.volume import Volume

SPACING = (0.7, 0.7, 1.5)
WHOLE = Box((0, 0, 0), (140, 130, 80))

Mask = npt.NDArray[np.bool_]


def a_wavy_object(contrast: float = 80, noise: float = 6) -> tuple[Volume, Mask, Patch]:
    """An object of 110 x 100 x 60 voxels whose border waves faster than a patch of 32^3 samples can follow."""
    k, j, i = np.indices((80, 130, 140)).astype(float)
    angle = np.arctan2(j - 65, i - 70)
    radius = np.hypot((i - 70) / 52, (j - 65) / 47) * (1 + 0.06 * np.sin(14 * angle))
    truth = np.hypot(radius, (k - 40) / 29) < 1
    values = np.where(truth, 40 + contrast, 40) + np.random.default_rng(0).normal(0, noise, truth.shape)
    volume = Volume(values.astype(np.float32), np.diag([*SPACING, 1.0]))
    box = Box.around(truth)
    assert box is not None
    return volume, truth, Patch.fit(box.start, box.stop, SPACING, 32, 1 / 3)


def rough_logits(truth: Mask, patch: Patch) -> npt.NDArray[np.float32]:
    """What a network might say: right on the patch's samples as far as these go."""
    share = sample_image(truth.astype(np.float32), patch)[0].numpy()
    return np.asarray((share - 0.5) * 8, dtype=np.float32)


def test_a_halved_patch_covers_the_same_part() -> None:
    patch = Patch((10.0, 20.5, -3.0), (3.0, 2.5, 1.5), 32)
    fine = halved(patch)
    assert fine.size == 64
    for mine, its in zip(patch.faces, fine.faces, strict=True):
        np.testing.assert_allclose(mine, its)


@pytest.mark.parametrize("size", [3, 16])
def test_filters_are_those_of_scipy(size: int) -> None:
    values = np.random.default_rng(0).normal(size=(size, size, size)).astype(np.float32)

    mean = ndimage.uniform_filter(values, 2 * RADIUS + 1, mode="nearest")
    np.testing.assert_allclose(_mean(values), mean, atol=1e-6)
    quiet = ndimage.gaussian_filter(values, QUIET, mode="nearest", truncate=3.0)
    np.testing.assert_allclose(_quiet(values), quiet, atol=1e-6)


def test_the_border_follows_the_image() -> None:
    volume, truth, patch = a_wavy_object()
    assert min(patch.step) > 2
    logits = rough_logits(truth, patch)
    plain = upsample(logits, patch, WHOLE) > 0
    refined = Refiner(volume).detail(logits, patch).at_voxels(WHOLE) > 0

    assert dice(refined, truth) > dice(plain, truth) + 0.004
    assert surface_dice(plain, truth, SPACING, 0.7) < 0.98
    assert surface_dice(refined, truth, SPACING, 0.7) > 0.99


@pytest.mark.parametrize(("contrast", "noise"), [(40, 20), (20, 25), (0, 25)])
def test_noise_does_not_shatter_a_mask(contrast: float, noise: float) -> None:
    """Thin slices of CT have a contrast of 20 in noise of 25."""
    volume, truth, patch = a_wavy_object(contrast, noise)
    logits = rough_logits(truth, patch)
    plain = upsample(logits, patch, WHOLE) > 0
    refined = Refiner(volume).detail(logits, patch).at_voxels(WHOLE) > 0

    assert dice(refined, truth) > dice(plain, truth) - 0.004
    assert ndimage.label(refined)[1] == 1, "one part"
    assert ndimage.label(~refined)[1] == 1, "and no holes"


def test_where_the_image_has_no_contrast_a_thin_sheet_stays() -> None:
    volume, truth, patch = a_wavy_object()
    flat = np.full(truth.shape, 100.0, dtype=np.float32)
    flat[:2] = 400  # somewhere else there is something to see
    logits = np.full((32, 32, 32), -6.0, dtype=np.float32)
    logits[15:17] = 2.5
    plain = upsample(logits, patch, WHOLE) > 0
    refined = Refiner(replace(volume, array_kji=flat)).detail(logits, patch).at_voxels(WHOLE) > 0

    assert plain.sum() > 20_000
    assert dice(refined, plain) > 0.99


def test_where_the_network_is_sure_its_word_stands() -> None:
    """A lake of another grey value in the middle of a sure object stays in the mask."""
    volume, truth, patch = a_wavy_object()
    values = volume.array_kji.copy()
    values[36:44, 60:70, 65:75] = 40
    logits = rough_logits(truth, patch) * 3
    detail = Refiner(replace(volume, array_kji=values)).detail(logits, patch)
    plain = upsample(logits, Patch((0.5,) * 3, (2.0,) * 3, 32), Box((0, 0, 0), (64, 64, 64)))
    sure = np.abs(plain) >= UNSURE

    assert sure.mean() > 0.5
    np.testing.assert_array_equal(detail.logits[sure], plain[sure])


def test_beyond_a_bound_nothing_is_added() -> None:
    volume, truth, patch = a_wavy_object()
    logits = rough_logits(truth, patch)
    bound = Box((0, 0, 0), (70, 130, 80))
    plain = Refiner(volume, enabled=False).detail(logits, patch).at_voxels(WHOLE) > 0
    free = Refiner(volume).detail(logits, patch).at_voxels(WHOLE) > 0
    bounded = Refiner(volume).detail(logits, patch, bound).at_voxels(WHOLE) > 0

    assert (free & ~plain)[..., 72:].sum() > 50, "there is something to be kept out"
    assert (bounded & ~plain)[..., 72:].sum() < 0.05 * (free & ~plain)[..., 72:].sum()
    np.testing.assert_array_equal(bounded[..., :68], free[..., :68])


def test_a_patch_about_as_fine_as_the_volume_stays_as_it_is() -> None:
    volume, _, _ = a_wavy_object()
    patch = Patch((10.0, 20.0, 5.0), (1.9, 0.9, 0.6), 32)
    logits = np.random.default_rng(1).normal(size=(32, 32, 32)).astype(np.float32)
    detail = Refiner(volume).detail(logits, patch)

    assert Guide.of(volume, patch) is None
    assert detail.patch == patch
    assert detail.on(patch) is logits


def test_units_do_not_matter() -> None:
    volume, truth, patch = a_wavy_object()
    logits = rough_logits(truth, patch)
    tiny = replace(volume, array_kji=volume.array_kji * np.float32(1e-9))
    one, other = (Refiner(each).detail(logits, patch).logits for each in (volume, tiny))

    np.testing.assert_allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("kind", ["flat", "outside"])
def test_an_image_that_says_nothing_changes_nothing(kind: str) -> None:
    _, truth, patch = a_wavy_object()
    values = np.zeros(truth.shape, dtype=np.int16)
    values[0, 0, 0] = 1  # a volume is not one value throughout
    if kind == "outside":
        patch = replace(patch, origin=(500.0, 500.0, 500.0))
    logits = rough_logits(truth, patch)

    refined = Refiner(Volume(values, np.diag([*SPACING, 1.0]))).detail(logits, patch).at_voxels(WHOLE)

    np.testing.assert_allclose(refined, upsample(logits, patch, WHOLE), atol=1e-5)


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("refined") / "tiny").folder)


def boxed(bundle: Bundle) -> tuple[Session, Prediction, Volume]:
    volume, truth, _ = a_wavy_object()
    box = Box.around(truth)
    assert box is not None
    session = Session(bundle, device="cpu")
    session.set_volume(volume)
    return session, session.add(BoxPrompt.from_ijk(box.start, box.stop, volume)), volume


def test_switched_off_masks_are_interpolated_and_smooth_ones_always_are(a_bundle: Bundle) -> None:
    """Who asks for a smooth border does not want the image's noise in it."""
    off = replace(a_bundle, plans=a_bundle.plans.without("refinement"))
    assert not off.plans.refinement
    assert Plans.from_json(off.plans.to_json()) == off.plans
    found = {}
    for name, each in (("on", a_bundle), ("off", off)):
        session, sharp, _ = boxed(each)
        found[name] = sharp.mask, session.finish(smoothing_mm=2.0).mask

    assert (found["on"][0] != found["off"][0]).any()
    np.testing.assert_array_equal(found["on"][1], found["off"][1])


def test_probability_and_quality_are_those_of_the_refined_mask(a_bundle: Bundle) -> None:
    """What the image decided counts by its probability: only clicks and hands are taken to be right."""
    _, prediction, _ = boxed(a_bundle)
    mask, probability = prediction.on_patch()
    decided = (probability == 0) | (probability == 1)

    assert prediction.detail is not None
    assert prediction.detail().patch.size == 2 * prediction.patch.size
    assert decided.mean() < 0.02
    assert ((probability > 0.5) == mask).all()
    np.testing.assert_array_equal(prediction.probability > 0.5, prediction.mask)
