"""nnInteractive's own client package, unchanged, against a real server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from KA2ERSegment.engine.nninteractive import drawn, outline, pack, unpack
from KA2ERSegment.engine.process import LocalEngine
from KA2ERSegment.engine.wire import DTYPES, EngineError
from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import Box
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, MaskPrompt, PointPrompt, Polarity
from KA2ERSegment.session import Session
from KA2ERSegment.volume import Volume

remote = pytest.importorskip("nnInteractive.inference.remote")
Client = remote.nnInteractiveRemoteInferenceSession

SPACING_KJI = (2.5, 1.1, 0.8)
INSIDE_KJI = (6, 12, 12)


@pytest.fixture
def a_viewer(an_engine: LocalEngine) -> Iterator[Client]:
    with Client(an_engine.client().url, an_engine.api_key) as viewer:
        yield viewer


@pytest.fixture
def a_viewer_with_image(a_viewer: Client, an_array: np.ndarray) -> Client:
    return with_image(a_viewer, an_array)


def with_image(viewer: Client, array: np.ndarray) -> Client:
    viewer.set_image(array[None], {"spacing": np.array(SPACING_KJI)})
    viewer.set_target_buffer(np.zeros(array.shape, dtype=np.uint8))
    return viewer


@pytest.fixture
def a_session(a_bundle: Path, an_array: np.ndarray) -> Session:
    """Ours, on the volume that the engine makes of the image."""
    from KA2ERSegment.bundle import load_bundle

    session = Session(load_bundle(a_bundle), "cpu")
    session.set_volume(Volume(an_array, np.diag([-0.8, -1.1, 2.5, 1.0])))
    return session


def test_client_finds_all_that_it_asks_for(a_viewer: Client) -> None:
    assert a_viewer.ping()
    assert all(a_viewer.supported_interactions[kind] for kind in ("points", "bbox2d", "bbox3d", "scribble", "lasso"))
    assert a_viewer.supports_undo
    assert a_viewer.supports_initial_label
    assert a_viewer.channel_mapping["points"] == (3, 4)
    assert a_viewer.license


def test_buffer_is_filled_as_our_own_session_fills_it(
    a_viewer_with_image: Client, a_session: Session, an_array: np.ndarray
) -> None:
    viewer, volume = a_viewer_with_image, a_session.volume
    k, j, i = INSIDE_KJI

    box = viewer.add_point_interaction((k, j, i), True)

    expected = a_session.add(PointPrompt.from_ijk((i, j, k), volume)).mask
    assert expected.any()
    assert viewer.original_image_shape == (1, *an_array.shape)
    np.testing.assert_array_equal(viewer.target_buffer, expected)
    found = Box.around(expected)
    assert [tuple(side) for side in box] == [
        tuple(side) for side in list(zip(found.start, found.stop, strict=True))[::-1]
    ]


def test_every_kind_of_prompt_means_what_ours_means(a_viewer_with_image: Client, a_session: Session) -> None:
    viewer, volume = a_viewer_with_image, a_session.volume
    scribble = np.zeros(volume.shape_kji, dtype=np.uint8)
    scribble[6, 11, 9:15] = 1
    beside = np.zeros((1, 2, 3), dtype=np.uint8)
    beside[0, 0] = 1
    lasso = np.zeros(volume.shape_kji, dtype=bool)
    lasso[4:9, 8:16, 11] = True

    def agree(prompt: object) -> None:
        expected = a_session.add(prompt).mask
        np.testing.assert_array_equal(viewer.target_buffer, expected)

    viewer.add_bbox_interaction([[3, 10], [7, 18], [6, 19]], True)
    agree(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), volume))
    viewer.add_point_interaction((6, 12, 12), True)
    agree(PointPrompt.from_ijk((12, 12, 6), volume))
    viewer.add_point_interaction((12, 3, 27), False)
    agree(PointPrompt.from_ijk((27, 3, 12), volume, Polarity.NEGATIVE))
    viewer.add_scribble_interaction(scribble, True)
    agree(LassoPrompt.from_ijk([(8.5, 10.5, 6), (14.5, 10.5, 6), (14.5, 11.5, 6), (8.5, 11.5, 6)], volume))
    viewer.add_scribble_interaction(beside, False, interaction_bbox=[[12, 13], [2, 4], [20, 23]])
    marked = np.zeros(volume.shape_kji, dtype=bool)
    marked[12, 2, 20:23] = True
    agree(MaskPrompt.from_array(marked, volume, Polarity.NEGATIVE))
    viewer.add_lasso_interaction(lasso, True)
    agree(LassoPrompt.from_ijk([(11, 7.5, 3.5), (11, 15.5, 3.5), (11, 15.5, 8.5), (11, 7.5, 8.5)], volume))
    viewer.add_bbox_interaction([[6, 7], [8, 15], [7, 17]], True)
    agree(BoxPrompt.from_ijk((7, 8, 6), (17, 15, 7), volume))


def test_initial_segmentation_is_shown_as_it_is_and_then_built_upon(
    a_viewer_with_image: Client, a_session: Session, a_mask: np.ndarray
) -> None:
    viewer, volume = a_viewer_with_image, a_session.volume
    viewer.add_point_interaction((3, 3, 3), True)

    viewer.add_initial_seg_interaction(a_mask.astype(np.uint8))
    np.testing.assert_array_equal(viewer.target_buffer, a_mask)
    viewer.add_point_interaction(INSIDE_KJI, True)

    a_session.edit(MaskPrompt.from_array(a_mask, volume))
    np.testing.assert_array_equal(
        viewer.target_buffer, a_session.add(PointPrompt.from_ijk(INSIDE_KJI[::-1], volume)).mask
    )


def test_initial_segmentation_can_be_refined_at_once(
    a_viewer_with_image: Client, a_session: Session, a_mask: np.ndarray
) -> None:
    viewer = a_viewer_with_image

    viewer.add_initial_seg_interaction(a_mask.astype(np.uint8), run_prediction=True)

    expected = a_session.add(MaskPrompt.from_array(a_mask, a_session.volume)).mask
    np.testing.assert_array_equal(viewer.target_buffer, expected)


def test_undo_brings_every_buffer_back(a_viewer_with_image: Client, a_mask: np.ndarray) -> None:
    viewer = a_viewer_with_image
    seen = [viewer.target_buffer.copy()]
    viewer.add_point_interaction(INSIDE_KJI, True)
    seen.append(viewer.target_buffer.copy())
    viewer.add_bbox_interaction([[3, 10], [7, 18], [6, 19]], True)
    seen.append(viewer.target_buffer.copy())
    viewer.add_initial_seg_interaction(a_mask.astype(np.uint8))
    seen.append(viewer.target_buffer.copy())
    viewer.add_point_interaction((5, 11, 12), True)
    assert len({buffer.tobytes() for buffer in seen}) == len(seen)

    for before in reversed(seen):
        assert viewer.undo()
        np.testing.assert_array_equal(viewer.target_buffer, before)
    assert not viewer.undo()


def test_prompts_without_prediction_wait_for_the_next_one(a_viewer_with_image: Client, a_session: Session) -> None:
    viewer, volume = a_viewer_with_image, a_session.volume

    assert viewer.add_point_interaction(INSIDE_KJI, True, run_prediction=False) is None
    assert viewer.add_point_interaction((12, 3, 27), False, run_prediction=False) is None
    assert viewer.add_point_interaction((1, 1, 1), True, run_prediction=False) is None
    assert viewer.undo()
    assert not viewer.target_buffer.any()
    viewer._predict()

    a_session.add(PointPrompt.from_ijk(INSIDE_KJI[::-1], volume))
    expected = a_session.add(PointPrompt.from_ijk((27, 3, 12), volume, Polarity.NEGATIVE)).mask
    np.testing.assert_array_equal(viewer.target_buffer, expected)
    assert viewer._predict() is None
    assert viewer.undo()
    assert not viewer.target_buffer.any()


def test_reset_begins_anew(a_viewer_with_image: Client) -> None:
    viewer = a_viewer_with_image
    viewer.add_point_interaction(INSIDE_KJI, True)
    first = viewer.target_buffer.copy()
    viewer.add_point_interaction((3, 3, 3), True)

    viewer.reset_interactions()
    assert not viewer.target_buffer.any()
    assert not viewer.undo()
    viewer.set_do_autozoom(False)
    viewer.add_point_interaction(INSIDE_KJI, True)

    np.testing.assert_array_equal(viewer.target_buffer, first)


def test_new_buffer_gets_the_whole_mask(a_viewer_with_image: Client) -> None:
    viewer = a_viewer_with_image
    viewer.add_point_interaction(INSIDE_KJI, True)
    viewer.set_target_buffer(np.zeros(viewer.target_buffer.shape, dtype=bool))
    viewer.add_point_interaction((6, 11, 12), True)
    shown = viewer.target_buffer.copy()

    viewer.reset_interactions()
    viewer.add_point_interaction(INSIDE_KJI, True)
    viewer.add_point_interaction((6, 11, 12), True)

    assert shown.any()
    np.testing.assert_array_equal(viewer.target_buffer, shown)


def test_two_viewers_work_on_two_images(an_engine: LocalEngine, an_array: np.ndarray) -> None:
    url, key = an_engine.client().url, an_engine.api_key
    other = np.ascontiguousarray(an_array[:, ::-1].transpose(1, 2, 0))
    with Client(url, key) as a, Client(url, key) as b:
        with_image(a, an_array), with_image(b, other)
        a.add_point_interaction(INSIDE_KJI, True)
        b.add_point_interaction((9, 12, 6), True)
        with Client(url, key) as alone:
            with_image(alone, other).add_point_interaction((9, 12, 6), True)
            expected = alone.target_buffer.copy()
        first = a.target_buffer.copy()
        b.add_point_interaction((9, 11, 6), True)

        assert a.target_buffer.shape == an_array.shape
        assert first.any()
        np.testing.assert_array_equal(a.target_buffer, first)
        assert expected.any()
        assert b.undo()
        np.testing.assert_array_equal(b.target_buffer, expected)


def test_spacing_belongs_to_the_axes_of_the_array(a_viewer: Client, a_session: Session, an_array: np.ndarray) -> None:
    flat = Volume(an_array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    a_viewer.set_image(an_array[None])
    a_viewer.set_target_buffer(np.zeros(an_array.shape, dtype=np.int16))
    a_viewer.add_point_interaction(INSIDE_KJI, True)
    without = a_viewer.target_buffer.copy()
    with_image(a_viewer, an_array).add_point_interaction(INSIDE_KJI, True)

    click = PointPrompt.from_ijk(INSIDE_KJI[::-1], a_session.volume)
    np.testing.assert_array_equal(a_viewer.target_buffer, a_session.add(click).mask)
    a_session.set_volume(flat)
    np.testing.assert_array_equal(without, a_session.add(PointPrompt.from_ijk(INSIDE_KJI[::-1], flat)).mask)


def test_wrong_key_is_refused(an_engine: LocalEngine) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        Client(an_engine.client().url, "another key")

    assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (lambda v: v.add_point_interaction((6, 12, 300), True), "outside"),
        (lambda v: v.add_point_interaction((6, 12), True), "3 numbers"),
        (lambda v: v.add_bbox_interaction([[3, 3], [7, 18], [6, 19]], True), "below its stop"),
        (lambda v: v.add_bbox_interaction([[30, 33], [7, 18], [6, 19]], True), "must meet the image"),
        (lambda v: v.add_scribble_interaction(np.zeros((14, 22, 30), np.uint8), True), "at least one voxel"),
        (lambda v: v.add_lasso_interaction(np.ones((3, 3, 3), np.uint8), True), "the image's shape"),
        (lambda v: v._post_binary("/add_initial_seg_interaction", {}, pack(np.ones((2, 3, 4), bool))), "the image's"),
        (lambda v: v.set_image(np.zeros((2, 4, 5, 6), np.float32)), "one channel"),
        (lambda v: v.set_image(np.zeros((1, 4, 5, 6), np.float32)), "nothing to segment"),
        (lambda v: v.set_image(np.full((1, 4, 5, 6), np.nan, np.float32)), "NaN"),
        (lambda v: v.set_image(np.ones((1, 4, 5, 6), np.complex64)), "dtype"),
        (lambda v: v._post_json("/set_target_buffer", {"shape": [1, 2, 3], "dtype": "uint8"}), "image's shape"),
        (lambda v: v._post_json("/set_target_buffer", {"shape": [14, 22, 30], "dtype": "object"}), "dtype"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(a_viewer_with_image: Client, give: object, reason: str) -> None:
    viewer = a_viewer_with_image
    viewer.add_point_interaction(INSIDE_KJI, True)
    viewer.add_point_interaction((6, 11, 12), True)
    shown = viewer.target_buffer.copy()

    with pytest.raises(httpx.HTTPStatusError) as refused:
        give(viewer)
    assert refused.value.response.status_code == 400
    assert reason in refused.value.response.json()["detail"]

    assert viewer.undo()
    viewer.add_point_interaction((6, 11, 12), True)
    np.testing.assert_array_equal(viewer.target_buffer, shown)


def test_lease_ends_when_its_user_is_idle_and_others_get_the_room(a_bundle: Path) -> None:
    arguments = ["--idle-timeout", "1", "--max-sessions", "1", "--threads", "1"]
    engine = LocalEngine([sys.executable], a_bundle, "cpu", arguments=arguments)
    engine.start()
    try:
        engine.wait()
        url, key = engine.client().url, engine.api_key
        with Client(url, key) as first:
            with pytest.raises(remote.ServerAtCapacityError):
                Client(url, key)
            assert 0 < first.lease_status()["remaining_seconds"] <= 1
            with pytest.raises(remote.SessionExpiredError):
                beat_for_ever(first)  # a sign of life is no action of the user
            with pytest.raises(remote.SessionExpiredError):
                first.undo()
            with Client(url, key) as second:
                assert second.lease_status()["idle_timeout_seconds"] == 1
    finally:
        engine.stop()


def beat_for_ever(viewer: Client) -> None:
    while True:
        viewer.heartbeat()


# --- drawn masks and packed arrays ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(bool, st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6))), st.permutations(range(3))
)
def test_prompts_of_a_drawn_mask_cover_exactly_its_voxels(mask: np.ndarray, axes: list[int]) -> None:
    mask = mask.transpose(axes)
    if not mask.any():
        return
    image = np.random.default_rng(0).normal(size=(11, 12, 13))
    volume = Volume(image, np.diag([-0.8, -1.1, 2.5, 1.0]))
    box = Box((2, 3, 4), tuple(a + n for a, n in zip((2, 3, 4), mask.shape[::-1], strict=True)))
    expected = np.zeros(volume.shape_kji, dtype=bool)
    expected[box.slices] = mask

    for positive in (True, False):
        covered = np.zeros_like(expected)
        for prompt in drawn(box, mask, volume, positive):
            assert prompt.polarity is (Polarity.POSITIVE if positive else Polarity.NEGATIVE)
            part, voxels = prompt.region(volume)
            covered[part.slices] |= voxels
        np.testing.assert_array_equal(covered, expected)


def test_drawing_that_is_no_drawing_is_refused() -> None:
    noise = np.random.default_rng(0).random((300, 300)) > 0.5

    with pytest.raises(PromptError, match="simpler"):
        outline(noise)


@settings(deadline=None)
@given(
    arrays.arrays(
        st.sampled_from(DTYPES),
        arrays.array_shapes(min_dims=1, max_dims=4, max_side=6),
        elements={"min_value": 0, "max_value": 100},
    )
)
def test_packed_arrays_are_read_by_both_sides(array: np.ndarray) -> None:
    theirs = pytest.importorskip("nnInteractive.inference.remote.serialization")

    np.testing.assert_array_equal(theirs.unpack_array(pack(array)), array)
    np.testing.assert_array_equal(unpack(theirs.pack_array(array), 10_000, DTYPES), array)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_packed_arrays_are_refused(data: st.DataObject) -> None:
    whole = bytearray(pack(np.arange(60, dtype=np.int16).reshape(3, 4, 5)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 33), st.integers(0, 255)), max_size=4)):
        whole[at % 46] = value  # the protocol's own head; the codec guards the rest
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])

    with suppress(EngineError):  # and nothing else
        assert unpack(cut, 10_000, DTYPES).size <= 10_000


def test_size_of_a_packed_array_is_not_believed() -> None:
    head = b"NNIA" + bytes([1, 1, 3, 7]) + b"float32" + np.array([1 << 20, 1 << 20, 1 << 20], "<i8").tobytes()

    with pytest.raises(EngineError, match="at most") as refused:
        unpack(head + bytes(4), 1 << 30, DTYPES)
    assert refused.value.kind == "too large"
