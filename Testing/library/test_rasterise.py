"""From prompts in RAS mm to voxels and to what the network sees on a patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import Box
from KA2ERSegment.prediction import PackedMask
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompt_encoder import BOX_START, BOX_STOP, NEGATIVE, POSITIVE
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, MaskPrompt, PointPrompt, Polarity, ScribblePrompt
from KA2ERSegment.rasterise import MAX_POINTS, Evidence, mask_on_patch, patch_prompts
from KA2ERSegment.volume import Volume

FINE = Patch((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 32)  # sample p is voxel p
COARSE = Patch((0.5, 0.5, 0.5), (3.0, 3.0, 3.0), 8)


def click(ijk: tuple[int, int, int], volume: Volume, sign: int = 1) -> PointPrompt:
    return PointPrompt.from_ijk(ijk, volume, Polarity.POSITIVE if sign > 0 else Polarity.NEGATIVE)


def evidence(*prompts: Any, volume: Volume) -> Evidence:
    return Evidence.of(prompts, volume)


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_prompts_become_voxels_of_the_canonical_volume(any_volume: Volume) -> None:
    canonical = any_volume.canonical()
    found = evidence(
        click((12, 12, 6), any_volume),
        click((3, 4, 5), any_volume, -1),
        BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), any_volume),
        volume=canonical,
    )
    marked = np.zeros(any_volume.shape_kji, dtype=int)
    marked[6, 12, 12], marked[5, 4, 3] = 1, -1
    seen = any_volume.to_canonical(marked)
    assert [seen[ijk[::-1]] for ijk, _ in found.clicks] == [1, -1] == [sign for _, sign in found.clicks]
    assert found.box is not None
    assert any_volume.from_canonical_box(found.box) == Box((6, 7, 3), (19, 18, 10))
    assert found.flat is None


def test_a_box_on_one_slice_says_across_which_axis(any_volume: Volume) -> None:
    canonical = any_volume.canonical()
    found = evidence(BoxPrompt.from_ijk((6, 7, 5), (19, 18, 6), any_volume), volume=canonical)
    assert found.box is not None
    assert found.flat is not None
    assert found.box.stop[found.flat] - found.box.start[found.flat] == 1
    one = evidence(BoxPrompt.from_ijk((6, 7, 5), (7, 8, 6), any_volume), volume=canonical)
    assert one.flat is None


def test_the_newest_box_and_mask_count_and_negative_ones_are_regions(a_volume: Volume, a_mask: np.ndarray) -> None:
    other = np.zeros_like(a_mask)
    other[2:4, 3:6, 4:9] = True
    negative = Polarity.NEGATIVE
    found = evidence(
        BoxPrompt.from_ijk((1, 1, 1), (5, 5, 5), a_volume),
        MaskPrompt.from_array(a_mask, a_volume),
        BoxPrompt.from_ijk((2, 2, 2), (9, 9, 9), a_volume),
        MaskPrompt.from_array(other, a_volume),
        BoxPrompt.from_ijk((20, 2, 2), (25, 9, 9), a_volume, negative),
        MaskPrompt.from_array(a_mask, a_volume, negative),
        volume=a_volume,
    )
    assert found.box == Box((2, 2, 2), (9, 9, 9))
    assert found.start is not None
    np.testing.assert_array_equal(found.start.on(a_volume.box), other)
    assert [sign for _, _, sign in found.regions] == [-1, -1]
    assert found.extent() == Box((2, 2, 2), (9, 9, 9))


def test_the_extent_is_around_everything_positive(a_volume: Volume) -> None:
    assert evidence(click((3, 3, 3), a_volume, -1), volume=a_volume).extent() is None
    assert evidence(volume=a_volume).extent() is None
    found = evidence(
        click((20, 3, 3), a_volume),
        click((29, 21, 13), a_volume, -1),
        ScribblePrompt.from_ijk([(5, 6, 7), (8, 6, 7)], a_volume, radius=0.1),
        volume=a_volume,
    )
    assert found.extent() == Box((5, 3, 3), (21, 7, 8))


def test_two_clicks_on_one_voxel_must_agree(a_volume: Volume) -> None:
    same = evidence(click((3, 4, 5), a_volume), click((8, 4, 5), a_volume), click((3, 4, 5), a_volume), volume=a_volume)
    assert [ijk for ijk, _ in same.clicks] == [(8, 4, 5), (3, 4, 5)]  # the newer place in the order
    with pytest.raises(PromptError, match=r"must agree; voxel IJK \(3, 4, 5\)"):
        evidence(click((3, 4, 5), a_volume), click((3, 4, 5), a_volume, -1), volume=a_volume)


@pytest.mark.parametrize("prompt", ["a click", None, (1, 2, 3)])
def test_something_else_than_a_prompt_is_refused(a_volume: Volume, prompt: Any) -> None:
    with pytest.raises(PromptError, match="must be one of the library's prompts"):
        evidence(prompt, volume=a_volume)


# -- maps and tokens ---------------------------------------------------------------------------------------------------


def test_clicks_are_on_the_maps_and_among_the_tokens(a_volume: Volume) -> None:
    found = evidence(click((12, 11, 6), a_volume), click((3, 4, 5), a_volume, -1), volume=a_volume)
    prompts = patch_prompts(found, FINE, None, [])
    assert prompts.positive[0].nonzero().tolist() == [[6, 11, 12]]  # KJI
    assert prompts.negative[0].nonzero().tolist() == [[5, 4, 3]]
    assert prompts.points[0].tolist() == [[6, 11, 12], [5, 4, 3]]
    assert prompts.labels[0].tolist() == [POSITIVE, NEGATIVE]
    assert (prompts.previous == 0.5).all()
    assert not prompts.box.any()
    assert not prompts.outside.any()


def test_clicks_outside_the_patch_are_left_out(a_volume: Volume) -> None:
    patch = Patch((8.0, 8.0, 2.0), (0.25, 0.25, 0.25), 16)
    found = evidence(click((9, 9, 3), a_volume), click((29, 21, 13), a_volume, -1), volume=a_volume)
    prompts = patch_prompts(found, patch, None, [])
    assert prompts.labels[0].tolist() == [POSITIVE]
    assert not prompts.negative.any()


def test_the_newest_clicks_become_tokens_and_all_are_on_the_maps(a_volume: Volume) -> None:
    clicks = [click((i, 10, 6), a_volume) for i in range(MAX_POINTS + 5)]
    prompts = patch_prompts(evidence(*clicks, volume=a_volume), FINE, None, [])
    assert prompts.positive.sum() == MAX_POINTS + 5
    assert prompts.points[0, :, 2].tolist() == list(range(5, MAX_POINTS + 5))


def test_no_prompt_on_the_patch_gives_no_token(a_volume: Volume) -> None:
    prompts = patch_prompts(Evidence(), FINE, None, [])
    assert prompts.points.shape == (1, 0, 3)
    assert prompts.labels.shape == (1, 0)


def test_a_box_bounds_everywhere_and_a_flat_one_in_its_slice(a_volume: Volume) -> None:
    solid = evidence(BoxPrompt.from_ijk((5, 6, 3), (15, 14, 9), a_volume), volume=a_volume)
    prompts = patch_prompts(solid, FINE, None, [])
    inside = np.zeros((32, 32, 32), dtype=bool)
    inside[3:9, 6:14, 5:15] = True
    np.testing.assert_array_equal(prompts.box[0].numpy(), inside)
    np.testing.assert_array_equal(prompts.outside[0].numpy(), ~inside)
    assert prompts.labels[0].tolist() == [BOX_START, BOX_STOP]
    assert prompts.points[0].tolist() == [[2.5, 5.5, 4.5], [8.5, 13.5, 14.5]]  # outer faces, KJI
    flat = evidence(BoxPrompt.from_ijk((5, 6, 3), (15, 14, 4), a_volume), volume=a_volume)
    prompts = patch_prompts(flat, FINE, None, [])
    assert prompts.box[0].nonzero()[:, 0].unique().tolist() == [3]
    assert prompts.outside[0].nonzero()[:, 0].unique().tolist() == [3]
    assert int(prompts.outside.sum()) == 32 * 32 - 10 * 8


def test_a_box_thinner_than_a_sample_still_covers_one(a_volume: Volume) -> None:
    found = evidence(BoxPrompt.from_ijk((12, 12, 6), (13, 13, 7), a_volume), volume=a_volume)
    prompts = patch_prompts(found, COARSE, None, [])
    assert prompts.box.sum() == 1


def test_of_two_regions_the_newest_wins_and_other_objects_are_outside(a_volume: Volume) -> None:
    stroke = [(5, 10, 6), (15, 10, 6)]
    for first, second in ((Polarity.POSITIVE, Polarity.NEGATIVE), (Polarity.NEGATIVE, Polarity.POSITIVE)):
        found = evidence(
            ScribblePrompt.from_ijk(stroke, a_volume, first, radius=0.1),
            ScribblePrompt.from_ijk(stroke, a_volume, second, radius=0.1),
            volume=a_volume,
        )
        prompts = patch_prompts(found, FINE, None, [])
        newest, oldest = prompts.positive, prompts.negative
        if second is Polarity.NEGATIVE:
            newest, oldest = oldest, newest
        assert newest.sum() == 11
        assert not oldest.any()
    other = np.zeros(a_volume.shape_kji, dtype=bool)
    other[5:8, 9:12, 4:8] = True
    packed = PackedMask.pack(a_volume.box, other)
    positive = evidence(ScribblePrompt.from_ijk(stroke, a_volume, radius=0.1), volume=a_volume)
    prompts = patch_prompts(positive, FINE, None, [packed])
    assert prompts.positive.sum() == 11
    assert prompts.negative.sum() == other.sum() - 3  # the stroke runs through it
    assert not (prompts.positive & prompts.negative).any()


def test_a_region_has_a_token_inside_it(a_volume: Volume) -> None:
    corners = [(6, 6, 6), (14, 6, 6), (10, 15, 6)]
    found = evidence(LassoPrompt.from_ijk(corners, a_volume, Polarity.NEGATIVE), volume=a_volume)
    prompts = patch_prompts(found, FINE, None, [])
    assert prompts.labels[0].tolist() == [NEGATIVE]
    k, j, i = prompts.points[0, 0].int().tolist()
    assert prompts.negative[0, k, j, i]


def test_a_thin_stroke_does_not_fall_between_coarse_samples(a_volume: Volume) -> None:
    found = evidence(ScribblePrompt.from_ijk([(5, 9, 6), (17, 9, 6)], a_volume, radius=0.1), volume=a_volume)
    prompts = patch_prompts(found, COARSE, None, [])
    i = prompts.positive[0].nonzero()[:, 2]
    assert sorted(i.tolist()) == list(range(int(i.min()), int(i.max()) + 1))
    assert len(i) >= 4


def test_a_mask_to_start_from_is_nearly_sure(a_volume: Volume, a_mask: np.ndarray) -> None:
    seen = mask_on_patch(PackedMask.pack(a_volume.box, a_mask), FINE)
    assert seen.dtype == np.float32
    inside = seen[: a_mask.shape[0], : a_mask.shape[1], : a_mask.shape[2]]
    np.testing.assert_array_equal(inside > 0.5, a_mask)
    assert set(np.unique(seen).round(3)) == {np.float32(0.05), np.float32(0.95)}
    assert (seen > 0.5).sum() == a_mask.sum()
    assert (mask_on_patch(PackedMask.pack(a_volume.box, ~a_mask & False), FINE) == np.float32(0.05)).all()
