"""The engine as the worker thread sees it: started when needed, restarted and told everything again when it dies.

No MRML here: `perform` runs in the worker thread. Only `cancel`, `state` and `session` are for other threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from KA2ERSegment.engine.client import EngineClient
from KA2ERSegment.engine.wire import EngineError, EngineGoneError
from KA2ERSegment.errors import CancelledError, KA2ERError, SessionStateError
from SlicerKA2ERLib.Protocols import EngineProtocol
from SlicerKA2ERLib.VolumeIO import VolumeData

Result = TypeVar("Result")

COOPERATION = 0.5
"""Seconds that a cancelled prediction has to stop by itself; after that its engine is killed."""
NOTICED = 2.0
"""Seconds from a broken connection until an engine that says nothing is replaced."""
PATIENCE = 120.0
"""Seconds until an engine that starts counts as dead: a cold start from a slow disk with CUDA takes long."""


class RemoteEngine:
    """An engine that somebody else runs: nothing to start, only a client to make.

    Args:
        url: "https://host:port".
        apiKey: its token.
    """

    def __init__(self, url: str, apiKey: str = "") -> None:
        self._url, self._apiKey = url, apiKey
        self._client: EngineClient | None = None
        self.log: list[str] = []

    def start(self) -> None:
        if self._client is None:
            self._client = EngineClient(self._url, self._apiKey)

    def poll(self) -> str:
        return "dead" if self._client is None else "ready"

    def client(self) -> EngineClient:
        self.start()
        assert self._client is not None, "started above"
        return self._client

    def restart(self) -> None:
        """Somebody else's engine is not ours to end."""

    def stop(self) -> None:
        """Leaves the engine running and gives back what it holds for us."""
        if self._client is not None:
            self._client.close()
        self._client = None


class EngineLink:
    """One engine and one session on it: the volume that was asked for last.

    Args:
        factory: makes the engine; None where there is nothing to connect to.
    """

    def __init__(self, factory: Callable[[], EngineProtocol] | None = None) -> None:
        self._factory = factory
        self._engine: EngineProtocol | None = None
        self.session: Any = None
        self.journal: dict[str, Any] | None = None
        """All that the session was told; what the next engine is told first. None where that is nothing."""
        self.info: dict[str, Any] = {}
        self.state = "stopped" if factory else "none"
        self.log: Any = ()
        self._volumeKey: tuple[Any, ...] | None = None
        self._closed = False
        self._cancelled = threading.Event()
        self._inVerb = threading.Event()
        self._idle = threading.Event()
        self._idle.set()

    # -- worker thread -----------------------------------------------------------------------------------------------

    def perform(self, volume: VolumeData, work: Callable[[Any], Result]) -> Result:
        """Run `work` with a session on that volume; once more with a new engine where the first one died.

        Args:
            volume: handed over where the session is on another one, or there is none.
            work: gets the session; what it did is all in the session's journal.

        Raises:
            CancelledError: `cancel` was called meanwhile. The session is as it was before.
            KA2ERError: what the engine refused, or that it died twice.
        """
        if self._closed:
            raise _cancelled()
        self._cancelled.clear()
        self._idle.clear()
        try:
            for attempt in (1, 2):
                try:
                    session = self._sessionOn(volume)
                    self._inVerb.set()
                    return work(session)
                except EngineError as error:
                    if not _isGone(error):
                        raise
                    self._lose()
                    if self._cancelled.is_set():
                        raise _cancelled() from error
                    if attempt == 2:
                        message = f"the engine stopped twice while it worked. {error}"
                        raise EngineGoneError(message) from error
                finally:
                    self._inVerb.clear()
        finally:
            if self.session is not None:  # what a refused verb did before it was refused counts
                self.journal = self.session.to_json()
            self._idle.set()
        raise AssertionError  # the loop returns or raises

    def close(self) -> None:
        """Stop the engine, and what it is doing, for good."""
        self._closed = True
        self._cancelled.set()
        if self._engine is not None:
            self._engine.stop()
        self.session, self._engine, self._volumeKey, self.journal = None, None, None, None
        self.state = "stopped" if self._factory else "none"

    @property
    def isStopped(self) -> bool:
        """Whether there is no engine of ours."""
        return self._engine is None

    def replaceFactory(self, factory: Callable[[], EngineProtocol] | None) -> None:
        """Stop the engine; the next one is made by `factory` and told what this one knew."""
        if self._engine is not None:
            self._engine.stop()
        self._factory, self._engine, self.session, self.info = factory, None, None, {}
        self.state = "stopped" if factory else "none"

    def forgetSession(self) -> None:
        """The next `perform` begins a new one that knows nothing."""
        if self.session is not None:
            self.session.close()
        self.session, self._volumeKey, self.journal = None, None, None

    def _sessionOn(self, volume: VolumeData) -> Any:
        client = self._client()
        if self._volumeKey != volume.key:
            self.forgetSession()
        if self.session is None or self.session.client is not client:
            session = client.open(volume.array, volume.grid.ijk_to_ras)
            self._volumeKey = volume.key
            try:
                if self.journal and self.journal["steps"]:
                    session.give(self.journal)
            except EngineGoneError:
                raise
            except KA2ERError:
                self.forgetSession()  # it cannot be told what it knew: whoever asks begins from the scene again
                raise
            self.session = session
        if self._cancelled.is_set():
            raise _cancelled()
        return self.session

    def _client(self) -> Any:
        if self._factory is None:
            message = "no engine is set up. Finish the installation first."
            raise SessionStateError(message)
        if self._engine is None:
            self._engine = self._factory()
            self.log = self._engine.log
        if self._engine.poll() == "dead":
            self._engine.start()
        deadline = time.monotonic() + PATIENCE
        pause = threading.Event()
        while (state := self._engine.poll()) == "starting" and time.monotonic() < deadline:
            self.state = state
            if self._cancelled.is_set():
                raise _cancelled()
            pause.wait(0.02)
        self.state = state
        if state != "ready":
            words = "\n".join(list(self._engine.log)[-5:])
            message = f"the engine could not be started. Its last words:\n{words}"
            raise EngineGoneError(message)
        client = self._engine.client()
        if not self.info:
            self.info = client.info()
        return client

    def _lose(self) -> None:
        """The session is gone; its journal is not. Where the engine is gone too, that is known afterwards."""
        self.session = None
        engine, pause = self._engine, threading.Event()
        deadline = time.monotonic() + NOTICED
        while engine is not None and engine.poll() == "ready" and not _answers(engine):
            if time.monotonic() > deadline:  # it runs, and does not speak
                engine.restart()
                break
            pause.wait(0.02)
        if engine is not None and engine.poll() != "ready":
            self.state = "dead"

    # -- any other thread --------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop what `perform` is doing, by another engine where it does not within half a second. May wait."""
        self._cancelled.set()
        session = self.session
        if session is not None and self._inVerb.is_set():
            with suppress(KA2ERError):  # it is gone, or has just finished: both end the wait below
                session.cancel()
        engine = self._engine
        if not self._idle.wait(COOPERATION) and self._inVerb.is_set() and engine is not None:
            engine.restart()


def _answers(engine: EngineProtocol) -> bool:
    """A killed process is there for some milliseconds more; it does not answer any more."""
    try:
        engine.client().info()
    except EngineError:
        return False
    return True


def _isGone(error: EngineError) -> bool:
    """Whether the session on the other side is lost: its process, the connection, or only its lease."""
    return isinstance(error, EngineGoneError) or error.kind == "lease"


def _cancelled() -> CancelledError:
    return CancelledError("the prediction was cancelled.")
