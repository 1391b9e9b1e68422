"""What `constraints` promises holds for any logits: white noise is the worst that a network could answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from KA2ERSegment.constraints import (
    SPECK,
    click_reach,
    finished,
    honour,
    keep_change_local,
    keep_in_box,
    remove_islands,
    remove_specks,
)
from KA2ERSegment.geometry import Box
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.steps import Finish

SHAPE = (18, 22, 26)  # KJI
BOX = Box.of_shape(SHAPE)
PATCH = Patch((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 26)

a_voxel = st.tuples(*(st.integers(0, n - 1) for n in SHAPE[::-1]))
some_clicks = st.dictionaries(a_voxel, st.sampled_from([1, -1]), min_size=1, max_size=8)


def noise(seed: int, deviation: float = 3.0, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(offset, deviation, SHAPE)).astype(np.float32)


def smooth(seed: int, offset: float = 0.0) -> np.ndarray:
    values = ndimage.gaussian_filter(noise(seed), 2.0)
    return (8 * values / values.std() + offset).astype(np.float32)


def kji(ijk: tuple[int, int, int]) -> tuple[int, int, int]:
    return ijk[2], ijk[1], ijk[0]


def specks(mask: np.ndarray, keep: list[tuple[int, int, int]], near: np.ndarray) -> int:
    """Components of fewer than SPECK voxels that reach into `near` and hold no voxel (IJK) of `keep`."""
    components, count = ndimage.label(mask)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    close = np.unique(components[near & mask])
    held = {components[kji(ijk)] for ijk in keep}
    return sum(1 for n in close if sizes[n] < SPECK and n not in held)


def near_clicks(clicks: dict[tuple[int, int, int], int], patch: Patch = PATCH) -> np.ndarray:
    near = np.zeros(SHAPE, dtype=bool)
    for ijk in clicks:
        near[click_reach(patch, ijk).intersect(BOX).slices] = True
    return near


def check_promises(mask: np.ndarray, clicks: dict[tuple[int, int, int], int], patch: Patch = PATCH) -> None:
    for ijk, sign in clicks.items():
        assert mask[kji(ijk)] == (sign > 0), (ijk, sign)
    near = near_clicks(clicks, patch)
    assert specks(mask, [ijk for ijk, sign in clicks.items() if sign > 0], near) == 0
    assert specks(~mask, [ijk for ijk, sign in clicks.items() if sign < 0], near) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), some_clicks, st.floats(-20, 20), st.booleans(), st.floats(0.25, 4))
def test_clicks_are_honoured_without_specks_whatever_the_logits(
    seed: int, clicks: dict[tuple[int, int, int], int], offset: float, is_smooth: bool, step: float
) -> None:
    patch = Patch((0.0, 0.0, 0.0), (step, 1.0, max(step / 2, 0.25)), 32)
    logits = smooth(seed, offset) if is_smooth else noise(seed, offset=offset)
    check_promises(honour(logits, BOX, patch, list(clicks.items())), clicks, patch)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ijk", [(13, 11, 9), (0, 0, 0), (25, 11, 0)])
def test_a_click_against_sure_logits_changes_a_ball_and_no_single_voxel(sign: int, ijk: tuple[int, int, int]) -> None:
    logits = np.full(SHAPE, -20.0 * sign, dtype=np.float32)
    logits[kji(ijk)] = -1.0 * sign  # the click itself lacks little: the bump alone would change one voxel
    mask = honour(logits, BOX, PATCH, [(ijk, sign)])
    changed = mask == (sign > 0)
    components, count = ndimage.label(changed)
    assert count == 1
    at_corner = sum(x in (0, n - 1) for x, n in zip(ijk, SHAPE[::-1], strict=True))
    assert {0: 19, 2: 8, 3: 7}[at_corner] <= components.astype(bool).sum() < 80


def test_a_click_that_the_network_followed_changes_nothing() -> None:
    logits = np.full(SHAPE, -5.0, dtype=np.float32)
    logits[4:12, 4:14, 5:15] = 5
    expected = logits > 0
    mask = honour(logits, BOX, PATCH, [((8, 8, 8), 1), ((20, 18, 15), -1)])
    np.testing.assert_array_equal(mask, expected)


def test_a_ball_is_as_large_as_the_patch_is_coarse() -> None:
    coarse = Patch((0.0, 0.0, 0.0), (3.0, 3.0, 3.0), 26)
    sizes = [
        int(honour(np.full(SHAPE, -2.0, dtype=np.float32), BOX, patch, [((13, 11, 9), 1)]).sum())
        for patch in (PATCH, coarse)
    ]
    assert sizes[1] > 6 * sizes[0]


def test_neighbouring_clicks_of_both_signs_each_get_the_voxels_nearer_to_them() -> None:
    logits = np.full(SHAPE, -9.0, dtype=np.float32)
    mask = honour(logits, BOX, PATCH, [((12, 11, 9), 1), ((13, 11, 9), -1)])
    assert mask[9, 11, 12]
    assert not mask[:, :, 13:].any()
    assert ndimage.label(mask)[1] == 1
    assert mask.sum() >= SPECK


def test_a_speck_and_a_hole_beside_a_click_go_and_far_ones_stay() -> None:
    logits = np.full(SHAPE, -5.0, dtype=np.float32)
    logits[2:16, 4:18, 2:14] = 5
    logits[8, 8, 8] = -5  # a hole
    logits[8, 8, 16] = 5  # a speck
    logits[1, 20, 24] = 5  # a speck far from the click
    mask = honour(logits, BOX, PATCH, [((11, 8, 8), 1)])
    assert mask[8, 8, 8]
    assert mask[1, 20, 24]
    assert not honour(logits, BOX, PATCH, [((13, 8, 8), 1)])[8, 8, 16]


def test_specks_on_the_border_of_the_crop_are_specks_too() -> None:
    logits = np.full(SHAPE, -5.0, dtype=np.float32)
    logits[0, 0, 0] = 5
    assert not honour(logits, BOX, PATCH, [((2, 2, 2), -1)])[0, 0, 0]


def test_voxels_of_a_locked_object_are_never_taken_and_their_holes_are_left() -> None:
    logits = np.full(SHAPE, 5.0, dtype=np.float32)
    blocked = np.zeros(SHAPE, dtype=bool)
    blocked[9, 11, 12:14] = True
    mask = honour(logits, BOX, PATCH, [((11, 11, 9), 1)], blocked)
    np.testing.assert_array_equal(mask, ~blocked)
    crowded = honour(np.full(SHAPE, -9.0, dtype=np.float32), BOX, PATCH, [((11, 11, 9), 1)], blocked)
    assert crowded[9, 11, 11]
    assert not (crowded & blocked).any()


def test_clicks_outside_the_crop_do_not_count() -> None:
    crop = Box((5, 5, 5), (15, 15, 15))
    mask = honour(np.full(crop.shape_kji, -5.0, dtype=np.float32), crop, PATCH, [((2, 2, 2), 1), ((10, 10, 10), 1)])
    assert mask[5, 5, 5]
    assert ndimage.label(mask)[1] == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), a_voxel)
def test_specks_are_dropped_near_a_place_and_nothing_else_changes(seed: int, keep: tuple[int, int, int]) -> None:
    before = noise(seed, offset=-3.0) > 0
    before[kji(keep)] = True
    near = Box((6, 5, 4), (14, 12, 10))
    mask = before.copy()
    remove_specks(mask, BOX, near, [keep])
    inside = np.zeros(SHAPE, dtype=bool)
    inside[near.slices] = True
    assert specks(mask, [keep], inside) == 0
    assert mask[kji(keep)]
    components, _ = ndimage.label(before)
    gone = np.unique(components[before & ~mask])
    assert not (mask & ~before).any()
    for n in gone:  # whole components, small, and near
        assert (components == n).sum() < SPECK
        assert not mask[components == n].any()
        assert (inside & (components == n)).any()


def test_a_change_is_kept_only_where_it_touches_the_newest_prompt() -> None:
    before = np.full(SHAPE, -4.0, dtype=np.float32)
    before[2:6, 2:6, 2:6] = 4
    after = np.full(SHAPE, -3.0, dtype=np.float32)  # the far part vanished, another one came at the click
    after[10:14, 10:14, 10:14] = 3
    kept = keep_change_local(after, before, [(11, 11, 11)])
    assert (kept[10:14, 10:14, 10:14] > 0).all()
    assert (kept[2:6, 2:6, 2:6] > 0).all()
    assert (kept > 0).sum() == 2 * 64
    unchanged = keep_change_local(before, before, [(11, 11, 11)])
    np.testing.assert_array_equal(unchanged, before)


def test_a_change_away_from_the_newest_prompt_is_undone_and_logits_of_one_sign_are_renewed() -> None:
    before = np.full(SHAPE, -4.0, dtype=np.float32)
    after = np.full(SHAPE, -3.0, dtype=np.float32)
    after[10:14, 10:14, 10:14] = 3
    kept = keep_change_local(after, before, [(2, 2, 2)])
    assert not (kept > 0).any()
    assert kept[0, 0, 0] == -3


def test_small_islands_go_unless_a_prompt_says_that_they_are_inside() -> None:
    logits = np.full(SHAPE, -4.0, dtype=np.float32)
    logits[2:12, 2:12, 2:12] = 4
    logits[15, 15, 15] = logits[15, 20, 20] = 4
    positive = np.zeros(SHAPE, dtype=bool)
    positive[15, 20, 20] = True
    kept = remove_islands(logits, positive)
    assert kept[15, 15, 15] < 0
    assert kept[15, 20, 20] > 0
    assert (kept[2:12, 2:12, 2:12] > 0).all()
    assert kept.dtype == np.float32
    alone = np.where(kept > 0, kept, -4.0).astype(np.float32)
    alone[15, 20, 20] = -4
    np.testing.assert_array_equal(remove_islands(alone, positive), alone)


def test_nothing_leaks_out_of_a_box_until_a_click_says_so() -> None:
    inside = np.zeros((20, 20, 20), dtype=bool)
    inside[5:15, 5:15, 5:15] = True
    nobody = np.zeros_like(inside)
    everything = np.full(inside.shape, 2.0, dtype=np.float32)
    bounded = keep_in_box(everything, inside, nobody)
    outlier = nobody.copy()
    outlier[10, 10, 19] = True

    assert Box.around(bounded > 0) == Box((3, 3, 3), (17, 17, 17))  # a sample, and a twentieth of ten rounded up
    assert (keep_in_box(everything, inside, inside) == bounded).all()
    assert (keep_in_box(everything, inside, outlier) == everything).all()
    assert (keep_in_box(everything, nobody, nobody) == everything).all()


# -- drawn by hand, and finished ---------------------------------------------------------------------------------------


def test_what_a_hand_drew_is_no_speck_and_no_hole() -> None:
    logits = np.full(BOX.shape_kji, -4.0, dtype=np.float32)
    drawn = np.zeros(BOX.shape_kji, dtype=bool)
    clicks = [((12, 12, 10), 1), ((16, 12, 10), -1)]
    logits[6:15, 8:17, 8:15] = 4.0
    speck, hole = kji((18, 12, 10)), kji((10, 10, 8))
    logits[speck], logits[hole] = 4.0, -4.0
    plain = honour(logits.copy(), BOX, PATCH, clicks)
    assert not plain[speck]
    assert plain[hole]
    drawn[speck] = drawn[hole] = True
    kept = honour(logits.copy(), BOX, PATCH, clicks, drawn=drawn)
    assert kept[speck]
    assert not kept[hole]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_click_on_what_a_hand_drew_as_it_says_moves_nothing(sign: int) -> None:
    logits = np.full(BOX.shape_kji, -10.0 * sign, dtype=np.float32)
    ijk = (12, 12, 10)
    logits[kji(ijk)] = 10.0 * sign  # one voxel, drawn
    drawn = np.zeros(BOX.shape_kji, dtype=bool)
    drawn[kji(ijk)] = True
    mask = honour(logits.copy(), BOX, PATCH, [(ijk, sign)], drawn=drawn)
    np.testing.assert_array_equal(mask, logits > 0)
    assert (honour(logits.copy(), BOX, PATCH, [(ijk, sign)]) != (logits > 0)).sum() > 8


def test_smoothing_rounds_in_millimetres_and_default_finishing_changes_nothing() -> None:
    logits = np.full((24, 24, 24), -20.0, dtype=np.float32)
    logits[8:16, 8:16, 8:16] = 20.0
    nothing = np.zeros(logits.shape, dtype=bool)
    assert finished(logits, nothing, (1, 1, 1), Finish()) is logits
    spacing = (0.5, 2.0, 8.0)  # I, J, K
    smooth = finished(logits, nothing, spacing, Finish(2.0))
    assert (smooth[:, 12, 12] > 0).sum() == 8  # 8 mm from sample to sample: hardly anything of 2 mm
    assert (np.abs(smooth[12, 12, :]) < 5.9).sum() > (np.abs(smooth[12, :, 12]) < 5.9).sum()
    assert ((smooth > 0).sum()) < (logits > 0).sum()
    ridge = logits.copy()
    ridge[12, 12, 2:8] = 20.0
    assert (finished(ridge, nothing, (1, 1, 1), Finish(2.0))[12, 12, 2:5] < 0).all()


def test_without_islands_only_touched_parts_stay_or_the_largest() -> None:
    logits = np.full((20, 20, 20), -3.0, dtype=np.float32)
    logits[2:9, 2:9, 2:9] = logits[12:16, 12:16, 12:16] = logits[2:5, 14:17, 14:17] = 3.0
    touched = np.zeros(logits.shape, dtype=bool)
    largest = finished(logits, touched, (1, 1, 1), Finish(islands=False)) > 0
    assert largest.sum() == 7**3
    touched[13, 13, 13] = True
    small = finished(logits, touched, (1, 1, 1), Finish(islands=False))
    assert (small > 0).sum() == 4**3
    assert small[13, 13, 13] > 0
    assert small.dtype == np.float32
