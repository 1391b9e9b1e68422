"""Boxes and affines: pure functions, checked on unequal axes so that a swap shows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from KA2ERSegment.errors import GeometryError, KA2ERError
from KA2ERSegment.geometry import Box, apply_affine, check_affine, ras_axes

indices = st.tuples(*[st.integers(-5, 12)] * 3)
boxes = st.builds(Box, indices, indices)


def voxels(box):
    """The set of voxels of a box, by definition."""
    ranges = [range(a, b) for a, b in zip(box.start, box.stop, strict=True)]
    return {(i, j, k) for i in ranges[0] for j in ranges[1] for k in ranges[2]}


@given(boxes)
def test_a_box_has_as_many_voxels_as_its_size_and_contains_them(box):
    inside = voxels(box)
    assert box.size == len(inside)
    assert all(box.contains(ijk) for ijk in inside)
    assert not box.contains(box.stop)


@given(boxes, boxes)
def test_intersection_holds_exactly_the_common_voxels(a, b):
    assert voxels(a.intersect(b)) == voxels(a) & voxels(b)
    assert a.intersect(b).size == b.intersect(a).size


@given(boxes, boxes)
def test_union_is_the_smallest_box_around_both(a, b):
    both = voxels(a) | voxels(b)
    union = a.union(b)
    assert both <= voxels(union)
    if both:
        corners = np.array(sorted(both))
        assert union == Box(tuple(corners.min(0)), tuple(corners.max(0) + 1))


@given(boxes, indices)
def test_shifted_boxes_hold_shifted_voxels(box, by):
    assert voxels(box.shift(by)) == {tuple(int(x) + d for x, d in zip(v, by, strict=True)) for v in voxels(box)}


@given(boxes)
def test_dilating_and_shrinking_gives_the_box_back(box):
    assert box.dilate(2).dilate(-2) == box
    if box.size:
        assert box.dilate(1).shape_kji == tuple(n + 2 for n in box.shape_kji)


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)))
def test_the_box_around_a_mask_is_tight(mask):
    box = Box.around(mask)
    if not mask.any():
        assert box is None
        return
    hits = np.argwhere(mask)[:, ::-1]
    assert box == Box(tuple(hits.min(0)), tuple(hits.max(0) + 1))
    assert box.crop(mask).sum() == mask.sum()


@given(st.data())
def test_a_patch_pasted_where_it_was_cut_changes_nothing_and_elsewhere_only_its_box(data):
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    start = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3)))
    stop = tuple(data.draw(st.integers(a, n)) for a, n in zip(start, (6, 5, 4), strict=True))
    box = Box(start, stop)
    patch = box.crop(array)
    assert {tuple(v) for v in np.argwhere(np.isin(array, patch))[:, ::-1]} == voxels(box)

    other = array.copy()
    box.paste(patch, other)
    assert np.array_equal(other, array)

    box.paste(np.full(box.shape_kji, -1), other)
    assert {tuple(v) for v in np.argwhere(other == -1)[:, ::-1]} == voxels(box)


def test_a_box_that_leaves_the_array_is_refused():
    array = np.zeros((2, 3, 4))
    for box in (Box((0, 0, 0), (5, 3, 2)), Box((-1, 0, 0), (2, 2, 2)), Box((2, 0, 0), (1, 2, 2))):
        with pytest.raises(GeometryError, match="must lie inside an array of shape KJI"):
            box.crop(array)


def test_a_patch_of_another_shape_is_refused_and_nothing_is_written():
    array = np.zeros((2, 3, 4))
    with pytest.raises(GeometryError, match="does not fill"):
        Box((0, 0, 0), (2, 2, 2)).paste(np.ones((1, 2, 2)), array)
    assert not array.any()


def test_arrays_of_two_or_four_axes_are_refused():
    for shape in ((3, 4), (1, 2, 3, 4)):
        with pytest.raises(GeometryError, match="three axes"):
            Box((0, 0, 0), (1, 1, 1)).crop(np.zeros(shape))


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.eye(3), "4x4"),
        ([[1, 2], [3]], "4x4"),
        (np.diag([1, np.nan, 1, 1]), "finite"),
        (np.diag([1, np.inf, 1, 1]), "finite"),
        (np.diag([1, 0, 1, 1]), "spacing must be above zero"),
        ([[1, 1, 0, 0], [2, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "two of its axes are parallel"),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], "last row"),
    ],
)
def test_unusable_affines_are_refused(matrix, words):
    with pytest.raises(GeometryError, match=words) as error:
        check_affine(matrix)
    assert isinstance(error.value, KA2ERError)


def test_a_checked_affine_is_a_read_only_copy_with_a_clean_last_row():
    matrix = np.diag([-1.0, 2, 3, 1])  # left-handed is fine
    matrix[3, 0] = 1e-9
    checked = check_affine(matrix)
    matrix[0, 0] = 5
    assert checked[0, 0] == -1
    assert checked[3].tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        checked[0, 0] = 5


def test_points_go_through_an_affine_one_by_one():
    matrix = check_affine([[0, 2, 0, 10], [3, 0, 0, 20], [0, 0, -4, 30], [0, 0, 0, 1]])
    assert apply_affine(matrix, (1, 2, 3)).tolist() == [14, 23, 18]
    assert apply_affine(matrix, np.zeros((2, 5, 3))).shape == (2, 5, 3)


def test_axes_are_named_after_the_closest_direction():
    # I runs to inferior, J to right, K to posterior
    matrix = check_affine([[0, 2, 0, 0], [0, 0, -3, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    assert ras_axes(matrix) == ((1, 2, 0), (1, -1, -1))


def test_axes_at_45_degrees_are_still_a_permutation():
    turned = np.array([[1, -1, 0], [1, 1, 0], [0, 0, 1]]) / np.sqrt(2)
    matrix = np.eye(4)
    matrix[:3, :3] = turned * [1, 2, 3]
    axes, _ = ras_axes(check_affine(matrix))
    assert sorted(axes) == [0, 1, 2]


def test_a_box_within_another_indexes_what_the_other_cut_out():
    array = np.arange(6 * 7 * 8).reshape(6, 7, 8)
    outer, inner = Box((2, 1, 1), (8, 6, 5)), Box((3, 4, 2), (6, 6, 5))
    assert np.array_equal(inner.within(outer).crop(outer.crop(array)), inner.crop(array))
