"""`LocalEngine`: an engine of our own on this machine, started, watched and stopped. Standard library alone.

It is started with another Python, listens on 127.0.0.1 on a port of its choice, and knows a random token that only
the two of us have. It ends with us, also when we are killed: the pipe to its standard input closes then, and it
watches our process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from KA2ERSegment.engine.client import EngineClient
from KA2ERSegment.engine.wire import EngineGoneError

KEY_VARIABLE = "KA2ERSEGMENT_API_KEY"
MEMORY_VARIABLE = "KA2ERSEGMENT_FEATURE_MEMORY_MB"
"""Environment: how much each session of an engine may keep of what it has computed."""
PACKAGE = Path(__file__).resolve().parents[1]
"""Our own package: what the other Python runs too, so that both sides are of one version."""

_BOOT = (
    "import importlib.util as u, sys; "
    "s = u.spec_from_file_location('KA2ERSegment', sys.argv.pop(1)); "
    "m = u.module_from_spec(s); sys.modules['KA2ERSegment'] = m; s.loader.exec_module(m); "
    "from KA2ERSegment.engine.serve import main; sys.exit(main())"
)
_FOREIGN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__")
"""What belongs to the Python that we run in, and would break another one."""
_SHARED_MACHINE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""An engine shares its cores with the viewer: its threads sleep while they wait for each other, instead of running in
circles, and memory of a click is kept for the next one (glibc), instead of being given back and cleared each time.
Where both cores are busy, a click takes clearly less CPU time by the first, and a little less by the others. What the
environment says otherwise counts."""

_NO_WINDOW = 0x08000000 if sys.platform == "win32" else 0
"""CREATE_NO_WINDOW: no console opens beside the viewer."""


class LocalEngine:
    """An engine in a process of its own.

    Args:
        python: command that starts a Python with torch, e.g. Slicer's PythonSlicer.
        bundle: folder; the shipped one by default.
        device: "auto", "cpu" or "cuda".
        environment: of the process; ours by default. What belongs to our Python is left out of it.
        arguments: more for `ka2ersegment serve`.
    """

    def __init__(
        self,
        python: Sequence[str],
        bundle: str | os.PathLike[str] | None = None,
        device: str = "auto",
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.python, self.bundle, self.device = list(python), bundle, device
        self.environment, self.arguments = environment, list(arguments)
        self.log: deque[str] = deque(maxlen=200)
        """Its last lines; no volume content, no names."""
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._ready: dict[str, Any] = {}
        self._key = ""
        self._exchange: Path | None = None
        self._client: EngineClient | None = None
        self._started = self._became_ready = 0.0

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it where none runs; does not wait."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._clean_up()
            self._exchange = _exchange_folder()
            self._key = secrets.token_urlsafe(32)
            self._ready, self._started = {}, time.monotonic()
            try:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    cwd=self._exchange.parent,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    creationflags=_NO_WINDOW,
                    start_new_session=True,  # a launcher and what it launched are one group; Windows has no such thing
                )
            except OSError as error:
                self.log.append(f"{self.python[0]!r} could not be started: {error.strerror}.")
                self._process = None
                self._clean_up()
                return
            _RUNNING.add(self)
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write("watch\n")  # from now on the end of this pipe is its end
                self._process.stdin.flush()
            arguments = (self._process, self.log, self._ready)
            threading.Thread(target=_drain, args=arguments, name="KA2ER engine log", daemon=True).start()

    def poll(self) -> str:
        """ "starting", "ready" or "dead"; never waits."""
        process = self._process
        if process is None or process.poll() is not None:
            return "dead"
        return "ready" if "port" in self._ready else "starting"

    def wait(self, timeout: float = 60.0) -> None:
        """Until it is ready.

        Raises:
            EngineGoneError: it ended, or was not ready in time; with its last words.
        """
        end = time.monotonic() + timeout
        while (state := self.poll()) == "starting" and time.monotonic() < end:
            time.sleep(0.01)
        if state != "ready":
            raise self._gone(state)

    def client(self) -> EngineClient:
        """The client of the engine that runs now; another one after each start.

        Raises:
            EngineGoneError: it is not ready.
        """
        with self._lock:
            if (state := self.poll()) != "ready":
                raise self._gone(state)
            if self._client is None:
                self._client = EngineClient(f"http://127.0.0.1:{self._ready['port']}", self._key, self._exchange)
            return self._client

    @property
    def api_key(self) -> str:
        """The token of the engine that runs now: what another viewer on this machine needs beside its address."""
        return self._key

    def address(self) -> tuple[str, str, Path | None]:
        """URL, token and folder for volumes of the engine that runs now: for viewers in other processes.

        Raises:
            EngineGoneError: it is not ready.
        """
        if (state := self.poll()) != "ready":
            raise self._gone(state)
        return f"http://127.0.0.1:{self._ready['port']}", self._key, self._exchange

    @property
    def pid(self) -> int | None:
        """Of the engine itself, which a launcher may have started; None before it is ready."""
        return self._ready.get("pid")

    @property
    def seconds_to_ready(self) -> float | None:
        """From start to the line that said "ready"; None before."""
        return self._ready["at"] - self._started if "at" in self._ready else None

    def restart(self) -> None:
        """Kill it at once and start another: what a cancel falls back to. Sessions are gone; replay their journals."""
        with self._lock:
            self._kill()
            self.start()

    def stop(self) -> None:
        """End it: politely, and after two seconds by force."""
        with self._lock:
            process = self._process
            if process is not None and process.poll() is None:
                with contextlib.suppress(OSError):
                    if process.stdin is not None:
                        process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
            self._kill()

    # -- how ---------------------------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        command = [*self.python, "-u", "-c", _BOOT, str(PACKAGE / "__init__.py")]
        command += ["--host", "127.0.0.1", "--port", "0", "--device", self.device, "--idle-timeout", "0"]
        command += ["--parent", str(os.getpid()), "--exchange", str(self._exchange), "--max-sessions", "32"]
        if self.bundle is not None:
            command += ["--bundle", str(self.bundle)]
        return command + self.arguments

    def _environment(self) -> dict[str, str]:
        inherited = os.environ if self.environment is None else self.environment
        environment = {name: value for name, value in inherited.items() if name not in _FOREIGN}
        return {**_SHARED_MACHINE, **environment, "PYTHONIOENCODING": "utf-8", KEY_VARIABLE: self._key}

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            _kill_tree(process, self._ready.get("pid"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        self._clean_up()

    def _clean_up(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._client is not None:
            self._client.forget()
        self._client = None
        if self._exchange is not None:
            shutil.rmtree(self._exchange, ignore_errors=True)
        self._exchange = None
        _RUNNING.discard(self)

    def _gone(self, state: str) -> EngineGoneError:
        last = "\n".join(list(self.log)[-5:])
        return EngineGoneError(f"the local engine is {state}. Its last words:\n{last}")


def _drain(process: subprocess.Popen[str], log: deque[str], ready: dict[str, Any]) -> None:
    """Read what the engine says, so that it never waits for us; the line with its port makes it ready."""
    assert process.stdout is not None
    stream: IO[str] = process.stdout
    with stream, contextlib.suppress(OSError, ValueError):
        for line in stream:
            if not ready and line.startswith('{"port"'):
                with contextlib.suppress(ValueError):
                    ready.update({**json.loads(line), "at": time.monotonic()})
                    continue
            log.append(line.rstrip()[:500])


def _exchange_folder() -> Path:
    """A private folder for volumes: in memory where the system offers that, so that no voxel reaches a disk."""
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    _sweep(base)
    return Path(tempfile.mkdtemp(prefix=f"ka2ersegment-{os.getpid()}-", dir=base))  # mode 0700


def _sweep(base: Path) -> None:
    """Remove what engines left whose owner was killed together with them."""
    for folder in base.glob("ka2ersegment-*-*"):
        owner = folder.name.split("-")[1]
        with contextlib.suppress(OSError):
            if owner.isdigit() and not process_alive(int(owner)) and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)  # of other users we may not, and do not


def process_alive(pid: int) -> bool:
    """Whether there is such a process; on Windows nobody knows cheaply, and it is taken to be there."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _kill_tree(process: subprocess.Popen[str], pid: int | None) -> None:
    """Kill a process and all that it started: a launcher's child is the engine."""
    if sys.platform == "win32":
        for each in {process.pid, pid} - {None}:
            with contextlib.suppress(OSError):
                command = ["taskkill", "/T", "/F", "/PID", str(each)]
                subprocess.run(command, check=False, creationflags=_NO_WINDOW, capture_output=True)
    else:
        with contextlib.suppress(OSError):
            # once the launcher has ended its number may be anybody's, unless the engine is still in its group
            if process.poll() is None or (pid not in (None, process.pid) and os.getpgid(pid) == process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.kill()


_RUNNING: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for engine in list(_RUNNING):
        engine.stop()
