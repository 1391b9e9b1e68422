"""Prompts: RAS to voxel and back on oblique, anisotropic, flipped grids; what each covers; JSON; every message."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import math
import pickle
import re
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import Box, apply_affine
from KA2ERSegment.prompts import (
    BoxPrompt,
    LassoPrompt,
    MaskPrompt,
    PointPrompt,
    Polarity,
    Prompt,
    ScribblePrompt,
    prompt_from_json,
)
from KA2ERSegment.volume import Volume

few = settings(max_examples=60, deadline=None)


def volume_of(shape_ijk, spacing=(1.0, 1.0, 1.0), turn=None, origin=(0.0, 0.0, 0.0), name="CTChest") -> Volume:
    """A volume with one value per voxel; `turn` is a 3x3 orthogonal matrix, also a reflection."""
    ijk_to_ras = np.eye(4)
    ijk_to_ras[:3, :3] = (np.eye(3) if turn is None else turn) * np.array(spacing)
    ijk_to_ras[:3, 3] = origin
    count = math.prod(shape_ijk)
    return Volume(np.arange(count, dtype=np.int32).reshape(shape_ijk[::-1]), ijk_to_ras, name)


def rotation(seed: int) -> np.ndarray:
    """A random orthogonal matrix, left-handed in half of the cases."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


def slanted(degrees: float, axis: int) -> np.ndarray:
    """Rotation about one RAS axis."""
    a, b = (x for x in range(3) if x != axis)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


@st.composite
def volumes(draw, smallest=2, largest=14):
    """Non-cubic and anisotropic; oblique or with permuted and flipped axes; right- and left-handed."""
    shape = draw(st.permutations([draw(st.integers(smallest, largest)) for _ in range(3)]))
    spacing = [draw(st.sampled_from([0.3, 0.5, 0.8, 1.0, 2.0, 5.0])) for _ in range(3)]
    if draw(st.booleans()):
        turn = rotation(draw(st.integers(0, 10_000)))
    else:
        turn = np.eye(3)[:, draw(st.permutations(range(3)))] * [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    origin = [draw(st.integers(-200, 200)) for _ in range(3)]
    return volume_of(tuple(shape), spacing, turn, origin)


def in_voxels(draw, volume, margin=0.0, whole=False):
    """A voxel index within or `margin` voxels around the volume."""
    if whole:
        return tuple(draw(st.integers(0, n - 1)) for n in volume.shape_ijk)
    return tuple(draw(st.floats(-0.499 - margin, n - 0.501 + margin)) for n in volume.shape_ijk)


@st.composite
def boxes_in_voxels(draw, volume, margin=0):
    ends = [
        sorted(
            draw(st.lists(st.integers(-margin, n + margin), min_size=2, max_size=2, unique=True)),
        )
        for n in volume.shape_ijk
    ]
    start, stop = zip(*ends, strict=True)
    assume(Box(start, stop).intersect(volume.box).size > 0)
    return start, stop


@st.composite
def prompts(draw, volume) -> Prompt:
    """Any prompt that lies at least partly inside; whole voxel indices are frequent, since they make ties."""
    whole = draw(st.booleans())
    polarity = draw(st.sampled_from(Polarity))
    kind = draw(st.sampled_from(["point", "box", "oblique box", "scribble", "lasso", "mask"]))
    if kind == "point":
        ijk = np.array(in_voxels(draw, volume, whole=True)) + (0 if whole else draw(st.sampled_from([0.0, 0.3, 0.5])))
        assume((ijk < np.array(volume.shape_ijk) - 0.6).all())  # on the outer face a point may fall outside
        return PointPrompt.from_ijk(ijk, volume, polarity)
    if kind == "box":
        return BoxPrompt.from_ijk(*draw(boxes_in_voxels(volume, 3)), volume, polarity)
    if kind == "oblique box":
        edges = rotation(draw(st.integers(0, 10_000))) * [[1.0], [4.0], [9.0]]
        inside = apply_affine(volume.ijk_to_ras, in_voxels(draw, volume, whole=True))
        return BoxPrompt(inside - edges.sum(axis=0) / 2, edges, polarity)
    if kind == "mask":
        rng = np.random.default_rng(draw(st.integers(0, 10_000)))
        mask = rng.random(volume.shape_kji) < 0.1
        mask.flat[rng.integers(mask.size)] = True
        return MaskPrompt.from_array(mask, volume, polarity)
    inside = in_voxels(draw, volume, whole=whole)
    others = [in_voxels(draw, volume, margin=4, whole=whole) for _ in range(draw(st.integers(2, 5)))]
    if kind == "scribble":
        radius = draw(st.sampled_from([0.05, 1.0, 2.5]))
        return ScribblePrompt.from_ijk([inside, *others], volume, polarity, radius=radius)
    corners = apply_affine(volume.ijk_to_ras, [inside, others[0], others[1]])
    assume(np.linalg.norm(np.cross(corners[1] - corners[0], corners[2] - corners[0])) > 1.0)
    fourth = corners[0] + draw(st.sampled_from([0.2, 0.6, 1.0, 3.0])) * (
        (corners[1] - corners[0]) + (corners[2] - corners[0])
    )
    thickness = draw(st.sampled_from([None, 0.1, 2.0, 7.5]))
    return LassoPrompt([corners[0], corners[1], fourth, corners[2]], thickness, polarity)


def covered(prompt: Prompt, volume: Volume) -> np.ndarray:
    """The region on the whole grid, (K, J, I)."""
    box, crop = prompt.region(volume)
    assert crop.dtype == np.bool_
    assert crop.shape == box.shape_kji
    assert Box.around(crop) == Box.of_shape(crop.shape), "a region is cropped to its voxels"
    mask = np.zeros(volume.shape_kji, dtype=bool)
    box.paste(crop, mask)
    return mask


def centres(volume: Volume) -> np.ndarray:
    """RAS of every voxel centre, (K, J, I, 3), the slow and simple way."""
    k, j, i = np.indices(volume.shape_kji)
    return apply_affine(volume.ijk_to_ras, np.stack([i, j, k], axis=-1))


# --- all prompts ------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_a_prompt_covers_the_same_voxels_on_the_canonical_axes(data):
    volume = data.draw(volumes())
    prompt = data.draw(prompts(volume))
    try:
        mask = covered(prompt, volume)
    except PromptError:  # a lasso or an oblique box between the voxel centres: refused on both
        with pytest.raises(PromptError):
            prompt.region(volume.canonical())
        return
    np.testing.assert_array_equal(covered(prompt, volume.canonical()), volume.to_canonical(mask))


@given(st.data())
@few
def test_a_prompt_survives_json_unchanged(data):
    volume = data.draw(volumes())
    prompt = data.draw(prompts(volume))
    text = json.dumps(prompt.to_json(), allow_nan=False)
    again = prompt_from_json(json.loads(text))
    assert again == prompt
    assert hash(again) == hash(prompt)
    assert again.polarity is prompt.polarity
    assert json.dumps(again.to_json()) == text


def one_of_each() -> list[Prompt]:
    volume = volume_of((30, 20, 10), (2, 2, 3))
    mask = np.zeros(volume.shape_kji, dtype=bool)
    mask[2:4, 5, 6:9] = True
    return [
        PointPrompt.from_ijk((3, 4, 5), volume),
        BoxPrompt.from_ijk((3, 4, 5), (6, 7, 8), volume),
        ScribblePrompt.from_ijk([(3, 4, 5), (9, 9, 5)], volume),
        LassoPrompt.from_ijk([(3, 4, 5), (9, 4, 5), (6, 9, 5)], volume),
        MaskPrompt.from_array(mask, volume),
    ]


@pytest.mark.parametrize("prompt", one_of_each(), ids=lambda p: type(p).__name__)
def test_prompts_are_frozen_values(prompt):
    assert copy.deepcopy(prompt) == prompt
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    assert len({prompt, copy.deepcopy(prompt)}) == 1
    assert prompt.polarity is Polarity.POSITIVE
    assert sum(prompt == other for other in one_of_each()) == 1
    with pytest.raises(AttributeError):
        prompt.polarity = Polarity.NEGATIVE


@pytest.mark.parametrize("prompt", one_of_each(), ids=lambda p: type(p).__name__)
def test_a_prompt_outside_another_volume_is_refused(prompt):
    elsewhere = volume_of((8, 7, 6), (1, 1, 2), slanted(20, 2), (500, 0, 0), name="MR")
    with pytest.raises(PromptError, match=re.escape("volume 'MR' of shape IJK (8, 7, 6)")):
        prompt.region(elsewhere)


# --- points -----------------------------------------------------------------------------------------------------------


@given(st.data())
@few
def test_a_point_comes_back_to_its_voxel(data):
    volume = data.draw(volumes())
    ijk = in_voxels(data.draw, volume, whole=True)
    prompt = PointPrompt.from_ijk(ijk, volume)
    assert prompt.ijk(volume) == ijk
    np.testing.assert_allclose(apply_affine(volume.ras_to_ijk, prompt.ras), ijk, atol=1e-6)
    box, mask = prompt.region(volume)
    assert (box.start, box.size, mask.tolist()) == (ijk, 1, [[[True]]])
    i, j, k = prompt.ijk(volume.canonical())
    assert volume.canonical().array_kji[k, j, i] == volume.array_kji[ijk[::-1]]


@given(st.data())
@few
def test_the_voxel_of_a_point_is_the_nearest(data):
    volume = data.draw(volumes())
    ijk = np.array(in_voxels(data.draw, volume, whole=True))
    offset = np.array([data.draw(st.floats(-0.49, 0.49)) for _ in range(3)])
    assert PointPrompt.from_ijk(ijk + offset, volume).ijk(volume) == tuple(ijk)


def test_a_point_outside_says_where_it_is():
    volume = volume_of((30, 20, 10), (2, 2, 3))
    message = (
        "PointPrompt at RAS (100.0, 4.0, 6.0) mm is voxel IJK (50, 2, 2), outside volume 'CTChest' of shape IJK "
        "(30, 20, 10). Place the click inside."
    )
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        PointPrompt((100, 4, 6)).ijk(volume)
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        PointPrompt.from_ijk((50, 2, 2), volume)
    with pytest.raises(PromptError, match=re.escape("voxel IJK (-1, 2, 2)")):
        PointPrompt((-1.01, 4, 6)).ijk(volume)
    assert PointPrompt((-0.99, 4, 6)).ijk(volume) == (0, 2, 2)


@pytest.mark.parametrize(
    ("ras", "words"),
    [
        ((math.nan, 0, 0), "PointPrompt.ras must be finite"),
        ((0, math.inf, 0), "PointPrompt.ras must be finite"),
        ((0, 0, 1e300), "PointPrompt.ras must be finite and at most 1e+09"),
        ((0, 0), r"PointPrompt.ras must be 3 numbers, got (0, 0)"),
        (("1", "2", "3"), "PointPrompt.ras must be 3 numbers"),
        ((True, False, True), "PointPrompt.ras must be 3 numbers"),
        ((1, 2, None), "PointPrompt.ras must be 3 numbers"),
        (((1, 2), (3,), 4), "PointPrompt.ras must be 3 numbers"),
        ((10**400, 0, 0), "PointPrompt.ras must be 3 numbers"),
        (7, "PointPrompt.ras must be 3 numbers, got 7"),
    ],
)
def test_coordinates_must_be_three_finite_numbers(ras, words):
    with pytest.raises(PromptError, match=re.escape(words)):
        PointPrompt(ras)


def test_a_voxel_index_that_is_not_a_number_is_refused():
    volume = volume_of((5, 6, 7))
    with pytest.raises(PromptError, match="PointPrompt voxel IJK must be finite"):
        PointPrompt.from_ijk((math.nan, 1, 1), volume)
    with pytest.raises(PromptError, match=re.escape("ScribblePrompt points IJK (at least 1) must be n x 3 numbers")):
        ScribblePrompt.from_ijk([(1, 2)], volume)


def test_numpy_coordinates_become_plain_floats():
    prompt = PointPrompt(np.array([1, 2, 3], dtype=np.float32))
    assert prompt == PointPrompt((1, 2, 3))
    assert [type(x) for x in prompt.ras] == [float] * 3
    scribble = ScribblePrompt(np.ones((2, 3)), radius=np.float32(2))
    assert json.loads(json.dumps(scribble.to_json()))["radius"] == 2


@pytest.mark.parametrize("prompt", one_of_each(), ids=lambda p: type(p).__name__)
def test_polarity_must_be_a_polarity(prompt):
    fields = {name: getattr(prompt, name) for name in prompt.__slots__} | {"polarity": "positive"}
    with pytest.raises(PromptError, match=f"{type(prompt).__name__}.polarity must be Polarity.POSITIVE or"):
        type(prompt)(**fields)


# --- boxes ------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_box_comes_back_to_its_voxels(data):
    volume = data.draw(volumes())
    start, stop = data.draw(boxes_in_voxels(volume, margin=4))
    prompt = BoxPrompt.from_ijk(start, stop, volume)
    expected = Box(start, stop).intersect(volume.box)
    assert prompt.box(volume) == expected
    assert volume.from_canonical_box(prompt.box(volume.canonical())) == expected
    box, mask = prompt.region(volume)
    assert box == expected
    assert mask.all()


@given(st.data())
@few
def test_a_box_on_one_slice_knows_its_slice(data):
    volume = data.draw(volumes(smallest=4))
    axis = data.draw(st.integers(0, 2))
    start = [data.draw(st.integers(0, n - 2)) for n in volume.shape_ijk]
    stop = [a + (1 if x == axis else 2) for x, a in enumerate(start)]
    prompt = BoxPrompt.from_ijk(start, stop, volume)
    assert prompt.planar_axis(volume) == axis
    canonical = volume.canonical()
    found = prompt.planar_axis(canonical)
    assert canonical.spacing[found] == pytest.approx(volume.spacing[axis])
    assert canonical.shape_ijk[found] == volume.shape_ijk[axis]
    assert BoxPrompt.from_ijk(start, [a + 2 for a in start], volume).planar_axis(volume) is None


def test_boxes_of_one_voxel_and_one_row_are_not_on_a_slice():
    volume = volume_of((9, 8, 7), (1, 2, 3), rotation(3))
    voxel = BoxPrompt.from_ijk((4, 5, 6), (5, 6, 7), volume)
    assert voxel.box(volume) == Box((4, 5, 6), (5, 6, 7))
    assert voxel.planar_axis(volume) is None
    assert BoxPrompt.from_ijk((4, 5, 2), (5, 6, 7), volume).planar_axis(volume) is None


def test_a_box_on_one_slice_stays_on_it_where_it_leaves_the_volume():
    volume = volume_of((9, 8, 7), (1, 2, 3), rotation(4))
    prompt = BoxPrompt.from_ijk((-5, 2, 3), (1, 6, 4), volume)
    assert prompt.box(volume) == Box((0, 2, 3), (1, 6, 4))
    assert prompt.planar_axis(volume) == 2


@given(st.data())
@few
def test_an_oblique_box_covers_the_centres_inside_it(data):
    volume = data.draw(volumes(smallest=8))
    turn = rotation(data.draw(st.integers(0, 10_000)))
    size = 3 * max(volume.spacing) * np.array([1.0, 1.5, 2.0])
    corner = centres(volume)[volume.shape_kji[0] // 2, 3, 3] - (turn * size[:, None]).sum(axis=0) / 2
    prompt = BoxPrompt(corner, turn * size[:, None])
    along = (centres(volume) - corner) @ turn.T / size
    mask = covered(prompt, volume)
    sure = (np.abs(along - 0.5) < 0.5 - 1e-4).all(axis=-1)
    never = (np.abs(along - 0.5) > 0.5 + 1e-4).any(axis=-1)
    assert mask[sure].all()
    assert not mask[never].any()
    box = prompt.box(volume)
    assert box.intersect(Box.around(mask)) == Box.around(mask)


def test_a_box_thinner_than_a_voxel_is_one_voxel_thick():
    volume = volume_of((20, 20, 20), (1, 1, 4), origin=(0, 0, 0))
    prompt = BoxPrompt((2.5, 3.5, 9.0), ((5, 0, 0), (0, 4, 0), (0, 0, 0.2)))  # between the slices at 8 and 12 mm
    assert prompt.box(volume) == Box((3, 4, 2), (8, 8, 3))
    assert prompt.planar_axis(volume) == 2
    slanting = BoxPrompt((2.5, 3.5, 20), ((12, 0, 12), (0, 12, 0), (-0.01, 0, 0.01)))
    assert covered(slanting, volume).any(axis=0)[5:14, 4:14].all(), "no holes seen from above"


def test_a_box_between_voxel_centres_is_half_open_in_patient_space():
    volume = volume_of((10, 10, 10), turn=np.diag([-1.0, 1.0, 1.0]), origin=(9, 0, 0))
    prompt = BoxPrompt((2, 2, 2), ((3, 0, 0), (0, 3, 0), (0, 0, 3)))  # faces exactly on voxel centres
    assert prompt.box(volume.canonical()) == Box((2, 2, 2), (5, 5, 5))
    assert prompt.box(volume) == Box((5, 2, 2), (8, 5, 5))


@pytest.mark.parametrize(
    ("start", "stop"),
    [((5, 5, 5), (5, 9, 9)), ((5, 5, 5), (4, 9, 9)), ((5, 9, 5), (9, 5, 9))],
    ids=["empty", "inverted", "inverted J"],
)
def test_an_empty_or_inverted_box_is_refused(start, stop):
    words = f"must have start below stop on every axis (IJK, half-open), got start {start} and stop {stop}."
    with pytest.raises(PromptError, match=re.escape(words)):
        BoxPrompt.from_ijk(start, stop, volume_of((30, 20, 10)))


@pytest.mark.parametrize("start", [(1.5, 2, 3), (1, 2), "123", None, (True, 0, 0), (math.nan, 0, 0)])
def test_a_box_needs_whole_numbers(start):
    with pytest.raises(PromptError, match="BoxPrompt start must be three whole numbers, got"):
        BoxPrompt.from_ijk(start, (9, 9, 9), volume_of((30, 20, 10)))


def test_a_box_wholly_outside_is_refused():
    words = (
        "BoxPrompt covers voxels IJK (30, 2, 2) to (40, 4, 4) (half-open), outside volume 'CTChest' of shape IJK "
        "(30, 20, 10). Draw the box inside."
    )
    with pytest.raises(PromptError, match=re.escape(words)):
        BoxPrompt.from_ijk((30, 2, 2), (40, 4, 4), volume_of((30, 20, 10), (1, 2, 3), rotation(1)))
    with pytest.raises(PromptError, match=r"must be at most 1e\+09"):
        BoxPrompt.from_ijk((0, 0, 0), (10**12, 1, 1), volume_of((30, 20, 10)))


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        (((1, 0, 0), (0, 1, 0), (0, 0, 0)), "BoxPrompt.edges must span a box"),
        (((1, 0, 0), (0, 1, 0), (1, 1, 0)), "which is flat or empty"),
        (((1, 0, 0), (0, 1, 0)), "BoxPrompt.edges must be 3 x 3 numbers"),
        (((1, 0, 0), (0, 1, 0), (0, 0, math.nan)), "BoxPrompt.edges must be finite"),
    ],
)
def test_edges_must_span_a_box(edges, words):
    with pytest.raises(PromptError, match=re.escape(words)):
        BoxPrompt((0, 0, 0), edges)


# --- scribbles --------------------------------------------------------------------------------------------------------


@given(st.data())
@few
def test_a_scribble_is_the_voxels_near_and_on_its_line(data):
    volume = data.draw(volumes())
    points = [in_voxels(data.draw, volume) for _ in range(data.draw(st.integers(1, 4)))]
    radius = data.draw(st.sampled_from([0.01, 0.7, 3.0]))
    prompt = ScribblePrompt.from_ijk(points, volume, radius=radius)
    mask = covered(prompt, volume)

    ends = list(itertools.pairwise(prompt.points)) or [(prompt.points[0], prompt.points[0])]
    distance = np.full(volume.shape_kji, np.inf)
    passed = np.zeros(volume.shape_kji, dtype=bool)
    for a, b in ends:
        a, b = np.array(a), np.array(b)
        t = np.clip((centres(volume) - a) @ (b - a) / max((b - a) @ (b - a), 1e-12), 0, 1)
        distance = np.minimum(distance, np.linalg.norm(centres(volume) - a - t[..., None] * (b - a), axis=-1))
        steps = np.linspace(0, 1, 400)[:, None]
        index = apply_affine(volume.ras_to_ijk, a + steps * (b - a))
        clear = (np.abs(index - np.floor(index) - 0.5) > 1e-3).all(axis=1)  # not on a face between two voxels
        i, j, k = np.rint(index[clear]).astype(int).clip(0, np.array(volume.shape_ijk) - 1).T
        passed[k, j, i] = True
    assert mask[distance < radius - 1e-3].all()
    assert mask[passed].all()
    half_voxel = 0.5 * np.linalg.norm(volume.spacing) + 1e-3  # a voxel that is passed is no further than its corner
    assert not mask[distance > max(radius + 1e-3, half_voxel)].any()
    assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1, "a stroke has no gaps"


def test_a_thin_scribble_passes_exactly_the_voxels_on_its_way():
    volume = volume_of((12, 8, 6), (0.5, 2.0, 3.0), rotation(8), (10, -20, 30))
    mask = covered(ScribblePrompt.from_ijk([(1, 2, 3), (10, 2, 3)], volume, radius=0.01), volume)
    expected = np.zeros_like(mask)
    expected[3, 2, 1:11] = True
    np.testing.assert_array_equal(mask, expected)
    diagonal = covered(ScribblePrompt.from_ijk([(0, 0, 0), (5, 5, 5)], volume, radius=0.01), volume)
    assert sorted(map(tuple, np.argwhere(diagonal))) == [(n, n, n) for n in range(6)]


def test_a_scribble_of_one_point_is_a_ball():
    volume = volume_of((31, 31, 31), (0.5, 0.5, 1.0), rotation(2))
    mask = covered(ScribblePrompt.from_ijk([(15, 15, 15)], volume, radius=5.0), volume)
    k, j, i = np.indices(mask.shape) - 15
    np.testing.assert_array_equal(mask, i**2 * 0.25 + j**2 * 0.25 + k**2 <= 25)


def test_a_scribble_is_clipped_to_the_volume():
    volume = volume_of((12, 8, 6), (1, 2, 3), rotation(5))
    prompt = ScribblePrompt.from_ijk([(-1e6, 3, 2), (1e6, 3, 2)], volume, radius=0.5)
    mask = covered(prompt, volume)
    expected = np.zeros_like(mask)
    expected[2, 3] = True
    np.testing.assert_array_equal(mask, expected)
    everything = ScribblePrompt.from_ijk([(3, 3, 3), (5, 5, 5)], volume, radius=1e6)
    assert covered(everything, volume).all()


def test_a_scribble_may_cross_the_volume_without_a_point_inside():
    volume = volume_of((9, 9, 9))
    mask = covered(ScribblePrompt([(-20, 4, 4), (20, 4, 4)], 0.2), volume)
    assert mask[4, 4].all()
    assert mask.sum() == 9
    with pytest.raises(PromptError, match="ScribblePrompt must cover at least one voxel centre"):
        ScribblePrompt([(-20, 4, 4), (4, 60, 4)], 0.2).region(volume)


def test_a_scribble_outside_is_refused():
    volume = volume_of((30, 20, 10))
    words = "ScribblePrompt reaches voxels IJK (39, 1, 1) to (46, 4, 4) (half-open), outside volume 'CTChest'"
    with pytest.raises(PromptError, match=re.escape(words)):
        ScribblePrompt.from_ijk([(40, 2, 2), (44, 2, 2)], volume)


def test_points_that_nearly_coincide_are_one_place():
    volume = volume_of((9, 9, 9))
    assert covered(ScribblePrompt([(3, 3, 3), (3, 3, 3), (3 + 4e-16, 3, 3), (1e-308, 3, 3)], 0.1), volume).sum() == 4
    assert covered(ScribblePrompt([(0, 0, 0), (1e-308, 0, 5e-324)], 0.1), volume).sum() == 1
    corners = [(0, 0, 3), (6, 0, 3), (6, 1e-320, 3), (6, 6, 3), (1e-308, 6, 3), (0, 6, 3)]
    assert covered(LassoPrompt(corners), volume).sum() == 49
    with pytest.raises(PromptError, match="flat or empty"):
        BoxPrompt((0, 0, 0), ((1e-320, 0, 0), (0, 1, 0), (0, 0, 1)))


@pytest.mark.parametrize(
    ("points", "radius", "words"),
    [
        ([], 1.0, "ScribblePrompt.points (at least 1) must be n x 3 numbers, got []"),
        (np.empty((0, 3)), 1.0, "ScribblePrompt.points must be at least 1"),
        ([(0, 0)], 1.0, "ScribblePrompt.points (at least 1) must be n x 3 numbers"),
        ([(0, 0, 0), (0, 0)], 1.0, "ScribblePrompt.points (at least 1) must be n x 3 numbers"),
        ([(0, 0, math.nan)], 1.0, "ScribblePrompt.points (at least 1) must be finite"),
        ([(0, 0, 0)], 0.0, "ScribblePrompt.radius must be above zero (mm), got 0.0"),
        ([(0, 0, 0)], -1.0, "ScribblePrompt.radius must be above zero (mm), got -1.0"),
        ([(0, 0, 0)], math.nan, "ScribblePrompt.radius must be finite"),
        ([(0, 0, 0)], None, "ScribblePrompt.radius must be a number, got None"),
    ],
)
def test_a_scribble_needs_points_and_a_radius(points, radius, words):
    with pytest.raises(PromptError, match=re.escape(words)):
        ScribblePrompt(points, radius)


# --- lassos -----------------------------------------------------------------------------------------------------------


def rectangle(centre, u, v, length, width):
    """Corners of a rectangle around `centre` on the plane of two unit vectors."""
    return [centre + a * length / 2 * u + b * width / 2 * v for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_lasso_on_an_oblique_plane_covers_what_geometry_says(data):
    volume = data.draw(volumes(smallest=6, largest=20))
    u, v, normal = rotation(data.draw(st.integers(0, 10_000)))
    centre = apply_affine(volume.ijk_to_ras, (np.array(volume.shape_ijk) - 1) / 2 + 0.123)
    length, width = 4.1 * max(volume.spacing), 3.3 * max(volume.spacing)
    thickness = data.draw(st.sampled_from([None, 0.05, 1.7, 6.0]))
    prompt = LassoPrompt(rectangle(centre, u, v, length, width), thickness)

    voxel = np.abs(normal @ volume.ijk_to_ras[:3, :3]).max()
    half = max(thickness or 0.0, voxel) / 2
    off = np.abs((centres(volume) - centre) @ np.stack([u, v, normal]).T) - [length / 2, width / 2, half]
    mask = covered(prompt, volume)
    assert mask[(off < -1e-4).all(axis=-1)].all()
    assert not mask[(off > 1e-4).any(axis=-1)].any()


def test_a_lasso_of_default_thickness_has_no_holes_and_no_second_layer():
    volume = volume_of((40, 30, 25), (0.7, 0.9, 1.5), rotation(11), (5, 6, 7))
    u, v, normal = slanted(25, 0) @ slanted(10, 1)
    centre = apply_affine(volume.ijk_to_ras, (20, 15, 12))
    mask = covered(LassoPrompt(rectangle(centre, u, v, 12.0, 9.0)), volume)
    steep = int(np.abs(normal @ volume.ijk_to_ras[:3, :3]).argmax())
    assert mask.sum(axis=2 - steep).max() == 1
    voxel = np.abs(normal @ volume.ijk_to_ras[:3, :3]).max()
    assert mask.sum() * 0.7 * 0.9 * 1.5 == pytest.approx(12 * 9 * voxel, rel=0.06)
    assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1


@given(st.data())
@few
def test_a_lasso_through_voxel_centres_includes_them_and_stays_on_their_slice(data):
    volume = data.draw(volumes(smallest=6))
    axis = data.draw(st.integers(0, 2))
    a, b = (x for x in range(3) if x != axis)
    at = data.draw(st.integers(0, volume.shape_ijk[axis] - 1))
    points = np.full((4, 3), at)
    points[:, [a, b]] = [(1, 1), (4, 1), (4, 3), (1, 3)]
    box, crop = LassoPrompt.from_ijk(points, volume).region(volume)
    expected_start, expected_stop = [0, 0, 0], [0, 0, 0]
    for x, (low, high) in ((axis, (at, at + 1)), (a, (1, 5)), (b, (1, 4))):
        expected_start[x], expected_stop[x] = low, high
    assert box == Box(tuple(expected_start), tuple(expected_stop))
    assert crop.all()


@pytest.mark.parametrize(("slices", "covers"), [(1, 1), (2, 2), (3, 3), (0.2, 1)])
def test_the_thickness_of_a_lasso_counts_slices(slices, covers):
    volume = volume_of((12, 11, 20), (1, 1, 2.5), rotation(6))
    points = [(2, 2, 8), (8, 2, 8), (8, 8, 8)]
    box, _ = LassoPrompt.from_ijk(points, volume, thickness=slices * 2.5).region(volume)
    assert box.shape_kji[0] == covers
    assert box.start[2] <= 8 < box.stop[2]


def test_a_concave_and_a_crossing_lasso_follow_the_even_odd_rule():
    volume = volume_of((21, 21, 3), (1, 1, 2), rotation(9))
    concave = [(0.5, 0.5), (18.5, 0.5), (18.5, 18.5), (9.5, 6.5), (0.5, 18.5)]
    mask = covered(LassoPrompt.from_ijk([(*p, 1) for p in concave], volume), volume)
    assert mask[1, 3, 9]
    assert not mask[1, 12, 9]
    assert mask[1, 12, 2]
    assert mask[1, 12, 17]
    pentagram = [
        (10 + 9 * math.cos(2 * math.pi * n * 2 / 5), 10 + 9 * math.sin(2 * math.pi * n * 2 / 5), 1) for n in range(5)
    ]
    star = covered(LassoPrompt.from_ijk(pentagram, volume), volume)
    assert not star[1, 10, 10]
    assert star[1, 10, 17]


def test_a_round_lasso_has_the_area_of_its_disc():
    volume = volume_of((60, 50, 4), (0.5, 0.5, 3.0), rotation(7))
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    centre = apply_affine(volume.ijk_to_ras, (30.2, 25.1, 2))
    direction = volume.ijk_to_ras[:3, :3] / volume.spacing
    ring = centre + 10 * (np.cos(angle)[:, None] * direction[:, 0] + np.sin(angle)[:, None] * direction[:, 1])
    mask = covered(LassoPrompt(ring.astype(np.float32)), volume)  # as VTK hands over its points
    assert mask.sum() * 0.25 == pytest.approx(math.pi * 100, rel=0.02)
    assert mask.any(axis=(1, 2)).tolist() == [False, False, True, False]


def test_a_lasso_is_clipped_to_the_volume():
    volume = volume_of((12, 11, 6), (1, 2, 3), rotation(12))
    mask = covered(LassoPrompt.from_ijk([(-900, -900, 2), (900, -900, 2), (0, 900, 2)], volume), volume)
    assert mask[2].all()
    assert mask.sum() == 12 * 11


def test_a_lasso_between_the_voxel_centres_is_refused():
    volume = volume_of((12, 11, 6))
    with pytest.raises(PromptError, match=re.escape("LassoPrompt must cover at least one voxel centre of volume")):
        LassoPrompt([(3.2, 3.2, 3), (3.7, 3.2, 3), (3.5, 3.7, 3)]).region(volume)


def test_a_lasso_outside_is_refused():
    words = "LassoPrompt reaches voxels IJK (40, 2, 2) to (45, 5, 3) (half-open), outside volume 'CTChest'"
    with pytest.raises(PromptError, match=re.escape(words)):
        LassoPrompt.from_ijk([(40, 2, 2), (44, 2, 2), (44, 4, 2)], volume_of((30, 20, 10)))


@pytest.mark.parametrize(
    ("points", "thickness", "words"),
    [
        ([(0, 0, 0), (1, 0, 0)], None, "LassoPrompt.points must be at least 3, got [(0, 0, 0), (1, 0, 0)]"),
        ([(0, 0, 0), (1, 1, 1), (5, 5, 5)], None, "LassoPrompt must enclose an area, got 3 points on one line"),
        ([(7, 8, 9)] * 5, None, "LassoPrompt must enclose an area, got 5 points"),
        (
            [(0, 0, 0), (9, 0, 0), (9, 9, 2), (0, 9, 0)],
            None,
            "LassoPrompt must lie on one plane, got points up to",
        ),
        ([(0, 0, 0), (9, 0, 0), (9, 9, math.inf)], None, "LassoPrompt.points (at least 3) must be finite"),
        ([(0, 0, 0), (9, 0, 0), (9, 9, 0)], 0, "LassoPrompt.thickness must be above zero (mm), got 0"),
        ([(0, 0, 0), (9, 0, 0), (9, 9, 0)], "thick", "LassoPrompt.thickness must be a number, got 'thick'"),
    ],
)
def test_a_lasso_needs_a_polygon_on_a_plane(points, thickness, words):
    with pytest.raises(PromptError, match=re.escape(words)):
        LassoPrompt(points, thickness)


def test_the_cost_of_a_lasso_and_a_scribble_is_that_of_what_is_drawn():
    class Huge:
        """The geometry of a volume that fits no memory: only a crop of it can be computed."""

        shape_kji = (30_000, 40_000, 50_000)
        ijk_to_ras = np.diag([0.1, 0.1, 0.1, 1.0])
        ras_to_ijk = np.diag([10.0, 10.0, 10.0, 1.0])
        name = "huge"

    ring = [(2000 + 9 * math.cos(a), 1500 + 9 * math.sin(a), 1500) for a in np.linspace(0, 6.2, 60)]
    started = time.process_time()
    lasso, _ = LassoPrompt(ring).region(Huge())
    scribble, _ = ScribblePrompt(ring, 0.3).region(Huge())
    assert lasso.shape_kji[0] == 1
    assert scribble.shape_kji[0] == 7
    assert all(176 < size <= 181 for size in lasso.shape_kji[1:])  # 18 mm of 0.1 mm, less what the corners cut off
    assert all(182 < size <= 187 for size in scribble.shape_kji[1:])
    assert time.process_time() - started < 2.0


# --- masks ------------------------------------------------------------------------------------------------------------


@given(st.data())
@few
def test_a_mask_comes_back_where_it_was(data):
    volume = data.draw(volumes())
    mask = np.random.default_rng(data.draw(st.integers(0, 10_000))).random(volume.shape_kji) < 0.02
    mask[tuple(n // 2 for n in mask.shape)] = True
    prompt = MaskPrompt.from_array(mask, volume)
    np.testing.assert_array_equal(covered(prompt, volume), mask)
    again = MaskPrompt.from_array(volume.to_canonical(mask), volume.canonical())
    np.testing.assert_array_equal(covered(again, volume), mask)


def test_a_mask_keeps_a_copy_of_its_crop_only():
    volume = volume_of((30, 20, 10), (1, 2, 3), rotation(1))
    mask = np.zeros(volume.shape_kji, dtype=np.uint8)
    mask[2:4, 5, 6:9] = 1
    prompt = MaskPrompt.from_array(mask, volume)
    assert prompt.box == Box((6, 5, 2), (9, 6, 4))
    assert prompt.array_kji.shape == (2, 1, 3)
    mask[:] = 0
    assert prompt.array_kji.all()
    with pytest.raises(ValueError, match="read-only"):
        prompt.array_kji[:] = False
    _, crop = prompt.region(volume)
    crop[:] = False  # what a caller does to a region does not reach the prompt
    assert prompt.array_kji.all()


def test_masks_are_equal_by_content():
    volume = volume_of((6, 5, 4), (1, 2, 3), rotation(1))
    mask = np.zeros(volume.shape_kji, dtype=bool)
    mask[1, 2, 3] = mask[2, 3, 4] = True
    prompt = MaskPrompt.from_array(mask, volume)
    whole = MaskPrompt(mask, volume.box, volume.ijk_to_ras, volume.shape_kji)  # the same, not cropped by hand
    assert prompt == whole
    assert hash(prompt) == hash(whole)
    other = mask.copy()
    other[1, 3, 3] = True
    moved = volume_of((6, 5, 4), (1, 2, 3), rotation(1), (0, 0, 1))
    assert prompt != MaskPrompt.from_array(other, volume)
    assert prompt != MaskPrompt.from_array(mask, moved)
    assert prompt != MaskPrompt.from_array(mask, volume, Polarity.NEGATIVE)
    assert prompt != "mask"


@pytest.mark.parametrize(
    "change",
    ["moved", "turned", "scaled", "other shape", "other direction"],
)
def test_a_mask_of_another_geometry_is_refused(change):
    volume = volume_of((6, 5, 4), (1, 2, 3))
    prompt = MaskPrompt.from_array(volume.array_kji % 3 == 0, volume)
    other = {
        "moved": volume_of((6, 5, 4), (1, 2, 3), origin=(0.5, 0, 0)),
        "turned": volume_of((6, 5, 4), (1, 2, 3), slanted(2, 1)),
        "scaled": volume_of((6, 5, 4), (1, 2, 3.1)),
        "other shape": volume_of((6, 5, 5), (1, 2, 3)),
        "other direction": volume_of((6, 5, 4), (1, 2, 3), np.diag([-1.0, 1, 1])),
    }[change]
    words = "MaskPrompt on a grid of shape IJK (6, 5, 4) with origin RAS (0.0, 0.0, 0.0) mm must lie on the voxels of"
    with pytest.raises(PromptError, match=re.escape(words)):
        prompt.region(other)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            np.ones((6, 5, 4), dtype=bool),
            "must lie on the grid of volume 'CTChest' of shape IJK (6, 5, 4), got shape IJK (4, 5, 6). Resample",
        ),
        (np.full((4, 5, 6), 3), "MaskPrompt must be made of bool (or 0 and 1), got int64"),
        (np.ones((4, 5, 6)), "MaskPrompt must be made of bool (or 0 and 1), got float64"),
    ],
)
def test_a_mask_must_fit_its_volume(mask, words):
    with pytest.raises(PromptError, match=re.escape(words)):
        MaskPrompt.from_array(mask, volume_of((6, 5, 4)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"box": Box((0, 0, 0), (9, 1, 1))}, "MaskPrompt.box must be a box inside its grid of shape IJK (6, 5, 4)"),
        ({"box": Box((0, 0, 0), (0, 1, 1))}, "MaskPrompt.box must be a box inside its grid"),
        ({"array_kji": np.ones((1, 1, 2), dtype=bool)}, "MaskPrompt.array_kji must be bool of the shape of its box"),
        ({"array_kji": np.ones((1, 2, 3))}, "MaskPrompt.array_kji must be bool of the shape of its box"),
        ({"ijk_to_ras": np.zeros((4, 4))}, "MaskPrompt.ijk_to_ras cannot be used"),
        ({"shape_kji": (4, 5)}, "MaskPrompt.shape_kji must be three whole numbers"),
    ],
)
def test_a_mask_made_by_hand_is_checked(change, words):
    fields = {
        "array_kji": np.ones((1, 2, 3), dtype=bool),
        "box": Box((1, 1, 1), (4, 3, 2)),
        "ijk_to_ras": np.eye(4),
        "shape_kji": (4, 5, 6),
    }
    assert MaskPrompt(**fields).box == fields["box"]
    with pytest.raises(PromptError, match=re.escape(words)):
        MaskPrompt(**(fields | change))


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", one_of_each(), ids=lambda p: type(p).__name__)
def test_json_lacks_and_adds_no_key(prompt):
    data = prompt.to_json()
    for key in set(data) - {"type"}:
        less = {k: v for k, v in data.items() if k != key}
        with pytest.raises(
            PromptError, match=rf"{data['type']} prompt in JSON must have the keys .*missing \['{key}'\]"
        ):
            prompt_from_json(less)
    with pytest.raises(PromptError, match=r"unknown \['colour'\]"):
        prompt_from_json(data | {"colour": "red"})
    with pytest.raises(PromptError, match="must be 'positive' or 'negative', got 'maybe'"):
        prompt_from_json(data | {"polarity": "maybe"})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1, 2], "a prompt in JSON must be an object, got [1, 2]"),
        (None, "a prompt in JSON must be an object, got None"),
        ({}, 'must have a "type" out of point, box, scribble, lasso, mask, got None'),
        ({"type": "circle"}, "got 'circle'"),
        ({"type": ["point"]}, "got ['point']"),
        ({"type": "point", "ras": [1, 2], "polarity": "positive"}, "PointPrompt.ras must be 3 numbers, got [1, 2]"),
        ({"type": "point", "ras": [1, 2, math.nan], "polarity": "positive"}, "PointPrompt.ras must be finite"),
        ({"type": "point", "ras": ["1", 2, 3], "polarity": "positive"}, "PointPrompt.ras must be 3 numbers"),
        ({"type": "point", "ras": [1, 2, 3], "polarity": ["positive"]}, "must be 'positive' or 'negative'"),
        ({"type": "scribble", "points": {}, "radius": 1, "polarity": "positive"}, "must be n x 3 numbers, got {}"),
        ({"type": "box", "corner": [0, 0, 0], "edges": 3, "polarity": "positive"}, "must be 3 x 3 numbers, got 3"),
    ],
)
def test_json_that_is_no_prompt_is_refused(data, words):
    with pytest.raises(PromptError, match=re.escape(words)):
        prompt_from_json(data)


def packed(size: int) -> str:
    return base64.b64encode(zlib.compress(b"\xff" * size)).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"array_kji": "!!!"}, "array_kji of a mask prompt in JSON is damaged"),
        ({"array_kji": 5}, "is damaged: base64 text is needed, got 5"),
        ({"array_kji": base64.b64encode(b"no zlib").decode()}, "is damaged"),
        ({"array_kji": packed(1)[:-4]}, "must unpack to the 1 bytes of its box"),
        ({"array_kji": packed(2)}, "must unpack to the 1 bytes of its box"),
        ({"array_kji": packed(0)}, "must unpack to the 1 bytes of its box"),
        ({"box": [[0, 0, 0], [1, 1, 1]]}, "box of a mask prompt in JSON must be {"),
        ({"box": {"start": [0, 0], "stop": [1, 1, 1]}}, "box.start of a mask prompt in JSON must be three whole"),
        ({"box": {"start": [2, 0, 0], "stop": [1, 1, 1]}}, "must hold 1 to 1073741824 voxels"),
        ({"box": {"start": [0, 0, 0], "stop": [10**6] * 3}}, "must hold 1 to 1073741824 voxels"),
        ({"shape_kji": [1, 1, 1]}, "MaskPrompt.box must be a box inside its grid of shape IJK (1, 1, 1)"),
        ({"shape_kji": [4, 5, 6.5]}, "MaskPrompt.shape_kji must be three whole numbers"),
        ({"ijk_to_ras": [[1, 0], [0, 1]]}, "ijk_to_ras of a mask prompt in JSON must be 4 x 4 numbers"),
        ({"ijk_to_ras": np.zeros((4, 4)).tolist()}, "MaskPrompt.ijk_to_ras cannot be used"),
    ],
)
def test_a_damaged_mask_in_json_is_refused(change, words):
    good = MaskPrompt(np.ones((1, 2, 3), dtype=bool), Box((1, 1, 1), (4, 3, 2)), np.eye(4), (4, 5, 6)).to_json()
    assert prompt_from_json(good).region(volume_of((6, 5, 4)))[1].all()
    with pytest.raises(PromptError, match=re.escape(words)):
        prompt_from_json(good | change)


def test_a_decompression_bomb_is_not_unpacked(monkeypatch):
    data: dict[str, Any] = one_of_each()[-1].to_json()
    asked = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self):
            self._real = real()

        def decompress(self, packed_bits, max_length):
            asked.append(max_length)
            return self._real.decompress(packed_bits, max_length)

        def __getattr__(self, name):
            return getattr(self._real, name)

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(PromptError, match="must unpack to the 1 bytes of its box"):
        prompt_from_json(data | {"array_kji": packed(50_000_000)})
    assert asked == [2]


def test_the_json_of_a_mask_is_small():
    volume = volume_of((128, 128, 64))
    mask = np.zeros(volume.shape_kji, dtype=bool)
    mask[10:50, 20:100, 20:100] = True
    assert len(json.dumps(MaskPrompt.from_array(mask, volume).to_json())) < 2000


def test_long_values_are_cut_short_in_messages():
    with pytest.raises(PromptError) as caught:
        ScribblePrompt([(0.0, 0.0, math.nan)] * 10_000)
    assert len(str(caught.value)) < 400
    with pytest.raises(PromptError) as caught:
        prompt_from_json({"type": "x" * 10_000})
    assert len(str(caught.value)) < 400
