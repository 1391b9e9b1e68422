"""Pages: one process per tab, found again by a number that cannot be guessed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from KA2ERViewer.options import ViewerOptions

logger = logging.getLogger("KA2ERViewer")

PACKAGES = Path(__file__).resolve().parents[2]
"""Where our packages are: the process of a page runs the same ones."""
PATIENCE = 300.0
"""Seconds that a page may take to start."""


class Session:
    """One page's process.

    Args:
        options: what it begins with.
        folder: its own; made here, removed at the end.
        engine: file with the engine's address.
    """

    def __init__(self, options: ViewerOptions, folder: Path, engine: Path) -> None:
        # Without capitals: the page's trame client writes the address of its socket in small letters.
        self.id, self.secret = secrets.token_hex(16), secrets.token_urlsafe(32)
        self._options, self._folder, self._engine = options, folder / self.id, engine
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.left_at = time.monotonic()
        self.browser: object | None = None
        """The connection of the tab that shows it."""

    async def start(self) -> None:
        """Start the process; returns when it answers.

        Raises:
            OSError: it ended, or did not answer in time.
        """
        self._folder.mkdir(mode=0o700)
        environment = {**os.environ, "PYTHONPATH": str(PACKAGES), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "KA2ERViewer.page.app",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._folder,
            env=environment,
            start_new_session=True,  # Ctrl+C is ours; we end it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = {
            "secret": self.secret,
            "engine": str(self._engine),
            "folder": str(self._folder),
            "limits": self._options.limits_as_json(),
            "volume": str(self._options.volume.resolve()) if self._options.volume else None,
        }
        self._process.stdin.write(json.dumps(told).encode() + b"\n")
        await self._process.stdin.drain()
        async with asyncio.timeout(PATIENCE) if sys.version_info >= (3, 11) else contextlib.AsyncExitStack():
            while line := await self._process.stdout.readline():
                if line.startswith(b'{"port"'):
                    self.port = json.loads(line)["port"]
                    self._drain = asyncio.create_task(_drain(self._process.stdout))
                    return
        message = "the page's process ended before it answered"
        raise OSError(message)

    @property
    def is_alive(self) -> bool:
        """Whether its process runs, or is about to."""
        return self._process is None or self._process.returncode is None

    async def end(self) -> None:
        """End the process, and remove its files."""
        process = self._process
        if process is not None and process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()  # it ends by itself then
            try:
                await asyncio.wait_for(process.wait(), 3)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class Sessions:
    """All pages of a server, and one that waits for the next tab.

    Args:
        options: how many there may be, and for how long.
        folder: private; each page gets a folder in it.
        engine: file with the engine's address.
    """

    def __init__(self, options: ViewerOptions, folder: Path, engine: Path) -> None:
        self._options, self._folder, self._engine = options, folder, engine
        self._all: dict[str, Session] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._waiting: Session | None = None
        self._failed: set[str] = set()

    def prepare(self) -> None:
        """Start a page before anybody asked: the first tab does not wait for it."""
        self._waiting = self._begin()

    def new(self) -> Session | None:
        """A page for a new tab; None where there are too many already."""
        if len(self._all) >= self._options.sessions:
            self._drop_oldest_left()
        if len(self._all) >= self._options.sessions:
            return None
        session, self._waiting = self._waiting, None
        if session is None or not session.is_alive:
            session = self._begin()
        session.left_at = time.monotonic()
        self._all[session.id] = session
        return session

    def find(self, session_id: str) -> Session | None:
        """The page of that number."""
        session = self._all.get(session_id)
        return session if session is not None and session.is_alive else None

    def has_failed(self, session_id: str) -> bool:
        """Whether that page's process ended while it started."""
        return session_id in self._failed

    async def watch(self) -> None:
        """End pages that nobody looks at."""
        while True:
            now = time.monotonic()
            for session in list(self._all.values()):
                left = session.browser is None and now - session.left_at > self._options.idle_seconds
                if left or not session.is_alive:
                    await self._end(session)
            await asyncio.sleep(1.0)

    async def close(self) -> None:
        """End them all."""
        every = [*self._all.values(), *([self._waiting] if self._waiting else [])]
        self._all.clear()
        await asyncio.gather(*(session.end() for session in every))

    def _begin(self) -> Session:
        session = Session(self._options, self._folder, self._engine)
        task = asyncio.create_task(session.start())
        self._starting[session.id] = task
        task.add_done_callback(lambda done: self._started(session, done))
        return session

    def _started(self, session: Session, task: asyncio.Task[None]) -> None:
        self._starting.pop(session.id, None)
        if not task.cancelled() and task.exception() is not None:
            self._failed.add(session.id)
            logger.warning("A page could not be started: %s", task.exception())

    def _drop_oldest_left(self) -> None:
        left = [session for session in self._all.values() if session.browser is None]
        if left:
            oldest = min(left, key=lambda session: session.left_at)
            self._all.pop(oldest.id)
            self._ending = asyncio.create_task(oldest.end())

    async def _end(self, session: Session) -> None:
        self._all.pop(session.id, None)
        await session.end()


async def _drain(stream: asyncio.StreamReader) -> None:
    """VTK and others write there; nobody reads it, and the pipe must not fill."""
    while await stream.read(1 << 16):
        pass
