"""The network between page and server breaks, the page is loaded again, and what is left when the viewer ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow
PATIENCE = 150.0


class Cable:
    """A cable between browser and viewer that can be cut, swallow what is sent, and be mended."""

    def __init__(self, port: int) -> None:
        self._target, self._plugged, self._ends = port, True, set()
        self._dead: set[socket.socket] = set()
        self._swallows, self.answers = False, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._plugged = False
        for end in list(self._ends):
            self._end(end)

    def swallow(self) -> None:
        """From now on nothing arrives, and nobody is told: as when a network goes away."""
        self._swallows = True
        self._dead.update(self._ends)

    def mend(self) -> None:
        """For new connections; those that were swallowed stay as they are."""
        self._plugged, self._swallows = True, False

    def close(self) -> None:
        self.cut()
        for end in (self._listening, *self._dead):
            self._end(end)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                if not self._plugged:
                    near.close()
                    continue
                if self._swallows:
                    self._dead.add(near)
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends.update((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                if source in self._dead:
                    continue
                self.answers += content.count(b"ka2er!")  # to the page, which asks whether it is heard
                target.sendall(content)
        for end in (source, target):
            self._ends.discard(end)
            self._end(end)

    @staticmethod
    def _end(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # closing alone tells nobody while another thread reads from it
        end.close()


@pytest.fixture
def a_cable(a_viewer: Any) -> Iterator[Cable]:
    cable = Cable(int(a_viewer.url.rstrip("/").rsplit(":", 1)[1]))
    yield cable
    cable.close()


@pytest.fixture
def a_far_tab(a_tab: Any, a_cable: Cable, open_tab: Callable[..., Any]) -> Any:
    """The session of `a_tab`, in a browser at the end of the cable."""
    session = a_tab.page.url.split("/", 3)[3]
    return open_tab(f"http://localhost:{a_cable.port}/{session}")


@pytest.mark.parametrize("broken", [Cable.cut, Cable.swallow], ids=["at once", "without a word"])
def test_page_says_that_the_connection_is_lost_and_comes_back_with_its_state(
    a_cable: Cable, a_far_tab: Any, broken: Callable[[Cable], None]
) -> None:
    tab = a_far_tab
    tab.click("Red", tab.BALL)
    shown, address = tab.colored("Green"), tab.page.url

    broken(a_cable)
    tab.page.locator("#lost").wait_for()
    assert "connection was lost" in tab.page.locator("#lost").inner_text()
    a_cable.mend()

    tab.page.locator("#lost").wait_for(state="detached")
    tab.wait_until_ready()
    assert tab.page.url == address
    assert tab.page.locator(".segments li").count() == 1
    assert np.mean(tab.colored("Green") ^ shown) < 0.01
    tab.press("Control+z")
    assert tab.state("prompt_count") == 0
    tab.click("Red", tab.BALL)


def test_quiet_connection_is_not_taken_for_a_dead_one(a_cable: Cable, a_far_tab: Any) -> None:
    heard = a_cable.answers

    a_far_tab.until(lambda: a_cable.answers >= heard + 4)

    assert a_far_tab.page.locator("#lost").count() == 0


def test_tab_that_leaves_while_it_is_answered_is_no_error(run_apart: Callable[..., Any]) -> None:
    protocols = pytest.importorskip("wslink.protocol", reason="needs the viewer's environment: make test-view")
    from wslink.websocket import ServerProtocol

    from KA2ERViewer.page.farewells import expect_farewells

    class Gone:
        asked = 0

        async def send_bytes(self, _: bytes) -> None:
            self.asked += 1
            raise ConnectionResetError

    async def answer(handler: Any) -> None:
        await handler.sendWrappedMessage("1", {}, client_id="tab")
        await handler.sendWrappedError("2", 0, "wrong", client_id="tab")

    expect_farewells()
    handler, gone = protocols.WslinkHandler(ServerProtocol()), Gone()
    handler.connections["tab"] = gone
    handler.authentified_client_ids.add("tab")

    run_apart(answer(handler))

    assert gone.asked == 2


def test_spinner_of_the_first_page_never_comes_after_the_page_itself(a_tab: Any) -> None:
    page, late = a_tab.page, list[Any]()
    page.route("**/loading.tpl", lambda asked: late.append(asked))

    page.reload()
    a_tab.wait_until_ready()
    for asked in late:
        with page.expect_response("**/loading.tpl"):
            asked.continue_()
    page.unroute("**/loading.tpl")
    page.evaluate("new Promise((done) => setTimeout(done, 100))")

    assert page.locator(".volume-name").is_visible()


def test_nothing_is_asked_for_that_is_not_there(a_viewer: Any, a_page: Any) -> None:
    wrong: list[str] = []
    a_page.on("response", lambda one: wrong.append(f"{one.status} {one.url}") if one.status >= 400 else None)
    a_page.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)

    a_page.goto(a_viewer.url)
    a_page.wait_for_selector(".engine-ready")
    a_page.wait_for_selector(".volume-name")

    assert wrong == []


def test_session_that_is_over_says_so(a_viewer: Any, a_page: Any) -> None:
    a_page.goto(f"{a_viewer.url}s/nothing-of-that-name/index.html")

    assert "This session is over" in a_page.locator("h1").inner_text()
    a_page.locator("a").click()
    a_page.wait_for_selector(".volume-name")


def test_ctrl_c_ends_pages_engine_and_files(
    another_viewer: Callable[..., Any], a_phantom: Path, tmp_path: Path
) -> None:
    viewer = another_viewer(str(a_phantom), TMPDIR=str(tmp_path))
    with urllib.request.urlopen(viewer.url, timeout=PATIENCE) as answer:
        assert answer.status == 200
    started = _descendants(viewer.process.pid)
    assert len(started) >= 2, "the engine and one page at least"

    viewer.process.send_signal(signal.SIGINT)

    assert viewer.process.wait(PATIENCE) == 0
    _until(lambda: not any(_runs(one) for one in started))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ka2er")] == []


@pytest.fixture
def an_engine() -> Iterator[Any]:
    """One that somebody else started: its process, address and key."""
    command = [sys.executable, "-m", "KA2ERSegment.cli", "serve", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    yield process, told["url"], told["api_key"]
    process.terminate()
    process.wait(PATIENCE)


def test_engine_that_runs_already_is_used_and_outlives_the_viewer(
    an_engine: Any, another_viewer: Callable[..., Any], a_phantom: Path, open_tab: Callable[..., Any]
) -> None:
    engine, url, key = an_engine
    viewer = another_viewer(str(a_phantom), "--engine", url, "--api-key", key)
    tab = open_tab(viewer.url)

    tab.click("Red", tab.BALL)

    assert tab.voxels("Segment_1").any()
    started = [Path(f"/proc/{one}/cmdline").read_text() for one in _descendants(viewer.process.pid)]
    assert not [line for line in started if "KA2ERSegment.engine" in line], "no engine of its own"
    viewer.process.send_signal(signal.SIGINT)
    assert viewer.process.wait(PATIENCE) == 0
    assert engine.poll() is None


def test_viewer_does_not_start_on_a_port_that_is_taken(another_viewer: Callable[..., Any], a_phantom: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        viewer = another_viewer(str(a_phantom), "--port", str(taken.getsockname()[1]))
        said, _ = viewer.process.communicate(timeout=PATIENCE)

    assert viewer.process.returncode == 1
    assert "http://" not in said


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _descendants(parent: int) -> list[int]:
    """Processes that a process started, and theirs."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found += [int(folder.name), *_descendants(int(folder.name))]
    return found


def _runs(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
