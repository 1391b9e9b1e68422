"""An engine of our own: it starts, says why it could not, dies, is replaced, and never outlives us."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from KA2ERSegment.engine.process import KEY_VARIABLE, LocalEngine
from KA2ERSegment.engine.wire import EngineGoneError
from KA2ERSegment.prompts import BoxPrompt, PointPrompt
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.volume import Volume

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")


def test_key_is_in_no_command_line_and_no_environment_that_others_see(an_engine: LocalEngine) -> None:
    process = psutil.Process(an_engine.pid)

    assert len(an_engine.api_key) >= 32
    assert an_engine.api_key not in " ".join(process.cmdline())
    assert an_engine.api_key not in "".join(an_engine.log)


@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_threads_of_an_engine_sleep_while_they_wait_unless_somebody_says_otherwise(
    policy: str | None, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    told = tmp_path / "told"
    program = f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(os.environ['OMP_WAIT_POLICY'])"
    said = {} if policy is None else {"OMP_WAIT_POLICY": policy}
    engine = LocalEngine([sys.executable, "-c", program], environment=environment | said)
    engine.start()
    try:
        with pytest.raises(EngineGoneError):
            engine.wait()
    finally:
        engine.stop()

    assert told.read_text() == (policy or "PASSIVE")


@posix
def test_exchange_folder_is_ours_alone_and_goes_with_the_engine(an_engine: LocalEngine) -> None:
    folder = an_engine.client().exchange

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()


def test_engine_killed_in_the_middle_of_a_prediction_is_replaced_and_nothing_is_lost(a_volume: Volume) -> None:
    engine = LocalEngine([sys.executable], device="cpu")  # the shipped bundle: its network takes its time
    engine.start()
    assert engine.poll() == "starting"
    try:
        engine.wait()
        assert engine.seconds_to_ready > 0
        session = engine.client().open(a_volume.array_kji, a_volume.ijk_to_ras)
        session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
        session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
        mask, saved = session.mask("object"), session.to_json()
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(session.add, BoxPrompt.from_ijk((1, 1, 1), (29, 21, 13), a_volume))
            while session.progress()[0] != "Computing features":
                assert not work.done()
            psutil.Process(engine.pid).kill()
            with pytest.raises(EngineGoneError):
                work.result(30)
        psutil.wait_procs([psutil.Process(engine._process.pid)], 10)
        assert engine.poll() == "dead"
        with pytest.raises(EngineGoneError, match="dead"):
            engine.client()
        with pytest.raises(EngineGoneError):
            session.undo()
        assert session.to_json() == saved

        engine.start()
        engine.wait()
        again = engine.client().open(a_volume.array_kji, a_volume.ijk_to_ras)
        again.give(saved)

        assert again.to_json() == saved
        box, crop = again.mask("object")
        assert box == mask[0]
        np.testing.assert_array_equal(crop, mask[1])
    finally:
        engine.stop()


def test_restart_stops_at_once_what_does_not_listen(a_bundle: Path, a_volume: Volume) -> None:
    engine = LocalEngine([sys.executable], a_bundle, "cpu")
    engine.start()
    try:
        engine.wait()
        client, pid, folder = engine.client(), engine.pid, engine.client().exchange
        session = client.open(a_volume.array_kji, a_volume.ijk_to_ras)
        if sys.platform != "win32":
            os.kill(pid, signal.SIGSTOP)  # as deaf as a process can be

        engine.restart()

        assert not psutil.pid_exists(pid)
        assert not folder.exists()
        with pytest.raises(EngineGoneError):
            session.undo()
        engine.wait()
        assert engine.pid != pid
        assert engine.client() is not client
        assert engine.client().info()["sessions"] == 0
    finally:
        engine.stop()
    assert engine.poll() == "dead"
    engine.stop()


PARENT = """
import sys, threading
from KA2ERSegment.engine.process import LocalEngine
engine = LocalEngine([sys.executable], sys.argv[1], "cpu")
engine.start()
engine.wait()
print(engine.pid, engine.client().exchange, flush=True)
threading.Event().wait()
"""


@posix
@pytest.mark.parametrize("way", ["pipe", "process"])
def test_engine_ends_when_its_parent_is_killed(a_bundle: Path, way: str) -> None:
    code = PARENT
    if way == "process":  # somebody else holds the pipe: only the watch of the process is left
        code = code.replace(
            "engine.wait()", "engine.wait(); import os; os.set_inheritable(engine._process.stdin.fileno(), True)"
        )
        code = code.replace("print(", "import subprocess; subprocess.Popen(['sleep', '60'], close_fds=False); print(")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(a_bundle)], stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    try:
        pid, folder = parent.stdout.readline().split()
        engine = psutil.Process(int(pid))

        parent.kill()

        gone, alive = psutil.wait_procs([engine], 15)
        assert not alive
        assert gone
        assert not Path(folder).exists()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


@posix
def test_launcher_and_what_it_launched_end_together(a_bundle: Path) -> None:
    launcher = ["/bin/sh", "-c", '"$0" "$@"; exit $?', sys.executable]
    environment = {**os.environ, "PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere"}
    engine = LocalEngine(launcher, a_bundle, "cpu", environment)
    engine.start()
    engine.wait()
    real, shell = psutil.Process(engine.pid), psutil.Process(engine._process.pid)
    assert real.pid != shell.pid
    assert KEY_VARIABLE not in os.environ

    engine.restart()
    _, alive = psutil.wait_procs([real], 10)
    assert not alive
    engine.stop()
    assert engine.poll() == "dead"


@posix
def test_stopping_an_engine_that_ended_kills_nobody_who_has_its_number_now(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine([sys.executable, "-S"])
    engine.start()
    engine._process.wait(30)
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))

    engine.stop()

    assert engine.poll() == "dead"
    assert killed == []


def test_python_that_is_not_there_is_named() -> None:
    engine = LocalEngine([str(Path("no") / "such" / "python")])
    engine.start()

    assert engine.poll() == "dead"
    with pytest.raises(EngineGoneError, match="could not be started"):
        engine.wait()
    engine.stop()


def test_python_without_torch_says_so() -> None:
    engine = LocalEngine([sys.executable, "-S"])
    engine.start()

    with pytest.raises(EngineGoneError, match="No module named"):
        engine.wait()
    assert engine.poll() == "dead"


def test_bundle_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    engine = LocalEngine([sys.executable], tmp_path, "cpu")
    engine.start()

    with pytest.raises(EngineGoneError, match="a bundle is a folder"):
        engine.wait()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0"], "must have a key"),
        (["--host", "nowhere.invalid"], "must have a key"),
        (["--port", "99999"], "cannot listen"),
    ],
)
def test_engine_that_would_be_unsafe_or_deaf_does_not_start(arguments: list[str], reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "KA2ERSegment.engine.serve", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stdout == ""


def test_log_is_short_and_tells_no_names(an_engine: LocalEngine, a_volume: Volume) -> None:
    session = an_engine.client().open(a_volume.array_kji, a_volume.ijk_to_ras, "Miller^Anna")
    session.select("Miller tumour")
    session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
    session.remove("Miller tumour")
    session.close()
    said = threading.Event()

    def wait() -> None:
        while not any("session closed" in line for line in an_engine.log):
            pass
        said.set()

    threading.Thread(target=wait, daemon=True).start()
    assert said.wait(10)
    text = "\n".join(an_engine.log)
    assert "Miller" not in text
    assert str(an_engine.client().exchange) not in text
    assert len(an_engine.log) <= 200


@pytest.mark.parametrize(("asked", "megabytes"), [("900", 900.0), ("1", 64.0), ("", 512.0), ("much", 512.0)])
def test_the_viewer_says_how_much_a_session_may_keep(
    monkeypatch: pytest.MonkeyPatch, asked: str, megabytes: float
) -> None:
    from KA2ERSegment.engine import serve

    monkeypatch.setenv("KA2ERSEGMENT_FEATURE_MEMORY_MB", asked)

    assert serve._feature_memory_mb(sessions=4) == megabytes


def test_a_bundles_folder_may_have_spaces_quotes_and_umlauts(a_volume: Volume, tmp_path: Path) -> None:
    odd = tmp_path / "Büro «nötig» it's 'all' & more"
    odd.mkdir()
    bundle = tiny_bundle(odd / "Bündel eins")
    engine = LocalEngine([sys.executable], bundle.folder, "cpu")
    engine.start()
    try:
        engine.wait()
        session = engine.client().open(a_volume.array_kji, a_volume.ijk_to_ras)
        change = session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))

        assert change.selected == "object"
        assert session.steps
    finally:
        engine.stop()
