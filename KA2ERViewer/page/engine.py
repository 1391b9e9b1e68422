"""The engine that the server keeps for all tabs, as one tab sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from KA2ERSegment.engine.client import EngineClient


class KeptEngine:
    """`Protocols.EngineProtocol` on an engine that the server starts, watches and starts again.

    Args:
        address: file in which the server says where the engine is: state, url, key and the folder for volumes. It is
            written anew whenever that changes.
    """

    def __init__(self, address: Path) -> None:
        self._file = address
        self._known: dict[str, Any] = {}
        self._client: EngineClient | None = None
        self.log: list[str] = []

    def start(self) -> None:
        """The server does that."""

    def poll(self) -> str:
        """ "starting", "ready" or "dead"."""
        return str(self._read().get("state", "starting"))

    def client(self) -> EngineClient:
        """Another one after each start of the engine."""
        told = self._read()
        if self._client is None or told != self._known:
            if self._client is not None:
                self._client.forget()
            folder = told.get("exchange")
            self._client = EngineClient(told["url"], told["key"], Path(folder) if folder else None)
            self._known = told
        return self._client

    def restart(self) -> None:
        """Other tabs work with it too: a cancelled prediction that does not stop comes to its end unseen."""

    def stop(self) -> None:
        """Leaves the engine running and gives back what it holds for us."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def _read(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        self.log = told.get("log", [])
        return told
