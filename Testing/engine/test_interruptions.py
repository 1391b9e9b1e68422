"""Work that is stopped, fails or loses its client: the session is as before, and the next prompt works."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from KA2ERSegment.engine.client import EngineClient, RemoteSession
from KA2ERSegment.engine.wire import API, EngineError
from KA2ERSegment.errors import CancelledError
from KA2ERSegment.prompts import BoxPrompt, PointPrompt
from KA2ERSegment.volume import Volume


@pytest.fixture
def another_thread(held: Any) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool
        held.go_on.set()  # a test that failed half-way


@pytest.fixture
def a_remote(engine_here: Any, a_volume: Volume) -> Iterator[RemoteSession]:
    session = engine_here.client().open(a_volume.array_kji, a_volume.ijk_to_ras)
    session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    yield session
    session.client.close()


@pytest.fixture
def a_click(a_volume: Volume) -> PointPrompt:
    return PointPrompt.from_ijk((12, 12, 6), a_volume)


def hold_up(held: Any) -> None:
    held.inside.clear()
    held.go_on.clear()


def begun(held: Any, pool: ThreadPoolExecutor, session: RemoteSession, prompt: Any) -> Future[Any]:
    """A prompt whose prediction is under way."""
    hold_up(held)
    work = pool.submit(session.add, prompt)
    assert held.inside.wait(30)
    return work


def test_cancelled_prompt_leaves_the_session_unchanged(
    a_remote: RemoteSession, held: Any, another_thread: ThreadPoolExecutor, a_click: PointPrompt
) -> None:
    before, mask = a_remote.to_json(), a_remote.mask("object")[1]
    work = begun(held, another_thread, a_remote, a_click)
    assert a_remote.busy
    assert a_remote.progress() == ("Decoding", None)

    begin = time.monotonic()
    a_remote.cancel()
    with pytest.raises(CancelledError):
        work.result(30)
    assert time.monotonic() - begin < 0.5  # of the promise; the network is far smaller than a real one
    assert not a_remote.busy

    held.go_on.set()
    assert a_remote.to_json() == before
    assert (a_remote.mask("object")[1] == mask).all()
    assert a_remote.select("object").can_redo is False
    assert len(a_remote.add(a_click).names) == 1
    assert len(a_remote.steps) == len(before["steps"]) + 1


def test_cancel_reaches_nobody_else(
    engine_here: Any,
    a_remote: RemoteSession,
    held: Any,
    another_thread: ThreadPoolExecutor,
    a_volume: Volume,
    a_click: PointPrompt,
) -> None:
    other = engine_here.client().open(a_volume.array_kji, a_volume.ijk_to_ras)
    first = begun(held, another_thread, a_remote, a_click)
    second = another_thread.submit(other.add, a_click)
    while other.progress()[0] != "Waiting for others":
        assert not second.done()

    other.cancel()
    held.go_on.set()

    assert first.result(30).objects
    with pytest.raises(CancelledError):
        second.result(30)
    assert other.steps == ()
    other.client.close()


def test_cancel_of_nothing_is_forgotten(a_remote: RemoteSession, a_click: PointPrompt) -> None:
    a_remote.cancel()

    assert a_remote.add(a_click).objects


def test_cancelled_replay_gives_back_what_was_there(
    a_remote: RemoteSession, held: Any, another_thread: ThreadPoolExecutor, a_click: PointPrompt
) -> None:
    a_remote.add(a_click)
    before = a_remote.to_json()
    hold_up(held)
    work = another_thread.submit(a_remote.revise, before["steps"][1:])
    assert held.inside.wait(30)
    a_remote.cancel()

    with pytest.raises(CancelledError):
        work.result(30)
    held.go_on.set()
    a_remote.select("object")
    assert a_remote.to_json() == before


def test_client_that_vanishes_stops_its_work(
    engine_here: Any, a_remote: RemoteSession, held: Any, a_click: PointPrompt
) -> None:
    before = a_remote.to_json()
    hold_up(held)
    connection = http.client.HTTPConnection(engine_here.url.removeprefix("http://"))
    body = json.dumps({"known": -1, "prompt": a_click.to_json()})
    headers = {"Authorization": f"Bearer {engine_here.api_key}", **a_remote._lease}
    connection.request("POST", f"{API}/session/add", body, headers)
    assert held.inside.wait(30)

    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    while a_remote.progress()[0]:
        pass
    held.go_on.set()

    a_remote.select("object")
    assert a_remote.to_json() == before
    assert a_remote.add(a_click).objects


def test_client_that_vanishes_in_the_middle_of_a_volume_leaves_nothing(engine_here: Any, a_volume: Volume) -> None:
    client = engine_here.client()
    before = client.info()["sessions"]
    host, port = engine_here.url.removeprefix("http://").split(":")
    meta = {"shape_kji": [10, 10, 10], "dtype": "int16", "ijk_to_ras": a_volume.ijk_to_ras.tolist()}
    head = (
        f"POST {API}/session HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {engine_here.api_key}\r\n"
        f"X-Meta: {json.dumps(meta)}\r\nContent-Length: 2000\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head.encode() + bytes(1000))
        while client.info()["sessions"] == before:
            pass
    while client.info()["sessions"] != before:
        pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_session_survives_that_memory_runs_out(
    a_remote: RemoteSession, held: Any, a_click: PointPrompt, error: BaseException
) -> None:
    before = a_remote.to_json()
    held.fail = error

    with pytest.raises(EngineError, match="not enough memory") as refused:
        a_remote.add(a_click)
    assert refused.value.kind == "memory"

    held.fail = None
    assert a_remote.to_json() == before
    assert a_remote.add(a_click).objects
    assert a_remote.undo().can_redo


def test_bug_in_the_engine_costs_one_request_and_the_log_tells_no_names(
    a_remote: RemoteSession, held: Any, a_click: PointPrompt, caplog: pytest.LogCaptureFixture
) -> None:
    before = a_remote.to_json()
    held.fail = ZeroDivisionError("Miller^Anna")

    with caplog.at_level(logging.DEBUG), pytest.raises(EngineError, match="ZeroDivisionError") as refused:
        a_remote.add(a_click)
    assert refused.value.kind == "failed"
    assert "Miller" not in str(refused.value) + caplog.text
    assert "ZeroDivisionError at" in caplog.text

    held.fail = None
    assert a_remote.to_json() == before
    assert a_remote.add(a_click).objects


def test_heartbeat_and_news_do_not_wait_for_the_network(
    engine_here: Any,
    a_remote: RemoteSession,
    held: Any,
    another_thread: ThreadPoolExecutor,
    a_click: PointPrompt,
) -> None:
    work = begun(held, another_thread, a_remote, a_click)
    answered = threading.Event()

    def beside() -> None:
        a_remote.heartbeat()
        EngineClient(engine_here.url, engine_here.api_key).info()
        answered.set()

    beside()
    assert answered.is_set()
    assert not work.done()
    held.go_on.set()
    assert work.result(30).network > 0
