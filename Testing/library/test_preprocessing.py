"""Patches: they lie where they should, sample what is there, and never read more than they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from KA2ERSegment.geometry import Box
from KA2ERSegment.preprocessing import (
    MAX_STEP_RATIO,
    MIN_STEP,
    Patch,
    normalise,
    sample_image,
    sample_nearest,
    upsample,
)

SHAPE_KJI = (40, 50, 60)
few = settings(max_examples=60, deadline=None)


def ramp(shape_kji: tuple[int, int, int] = SHAPE_KJI) -> np.ndarray:
    """Another slope along each axis, so that no swap goes unnoticed."""
    k, j, i = np.indices(shape_kji)
    return (0.5 * i - 2.0 * j + 3.0 * k + 10).astype(np.float32)


def ramp_at(patch: Patch) -> np.ndarray:
    """What the ramp is at each sample of a patch, (S, S, S) KJI."""
    i, j, k = (o + s * np.arange(patch.size) for o, s in zip(patch.origin, patch.step, strict=True))
    return 0.5 * i - 2.0 * j[:, None] + 3.0 * k[:, None, None] + 10


@pytest.mark.parametrize(
    ("origin", "step", "size"),
    [
        ((10, 11, 12), (1, 1, 1), 16),
        ((10.3, 11.6, 12.1), (0.25, 0.7, 1), 16),
        ((4.5, 6.25, 8), (3, 2, 1), 12),  # tents of a whole number of voxels keep a ramp as it is
        ((8.0, 9.5, 10), (4, 4, 4), 6),  # every second voxel is read
        ((16, 13, 12), (8, 6, 4), 4),
    ],
)
def test_a_linear_ramp_is_sampled_exactly(origin: Any, step: Any, size: int) -> None:
    patch = Patch(origin, step, size)
    values, inside = sample_image(ramp(), patch)

    assert values.dtype == torch.float32
    assert inside.all()
    np.testing.assert_allclose(values.numpy(), ramp_at(patch), atol=1e-3)


def test_between_whole_steps_a_ramp_is_off_by_a_small_part_of_a_step() -> None:
    patch = Patch((14.2, 12.3, 11.4), (2.6, 1.7, 3.3), 6)
    values, _ = sample_image(ramp(), patch)

    step_of_ramp = max(0.5 * 2.6, 2.0 * 1.7, 3.0 * 3.3)
    assert np.abs(values.numpy() - ramp_at(patch)).max() < 0.15 * step_of_ramp


def test_coarse_samples_are_means_and_not_single_voxels() -> None:
    """Aliasing would turn a checkerboard into black or white; its mean is one half."""
    checkers = (np.indices(SHAPE_KJI).sum(0) % 2).astype(np.int16)
    values, _ = sample_image(checkers, Patch((8, 8, 8), (3, 3, 3), 8))

    np.testing.assert_allclose(values.numpy(), 0.5, atol=0.02)


def test_outside_the_volume_the_nearest_voxel_counts_and_the_sample_is_marked() -> None:
    array = ramp((5, 6, 7))
    patch = Patch((-3, -2, -4), (1, 1, 1), 16)
    values, inside = sample_image(array, patch)
    nearest = array[np.ix_(*[np.arange(start, start + 16).clip(0, n - 1) for start, n in ((-4, 5), (-2, 6), (-3, 7))])]

    np.testing.assert_allclose(values.numpy(), nearest, atol=1e-4)
    expected = np.zeros((16, 16, 16), dtype=bool)
    expected[4:9, 2:8, 3:10] = True
    np.testing.assert_array_equal(inside.numpy(), expected)


@pytest.mark.parametrize("origin", [(100, 100, 100), (-90, -90, -90), (100, -90, 3)])
@pytest.mark.parametrize("step", [0.5, 1, 5])
def test_a_patch_wholly_outside_has_no_sample_inside_and_no_nan(origin: Any, step: float) -> None:
    patch = Patch(origin, (step, step, step), 8)
    values, inside = sample_image(ramp((5, 6, 7)), patch)

    assert values.isfinite().all()
    assert not inside.any()
    assert (sample_nearest(ramp((5, 6, 7)), patch, outside=-7) == -7).all()
    assert patch.box((5, 6, 7)).size == 0


def test_a_slice_of_one_voxel_is_sampled_too() -> None:
    values, inside = sample_image(ramp((1, 6, 7)), Patch((0, 0, -4), (1, 1, 1), 8))

    assert values.isfinite().all()
    assert inside.any(dim=2).any(dim=1).nonzero().flatten().tolist() == [4]


class Counting(np.ndarray):
    """An array that counts the voxels that are read from it."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        part = np.asarray(super().__getitem__(index))
        Counting.read += part.size
        return part


@pytest.mark.parametrize("step", [0.25, 1.0, 1.9, 2.0, 3.99, 4.0, 17.3, 120.0])
def test_what_is_read_is_bounded_by_the_patch_and_not_by_the_volume(step: float) -> None:
    huge = np.broadcast_to(np.int16(7), (4000, 4000, 4000)).view(Counting)  # 128 GB, if anybody read it
    patch = Patch((20.0, 30.0, 40.0), (step, step, step), 8)
    Counting.read = 0
    values, _ = sample_image(huge, patch)

    torch.testing.assert_close(values, torch.full_like(values, 7.0))
    assert 0 < Counting.read <= (4 * (patch.size + 2)) ** 3
    Counting.read = 0
    sample_nearest(huge, patch)
    assert Counting.read == patch.size**3


def test_nearest_samples_are_voxels_of_the_array() -> None:
    array = np.random.default_rng(0).integers(0, 500, (9, 10, 11)).astype(np.uint16)
    before = array.copy()
    patch = Patch((-1.2, 0.4, 2.0), (0.6, 1.0, 2.0), 8)
    values = sample_nearest(array, patch, outside=999)

    assert values.dtype == np.uint16
    for k, j, i in [(0, 0, 0), (0, 0, 2), (3, 1, 4), (2, 7, 5), (5, 2, 3), (7, 7, 7)]:
        at = np.floor(np.array(patch.origin) + np.array(patch.step) * (i, j, k) + 0.5).astype(int)
        x, y, z = at
        there = 0 <= x < 11 and 0 <= y < 10 and 0 <= z < 9
        assert values[k, j, i] == (array[z, y, x] if there else 999), (i, j, k)
    np.testing.assert_array_equal(array, before)


def test_sampled_voxel_by_voxel_and_written_back_an_image_is_the_same() -> None:
    array = np.random.default_rng(1).normal(size=(20, 21, 22)).astype(np.float32)
    patch, box = Patch((3, 2, 4), (1, 1, 1), 16), Box((3, 2, 4), (19, 18, 20))
    values, _ = sample_image(array, patch)

    np.testing.assert_allclose(upsample(values.numpy(), patch, box), box.crop(array), atol=1e-5)


@pytest.mark.parametrize("step", [(0.5, 0.5, 0.5), (1.5, 1.0, 0.7), (2.0, 1.2, 1.6)])
def test_a_smooth_image_comes_back_from_its_samples(step: Any) -> None:
    k, j, i = np.indices(SHAPE_KJI)
    blob = np.exp(-((i - 25) ** 2 / 200 + (j - 22) ** 2 / 120 + (k - 20) ** 2 / 160)).astype(np.float32)
    patch = Patch((13.2, 12.4, 9.8), step, 16)
    box = patch.box(SHAPE_KJI).dilate(-3)
    values, _ = sample_image(blob, patch)

    np.testing.assert_allclose(upsample(values.numpy(), patch, box), box.crop(blob), atol=0.05)


def test_beyond_the_patch_the_nearest_sample_counts() -> None:
    patch = Patch((10, 10, 10), (2, 2, 2), 4)
    logits = np.random.default_rng(2).normal(size=(4, 4, 4)).astype(np.float32)
    far = upsample(logits, patch, Box((0, 0, 0), (30, 30, 30)))

    assert far.shape == (30, 30, 30)
    assert far[0, 0, 0] == logits[0, 0, 0]
    assert far[29, 0, 13] == pytest.approx(logits[3, 0, 1:3].mean(), abs=1e-6)


spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)
corners = st.tuples(*[st.floats(-50, 400)] * 3)
extents = st.tuples(*[st.floats(1, 300)] * 3)


@few
@given(corners, extents, spacings, st.sampled_from([32, 64]), st.floats(0, 1))
def test_a_fitted_patch_covers_the_object_and_its_margin(
    start: Any, extent: Any, spacing: Any, size: int, margin: float
) -> None:
    start, extent = np.array(start), np.array(extent)
    patch = Patch.fit(start, start + extent, spacing, size, margin)
    first, last = patch.faces
    wanted = np.maximum(margin * extent, 2.0)

    assert (first <= start - wanted + 1e-6).all()
    assert (last >= start + extent + wanted - 1e-6).all()
    np.testing.assert_allclose((first + last) / 2, start + extent / 2, atol=1e-6)
    np.testing.assert_allclose(last - first, np.array(patch.step) * size)


@few
@given(corners, extents, spacings, st.sampled_from([32, 64]), st.floats(0, 1))
def test_a_fitted_patch_is_stretched_no_more_than_training_shows(
    start: Any, extent: Any, spacing: Any, size: int, margin: float
) -> None:
    start = np.array(start)
    patch = Patch.fit(start, start + extent, spacing, size, margin)
    step_mm = np.array(patch.step) * spacing

    assert min(patch.step) >= MIN_STEP
    coarsest = int(step_mm.argmax())
    if patch.step[coarsest] > MIN_STEP:  # a thick slice is not sampled finer than that, however small the object
        assert step_mm.max() / step_mm.min() <= MAX_STEP_RATIO + 1e-6


@few
@given(
    st.tuples(*[st.floats(-20, 40)] * 3),
    st.tuples(*[st.floats(0.25, 9)] * 3),
    st.tuples(*[st.integers(0, 59)] * 3),
)
def test_faces_box_and_contains_agree_on_every_voxel(origin: Any, step: Any, voxel: Any) -> None:
    patch = Patch(origin, step, 8)
    first, last = patch.faces
    at = np.array(voxel) + 0.5  # a voxel's centre, counted in faces
    assume((np.abs(at - first) > 1e-6).all())
    assume((np.abs(at - last) > 1e-6).all())
    inside = bool((at > first).all() and (at < last).all())

    assert patch.contains(voxel) == inside
    assert patch.box((60, 60, 60)).contains(voxel) == inside


def test_contains_with_an_inset_is_the_middle_of_the_patch() -> None:
    patch = Patch((0, 0, 0), (1, 2, 3), 10)

    assert patch.contains((0, 0, 0))
    assert not patch.contains((0, 0, 0), inset=0.1)
    assert patch.contains((1, 2, 3), inset=0.1)
    assert patch.contains((8, 16, 24), inset=0.1)
    assert not patch.contains((8, 18, 24), inset=0.1)
    np.testing.assert_allclose(patch.to_patch([[1, 2, 3], [4.5, 9, 13.5]]), [[1, 1, 1], [4.5, 4.5, 4.5]])


@few
@given(st.tuples(*[st.floats(0, 200)] * 3), st.floats(5, 300), spacings)
def test_a_cube_has_its_extent_around_its_centre(centre: Any, extent_mm: float, spacing: Any) -> None:
    patch = Patch.cube(centre, extent_mm, spacing, 32)
    first, last = patch.faces

    assert patch.contains(centre)
    np.testing.assert_allclose((first + last) / 2, np.array(centre) + 0.5, atol=1e-6)
    assert ((last - first) * spacing >= extent_mm - 1e-6).all()


def a_patch_of_tissue() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 16, 16, 16, generator=generator)
    values[:, :, :8] += 4
    return values


@pytest.mark.parametrize(("slope", "shift"), [(1000.0, -1024.0), (0.01, 0.0), (3.5, 40.0)])
def test_the_unit_of_the_image_does_not_matter(slope: float, shift: float) -> None:
    values = a_patch_of_tissue()
    everywhere = torch.ones_like(values, dtype=torch.bool)
    one, other = normalise(values, everywhere), normalise(values * slope + shift, everywhere)

    torch.testing.assert_close(other[:, 0], one[:, 0], atol=2e-3, rtol=0)
    assert (other[:, 1] - one[:, 1]).abs().max() <= 1 / 128 + 1e-6  # rounding may move a value to the next rank
    assert (other[:, 1] != one[:, 1]).float().mean() < 0.01


def test_channels_are_zscore_and_rank() -> None:
    values = a_patch_of_tissue()
    channels = normalise(values, torch.ones_like(values, dtype=torch.bool))

    assert channels.shape == (1, 2, 16, 16, 16)
    assert channels[:, 0].mean().abs() < 0.05
    assert (channels[:, 0].std() - 1).abs() < 0.05
    assert -0.5 <= channels[:, 1].min() < -0.45
    assert 0.45 < channels[:, 1].max() <= 0.5
    order = values.flatten().argsort()
    assert (channels[0, 1].flatten()[order].diff() >= 0).all()


def test_outside_the_volume_both_channels_are_zero_and_do_not_count() -> None:
    values = a_patch_of_tissue()
    inside = torch.ones_like(values, dtype=torch.bool)
    inside[:, 12:] = False
    garbage = torch.where(inside, values, torch.full_like(values, 1e5))
    one, other = normalise(values, inside), normalise(garbage, inside)

    assert (other[:, :, 12:] == 0).all()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [0.0, 1000.1, -1024.0, 0.1])
def test_a_constant_patch_is_flat_and_not_nan(value: float) -> None:
    """The mean of a constant is rounded; over a deviation of zero that would look like tissue."""
    values = torch.full((2, 16, 16, 16), value)
    inside = torch.ones_like(values, dtype=torch.bool)
    inside[1, :5] = False
    channels = normalise(values, inside)

    assert (channels[:, 0] == 0).all()
    assert channels.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_a_patch_with_hardly_a_sample_inside_is_not_nan(count: int) -> None:
    values = a_patch_of_tissue()
    inside = torch.zeros_like(values, dtype=torch.bool)
    inside.view(-1)[:count] = True

    assert normalise(values, inside).isfinite().all()


def test_a_volume_of_one_voxel_along_a_flipped_axis_is_sampled() -> None:
    array = np.arange(40 * 50, dtype=np.float32).reshape(40, 1, 50)[:, ::-1]
    image, inside = sample_image(array, Patch((0.0, -3.0, 0.0), (1.0, 1.0, 1.0), 8))
    assert image[2, 3, 5] == array[2, 0, 5]
    assert inside[2, 3, 5]
    assert not inside[2, 2, 5]
