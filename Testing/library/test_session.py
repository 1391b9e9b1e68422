"""The session's verbs and promises. Weights are random or the model is a fake: promises hold for any model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import KA2ERSegment.session as session_module
from KA2ERSegment import (
    BoxPrompt,
    LassoPrompt,
    MaskPrompt,
    PointPrompt,
    Polarity,
    Prediction,
    ScribblePrompt,
    Session,
    Volume,
    answering,
    load_bundle,
)
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.constraints import SPECK, click_reach
from KA2ERSegment.errors import DeviceError, KA2ERError, PromptError, SessionStateError
from KA2ERSegment.geometry import Box
from KA2ERSegment.mask_decoder import Decoded
from KA2ERSegment.prompt_encoder import PatchPrompts
from KA2ERSegment.testing import tiny_bundle

NEGATIVE = Polarity.NEGATIVE
SHAPE_KJI = (14, 22, 30)
INSIDE = (12, 12, 6)  # IJK, in the bright ellipsoid
OUTSIDE = (26, 3, 12)


# -- fixtures and fakes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def a_tiny_model_session(a_bundle: Bundle) -> Session:
    """One model for all tests; `set_volume` makes everything else new."""
    return Session(a_bundle, device="cpu")


@pytest.fixture
def a_tiny_session(a_tiny_model_session: Session, a_volume: Volume) -> Session:
    """With the tiny untrained model, and a volume."""
    a_tiny_model_session.set_volume(a_volume)
    return a_tiny_model_session


@pytest.fixture
def a_session(a_bundle: Bundle, a_volume: Volume) -> Session:
    """With a fake model that finds what is bright, and a volume."""
    return fake_session(a_bundle, FakeModel(lambda image, prompts: image * 2 - 1), a_volume)


class FakeModel:
    """Answers by a function of image and prompts; counts what it is asked for."""

    arms = ("foundation", "fake")
    voters = ()
    reads_raw = False

    def __init__(self, answer: Callable[[np.ndarray, PatchPrompts], np.ndarray]) -> None:
        self.answer = answer
        self.encoded = self.decoded = 0

    def to(self, device: torch.device) -> FakeModel:
        return self

    def encode(self, image: torch.Tensor, raw: None = None, prior: None = None) -> SimpleNamespace:
        self.encoded += 1
        weights = torch.full((1, 2, 4, 4, 4), 0.5)
        return SimpleNamespace(image=image, weights=weights, nbytes=4 * image.numel())

    def decode(self, features: SimpleNamespace, prompts: PatchPrompts) -> Decoded:
        self.decoded += 1
        logits = self.answer(features.image[0, 0].numpy(), prompts).astype(np.float32)
        nothing = torch.zeros(1, 0)  # no features: there is no network
        return Decoded(torch.from_numpy(logits)[None], torch.tensor([0.9]), nothing, nothing)


def noise_model(seed: int) -> FakeModel:
    """Says something else at every call: smooth blobs, white noise, all or nothing."""
    random = np.random.default_rng(seed)

    def answer(image: np.ndarray, prompts: PatchPrompts) -> np.ndarray:
        noise = random.normal(0, 1, image.shape)
        kind = random.integers(4)
        if kind == 0:
            return noise * 3
        if kind == 1:
            return noise + random.choice([-20, 20])
        smooth = ndimage.gaussian_filter(noise, 2.5)
        return smooth / smooth.std() * 6 + random.normal(0, 4)

    return FakeModel(answer)


def threshold_model() -> FakeModel:
    """A perfect segmenter of bright objects: what is above 50 and connected to the box or to a positive seed."""

    def answer(image: np.ndarray, prompts: PatchPrompts) -> np.ndarray:
        components, _ = ndimage.label(image > 50)
        seeds = (prompts.positive | prompts.box)[0].numpy()
        wanted = np.setdiff1d(np.unique(components[seeds]), [0])
        near = ndimage.binary_dilation(np.isin(components, wanted))
        return np.where(near, (image - 50) / 10, -5.0)

    return FakeModel(answer)


def fake_session(bundle: Bundle, model: FakeModel, volume: Volume, **more: Any) -> Session:
    session = Session(bundle, device="cpu", model=model, **more)  # type: ignore[arg-type]
    session.set_volume(volume)
    return session


@pytest.fixture
def raw_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees grey values as they are."""
    monkeypatch.setattr(answering, "normalise", lambda image, inside: torch.stack([image, image], dim=1))


def at(array: np.ndarray, ijk: tuple[int, int, int]) -> Any:
    return array[ijk[2], ijk[1], ijk[0]]


def masks(session: Session) -> dict[str, np.ndarray]:
    predictions = {name: session.prediction_of(name) for name in session.objects}
    return {name: p.mask for name, p in predictions.items() if p is not None}


def snapshot(session: Session) -> tuple[Any, ...]:
    labels, names = session.label_map()
    return (
        session._state,
        session.objects,
        session.selected,
        session.prediction,
        session.can_undo,
        session.can_redo,
        session.changed,
        session.prompts(),
        names,
        labels.tobytes(),
    )


def check_same(before: tuple[Any, ...], session: Session) -> None:
    after = snapshot(session)
    assert after[0] is before[0]
    assert after[3] is before[3]
    assert after[1:3] + after[4:] == before[1:3] + before[4:]


# -- the lines of the issue --------------------------------------------------------------------------------------------


def test_the_lines_of_the_interface_work_as_written(
    a_bundle: Bundle, an_array: np.ndarray, an_oblique_affine: np.ndarray, tmp_path: Path
) -> None:
    volume = Volume(an_array, an_oblique_affine, name="ct")
    session = Session(load_bundle(a_bundle.folder), device="auto")
    session.set_volume(volume)
    prediction = session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), volume))
    prediction = session.add(PointPrompt.from_ijk((3, 3, 2), volume, Polarity.NEGATIVE))
    assert prediction.mask.shape == volume.shape_kji
    assert prediction.mask.dtype == bool
    assert prediction.probability.shape == volume.shape_kji
    assert prediction.probability.min() >= 0
    assert prediction.probability.max() <= 1
    assert isinstance(prediction.changed, Box)
    for opinion in prediction.experts.values():
        assert opinion.probability.shape == opinion.weight.shape == volume.shape_kji
        assert 0 <= opinion.mean_weight <= 1
    session.undo()
    session.redo()
    session.reset()
    session.select("liver")
    session.add(PointPrompt.from_ijk(INSIDE, volume))
    session.save(tmp_path / "prompts.json")
    again = Session.replay(tmp_path / "prompts.json", volume, a_bundle, device="cpu")
    np.testing.assert_array_equal(masks(again)["liver"], masks(session)["liver"])


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(a_bundle: Bundle, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="finds no CUDA"):
        Session(a_bundle, device=device)
    assert Session(a_bundle, device="auto").device == torch.device("cpu")


def test_a_cuda_device_beyond_the_last_is_refused(a_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="there are 2 CUDA devices"):
        Session(a_bundle, device="cuda:2")


@pytest.mark.parametrize("device", ["gpu", "", "cudart", "cuda:x", "CPU"])
def test_an_unknown_device_is_refused(a_bundle: Bundle, device: str) -> None:
    with pytest.raises(DeviceError, match="must be 'auto', 'cpu', 'cuda'"):
        Session(a_bundle, device=device)


# -- undo, redo, reset, select, lock -----------------------------------------------------------------------------------


def test_undo_and_redo_move_along_the_prompts(a_session: Session, a_volume: Volume) -> None:
    first = a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    second = a_session.add(PointPrompt.from_ijk((14, 12, 6), a_volume, NEGATIVE))
    undone = a_session.undo()
    assert undone is not None
    np.testing.assert_array_equal(undone.mask, first.mask)
    assert a_session.prediction is first
    assert len(a_session.prompts()) == 1
    assert a_session.undo() is None
    assert a_session.prediction is None
    assert not a_session.can_undo
    with pytest.raises(SessionStateError, match="nothing to undo"):
        a_session.undo()
    a_session.redo()
    redone = a_session.redo()
    assert redone is not None
    np.testing.assert_array_equal(redone.mask, second.mask)
    assert a_session.prediction is second
    assert not a_session.can_redo
    with pytest.raises(SessionStateError, match="nothing to redo"):
        a_session.redo()


def test_a_new_prompt_drops_what_redo_would_bring(a_session: Session, a_volume: Volume) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.undo()
    a_session.add(PointPrompt.from_ijk((13, 12, 6), a_volume))
    assert not a_session.can_redo
    assert a_session.prompts() == (PointPrompt.from_ijk((13, 12, 6), a_volume),)


def test_the_prompt_after_an_undo_builds_on_what_is_left(a_session: Session, a_volume: Volume) -> None:
    first, second, third = (PointPrompt.from_ijk((i, 12, 6), a_volume) for i in (12, 13, 15))
    a_session.add(first)
    expected = a_session.add(third).mask
    a_session.undo()
    a_session.add(second)
    a_session.undo()
    np.testing.assert_array_equal(a_session.add(third).mask, expected)


def test_changed_after_undo_and_redo_holds_all_differences_of_all_objects(a_bundle: Bundle, a_volume: Volume) -> None:
    session = fake_session(a_bundle, noise_model(3), a_volume)
    random = np.random.default_rng(0)
    for n in range(8):
        session.select(f"object {n % 3}")
        session.add(PointPrompt.from_ijk([random.integers(size) for size in a_volume.shape_ijk], a_volume))
    session.reset()
    moves = [session.undo] * 9 + [session.redo] * 9
    for move in moves:
        before, _ = session.label_map()
        prediction = move()
        after, _ = session.label_map()
        assert prediction is None or prediction.changed == session.changed
        check_box(before != after, session.changed)


def check_box(different: np.ndarray, box: Box) -> None:
    if box.size:
        different = different.copy()
        different[box.slices] = False
    assert not different.any()


def test_selecting_is_no_step_of_undo_and_keeps_redo(a_session: Session, a_volume: Volume) -> None:
    a_session.select("liver")
    assert a_session.objects == ("liver",)
    assert not a_session.can_undo
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.undo()
    a_session.select("spleen")
    assert a_session.can_redo
    a_session.redo()
    assert a_session.selected == "spleen"
    assert a_session.prompts("liver")
    a_session.undo()
    assert (a_session.objects, a_session.selected) == (("liver", "spleen"), "spleen")
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    assert a_session.prompts("spleen")
    assert not a_session.prompts("liver")


def test_the_nameless_first_object_stays_once_something_was_done_with_it(a_session: Session, a_volume: Volume) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.select("liver")
    assert a_session.objects == ("object", "liver")
    a_session.undo()
    assert a_session.select("object") is None
    a_session.redo()
    assert a_session.prediction is not None


@pytest.mark.parametrize("name", ["", None, 3])
def test_an_object_needs_a_name(a_session: Session, name: Any) -> None:
    before = snapshot(a_session)
    with pytest.raises(SessionStateError, match="name must be text and not empty"):
        a_session.select(name)
    check_same(before, a_session)


@pytest.mark.parametrize("verb", ["lock", "unlock", "prompts", "prediction_of"])
def test_an_unknown_object_is_named_in_the_error(a_session: Session, verb: str) -> None:
    before = snapshot(a_session)
    with pytest.raises(SessionStateError, match="no object 'kidney'; there are \\['object'\\]"):
        getattr(a_session, verb)("kidney")
    check_same(before, a_session)


def test_reset_drops_one_object_and_undo_brings_it_back(a_session: Session, a_volume: Volume) -> None:
    a_session.select("liver")
    liver = a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.select("spleen")
    a_session.add(PointPrompt.from_ijk(OUTSIDE, a_volume))
    a_session.select("liver")
    a_session.reset()
    assert a_session.prediction is None
    assert a_session.prompts() == ()
    assert a_session.prompts("spleen")
    assert not (a_session.label_map()[0] == 1).any()
    kept = a_session.prediction_of("liver")
    assert kept is None
    a_session.undo()
    assert a_session.prediction is not None
    assert a_session.prompts() == (PointPrompt.from_ijk(INSIDE, a_volume),)
    assert a_session.prediction.patch == liver.patch


def test_reset_of_an_object_without_prompts_is_no_step(a_session: Session) -> None:
    a_session.reset()
    assert not a_session.can_undo


def test_a_locked_object_refuses_prompts_and_reset_until_it_is_unlocked(a_session: Session, a_volume: Volume) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.lock()
    a_session.lock()  # no second step
    before = snapshot(a_session)
    with pytest.raises(SessionStateError, match="object 'object' is locked; got a PointPrompt"):
        a_session.add(PointPrompt.from_ijk(OUTSIDE, a_volume))
    with pytest.raises(SessionStateError, match=r"is locked; got its reset\. Unlock it"):
        a_session.reset()
    check_same(before, a_session)
    a_session.undo()
    a_session.add(PointPrompt.from_ijk(OUTSIDE, a_volume, NEGATIVE))
    a_session.lock("object")
    a_session.unlock()
    a_session.add(PointPrompt.from_ijk((1, 1, 1), a_volume, NEGATIVE))


def test_history_is_bounded(a_session: Session, a_volume: Volume) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    for _ in range(50):
        a_session.lock()
        a_session.unlock()
    assert len(a_session._history) == session_module.HISTORY
    undone = 0
    while a_session.can_undo:
        a_session.undo()
        undone += 1
    assert undone == session_module.HISTORY - 1
    assert a_session.prediction is not None  # the first prompt is beyond the history


def test_another_volume_starts_anew(a_session: Session, a_volume: Volume, an_oblique_volume: Volume) -> None:
    a_session.select("liver")
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.set_volume(an_oblique_volume)
    assert a_session.objects == ("object",)
    assert a_session.volume is an_oblique_volume
    assert not a_session.can_undo
    assert a_session.prediction is None
    assert a_session.add(PointPrompt.from_ijk(INSIDE, an_oblique_volume)).volume is an_oblique_volume


def test_label_map_numbers_the_objects_in_their_order(a_session: Session, a_volume: Volume) -> None:
    for name, ijk in (("liver", INSIDE), ("spleen", OUTSIDE), ("empty", None)):
        a_session.select(name)
        if ijk:
            a_session.add(PointPrompt.from_ijk(ijk, a_volume))
    labels, names = a_session.label_map()
    assert names == ("liver", "spleen", "empty")
    assert labels.dtype == np.uint16
    assert (at(labels, INSIDE), at(labels, OUTSIDE)) == (1, 2)
    for value, (_, mask) in enumerate(masks(a_session).items(), 1):
        np.testing.assert_array_equal(labels == value, mask)


# -- refused prompts ---------------------------------------------------------------------------------------------------


def test_verbs_before_set_volume_say_so(a_bundle: Bundle, a_volume: Volume, tmp_path: Path) -> None:
    session = Session(a_bundle, device="cpu")
    for verb in (
        lambda: session.add(PointPrompt.from_ijk(INSIDE, a_volume)),
        lambda: session.label_map(),
        lambda: session.save(tmp_path / "prompts.json"),
        lambda: session.give({"format": 1, "objects": [], "selected": "a", "steps": []}),
        lambda: session.volume,
    ):
        with pytest.raises(SessionStateError, match="Call `set_volume` first"):
            verb()
    assert not session.can_undo
    assert list(tmp_path.iterdir()) == []


def test_rejected_prompt_leaves_the_session_unchanged(
    a_session: Session, a_volume: Volume, an_oblique_volume: Volume, a_mask: np.ndarray
) -> None:
    a_session.select("locked")
    a_session.add(BoxPrompt.from_ijk((2, 2, 2), (8, 8, 6), a_volume))
    a_session.add(PointPrompt.from_ijk((5, 5, 4), a_volume))
    a_session.lock()
    a_session.select("other")
    a_session.add(PointPrompt.from_ijk(OUTSIDE, a_volume))
    a_session.select("liver")
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.add(PointPrompt.from_ijk((13, 12, 6), a_volume, NEGATIVE))
    a_session.lock()
    a_session.undo()  # so that redo must survive as well
    before = snapshot(a_session)
    refused: list[tuple[Any, str]] = [
        (PointPrompt((1e4, 0, 0)), "outside volume"),
        (BoxPrompt((1e4, 0, 0), ((1, 0, 0), (0, 1, 0), (0, 0, 1))), "outside"),
        (ScribblePrompt(((1e4, 0, 0),)), "outside"),
        (MaskPrompt.from_array(a_mask, an_oblique_volume), "must lie on the voxels"),
        (PointPrompt.from_ijk(INSIDE, a_volume, NEGATIVE), "must agree"),
        (PointPrompt.from_ijk((13, 12, 6), a_volume), "must agree"),
        (PointPrompt.from_ijk((5, 5, 4), a_volume), "must lie outside locked objects; the click lies in 'locked'"),
        (PointPrompt.from_ijk(OUTSIDE, a_volume), "can only belong to one object"),
        ("a click", "one of the library's prompts, got str"),
        (None, "got NoneType"),
    ]
    for prompt, words in refused:
        with pytest.raises(PromptError, match=words):
            a_session.add(prompt)
        check_same(before, a_session)
    assert a_session.can_redo


def test_a_model_that_fails_leaves_the_session_unchanged(a_bundle: Bundle, a_volume: Volume) -> None:
    model = noise_model(0)
    session = fake_session(a_bundle, model, a_volume)
    session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    before = snapshot(session)

    def fail(image: np.ndarray, prompts: PatchPrompts) -> np.ndarray:
        raise MemoryError

    model.answer = fail
    with pytest.raises(MemoryError):
        session.add(PointPrompt.from_ijk(OUTSIDE, a_volume))
    check_same(before, session)


# -- promises ----------------------------------------------------------------------------------------------------------


def some_geometry(seed: int) -> Volume:
    """Oblique, anisotropic, often left-handed, with axes in any order."""
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = turn * random.uniform(0.5, 4, 3)
    matrix[:3, 3] = random.uniform(-100, 100, 3)
    shape = tuple(random.integers(9, 26, 3))
    return Volume(random.normal(0, 1, shape).astype(np.float32), matrix, "noise")


a_share = st.tuples(*[st.floats(0, 0.999)] * 3)
an_act = st.one_of(
    st.tuples(st.sampled_from(["click", "click", "click", "no click", "no click", "scribble", "no scribble"]), a_share),
    st.tuples(st.sampled_from(["box", "no box", "slice", "lasso", "mask"]), a_share),
    st.tuples(
        st.sampled_from(["select a", "select b", "select c", "lock", "unlock", "undo", "redo", "reset"]), a_share
    ),
)


def act(session: Session, what: str, share: tuple[float, float, float]) -> Prediction | None:
    volume = session.volume
    size = volume.shape_ijk
    ijk = tuple(int(s * n) for s, n in zip(share, size, strict=True))
    stop = tuple(min(n, x + 3 + n // 4) for x, n in zip(ijk, size, strict=True))
    polarity = NEGATIVE if what.startswith("no ") else Polarity.POSITIVE
    match what.removeprefix("no ").split():
        case ["click"]:
            return session.add(PointPrompt.from_ijk(ijk, volume, polarity))
        case ["scribble"]:
            return session.add(ScribblePrompt.from_ijk([ijk, [x - 1 for x in stop]], volume, polarity))
        case ["box"]:
            return session.add(BoxPrompt.from_ijk(ijk, stop, volume, polarity))
        case ["slice"]:
            return session.add(BoxPrompt.from_ijk(ijk, (*stop[:2], ijk[2] + 1), volume))
        case ["lasso"]:
            i, j, k = ijk
            corners = [(i, j, k), (i + 6, j, k), (i, j + 5, k)]
            return session.add(LassoPrompt.from_ijk(corners, volume))
        case ["mask"]:
            mask = np.zeros(volume.shape_kji, dtype=bool)
            mask[Box(ijk, stop).slices] = True
            return session.add(MaskPrompt.from_array(mask, volume))
        case ["select", name]:
            session.select(name)
        case [verb]:
            getattr(session, verb)()
    return None


def check_promises(session: Session, before: dict[str, np.ndarray], locked: set[str], prediction: Prediction) -> None:
    volume = session.volume
    now = masks(session)
    assert sum(mask.astype(int) for mask in now.values()).max() <= 1  # no overlap
    for name in session.objects:
        for prompt in session.prompts(name):
            if isinstance(prompt, PointPrompt):
                inside = at(now[name], prompt.ijk(volume))
                assert inside == (prompt.polarity is Polarity.POSITIVE), (name, prompt)
    for name in locked & before.keys():
        np.testing.assert_array_equal(now[name], before[name])
    for name, mask in now.items():
        check_box(mask != before.get(name, np.zeros_like(mask)), prediction.changed)
        if name != prediction.name and name in before:
            check_only_cut(session, name, before[name], mask)
    check_probability(prediction)
    check_specks(session, prediction, locked, now)


def check_only_cut(session: Session, name: str, before: np.ndarray, mask: np.ndarray) -> None:
    """Another object's mask only loses, and what is left of it has no specks that were not there."""
    assert not (mask & ~before).any()
    old, _ = ndimage.label(before)
    new, count = ndimage.label(mask)
    clicks = [p.ijk(session.volume) for p in session.prompts(name) if isinstance(p, PointPrompt)]
    held = {at(new, ijk) for ijk in clicks}
    for n in set(range(1, count + 1)) - held:
        part = new == n
        assert part.sum() >= SPECK or (old == old[part][0]).sum() == part.sum()


def check_probability(prediction: Prediction) -> None:
    probability = prediction.probability
    np.testing.assert_array_equal(probability > 0.5, prediction.mask)
    patch = prediction.volume.from_canonical_box(prediction.patch.box(prediction.canonical.shape_kji))
    outside = np.ones_like(prediction.mask)
    outside[patch.slices] = False
    assert not probability[outside].any()
    assert probability[~outside].min() > 0


def check_specks(session: Session, prediction: Prediction, locked: set[str], now: dict[str, np.ndarray]) -> None:
    """Near the object's clicks: no small part without a positive click, no small hole that could be filled."""
    volume, canonical = prediction.volume, prediction.canonical
    own = [p for p in session.prompts(prediction.name) if isinstance(p, PointPrompt)]
    rivals = [
        p for n in session.objects if n != prediction.name for p in session.prompts(n) if isinstance(p, PointPrompt)
    ]
    near = np.zeros(volume.shape_kji, dtype=bool)
    domain = prediction.patch.box(canonical.shape_kji)
    for prompt in own:
        box = click_reach(prediction.patch, prompt.ijk(canonical)).intersect(domain)
        near[volume.from_canonical_box(box).slices] = True
    positive = [p.ijk(volume) for p in own if p.polarity is Polarity.POSITIVE]
    negative = [p.ijk(volume) for p in own if p.polarity is NEGATIVE]
    negative += [p.ijk(volume) for p in rivals if p.polarity is Polarity.POSITIVE]
    blocked = np.zeros(volume.shape_kji, dtype=bool)
    for name in locked & now.keys():
        blocked |= now[name]
    for value, keep in ((True, positive), (False, negative)):
        components, count = ndimage.label(prediction.mask == value)
        for n in range(1, count + 1):
            part = components == n
            if part.sum() < SPECK and (part & near).any() and not any(at(part, ijk) for ijk in keep):
                assert not value
                assert (part & blocked).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(an_act, min_size=2, max_size=9))
def test_promises_hold_after_every_prediction(
    a_bundle: Bundle, seed: int, acts: list[tuple[str, tuple[float, float, float]]]
) -> None:
    session = fake_session(a_bundle, noise_model(seed), some_geometry(seed))
    for what, share in acts:
        unchanged, before = snapshot(session), masks(session)
        locked = {name for name in session.objects if session._state.of(name).locked}
        try:
            prediction = act(session, what, share)
        except KA2ERError:
            check_same(unchanged, session)
            continue
        if prediction is not None:
            check_promises(session, before, locked, prediction)


def test_a_click_takes_a_ball_from_an_object_that_is_not_locked(a_bundle: Bundle, a_volume: Volume) -> None:
    session = fake_session(a_bundle, FakeModel(lambda image, prompts: np.full(image.shape, 5.0)), a_volume)
    session.select("first")
    session.add(BoxPrompt.from_ijk((0, 0, 0), a_volume.shape_ijk, a_volume))
    session.add(PointPrompt.from_ijk((20, 4, 3), a_volume))
    session.model.answer = lambda image, prompts: np.full(image.shape, -5.0)  # type: ignore[assignment]
    session.select("second")
    second = session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    assert second.mask.sum() >= 19
    first = masks(session)["first"]
    assert not (first & second.mask).any()
    assert (first | second.mask).all()
    assert at(first, (20, 4, 3))


def test_a_voxel_goes_to_the_more_probable_object(a_bundle: Bundle, a_volume: Volume) -> None:
    levels = {"weak": 1.0, "strong": 4.0, "weaker": 0.9}
    session = fake_session(a_bundle, noise_model(0), a_volume)
    for name, level in levels.items():
        session.model.answer = lambda image, prompts, x=level: np.full(image.shape, x)  # type: ignore[assignment]
        session.select(name)
        session.add(BoxPrompt.from_ijk((4, 4, 3), (20, 16, 11), a_volume))
    found = masks(session)
    assert found["strong"].any()
    assert not found["weak"].any()
    assert not found["weaker"].any()


def test_a_mask_on_a_locked_object_goes_around_it(a_bundle: Bundle, a_volume: Volume) -> None:
    session = fake_session(a_bundle, FakeModel(lambda image, prompts: np.full(image.shape, 1.0)), a_volume)
    session.select("locked")
    session.add(BoxPrompt.from_ijk((4, 4, 3), (10, 10, 8), a_volume))
    locked = masks(session)["locked"]
    session.lock()
    session.model.answer = lambda image, prompts: np.full(image.shape, 9.0)  # type: ignore[assignment]
    session.select("greedy")
    greedy = session.add(BoxPrompt.from_ijk((0, 0, 0), a_volume.shape_ijk, a_volume))
    np.testing.assert_array_equal(masks(session)["locked"], locked)
    np.testing.assert_array_equal(greedy.mask, ~locked)


def test_other_objects_are_negatives_for_the_network(a_bundle: Bundle, a_volume: Volume, raw_values: None) -> None:
    seen: list[PatchPrompts] = []

    def answer(image: np.ndarray, prompts: PatchPrompts) -> np.ndarray:
        seen.append(prompts)
        return (image - 50) / 10

    session = fake_session(a_bundle, FakeModel(answer), a_volume)
    session.add(BoxPrompt.from_ijk((4, 4, 2), (22, 20, 11), a_volume))
    assert not seen[-1].negative.any()
    session.select("second")
    session.add(BoxPrompt.from_ijk((4, 4, 2), (22, 20, 11), a_volume))
    assert seen[-1].negative.sum() > 100


@pytest.mark.parametrize("kind", ["click", "scribble", "box", "mask"])
def test_negative_prompts_alone_give_an_empty_mask_and_the_first_click_starts_anew(
    a_bundle: Bundle, a_volume: Volume, a_mask: np.ndarray, kind: str
) -> None:
    prompts = {
        "click": PointPrompt.from_ijk(OUTSIDE, a_volume, NEGATIVE),
        "scribble": ScribblePrompt.from_ijk([OUTSIDE, (20, 3, 10)], a_volume, NEGATIVE),
        "box": BoxPrompt.from_ijk((22, 1, 9), (28, 5, 13), a_volume, NEGATIVE),
        "mask": MaskPrompt.from_array(a_mask, a_volume, NEGATIVE),
    }
    session = fake_session(a_bundle, FakeModel(lambda image, prompts: np.full(image.shape, 5.0)), a_volume)
    prediction = session.add(prompts[kind])
    assert not prediction.mask.any()
    check_probability(prediction)
    assert prediction.box.size == 0
    prediction = session.add(PointPrompt.from_ijk((2, 2, 2), a_volume))
    assert at(prediction.mask, (2, 2, 2))
    assert prediction.mask.sum() > 50
    if kind == "click":
        assert not at(prediction.mask, OUTSIDE)


# -- geometry and determinism ------------------------------------------------------------------------------------------


def stored_otherwise(volume: Volume, order: tuple[int, int, int], flips: tuple[int, int, int]) -> Volume:
    """The same image with its IJK axes in another order and direction."""
    kji = tuple(2 - order[2 - axis] for axis in range(3))
    steps = tuple(slice(None, None, flips[2 - axis]) for axis in range(3))
    array = np.ascontiguousarray(volume.array_kji.transpose(kji)[steps])
    matrix = np.array(volume.ijk_to_ras)
    matrix[:3, :3] = volume.ijk_to_ras[:3, list(order)] * flips
    for new, old in enumerate(order):
        if flips[new] < 0:
            matrix[:3, 3] += volume.ijk_to_ras[:3, old] * (volume.shape_ijk[old] - 1)
    return Volume(array, matrix, volume.name)


@pytest.mark.parametrize(
    ("order", "flips"), [((2, 0, 1), (1, -1, 1)), ((1, 0, 2), (-1, -1, -1)), ((0, 2, 1), (-1, 1, -1))]
)
def test_the_mask_does_not_depend_on_how_the_image_is_stored(
    a_tiny_session: Session, an_oblique_volume: Volume, order: tuple[int, int, int], flips: tuple[int, int, int]
) -> None:
    prompts = [
        BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), an_oblique_volume),
        PointPrompt.from_ijk((9, 10, 4), an_oblique_volume, NEGATIVE),
        ScribblePrompt.from_ijk([(10, 11, 6), (15, 13, 7)], an_oblique_volume),
    ]
    found = []
    for volume in (an_oblique_volume, stored_otherwise(an_oblique_volume, order, flips)):
        a_tiny_session.set_volume(volume)
        for prompt in prompts:
            prediction = a_tiny_session.add(prompt)
        found.append(prediction)
    assert found[0].mask.any()
    for name in ("mask", "probability"):
        own, other = (p.volume.to_canonical(getattr(p, name)) for p in found)
        np.testing.assert_array_equal(own, other)
    assert found[0].changed.size == found[1].changed.size


def test_the_same_prompts_give_the_same_mask(a_bundle: Bundle, a_volume: Volume, a_tiny_session: Session) -> None:
    prompts = [PointPrompt.from_ijk(INSIDE, a_volume), PointPrompt.from_ijk((16, 12, 6), a_volume, NEGATIVE)]
    other = Session(a_bundle, device="cpu")
    other.set_volume(a_volume)
    for prompt in prompts:
        first, second = a_tiny_session.add(prompt), other.add(prompt)
        np.testing.assert_array_equal(first.mask, second.mask)
        np.testing.assert_array_equal(first.probability, second.probability)
        assert first.quality == second.quality


# -- patches and features ----------------------------------------------------------------------------------------------


def count_encodes(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts = [0]
    encode = session.model.encode

    def counting(*args: Any, **options: Any) -> Any:
        counts[0] += 1
        return encode(*args, **options)

    monkeypatch.setattr(session.model, "encode", counting)
    return counts


def test_set_volume_computes_nothing(a_session: Session, a_volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_encodes(a_session, monkeypatch)
    a_session.set_volume(a_volume)
    assert counts == [0]


def test_a_further_prompt_inside_the_patch_encodes_nothing(
    a_tiny_session: Session, a_volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_encodes(a_tiny_session, monkeypatch)
    first = a_tiny_session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    assert counts == [1]
    a_tiny_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_tiny_session.add(PointPrompt.from_ijk((7, 8, 4), a_volume, NEGATIVE))
    last = a_tiny_session.add(ScribblePrompt.from_ijk([(10, 11, 6), (15, 13, 7)], a_volume))
    a_tiny_session.undo()
    a_tiny_session.add(PointPrompt.from_ijk((14, 12, 6), a_volume))
    assert counts == [1]
    assert last.patch == first.patch


def test_a_negative_click_far_away_keeps_the_patch(a_bundle: Bundle, a_volume: Volume) -> None:
    session = fake_session(a_bundle, noise_model(0), a_volume)
    patch = session.add(BoxPrompt.from_ijk((10, 10, 5), (13, 13, 8), a_volume)).patch
    assert session.add(PointPrompt.from_ijk((29, 21, 13), a_volume, NEGATIVE)).patch == patch


def test_a_positive_prompt_beyond_the_patch_moves_it(a_bundle: Bundle, a_volume: Volume) -> None:
    for prompt in (
        PointPrompt.from_ijk((29, 21, 13), a_volume),
        ScribblePrompt.from_ijk([(25, 20, 12), (29, 21, 13)], a_volume),
    ):
        session = fake_session(a_bundle, noise_model(1), a_volume)
        before = session.add(BoxPrompt.from_ijk((3, 4, 2), (8, 8, 5), a_volume))
        after = session.add(prompt)
        assert after.patch != before.patch
        assert after.patch.contains((29, 21, 13))
        assert after.patch.contains((3, 4, 2))


def test_features_are_kept_within_their_memory(a_bundle: Bundle, a_volume: Volume) -> None:
    model = threshold_model()
    one = 2 * 32**3 * 4 / 1e6  # MB that the fake's features of a patch take
    session = fake_session(a_bundle, model, a_volume, feature_memory_mb=2.5 * one)
    boxes = [BoxPrompt.from_ijk((i, 3, 2), (i + 6, 9, 7), a_volume) for i in (2, 8, 14, 20)]
    for n, box in enumerate(boxes):
        session.select(str(n))
        session.add(box)
        assert sum(features.nbytes for features in session._answerer.features.values()) <= 2.5e6 * one
    assert model.encoded == 4
    session.add(PointPrompt.from_ijk((22, 6, 4), a_volume))  # the newest patch is there
    assert model.encoded == 4
    session.select("0")
    session.add(PointPrompt.from_ijk((4, 6, 4), a_volume))  # the oldest is not
    assert model.encoded == 5
    small = fake_session(a_bundle, threshold_model(), a_volume, feature_memory_mb=0.0)
    small.add(boxes[0])
    assert len(small._answerer.features) == 1  # the patch at work always stays


def test_what_answers_add_to_features_counts_in_their_memory(a_bundle: Bundle, a_volume: Volume) -> None:
    model = threshold_model()
    one = 2 * 32**3 * 4  # bytes that the fake's features of a patch take
    session = fake_session(a_bundle, model, a_volume, feature_memory_mb=2.5 * one / 1e6)
    for name, i in (("left", 2), ("right", 20)):
        session.select(name)
        session.add(BoxPrompt.from_ijk((i, 3, 2), (i + 6, 9, 7), a_volume))
    kept = session._answerer.features
    assert len(kept) == 2
    for features in kept.values():
        features.nbytes += one
    session.add(PointPrompt.from_ijk((22, 6, 4), a_volume))
    assert [features.nbytes for features in kept.values()] == [2 * one]
    assert model.encoded == 2


class CountedArray:
    """An image that counts the voxels read from it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.read = array, array.shape, 0

    def __getitem__(self, key: Any) -> np.ndarray:
        part = self.array[key]
        self.read += part.size
        return part


def voxels_read(session: Session, volume: Volume, prompt: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    counted: list[CountedArray] = []
    sample = answering.sample_image

    def counting(array: np.ndarray, patch: Any) -> Any:
        counted.append(CountedArray(array))
        return sample(counted[-1], patch)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(answering, "sample_image", counting)
        session.set_volume(volume)
        session.add(prompt)
    return sum(array.read for array in counted)


def test_a_click_reads_no_more_of_a_larger_volume(
    a_bundle: Bundle, a_large_volume: Volume, raw_values: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesion = PointPrompt.from_ijk(LESION, a_large_volume)
    part = Box((340, 340, 160), (440, 440, 240))
    matrix = np.array(a_large_volume.ijk_to_ras)
    matrix[:3, 3] = (matrix @ (*part.start, 1))[:3]
    small = Volume(part.crop(a_large_volume.array_kji), matrix)
    session = fake_session(a_bundle, threshold_model(), small)
    read = [voxels_read(session, volume, lesion, monkeypatch) for volume in (small, a_large_volume)]
    assert read[0] == read[1] < 500_000


def test_a_patch_over_a_whole_volume_skips_voxels(
    a_bundle: Bundle, a_large_volume: Volume, raw_values: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = fake_session(a_bundle, threshold_model(), a_large_volume)
    box = BoxPrompt.from_ijk((0, 0, 0), a_large_volume.shape_ijk, a_large_volume)
    assert voxels_read(session, a_large_volume, box, monkeypatch) < 1_000_000  # of 79 million


# -- any size of object in a large volume ------------------------------------------------------------------------------

LARGE_KJI, LARGE_SPACING = (300, 512, 512), (0.8, 0.8, 1.5)
LESION, LESION_MM = (390, 390, 200), (2.0, 2.0, 2.0)  # centre IJK, radii in mm
LIVER, LIVER_MM = (180, 230, 120), (95.0, 65.0, 70.0)


def ball_in_large_volume(centre: tuple[int, int, int], radii_mm: tuple[float, float, float]) -> tuple[Box, np.ndarray]:
    """Box and (K, J, I) bool of an ellipsoid."""
    radii = np.array(radii_mm) / LARGE_SPACING
    start, stop = np.floor(np.array(centre) - radii).astype(int), np.ceil(np.array(centre) + radii).astype(int) + 1
    i, j, k = (((np.arange(a, b) - x) / r) ** 2 for a, b, x, r in zip(start, stop, centre, radii, strict=True))
    box = Box(tuple(start.tolist()), tuple(stop.tolist()))
    return box, k[:, None, None] + j[:, None] + i <= 1


@pytest.fixture(scope="module")
def a_large_volume() -> Volume:
    """512 x 512 x 300 int16, axes towards L, P and S: air, a liver and a lesion of 4 mm."""
    array = np.zeros(LARGE_KJI, dtype=np.int16)
    for centre, radii in ((LESION, LESION_MM), (LIVER, LIVER_MM)):
        box, inside = ball_in_large_volume(centre, radii)
        array[box.slices][inside] = 100
    return Volume(array, np.diag([-0.8, -0.8, 1.5, 1.0]), "a large volume")


@pytest.mark.parametrize("by", ["box", "click", "slice"])
@pytest.mark.parametrize(("centre", "radii"), [(LESION, LESION_MM), (LIVER, LIVER_MM)], ids=["lesion", "liver"])
def test_a_lesion_and_a_liver_are_found_in_a_large_volume(
    a_bundle: Bundle,
    a_large_volume: Volume,
    raw_values: None,
    by: str,
    centre: tuple[int, int, int],
    radii: tuple[float, float, float],
) -> None:
    session = fake_session(a_bundle, threshold_model(), a_large_volume)
    box, truth = ball_in_large_volume(centre, radii)
    k = centre[2]
    prediction = session.add(
        {
            "box": BoxPrompt.from_ijk(box.start, box.stop, a_large_volume),
            "slice": BoxPrompt.from_ijk((*box.start[:2], k), (*box.stop[:2], k + 1), a_large_volume),
            "click": PointPrompt.from_ijk(centre, a_large_volume),
        }[by]
    )
    mask = prediction.mask
    common = np.logical_and(mask[box.slices], truth).sum()
    assert 2 * common / (np.count_nonzero(mask) + truth.sum()) > 0.85
    assert session.model.encoded <= 7  # type: ignore[attr-defined]
    encoded = session.model.encoded  # type: ignore[attr-defined]
    session.add(PointPrompt.from_ijk((centre[0] + 1, centre[1], k), a_large_volume))
    assert session.model.encoded == encoded  # type: ignore[attr-defined]


def test_a_mask_that_outgrows_its_patch_grows_the_patch(
    a_bundle: Bundle, a_large_volume: Volume, raw_values: None
) -> None:
    session = fake_session(a_bundle, threshold_model(), a_large_volume)
    prediction = session.add(PointPrompt.from_ijk(LIVER, a_large_volume))
    start, stop = prediction.patch.faces
    assert ((stop - start) * LARGE_SPACING > 2 * np.array(LIVER_MM)).all()
    assert max(session.bundle.plans.zooms_mm) < 60


# -- kinds of boxes and masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        ((12, 12, 6), (13, 13, 7)),  # one voxel
        ((8, 8, 6), (18, 16, 7)),  # one slice
        ((0, 0, 0), (3, 3, 3)),  # in a corner
        ((27, 19, 11), (30, 22, 14)),
        ((0, 0, 0), (30, 22, 14)),  # everything
        ((-5, -5, -5), (9, 9, 9)),  # partly outside
    ],
)
def test_any_box_in_the_volume_gives_a_prediction(
    a_session: Session, any_volume: Volume, start: tuple[int, int, int], stop: tuple[int, int, int]
) -> None:
    a_session.set_volume(any_volume)
    prediction = a_session.add(BoxPrompt.from_ijk(start, stop, any_volume))
    assert prediction.mask.shape == any_volume.shape_kji
    check_probability(prediction)
    canonical = any_volume.canonical()
    box = a_session.prompts()[0].box(canonical)
    assert prediction.patch.contains(box.start)
    assert prediction.patch.contains(np.array(box.stop) - 1)


def test_a_mask_to_start_from_is_what_the_network_sees(a_bundle: Bundle, a_volume: Volume, a_mask: np.ndarray) -> None:
    def answer(image: np.ndarray, prompts: PatchPrompts) -> np.ndarray:
        return (prompts.previous[0].numpy() - 0.5) * 10  # "as before"

    session = fake_session(a_bundle, FakeModel(answer), a_volume)
    found = session.add(MaskPrompt.from_array(a_mask, a_volume)).mask
    assert 2 * (found & a_mask).sum() / (found.sum() + a_mask.sum()) > 0.9
    ijk = (12, 12, 6)
    assert at(found, ijk)
    corrected = session.add(PointPrompt.from_ijk(ijk, a_volume, NEGATIVE)).mask
    assert not at(corrected, ijk)
    assert 2 * (corrected & a_mask).sum() / (corrected.sum() + a_mask.sum()) > 0.75


# -- experts -----------------------------------------------------------------------------------------------------------


def test_the_network_is_asked_for_an_expert_when_somebody_looks_and_once(
    a_tiny_session: Session, a_volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    only = a_tiny_session.model.only
    monkeypatch.setattr(a_tiny_session.model, "only", lambda features, arm: asked.append(arm) or only(features, arm))
    experts = a_tiny_session.add(PointPrompt.from_ijk(INSIDE, a_volume)).experts
    assert list(experts) == ["foundation", "tiny_trunk", "tiny_brain"]
    assert len(experts) == 3
    assert "tiny_brain" in experts
    assert "nobody" not in experts
    assert asked == []
    first = experts["tiny_brain"]
    np.testing.assert_array_equal(experts["tiny_brain"].probability, first.probability)
    assert asked == [2]
    with pytest.raises(KeyError):
        experts["nobody"]


def test_experts_share_the_decision_inside_the_patch_and_have_none_outside(
    a_tiny_session: Session, an_oblique_left_handed_volume: Volume
) -> None:
    volume = an_oblique_left_handed_volume
    a_tiny_session.set_volume(volume)
    prediction = a_tiny_session.add(BoxPrompt.from_ijk((10, 8, 5), (15, 12, 8), volume))
    inside = np.zeros(volume.shape_kji, dtype=bool)
    inside[volume.from_canonical_box(prediction.patch.box(prediction.canonical.shape_kji)).slices] = True
    assert not inside.all()
    total = np.zeros(volume.shape_kji)
    for opinion in prediction.experts.values():
        assert opinion.weight.dtype == opinion.probability.dtype == np.float32
        assert (opinion.weight[inside] > 0).all()
        assert (opinion.probability[inside] > 0).all()
        assert (opinion.probability <= 1).all()
        assert not opinion.weight[~inside].any()
        assert not opinion.probability[~inside].any()
        total += opinion.weight
    np.testing.assert_allclose(total[inside], 1, atol=1e-5)
    assert sum(opinion.mean_weight for opinion in prediction.experts.values()) == pytest.approx(1, abs=1e-4)


def test_experts_of_a_former_volume_cannot_be_asked(
    a_tiny_session: Session, a_volume: Volume, an_oblique_volume: Volume
) -> None:
    prediction = a_tiny_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    known = prediction.experts["foundation"]
    a_tiny_session.set_volume(an_oblique_volume)
    with pytest.raises(SessionStateError, match="while its volume is the session's"):
        prediction.experts["tiny_brain"]
    assert known.probability.shape == a_volume.shape_kji, "what was asked for before stays with who asked"
    assert prediction.mask.shape == a_volume.shape_kji


# -- save, give, replay ------------------------------------------------------------------------------------------------


def a_busy_session(session: Session, volume: Volume, mask: np.ndarray) -> None:
    """Several objects, all prompts, locks, a reset and an undo."""
    session.select("liver")
    session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), volume))
    session.add(PointPrompt.from_ijk((9, 10, 4), volume, NEGATIVE))
    session.add(PointPrompt.from_ijk(INSIDE, volume))
    session.lock()
    session.select("spleen")
    session.add(LassoPrompt.from_ijk([(14, 10, 6), (22, 11, 6), (17, 19, 6)], volume))
    session.add(ScribblePrompt.from_ijk([(20, 12, 6), (22, 15, 8)], volume))
    session.select("gone")
    session.add(BoxPrompt.from_ijk((1, 1, 1), (12, 12, 7), volume))
    session.select("tumour")
    session.add(MaskPrompt.from_array(mask, volume))
    session.add(PointPrompt.from_ijk((2, 2, 2), volume))
    session.select("gone")
    session.reset()
    session.unlock("liver")
    session.select("spleen")
    session.add(PointPrompt.from_ijk((21, 12, 6), volume))
    session.add(PointPrompt.from_ijk((23, 20, 12), volume))
    session.undo()


def test_replay_gives_the_same_masks_with_locks_resets_and_all_prompts(
    a_tiny_session: Session, a_bundle: Bundle, an_oblique_volume: Volume, a_mask: np.ndarray, tmp_path: Path
) -> None:
    a_tiny_session.set_volume(an_oblique_volume)
    a_busy_session(a_tiny_session, an_oblique_volume, a_mask)
    a_tiny_session.save(tmp_path / "prompts.json")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]
    again = Session.replay(tmp_path / "prompts.json", an_oblique_volume, a_bundle, device="cpu")
    assert again.objects == a_tiny_session.objects == ("liver", "spleen", "gone", "tumour")
    assert again.selected == a_tiny_session.selected == "spleen"
    assert again.to_json() == a_tiny_session.to_json()
    for name in again.objects:
        assert again.prompts(name) == a_tiny_session.prompts(name)
    expected, found = masks(a_tiny_session), masks(again)
    assert expected.keys() == found.keys() == {"liver", "spleen", "tumour"}
    assert all(mask.any() for mask in expected.values())
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def test_an_object_locked_midway_is_respected_in_the_replay(
    a_bundle: Bundle, a_volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(image: np.ndarray, prompts: PatchPrompts) -> np.ndarray:
        return np.full(image.shape, 1.0 + len(prompts.points[0]))  # ever surer, so it would take all that it may

    monkeypatch.setattr(session_module, "build_model", lambda plans, weights: FakeModel(answer))
    session = Session(a_bundle, device="cpu")
    session.set_volume(a_volume)
    session.select("first")
    session.add(BoxPrompt.from_ijk((8, 8, 5), (12, 12, 8), a_volume))
    session.lock()
    session.select("second")
    session.add(BoxPrompt.from_ijk((8, 8, 5), (16, 12, 8), a_volume))
    session.add(PointPrompt.from_ijk((15, 10, 6), a_volume))
    session.unlock("first")
    assert masks(session)["first"].any()
    session.save(tmp_path / "prompts.json")
    again = Session.replay(tmp_path / "prompts.json", a_volume, a_bundle, device="cpu")
    np.testing.assert_array_equal(again.label_map()[0], session.label_map()[0])


def test_prompts_can_be_replayed_on_another_volume(
    a_tiny_session: Session, a_bundle: Bundle, a_volume: Volume, tmp_path: Path
) -> None:
    a_tiny_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_tiny_session.save(tmp_path / "prompts.json")
    matrix = np.array(a_volume.ijk_to_ras)
    matrix[:3, :3] /= 2  # twice as fine
    fine = Volume(np.kron(a_volume.array_kji, np.ones((2, 2, 2), dtype=np.float32)), matrix)
    again = Session.replay(tmp_path / "prompts.json", fine, a_bundle, device="cpu")
    assert again.prediction is not None
    assert at(again.prediction.mask, tuple(2 * x for x in INSIDE))


def test_saved_prompts_hold_no_image_and_no_file_name(a_session: Session, a_volume: Volume) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    saved = a_session.to_json()
    assert set(saved) == {"format", "bundle", "grid", "objects", "selected", "steps"}
    assert a_volume.name not in json.dumps(saved)
    assert saved["steps"] == [{"object": "object", "prompt": PointPrompt.from_ijk(INSIDE, a_volume).to_json()}]


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    a_session: Session, a_volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "prompts.json"
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.save(target)
    old = target.read_bytes()
    a_session.add(PointPrompt.from_ijk((13, 12, 6), a_volume))
    write = Path.write_text

    def half(self: Path, text: str, **more: Any) -> int:
        write(self, text[:20], **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(PromptError, match="No space left"):
        a_session.save(target)
    assert target.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]


def test_a_save_to_what_is_no_file_is_refused(a_session: Session, a_volume: Volume, tmp_path: Path) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    with pytest.raises(PromptError, match="plain file"):
        a_session.save(tmp_path)
    with pytest.raises(PromptError, match="could not be saved"):
        a_session.save(tmp_path / "missing" / "prompts.json")


def test_an_array_is_no_volume(a_session: Session, a_volume: Volume) -> None:
    with pytest.raises(SessionStateError, match="needs a Volume, got ndarray"):
        a_session.set_volume(a_volume.array_kji)  # type: ignore[arg-type]
    assert a_session.volume is a_volume


CLICK = {"object": "liver", "prompt": {"type": "point", "ras": [0.0, 0.0, 0.0], "polarity": "positive"}}
GOOD: dict[str, Any] = {"format": 1, "objects": ["liver"], "selected": "liver", "steps": []}


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([], "must be saved as an object"),
        (None, "must be saved as an object"),
        ({}, "must be saved as an object"),
        ({**GOOD, "format": 2}, "must be saved in format 1, got format 2"),
        ({**GOOD, "format": [1]}, "must be saved in format 1"),
        ({k: v for k, v in GOOD.items() if k != "steps"}, "must be saved as an object"),
        ({k: v for k, v in GOOD.items() if k != "objects"}, "must be saved as an object"),
        ({k: v for k, v in GOOD.items() if k != "selected"}, "must be saved as an object"),
        ({**GOOD, "objects": [""]}, "must be saved as an object"),
        ({**GOOD, "objects": "liver"}, "must be saved as an object"),
        ({**GOOD, "selected": 1}, "must be saved as an object"),
        ({**GOOD, "steps": {"a": 1}}, "must be saved as an object"),
        ({**GOOD, "steps": [1]}, "a step in JSON must have"),
        ({**GOOD, "steps": [{"object": "liver"}]}, "a step in JSON must have"),
        ({**GOOD, "steps": [{**CLICK, "object": ""}]}, "a step in JSON must have"),
        ({**GOOD, "steps": [{**CLICK, "do": "lock"}]}, "a step in JSON must have"),
        ({**GOOD, "steps": [{"object": "liver", "do": "explode"}]}, "a step in JSON must have"),
        ({**GOOD, "steps": [{"object": "liver", "prompt": {"type": "sphere"}}]}, "sphere"),
        ({**GOOD, "steps": [{"object": "liver", "prompt": {"type": "point"}}]}, "missing"),
        ({**GOOD, "steps": [{"object": "liver", "prompt": None}]}, "a prompt in JSON must be an object"),
    ],
)
def test_what_is_no_saved_session_is_refused_and_changes_nothing(
    a_session: Session, a_bundle: Bundle, a_volume: Volume, tmp_path: Path, saved: Any, words: str
) -> None:
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    before = snapshot(a_session)
    with pytest.raises(PromptError, match=words):
        a_session.give(saved)
    check_same(before, a_session)
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(PromptError, match=words):
        Session.replay(path, a_volume, a_bundle, device="cpu")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, None])
def test_a_file_that_is_no_json_is_refused(
    a_bundle: Bundle, a_volume: Volume, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=r"'prompts.json' must be a prompts file that Session.save wrote"):
        Session.replay(path, a_volume, a_bundle, device="cpu")


def test_giving_prompts_is_all_or_nothing(a_session: Session, a_volume: Volume) -> None:
    a_session.select("liver")
    a_session.add(PointPrompt.from_ijk(INSIDE, a_volume))
    a_session.add(PointPrompt.from_ijk((13, 12, 6), a_volume))
    a_session.undo()
    good = {"object": "new", "prompt": PointPrompt.from_ijk(OUTSIDE, a_volume).to_json()}
    far = copy.deepcopy(good)
    far["prompt"]["ras"] = [1e4, 0, 0]
    before = snapshot(a_session)
    for last in (far, {"object": "liver", "prompt": PointPrompt.from_ijk(INSIDE, a_volume, NEGATIVE).to_json()}):
        with pytest.raises(PromptError):
            a_session.give({**GOOD, "objects": ["new"], "steps": [good, last]})
        check_same(before, a_session)
    a_session.give({**GOOD, "objects": ["new"], "selected": "new", "steps": [good]})
    assert a_session.objects == ("liver", "new")
    assert at(masks(a_session)["new"], OUTSIDE)
    assert at(masks(a_session)["liver"], INSIDE)
