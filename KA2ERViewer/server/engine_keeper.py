"""One engine for all pages, started and watched; where it is stands in a file that pages read."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from KA2ERSegment.engine.process import LocalEngine
from KA2ERViewer.options import ViewerOptions

LOOKS = 0.2
"""Seconds between two looks at the engine."""


class EngineKeeper:
    """An engine of our own, or the address of somebody else's.

    Args:
        options: which one.
        folder: private; the file `engine.json` is written into it.
    """

    def __init__(self, options: ViewerOptions, folder: Path) -> None:
        self.file = folder / "engine.json"
        self._options, self._told = options, ""
        self._engine: LocalEngine | None = None
        if not options.engine:
            self._engine = LocalEngine([sys.executable], options.bundle, options.device)
        self._tell()

    def start(self) -> None:
        """Start an engine of our own; does not wait for it."""
        if self._engine is not None:
            self._engine.start()

    async def watch(self) -> None:
        """Start it again whenever it dies."""
        while self._engine is not None:
            if self._engine.poll() == "dead":
                self._engine.start()
            self._tell()
            await asyncio.sleep(LOOKS)

    def stop(self) -> None:
        """End an engine of our own."""
        if self._engine is not None:
            self._engine.stop()

    def _tell(self) -> None:
        text = json.dumps(self._address())
        if text != self._told:
            self._told = text
            fresh = self.file.with_suffix(".new")
            fresh.touch(mode=0o600)
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self.file)

    def _address(self) -> dict[str, Any]:
        engine = self._engine
        if engine is None:
            return {"state": "ready", "url": self._options.engine, "key": self._options.engine_key}
        if engine.poll() != "ready":
            return {"state": "starting", "log": list(engine.log)[-5:]}
        url, key, exchange = engine.address()
        return {"state": "ready", "url": url, "key": key, "exchange": str(exchange)}
