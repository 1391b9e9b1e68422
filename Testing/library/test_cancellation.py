"""A verb can be stopped at every checkpoint, and then nothing has happened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from KA2ERSegment import BoxPrompt, MaskPrompt, Neighbours, PointPrompt, Polarity, Session, Volume
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.cancellation import checkpoint, checkpoints, watch_layers
from KA2ERSegment.errors import CancelledError
from KA2ERSegment.testing import tiny_bundle

Verb = Callable[[Session], Any]


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def a_session(a_bundle: Bundle, a_volume: Volume) -> Session:
    """With an object, another one edited by hand, and something to redo."""
    session = Session(a_bundle, device="cpu")
    session.set_volume(a_volume)
    session.select("other")
    session.edit(MaskPrompt.from_array(a_volume.array_kji > 90, a_volume))
    session.select("own")
    session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    session.add(PointPrompt.from_ijk((20, 19, 12), a_volume, Polarity.NEGATIVE))
    session.undo()
    return session


def a_click(session: Session) -> None:
    session.add(PointPrompt.from_ijk((11, 13, 5), session.volume), Neighbours.OVERLAP)


def a_first_click(session: Session) -> None:
    session.select("new")
    session.add(PointPrompt.from_ijk((24, 4, 11), session.volume))


def an_edit(session: Session) -> None:
    session.edit(MaskPrompt.from_array(session.volume.array_kji > 50, session.volume), neighbours=Neighbours.COMPETE)


def a_finish(session: Session) -> None:
    session.finish(2.0, islands=False)


def a_revision(session: Session) -> None:
    session.revise([*session.steps[1:], session.steps[0]])


def a_replay(session: Session) -> None:
    saved = session.to_json()
    session.give(
        {**saved, "objects": [], "selected": "again", "steps": [{**s, "object": "again"} for s in saved["steps"]]}
    )


VERBS = [a_click, a_first_click, an_edit, a_finish, a_revision, a_replay]


def snapshot(session: Session) -> tuple[Any, ...]:
    return (
        id(session._state),
        id(session.prediction),
        session.selected,
        session.objects,
        session.can_undo,
        session.can_redo,
        session.changed,
        session.label_map()[0].tobytes(),
    )


def checkpoints_of(session: Session, verb: Verb) -> int:
    """How many a verb passes; what it did is undone, and features are as before it."""
    passed = [0]

    def count() -> None:
        passed[0] += 1

    session.checkpoint = count
    verb(session)
    session.checkpoint = None
    return passed[0]


def stop_at(number: int) -> Callable[[], None]:
    passed = [0]

    def stop() -> None:
        passed[0] += 1
        if passed[0] == number:
            message = "stopped by the user"
            raise CancelledError(message)

    return stop


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_a_cancelled_verb_leaves_the_session_as_it_was(
    a_session: Session, a_bundle: Bundle, a_volume: Volume, verb: Verb, share: float
) -> None:
    expected = Session(a_bundle, device="cpu", model=a_session.model)
    expected.set_volume(a_volume)
    expected.give(a_session.to_json())
    count = checkpoints_of(expected, verb)
    assert count >= 2
    if verb is a_first_click:
        a_session.select("new")  # choosing an object is no part of what is cancelled
    a_session._answerer.features.clear()  # type: ignore[union-attr]
    before = snapshot(a_session)
    a_session.checkpoint = stop_at(1 + round(share * (count - 1)))
    with pytest.raises(CancelledError, match="stopped by the user"):
        verb(a_session)
    assert snapshot(a_session) == before
    a_session.checkpoint = None
    verb(a_session)
    np.testing.assert_array_equal(a_session.label_map()[0], expected.label_map()[0])


def test_every_layer_of_the_network_is_a_checkpoint(a_session: Session) -> None:
    layers = [layer for layer in a_session.model.modules() if next(layer.children(), None) is None]
    called = set()
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: called.add(layer))
    count = checkpoints_of(a_session, a_first_click)
    assert len(called) > 50
    assert count > len(called)


def test_checkpoints_belong_to_the_thread_that_works(a_bundle: Bundle, a_session: Session) -> None:
    """Two sessions on one model: stopping one never stops the other."""
    other = Session(a_bundle, device="cpu", model=a_session.model)
    other.set_volume(a_session.volume)
    under_way, stopped = threading.Event(), threading.Event()

    def wait_once() -> None:
        under_way.set()
        assert stopped.wait(60)

    other.checkpoint = wait_once
    thread = threading.Thread(target=lambda: other.add(PointPrompt.from_ijk((12, 12, 6), other.volume)))
    thread.start()
    assert under_way.wait(60)
    a_session.checkpoint = stop_at(3)
    with pytest.raises(CancelledError):
        a_click(a_session)
    stopped.set()
    thread.join()
    assert other.prediction is not None


def test_a_checkpoint_without_anybody_to_ask_does_nothing() -> None:
    asked: list[int] = []
    checkpoint()
    with checkpoints(lambda: asked.append(1)):
        checkpoint()
        with checkpoints(None):
            checkpoint()
        checkpoint()
    checkpoint()
    assert asked == [1, 1]


def test_watching_changes_no_result() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    given = torch.randn(5, 3)
    before = network(given)
    watch_layers(network)
    passed: list[int] = []
    with checkpoints(lambda: passed.append(1)):
        assert torch.equal(network(given), before)
    assert len(passed) == 3


def test_between_two_convolutions_work_can_be_stopped(a_session: Session) -> None:
    """They are what a click waits for; none may be called past the layers that `watch_layers` watches."""
    happened: list[str] = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.conv3d, torch.mkldnn_convolution):
                happened.append("convolution")
            return func(*args, **(kwargs or {}))

    a_session.forget_features()
    a_session.checkpoint = lambda: happened.append("checkpoint")
    with Listener():
        a_click(a_session)

    assert happened.count("convolution") > 10
    assert all(before == "checkpoint" for before, now in pairwise(happened) if now == "convolution")
