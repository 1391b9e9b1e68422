"""Hand edits, finishing, revising, removing, experts and neighbours: the verbs beside prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from KA2ERSegment import (
    BoxPrompt,
    MaskPrompt,
    Neighbours,
    PointPrompt,
    Polarity,
    PromptError,
    ScribblePrompt,
    Session,
    SessionStateError,
    Volume,
)
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import Box
from KA2ERSegment.mask_decoder import Decoded
from KA2ERSegment.session import HISTORY
from KA2ERSegment.steps import Finish, Step
from KA2ERSegment.testing import tiny_bundle

NEGATIVE = Polarity.NEGATIVE
INSIDE = (12, 12, 6)  # IJK, in the bright ellipsoid
CORNER = (26, 3, 12)


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def a_tiny_model_session(a_bundle: Bundle) -> Session:
    return Session(a_bundle, device="cpu")


@pytest.fixture
def a_session(a_tiny_model_session: Session, a_volume: Volume) -> Session:
    """With the tiny untrained model, and a volume."""
    return session_on(a_tiny_model_session, a_volume)


def session_on(session: Session, volume: Volume) -> Session:
    session.set_volume(volume)
    session.use_experts(None)
    session.checkpoint = None
    return session


def click(volume: Volume, ijk: Any, polarity: Polarity = Polarity.POSITIVE) -> PointPrompt:
    return PointPrompt.from_ijk(ijk, volume, polarity)


def at(array: np.ndarray, ijk: tuple[int, int, int]) -> Any:
    return array[ijk[2], ijk[1], ijk[0]]


def masks(session: Session) -> dict[str, np.ndarray]:
    found = {name: session.prediction_of(name) for name in session.objects}
    return {name: prediction.mask for name, prediction in found.items() if prediction is not None}


def snapshot(session: Session) -> tuple[Any, ...]:
    return (
        session._state,
        session.objects,
        session.selected,
        session.prediction,
        session.can_undo,
        session.can_redo,
        session.changed,
        session.experts,
        json.dumps(session.to_json()),
        {name: mask.tobytes() for name, mask in masks(session).items()},
    )


def check_same(before: tuple[Any, ...], session: Session) -> None:
    after = snapshot(session)
    assert after[0] is before[0]
    assert after[3] is before[3]
    assert after[1:3] + after[4:] == before[1:3] + before[4:]


def check_replay(session: Session) -> None:
    """Another session of the same model comes out the same."""
    again = Session(session.bundle, device="cpu", model=session.model)
    again.set_volume(session.volume)
    again.give(json.loads(json.dumps(session.to_json())))
    assert again.to_json() == session.to_json()
    expected, found = masks(session), masks(again)
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def speckled(shape_kji: tuple[int, int, int], seed: int = 3) -> np.ndarray:
    """A mask that no network and no clean-up would leave: single voxels, pin holes, a thin line."""
    mask = np.random.default_rng(seed).random(shape_kji) < 0.03
    mask[4:8, 6:16, 6:18] = True
    mask[5, 9, 9] = mask[6, 12, 12] = False
    mask[2, :, 3] = True
    return mask


# -- hand edits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["nothing", "clicks", "finished"])
def test_an_edit_is_kept_voxel_for_voxel(a_tiny_model_session: Session, any_volume: Volume, first: str) -> None:
    session = session_on(a_tiny_model_session, any_volume)
    if first != "nothing":
        session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), any_volume))
        session.add(click(any_volume, (7, 8, 4), NEGATIVE))
    if first == "finished":
        session.finish(2.0, islands=False)
    mask = speckled(any_volume.shape_kji)
    prediction = session.edit(MaskPrompt.from_array(mask, any_volume))
    np.testing.assert_array_equal(prediction.mask, mask)
    np.testing.assert_array_equal(session.label_map()[0] == 1, mask)
    np.testing.assert_array_equal(prediction.probability > 0.5, mask)
    check_replay(session)
    session.undo()
    session.redo()
    np.testing.assert_array_equal(masks(session)["object"], mask)


def test_an_edit_asks_no_network(a_session: Session, a_volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    a_session.add(click(a_volume, INSIDE))

    def never(*_: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        for name in ("encode", "decode"):
            patched.setattr(a_session.model, name, never)
        a_session.edit(MaskPrompt.from_array(speckled(a_volume.shape_kji), a_volume))
        a_session.finish(1.0)
        a_session.suggest()
        assert isinstance(a_session.prediction.shares, dict)
        assert 0 <= a_session.prediction.quality <= 1


@pytest.fixture
def a_wide_volume() -> Volume:
    """Two bright blocks far apart, anisotropic, oblique and left-handed."""
    random = np.random.default_rng(0)
    array = random.normal(0, 5, (40, 90, 110)).astype(np.float32)
    array[10:28, 20:60, 12:52] += 100
    matrix = np.array([[-0.7, 0.1, 0.2, 5.0], [0.1, 0.9, -0.3, -8.0], [0.1, 0.2, 2.0, 60.0], [0, 0, 0, 1]])
    return Volume(array, matrix, "wide")


DETAIL = Box((14, 22, 12), (22, 30, 18))
"""Where the hand draws."""
FAR = (50, 58, 26)
"""Clicked next: well beyond NEAR of it."""


@pytest.mark.parametrize("made_by", ["hand", "box"])
@pytest.mark.parametrize("polarity", list(Polarity))
def test_a_hand_made_detail_survives_a_click_far_from_it(
    a_tiny_model_session: Session, a_wide_volume: Volume, made_by: str, polarity: Polarity
) -> None:
    session = session_on(a_tiny_model_session, a_wide_volume)
    mask = a_wide_volume.array_kji > 50
    if made_by == "box":
        mask = session.add(BoxPrompt.from_ijk((12, 20, 10), (52, 60, 28), a_wide_volume)).mask
    crop = mask[DETAIL.slices]
    crop[...] = np.random.default_rng(1).random(crop.shape) < 0.5  # single voxels and holes
    session.edit(MaskPrompt.from_array(mask, a_wide_volume))
    for ijk in (FAR, (48, 55, 24)):
        after = session.add(click(a_wide_volume, ijk, polarity)).mask
        np.testing.assert_array_equal(after[DETAIL.slices], mask[DETAIL.slices])
        assert at(after, ijk) == (polarity is Polarity.POSITIVE)
    grown = session.add(click(a_wide_volume, (100, 80, 35))).mask  # beyond the patch, so that it moves
    np.testing.assert_array_equal(grown[DETAIL.slices], mask[DETAIL.slices])
    assert at(grown, (100, 80, 35))
    check_replay(session)


def test_a_click_changes_what_a_hand_drew_close_to_it(a_session: Session, a_volume: Volume, a_mask: np.ndarray) -> None:
    a_session.edit(MaskPrompt.from_array(a_mask, a_volume))
    after = a_session.add(click(a_volume, INSIDE, NEGATIVE)).mask
    assert at(a_mask, INSIDE)
    assert not at(after, INSIDE)
    assert (a_mask & ~after).sum() >= 8  # a ball and no single voxel


def test_a_single_drawn_voxel_beside_an_older_click_stays(a_session: Session, a_volume: Volume) -> None:
    mask = a_session.add(click(a_volume, INSIDE)).mask
    near, lonely = (INSIDE[0] + 1, INSIDE[1], INSIDE[2]), (29, 21, 13)
    drawn = np.zeros_like(mask)
    for i, j, k in (INSIDE, near, lonely):
        drawn[k, j, i] = True
    a_session.edit(MaskPrompt.from_array(drawn, a_volume))
    after = a_session.add(click(a_volume, (0, 0, 0), NEGATIVE)).mask
    assert at(after, INSIDE)
    assert at(after, lonely)


def test_the_hand_wins_over_older_clicks_and_newer_clicks_over_the_hand(
    a_session: Session, a_volume: Volume, a_mask: np.ndarray
) -> None:
    beside = (20, 20, 12)
    a_session.add(click(a_volume, INSIDE))
    a_session.add(click(a_volume, beside, NEGATIVE))
    mask = np.zeros_like(a_mask)
    mask[10:, 16:, 15:] = True  # without the positive click, with the negative one
    a_session.edit(MaskPrompt.from_array(mask, a_volume))
    assert len(a_session.prompts()) == 2
    np.testing.assert_array_equal(masks(a_session)["object"], mask)
    prediction = a_session.add(click(a_volume, beside))  # its voxels are free again for the other polarity
    assert at(prediction.mask, beside)
    prediction = a_session.add(click(a_volume, INSIDE, NEGATIVE))
    assert at(prediction.mask, beside)
    assert not at(prediction.mask, INSIDE)


def test_an_object_can_be_emptied_and_starts_anew(a_session: Session, a_volume: Volume) -> None:
    a_session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    empty = MaskPrompt.from_array(np.zeros(a_volume.shape_kji, dtype=bool), a_volume)
    prediction = a_session.edit(empty)
    assert not prediction.mask.any()
    assert prediction.quality == 0
    assert a_session.suggest() is None
    check_replay(a_session)
    assert at(a_session.add(click(a_volume, (24, 4, 11))).mask, (24, 4, 11))
    with pytest.raises(PromptError, match="at least one voxel"):
        a_session.add(empty)


def test_an_amended_edit_is_undone_together_with_what_was_before_it(a_session: Session, a_volume: Volume) -> None:
    first = a_session.add(click(a_volume, INSIDE)).mask
    a_session.add(click(a_volume, (14, 12, 6)))
    drawn = speckled(a_volume.shape_kji)
    a_session.edit(MaskPrompt.from_array(drawn, a_volume), amend=True)
    check_replay(a_session)
    assert len(a_session.steps) == 3
    a_session.undo()
    np.testing.assert_array_equal(masks(a_session)["object"], first)
    a_session.redo()
    np.testing.assert_array_equal(masks(a_session)["object"], drawn)


@pytest.mark.parametrize(
    ("neighbours", "others_keep", "own_gets"),
    [(Neighbours.OVERLAP, True, True), (Neighbours.COMPETE, False, True), (Neighbours.KEEP, True, False)],
)
def test_an_edit_on_other_objects_does_as_is_chosen(
    a_session: Session, a_volume: Volume, neighbours: Neighbours, others_keep: bool, own_gets: bool
) -> None:
    block, other = np.zeros((2, *a_volume.shape_kji), dtype=bool)
    block[2:8, 2:12, 2:12] = True
    other[4:10, 6:16, 6:16] = True
    both = block & other
    a_session.select("other")
    a_session.edit(MaskPrompt.from_array(other, a_volume))
    a_session.select("own")
    prediction = a_session.edit(MaskPrompt.from_array(block, a_volume), neighbours=neighbours)
    found = masks(a_session)
    assert found["other"][both].all() == others_keep
    assert found["own"][both].all() == own_gets
    np.testing.assert_array_equal(found["own"] | both, block)
    np.testing.assert_array_equal(found["other"] | both, other)
    differs = (found["other"] != other) | found["own"]
    differs[prediction.changed.slices] = False
    assert not differs.any()
    check_replay(a_session)


def test_what_another_object_won_of_a_drawn_mask_is_not_taken_back_from_afar(
    a_session: Session, a_wide_volume: Volume
) -> None:
    session_on(a_session, a_wide_volume)
    own, other = np.zeros((2, *a_wide_volume.shape_kji), dtype=bool)
    _, rows, columns = a_wide_volume.shape_kji
    own[:, 2:-2, 2 : columns // 2] = True
    other[:, 2 : rows // 4, 2:-2] = True
    a_session.select("own")
    a_session.edit(MaskPrompt.from_array(own, a_wide_volume))
    a_session.select("other")
    a_session.edit(MaskPrompt.from_array(other, a_wide_volume), neighbours=Neighbours.COMPETE)
    np.testing.assert_array_equal(masks(a_session)["own"], own & ~other)
    a_session.select("own")
    a_session.add(click(a_wide_volume, (columns // 4, rows - 3, 1)))
    kept = masks(a_session)["other"][:, : rows // 8]
    np.testing.assert_array_equal(kept, other[:, : rows // 8])
    check_replay(a_session)


def test_a_locked_object_loses_nothing_to_a_hand(a_session: Session, a_volume: Volume, a_mask: np.ndarray) -> None:
    a_session.select("locked")
    a_session.edit(MaskPrompt.from_array(a_mask, a_volume))
    a_session.lock()
    before = snapshot(a_session)
    with pytest.raises(SessionStateError, match="'locked' is locked; got a hand edit"):
        a_session.edit(MaskPrompt.from_array(~a_mask, a_volume))
    with pytest.raises(SessionStateError, match="is locked"):
        a_session.finish(1.0)
    with pytest.raises(SessionStateError, match="is locked"):
        a_session.remove()
    check_same(before, a_session)
    a_session.select("own")
    a_session.edit(MaskPrompt.from_array(np.ones_like(a_mask), a_volume), neighbours=Neighbours.COMPETE)
    np.testing.assert_array_equal(masks(a_session)["own"], ~a_mask)
    np.testing.assert_array_equal(masks(a_session)["locked"], a_mask)


def test_what_is_no_edit_is_refused(a_session: Session, a_volume: Volume, an_oblique_volume: Volume) -> None:
    a_session.add(click(a_volume, INSIDE))
    before = snapshot(a_session)
    mask = speckled(a_volume.shape_kji)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: a_session.edit(MaskPrompt.from_array(mask, an_oblique_volume)), "must lie on the voxels"),
        (lambda: a_session.edit(MaskPrompt.from_array(mask, a_volume, NEGATIVE)), "got a negative MaskPrompt"),
        (lambda: a_session.edit(mask), "must be a positive MaskPrompt, got ndarray"),  # type: ignore[arg-type]
        (lambda: a_session.finish(-1), "must be a number from 0 to 50"),
        (lambda: a_session.finish(float("nan")), "must be a number from 0 to 50"),
        (lambda: a_session.finish(1, islands=3), "must be True or False"),  # type: ignore[arg-type]
        (lambda: a_session.add(click(a_volume, INSIDE), "maybe"), "neighbours must be one of"),  # type: ignore[arg-type]
        (lambda: a_session.revise(["a step"]), "got str"),  # type: ignore[list-item]
    ]
    for verb, words in refused:
        with pytest.raises(PromptError, match=words):
            verb()
        check_same(before, a_session)


# -- neighbours of prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", list(Neighbours))
def test_a_prompt_on_another_object_does_as_is_chosen(
    a_session: Session, a_volume: Volume, a_mask: np.ndarray, neighbours: Neighbours
) -> None:
    a_session.select("other")
    a_session.edit(MaskPrompt.from_array(a_mask, a_volume))
    a_session.select("own")
    if neighbours is Neighbours.KEEP:
        before = snapshot(a_session)
        with pytest.raises(PromptError, match="belongs to 'other' and neighbours keep their voxels"):
            a_session.add(click(a_volume, INSIDE), neighbours)
        check_same(before, a_session)
        a_session.add(BoxPrompt.from_ijk((4, 5, 2), (21, 20, 11), a_volume), neighbours)
    else:
        a_session.add(click(a_volume, INSIDE), neighbours)
        assert at(masks(a_session)["own"], INSIDE)
    found = masks(a_session)
    overlap = found["own"] & found["other"]
    assert overlap.any() == (neighbours is Neighbours.OVERLAP)
    assert (found["other"] == a_mask).all() == (neighbours is not Neighbours.COMPETE)
    check_replay(a_session)
    kept = overlap.copy()
    a_session.add(click(a_volume, CORNER, NEGATIVE))  # competing again takes nothing that was shared
    assert not (masks(a_session)["other"] != found["other"])[kept].any()


def test_a_click_on_what_the_object_shares_already_takes_nothing_from_neighbours_that_keep(
    a_session: Session, a_volume: Volume
) -> None:
    shared, other = np.zeros((2, *a_volume.shape_kji), dtype=bool)
    shared[4:9, 6:14, 6:14] = True
    other[4:9, 6:18, 6:18] = True
    for name, mask in (("other", other), ("own", shared)):
        a_session.select(name)
        a_session.edit(MaskPrompt.from_array(mask, a_volume))
    prediction = a_session.add(click(a_volume, (9, 9, 6)), Neighbours.KEEP)
    assert at(prediction.mask, (9, 9, 6))
    np.testing.assert_array_equal(masks(a_session)["other"], other)
    assert not (prediction.mask & other & ~shared).any()
    with pytest.raises(PromptError, match="neighbours keep their voxels"):
        a_session.add(click(a_volume, (16, 16, 6)), Neighbours.KEEP)
    check_replay(a_session)


def test_steps_without_neighbours_compete(a_volume: Volume) -> None:
    old = {"object": "liver", "prompt": click(a_volume, INSIDE).to_json()}
    step = Step.from_json(old)
    assert step.neighbours is Neighbours.COMPETE
    assert step.experts is None
    assert step.to_json() == old


# -- finishing ---------------------------------------------------------------------------------------------------------


def test_finishing_acts_without_the_network_and_coalesces(a_session: Session, a_volume: Volume) -> None:
    raw = a_session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume)).mask
    seen = []
    for smoothing in (0.5, 3.0, 1.5):
        before = masks(a_session)["object"]
        prediction = a_session.finish(smoothing)
        assert prediction is not None
        different = before != prediction.mask
        different[prediction.changed.slices] = False
        assert not different.any()
        seen.append(prediction.mask)
    assert any((mask != raw).any() for mask in seen)
    assert len(a_session.steps) == 2
    check_replay(a_session)
    a_session.finish()
    np.testing.assert_array_equal(masks(a_session)["object"], raw)
    assert len(a_session.steps) == 1
    a_session.finish(3.0)
    a_session.undo()
    np.testing.assert_array_equal(masks(a_session)["object"], raw)
    a_session.undo()
    assert a_session.prediction is None


def test_finishing_after_a_revision_keeps_the_revision(a_session: Session, a_volume: Volume) -> None:
    a_session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    moved = Step("object", BoxPrompt.from_ijk((10, 8, 4), (24, 19, 12), a_volume))
    a_session.revise([moved, Step("object", Finish(1.0))])
    a_session.finish(2.0)
    assert [step.done for step in a_session.steps] == [moved.done, Finish(1.0), Finish(2.0)]
    finished = masks(a_session)["object"]
    a_session.finish(3.0)
    assert a_session.steps[-1].done == Finish(3.0)
    assert len(a_session.steps) == 3
    a_session.revise([moved, Step("object", Finish(2.0))])
    np.testing.assert_array_equal(masks(a_session)["object"], finished)


def test_finishing_keeps_clicks_hand_edits_and_neighbours(a_session: Session, a_volume: Volume) -> None:
    a_session.select("other")
    other = np.zeros(a_volume.shape_kji, dtype=bool)
    other[3:9, 4:9, 4:9] = True
    a_session.edit(MaskPrompt.from_array(other, a_volume))
    a_session.select("own")
    a_session.add(click(a_volume, INSIDE))
    a_session.add(click(a_volume, (15, 12, 6), NEGATIVE))
    for smoothing in (1.0, 8.0, 40.0):
        after = a_session.finish(smoothing, islands=False)
        assert after is not None
        assert at(after.mask, INSIDE)
        assert not at(after.mask, (15, 12, 6))
        np.testing.assert_array_equal(masks(a_session)["other"], other)
    drawn = speckled(a_volume.shape_kji)
    a_session.select("drawn")
    a_session.edit(MaskPrompt.from_array(drawn, a_volume))
    finished = a_session.finish(5.0, islands=False)
    assert finished is not None
    np.testing.assert_array_equal(finished.mask, drawn)


def test_islands_that_no_prompt_touches_go_on_demand(a_session: Session, a_wide_volume: Volume) -> None:
    def two_blocks(features: Any, prompts: Any) -> Any:
        logits = torch.full((1, 32, 32, 32), -4.0)
        logits[0, 10:20, 4:12, 4:12] = logits[0, 10:20, 4:12, 20:28] = 4.0
        nothing = torch.zeros(1, 0)
        return Decoded(logits, torch.tensor([1.0]), nothing, nothing)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(a_session.model, "decode", two_blocks)
        a_session.set_volume(a_wide_volume)
        a_session.add(BoxPrompt.from_ijk((10, 10, 5), (60, 60, 30), a_wide_volume))
        whole = a_session.prediction
        assert whole is not None
        k, j, i = np.argwhere(whole.mask)[0]
        a_session.add(click(a_wide_volume, (i, j, k)))
        assert ndimage.label(masks(a_session)["object"])[1] == 2
        one = a_session.finish(islands=False)
        assert one is not None
        assert ndimage.label(one.mask)[1] == 1
        assert one.mask[k, j, i]
        both = a_session.finish(islands=True)
        assert both is not None
        assert ndimage.label(both.mask)[1] == 2


def test_finishing_before_the_first_prompt_is_for_later(a_session: Session, a_volume: Volume) -> None:
    assert a_session.finish(2.0) is None
    later = a_session.add(click(a_volume, INSIDE)).mask
    a_session.reset()
    a_session.add(click(a_volume, INSIDE))
    now = a_session.finish(2.0)
    assert now is not None
    np.testing.assert_array_equal(now.mask, later)


# -- revise, remove, rename --------------------------------------------------------------------------------------------


def test_a_deleted_prompt_leaves_what_the_others_give(a_session: Session, a_volume: Volume) -> None:
    prompts = [click(a_volume, ijk) for ijk in (INSIDE, (15, 12, 6), (10, 14, 5))]
    a_session.add(prompts[0])
    a_session.add(prompts[2])
    expected = masks(a_session)["object"]
    a_session.reset()
    for prompt in prompts:
        a_session.add(prompt)
    before = snapshot(a_session)
    steps = [step for step in a_session.steps if step.done != prompts[1]]
    prediction = a_session.revise(steps)
    assert prediction is not None
    np.testing.assert_array_equal(prediction.mask, expected)
    assert a_session.prompts() == (prompts[0], prompts[2])
    assert a_session.changed == prediction.changed
    a_session.undo()
    assert a_session._state is before[0]
    a_session.redo()
    np.testing.assert_array_equal(masks(a_session)["object"], expected)
    check_replay(a_session)


def test_a_revision_starts_at_the_newest_state_that_fits(
    a_session: Session, a_volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ijk in (INSIDE, (13, 12, 6), (14, 12, 6)):
        a_session.add(click(a_volume, ijk))
    steps = a_session.steps
    added: list[Any] = []
    add = a_session.add
    monkeypatch.setattr(a_session, "add", lambda *args: added.append(args[0]) or add(*args))
    moved = click(a_volume, (14, 13, 6))
    a_session.revise([*steps[:2], Step("object", moved)])
    assert added == [moved]
    a_session.revise(steps)
    assert added == [moved]  # that state is still known
    assert a_session.revise([]) is None
    assert not masks(a_session)


def test_a_revision_that_is_refused_changes_nothing(a_session: Session, a_volume: Volume) -> None:
    a_session.select("liver")
    a_session.add(click(a_volume, INSIDE))
    a_session.add(click(a_volume, (14, 12, 6)))
    a_session.undo()
    before = snapshot(a_session)
    steps = a_session.steps
    for bad in (
        Step("liver", click(a_volume, INSIDE, NEGATIVE)),
        Step("new", PointPrompt((1e4, 0, 0))),
        Step("liver", click(a_volume, (15, 12, 6)), experts=("nobody",)),
    ):
        with pytest.raises(KA2ERError):
            a_session.revise([*steps, Step("other", click(a_volume, CORNER)), bad])
        check_same(before, a_session)
    with pytest.raises(SessionStateError, match="is locked"):
        a_session.revise([*steps, Step("liver", "lock"), Step("liver", click(a_volume, (15, 12, 6)))])
    check_same(before, a_session)


def test_a_removed_object_is_gone_until_undo(a_session: Session, a_volume: Volume) -> None:
    for name, ijk in (("liver", INSIDE), ("spleen", CORNER)):
        a_session.select(name)
        a_session.add(click(a_volume, ijk))
    before = masks(a_session)
    a_session.remove("spleen")
    assert (a_session.objects, a_session.selected) == (("liver",), "liver")
    assert set(masks(a_session)) == {"liver"}
    check_replay(a_session)
    with pytest.raises(SessionStateError, match="no object 'spleen'"):
        a_session.prediction_of("spleen")
    a_session.undo()
    assert a_session.objects == ("liver", "spleen")
    np.testing.assert_array_equal(masks(a_session)["spleen"], before["spleen"])
    a_session.select("spleen")
    a_session.redo()
    assert a_session.selected == "liver"
    assert a_session.select("spleen") is None  # a new one of that name
    assert a_session.prompts() == ()
    check_replay(a_session)
    a_session.add(click(a_volume, CORNER))
    a_session.remove("liver")
    a_session.remove()
    assert a_session.objects == ("object",)
    a_session.select("kidney")
    assert a_session.objects == ("kidney",)
    for _ in range(3):
        a_session.undo()
    assert a_session.objects == ("liver", "spleen", "kidney")


def test_history_stays_bounded_whatever_is_done(a_session: Session, a_volume: Volume, a_mask: np.ndarray) -> None:
    a_session.edit(MaskPrompt.from_array(a_mask, a_volume))
    for n in range(HISTORY):
        a_session.edit(MaskPrompt.from_array(np.roll(a_mask, n % 3), a_volume))
        a_session.finish(1.0 + n % 2)
        a_session.select(f"other {n % 2}")
        a_session.remove()
        a_session.select("object")
    assert len(a_session._history) == HISTORY


def test_a_renamed_object_keeps_all_that_was_done(a_session: Session, a_volume: Volume) -> None:
    a_session.add(click(a_volume, INSIDE))
    a_session.select("spleen")
    a_session.add(click(a_volume, CORNER))
    a_session.remove()
    before = masks(a_session)["object"]
    a_session.rename("object", "liver")
    assert (a_session.objects, a_session.selected) == (("liver",), "liver")
    assert a_session.prediction is not None
    assert a_session.prediction.name == "liver"
    np.testing.assert_array_equal(masks(a_session)["liver"], before)
    check_replay(a_session)
    unchanged = snapshot(a_session)
    for old, new in (("liver", "spleen"), ("nobody", "kidney"), ("liver", "")):
        with pytest.raises(SessionStateError):
            a_session.rename(old, new)
        check_same(unchanged, a_session)
    a_session.undo()
    assert a_session.objects == ("liver", "spleen")
    a_session.undo()
    a_session.undo()
    assert not a_session.can_undo


# -- experts -----------------------------------------------------------------------------------------------------------


def test_experts_that_are_switched_off_have_no_say(a_session: Session, a_volume: Volume) -> None:
    everyone = a_session.add(click(a_volume, INSIDE))
    a_session.undo()
    a_session.use_experts(["tiny_brain"])
    assert a_session.experts == ("tiny_brain",)
    one = a_session.add(click(a_volume, INSIDE))
    assert list(one.shares) == list(one.experts) == ["foundation", "tiny_brain"]
    assert sum(one.shares.values()) == pytest.approx(1, abs=1e-4)
    assert (one.probability != everyone.probability).any()
    for name in one.arms:  # an arm alone answers the same, whoever else takes part
        alone = one.opinion_crop(name)[1]
        if one.patch == everyone.patch:
            np.testing.assert_allclose(alone, everyone.opinion_crop(name)[1], atol=1e-5)
    a_session.use_experts(None)
    a_session.add(click(a_volume, (14, 12, 6)))
    a_session.use_experts([])
    a_session.add(click(a_volume, (13, 13, 6)))
    assert a_session.to_json()["experts"] == []
    check_replay(a_session)
    before = snapshot(a_session)
    with pytest.raises(SessionStateError, match="got \\['nobody'\\]"):
        a_session.use_experts(["nobody"])
    check_same(before, a_session)


def test_two_sessions_share_one_model(a_bundle: Bundle, a_session: Session, an_oblique_volume: Volume) -> None:
    other = Session(a_bundle, device="cpu", model=a_session.model)
    assert other.model is a_session.model
    other.set_volume(an_oblique_volume)
    first = a_session.add(click(a_session.volume, INSIDE))
    second = other.add(click(an_oblique_volume, INSIDE))
    assert first.volume is a_session.volume
    assert second.volume is an_oblique_volume
    assert a_session.prediction is first


# -- everything together -----------------------------------------------------------------------------------------------

AN_ACT = st.tuples(
    st.sampled_from(["click", "no click", "scribble", "edit", "amend", "erase", "finish", "islands"])
    | st.sampled_from(
        ["select a", "select b", "select c", "remove", "undo", "redo", "reset", "drop", "lock", "unlock"]
    ),
    st.integers(0, 10**6),
    st.sampled_from(list(Neighbours)),
)


def act(session: Session, what: str, seed: int, neighbours: Neighbours) -> None:
    volume, random = session.volume, np.random.default_rng(seed)
    ijk = [int(random.integers(size)) for size in volume.shape_ijk]
    mask = session.prediction.mask if session.prediction else np.zeros(volume.shape_kji, dtype=bool)
    match what.split():
        case ["click"]:
            session.add(click(volume, ijk), neighbours)
        case ["no", "click"]:
            session.add(click(volume, ijk, NEGATIVE), neighbours)
        case ["scribble"]:
            session.add(ScribblePrompt.from_ijk([ijk, [x // 2 for x in ijk]], volume), neighbours)
        case ["edit" | "amend" | "erase" as kind]:
            i, j, k = ijk
            mask[k : k + 4, j : j + 5, i : i + 6] = kind != "erase"
            session.edit(MaskPrompt.from_array(mask, volume), kind == "amend", neighbours)
        case ["finish"]:
            session.finish(seed % 4)
        case ["islands"]:
            session.finish(0.5, islands=False)
        case ["drop"]:
            steps = list(session.steps)
            if steps:
                del steps[seed % len(steps)]
            session.revise(steps)
        case ["select", name]:
            session.select(name)
        case [verb]:
            getattr(session, verb)()


@settings(max_examples=20, deadline=None)
@given(st.lists(AN_ACT, min_size=3, max_size=10))
def test_whatever_is_done_is_undone_and_replayed_and_refusals_change_nothing(
    a_tiny_model_session: Session, acts: list[tuple[str, int, Neighbours]]
) -> None:
    random = np.random.default_rng(5)
    matrix = np.array([[-0.8, 0.1, 0.0, 4.0], [0.1, 1.1, 0.2, -3.0], [0.0, -0.2, 2.4, 9.0], [0, 0, 0, 1]])
    session = session_on(a_tiny_model_session, Volume(random.normal(0, 1, (13, 17, 21)).astype(np.float32), matrix))
    for what, seed, neighbours in acts:
        before, shown = snapshot(session), masks(session)
        steps = session.steps
        try:
            act(session, what, seed, neighbours)
        except KA2ERError:
            check_same(before, session)
            continue
        check_changed(session, shown, what)
        finish_withdrawn = what in ("finish", "islands") and len(session.steps) < len(steps)  # as it was before it
        if session.steps != steps and what not in ("undo", "redo", "amend") and not finish_withdrawn:
            state = session._state
            session.undo()
            coalesced = what in ("finish", "islands")  # undo goes back further
            assert coalesced or {name: mask.tobytes() for name, mask in masks(session).items()} == before[9]
            session.redo()
            assert session._state is state
    check_replay(session)


def check_changed(session: Session, before: dict[str, np.ndarray], what: str) -> None:
    if what.startswith("select"):
        return
    after = masks(session)
    for name in before.keys() | after.keys():
        nothing = np.zeros(session.volume.shape_kji, dtype=bool)
        different = before.get(name, nothing) != after.get(name, nothing)
        if session.changed.size:
            different[session.changed.slices] = False
        assert not different.any(), (what, name)


def test_a_file_with_every_kind_of_step_reads_back(a_session: Session, a_volume: Volume, tmp_path: Path) -> None:
    a_session.select("liver")
    a_session.add(click(a_volume, INSIDE), Neighbours.KEEP)
    a_session.finish(1.5, islands=False)
    a_session.edit(MaskPrompt.from_array(speckled(a_volume.shape_kji), a_volume), amend=True)
    a_session.lock()
    a_session.select("spleen")
    a_session.use_experts(["tiny_trunk"])
    a_session.add(click(a_volume, CORNER), Neighbours.OVERLAP)
    a_session.select("gone")
    a_session.remove()
    a_session.save(tmp_path / "prompts.json")
    again = Session.replay(tmp_path / "prompts.json", a_volume, a_session.bundle, device="cpu")
    assert again.steps == a_session.steps
    assert again.to_json() == a_session.to_json()
    assert again.experts == ("tiny_trunk",)
    assert set(a_session.to_json(steps=False)) == set(a_session.to_json()) - {"steps"}
    assert isinstance(a_session.steps[1].done, Finish)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"neighbours": "eat"}, '"neighbours" in JSON must be one of'),
        ({"experts": "all"}, '"experts" in JSON must be a list'),
        ({"amend": True}, "a step in JSON must have"),
        ({"prompt": None, "edit": {}}, "a step in JSON must have"),
    ],
)
def test_a_step_in_json_is_checked(a_volume: Volume, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        Step.from_json({"object": "liver", "prompt": click(a_volume, INSIDE).to_json(), **change})


@pytest.mark.parametrize(
    "entry",
    [
        {"object": "liver", "edit": {"type": "point", "ras": [0, 0, 0], "polarity": "positive"}},
        {"object": "liver", "edit": 3},
        {"object": "liver", "finish": {"smoothing_mm": 1.0}},
        {"object": "liver", "finish": {"smoothing_mm": "x", "islands": True}},
        {"object": "liver", "finish": {"smoothing_mm": 1.0, "islands": True, "more": 1}},
        {"object": "liver", "finish": {"smoothing_mm": 1.0, "islands": True}, "neighbours": "keep"},
    ],
)
def test_an_edit_or_finish_in_json_is_checked(entry: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        Step.from_json(entry)
