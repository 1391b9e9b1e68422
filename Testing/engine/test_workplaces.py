"""Leases and time, by a clock of our own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.engine.app import Api, Engine
from KA2ERSegment.engine.wire import META_HEADER, EngineError, VolumeHeader, write_json
from KA2ERSegment.engine.workplaces import Job, Worker, Workplaces, difference
from KA2ERSegment.errors import CancelledError
from KA2ERSegment.geometry import Box
from KA2ERSegment.prediction import PackedMask
from KA2ERSegment.session import Session
from KA2ERSegment.volume import Volume


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def a_clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def a_session(a_bundle: Path) -> Session:
    return Session(load_bundle(a_bundle), "cpu")


@pytest.fixture
def places(a_session: Session, a_clock: Clock) -> Workplaces:
    return Workplaces(lambda: a_session, 2, idle_timeout=100, liveness_timeout=10, clock=a_clock)


def test_every_workplace_has_a_lease_that_cannot_be_guessed(places: Workplaces) -> None:
    a, b = places.claim(), places.claim()

    assert a.lease != b.lease
    assert min(len(a.lease), len(b.lease)) >= 32
    assert places.get(a.lease) is a
    with pytest.raises(EngineError) as refused:
        places.get(a.lease[:-1])
    assert refused.value.kind == "lease"


def test_there_are_no_more_workplaces_than_allowed(places: Workplaces) -> None:
    first = places.claim()
    places.claim()
    with pytest.raises(EngineError) as refused:
        places.claim()
    assert refused.value.kind == "capacity"

    places.release(first.lease)
    places.release(first.lease)
    assert places.claim() is not first


def test_client_without_a_sign_of_life_loses_its_workplace(places: Workplaces, a_clock: Clock) -> None:
    dead, alive = places.claim(), places.claim()
    a_clock.seconds += 9
    places.get(alive.lease, active=False)
    a_clock.seconds += 2
    places.sweep()

    assert list(places) == [alive]
    assert dead not in places


def test_user_who_does_nothing_loses_the_workplace_in_spite_of_heartbeats(places: Workplaces, a_clock: Clock) -> None:
    place = places.claim()
    for _ in range(10):
        a_clock.seconds += 9
        places.get(place.lease, active=False)
        places.sweep()
    assert places.remaining(place) == 10
    assert list(places) == [place]

    a_clock.seconds += 9
    places.peek(place.lease)
    places.get(place.lease, active=False)
    a_clock.seconds += 2
    places.sweep()
    assert list(places) == []


def test_action_of_the_user_keeps_the_workplace(places: Workplaces, a_clock: Clock) -> None:
    place = places.claim()
    for _ in range(40):
        a_clock.seconds += 9
        places.get(place.lease)
        places.sweep()

    assert list(places) == [place]


def test_workplace_at_work_is_kept(places: Workplaces, a_clock: Clock) -> None:
    worker, place, go_on = Worker(), places.claim(), threading.Event()
    job = place.begin(go_on.wait, worker, "Waiting")
    a_clock.seconds += 1000
    places.sweep()
    assert list(places) == [place]

    go_on.set()
    job.result.result(10)
    places.sweep()
    assert list(places) == []
    worker.close()


def test_closed_workplace_and_its_volume_are_gone_at_once(places: Workplaces) -> None:
    def work_on(*things: object) -> Callable[[], bool]:
        return lambda: bool(things)

    worker, place, volume = Worker(), places.claim(), Clock()
    kept = weakref.ref(place), weakref.ref(volume)
    gc.disable()  # volumes are too large to wait for the collector
    try:
        place.begin(work_on(place, volume), worker, "Reading").result.result(10)
        worker.submit(Job(lambda: None)).result.result(10)
        places.release(place.lease)
        del place, volume
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()
        worker.close()


def test_workplace_of_one_owner_is_kept_for_ever(a_session: Session, a_clock: Clock) -> None:
    places = Workplaces(lambda: a_session, 1, idle_timeout=0, clock=a_clock)
    place = places.claim()
    a_clock.seconds += 1e6
    places.sweep()

    assert list(places) == [place]
    assert places.liveness_timeout == 0


@pytest.mark.parametrize(("pause", "kept"), [(9, True), (11, False)])
def test_volume_that_comes_slowly_keeps_its_workplace_and_one_that_stops_loses_it(
    places: Workplaces, a_clock: Clock, a_session: Session, a_volume: Volume, pause: int, kept: bool
) -> None:
    voxels = a_volume.array_kji.tobytes()
    size = len(voxels) // 20
    parts = [voxels[at : at + size] for at in range(0, len(voxels), size)]
    shape, matrix = a_volume.shape_kji, np.asarray(a_volume.ijk_to_ras)
    header = VolumeHeader(shape, a_volume.array_kji.dtype.name, matrix)
    scope = {"type": "http", "headers": [(META_HEADER.lower().encode(), write_json(header.to_json()))]}

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()  # the client waits for the answer
        a_clock.seconds += pause
        places.sweep()
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    worker = Worker()
    engine = Engine(a_session.bundle, a_session.model, "cpu", worker, places)
    try:
        if kept:
            asyncio.run(Api(engine).open(Request(scope, receive)))
            assert len(places) == 1
        else:
            with pytest.raises(EngineError, match="idle for too long"):
                asyncio.run(Api(engine).open(Request(scope, receive)))
            assert len(places) == 0
    finally:
        worker.close()


def test_work_is_done_one_after_the_other_in_one_thread() -> None:
    worker, seen = Worker(), []
    jobs = [worker.submit(Job(lambda n=n: seen.append((n, threading.get_ident())))) for n in range(20)]
    for job in jobs:
        job.result.result(10)

    assert [n for n, _ in seen] == list(range(20))
    assert len({thread for _, thread in seen}) == 1
    worker.close()


def test_cancelled_work_that_waits_never_begins() -> None:
    worker, go_on, began = Worker(), threading.Event(), []
    first = worker.submit(Job(go_on.wait))
    second = worker.submit(Job(lambda: began.append(2)))
    second.cancel()
    go_on.set()
    first.result.result(10)

    with pytest.raises(CancelledError):
        second.result.result(10)
    assert began == []
    worker.close()


def test_work_that_nobody_waits_for_any_more_does_not_stop_the_worker() -> None:
    worker, inside, go_on, began = Worker(), threading.Event(), threading.Event(), []
    first = worker.submit(Job(lambda: (inside.set(), go_on.wait())))
    second, third = worker.submit(Job(lambda: began.append(2))), worker.submit(Job(lambda: "done"))
    assert inside.wait(10)
    assert second.result.cancel()
    assert not first.result.cancel()
    go_on.set()

    assert third.result.result(10) == "done"
    assert began == []
    worker.close()


def test_closed_worker_leaves_nobody_waiting() -> None:
    worker, inside, began = Worker(), threading.Event(), []

    def work() -> None:
        inside.set()
        while True:
            worker.checkpoint()

    runs, waits = worker.submit(Job(work)), worker.submit(Job(lambda: began.append("waits")))
    assert inside.wait(10)
    worker.close()
    late = worker.submit(Job(lambda: began.append("late")))

    for job in (runs, waits, late):
        with pytest.raises(CancelledError, match="the engine ends"):
            job.result.result(10)
    assert began == []


def test_warming_up_gives_way_to_a_request() -> None:
    worker, inside = Worker(), threading.Event()

    def warm_up() -> None:
        inside.set()
        while True:
            worker.checkpoint()

    warming = worker.submit(Job(warm_up, gives_way=True))
    assert inside.wait(10)
    request = worker.submit(Job(lambda: "done"))

    assert request.result.result(10) == "done"
    with pytest.raises(CancelledError):
        warming.result.result(10)
    worker.close()


def test_difference_of_two_masks_is_what_a_viewer_has_to_write(any_volume: Volume) -> None:
    rng = np.random.default_rng(0)
    old, new = rng.random((2, *any_volume.shape_kji)) > 0.9
    old[:4], new[:4] = True, True
    old[:, :, 20:], new[:, :, 20:] = False, False

    def packed(mask: np.ndarray) -> PackedMask:
        view = any_volume.to_canonical(mask)
        return PackedMask.pack(Box.of_shape(view.shape), view)

    box, crop = difference(packed(old), packed(new), any_volume)
    assert box == Box.around(old ^ new)
    shown = old.copy()
    shown[box.slices] = crop
    np.testing.assert_array_equal(shown, new)
    assert difference(packed(old), packed(old), any_volume)[0].size == 0
    assert difference(None, None, any_volume)[0].size == 0
    assert difference(None, packed(new), any_volume)[0] == Box.around(new)
    box, crop = difference(packed(new), None, any_volume)
    assert box == Box.around(new)
    assert not crop.any()
