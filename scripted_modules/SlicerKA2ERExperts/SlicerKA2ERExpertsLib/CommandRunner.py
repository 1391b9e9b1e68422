"""`ka2ersegment` in another process, so that Slicer's window lives on and a cancel takes effect. No Qt."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_BOOT = (
    "import importlib.util as u, sys; "
    "s = u.spec_from_file_location('KA2ERSegment', sys.argv.pop(1)); "
    "m = u.module_from_spec(s); sys.modules['KA2ERSegment'] = m; s.loader.exec_module(m); "
    "from KA2ERSegment.cli import main; sys.exit(main())"
)
"""The other Python runs our own package, wherever it lies, so that both sides are of one version."""
_FOREIGN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__")
"""What belongs to the Python that we run in, and would break another one."""


class CommandRunner:
    """RunnerProtocol.

    Args:
        python: command that starts a Python with torch, e.g. Slicer's PythonSlicer.
        environment: of the process; ours by default.
    """

    def __init__(self, python: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._python = list(python)
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._output: list[str] = []
        self._readers: list[threading.Thread] = []

    def start(self, arguments: Sequence[str]) -> None:
        import KA2ERSegment

        inherited = os.environ if self._environment is None else self._environment
        environment = {name: value for name, value in inherited.items() if name not in _FOREIGN}
        environment |= {"PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}
        package = Path(KA2ERSegment.__file__).resolve()
        self._lines, self._output = queue.SimpleQueue(), []
        lines, output = self._lines, self._output
        self._process = subprocess.Popen(
            [*self._python, "-u", "-c", _BOOT, str(package), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
            creationflags=0x08000000 if sys.platform == "win32" else 0,  # CREATE_NO_WINDOW
            start_new_session=True,  # PythonSlicer is a launcher: it and what it launched are one group
        )
        self._readers = [
            _reading(self._process.stdout, output.append),
            _reading(self._process.stderr, lines.put),
        ]

    def poll(self) -> tuple[list[str], int | None]:
        process = self._process
        code = None if process is None else process.poll()
        if code is not None and any(reader.is_alive() for reader in self._readers):
            code = None  # its last words are on their way
        lines = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._lines.get_nowait().rstrip("\n"))
        return lines, code

    def output(self) -> str:
        return "".join(self._output)

    def cancel(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        if sys.platform == "win32":
            command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
            subprocess.run(command, capture_output=True, check=False, creationflags=0x08000000)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)


def _reading(stream: IO[str] | None, take: Any) -> threading.Thread:
    """A thread that takes the lines of a stream until its end."""

    def read() -> None:
        for line in stream or ():
            take(line)

    thread = threading.Thread(target=read, name="KA2ER command", daemon=True)
    thread.start()
    return thread
