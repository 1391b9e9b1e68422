"""The module's values in the application's settings, and the engine that they ask for. No Qt, no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from . import ExpertSwitches
from .Shortcuts import DEFAULT_KEYS

DEFAULTS: dict[str, Any] = {
    "engine": "local",
    "device": "auto",
    "python": "",
    "url": "",
    "apiKey": "",
    "bundle": "",
    "memoryMb": 512,
    "offline": False,
    "resumeInstall": False,
    **{f"shortcut/{action}": keys for action, keys in DEFAULT_KEYS.items()},
}
"""`engine` is "local" (Slicer's own Python), "python" (the interpreter `python`) or "remote" (`url` and `apiKey`)."""

PREFIX = "KA2ERSegment/"
ENGINE_KEYS = ("engine", "device", "python", "url", "apiKey", "bundle", "memoryMb", "offline")


class Settings:
    """SettingsProtocol over the application's settings.

    Args:
        store: a QSettings; the application's by default.
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store

    def value(self, key: str) -> Any:
        default = DEFAULTS[key]
        text = self._settings().value(PREFIX + key)
        if text is None:
            return default
        if isinstance(default, bool):
            return str(text).lower() in ("true", "1")  # QSettings gives back what its file has: text
        try:
            return type(default)(text)
        except ValueError:
            return default

    def setValue(self, key: str, value: Any) -> None:
        if key not in DEFAULTS:
            msg = f"Settings have the keys {sorted(DEFAULTS)}, got {key!r}."
            raise KeyError(msg)
        self._settings().setValue(PREFIX + key, value)

    def expertsOff(self, identity: str) -> tuple[str, ...]:
        """Experts of a bundle that take no part."""
        return ExpertSwitches.switchedOff(self._settings().value(ExpertSwitches.PREFIX + identity))

    def setExpertsOff(self, identity: str, names: Iterable[str]) -> None:
        self._settings().setValue(ExpertSwitches.PREFIX + identity, ExpertSwitches.toStored(names))

    def engineChoice(self) -> tuple[Any, ...]:
        """What an engine is made from: where this differs, another engine is needed."""
        return tuple(self.value(key) for key in ENGINE_KEYS)

    def _settings(self) -> Any:
        if self._store is None:
            import slicer

            self._store = slicer.app.settings()
        return self._store


class EngineMaker:
    """Makes the engine that the settings ask for, and remembers it: its log explains what went wrong."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._latest: Any = None
        self._choice: tuple[Any, ...] | None = None

    def isStale(self) -> bool:
        """Whether the settings ask for another engine than the latest factory makes, or there was none."""
        return self._choice != self._settings.engineChoice()

    def factory(self) -> Callable[[], Any]:
        """Makes such an engine when called, in any thread: what Qt must be asked for is asked for here."""
        self._choice = self._settings.engineChoice()
        make = self._prepare()

        def remember() -> Any:
            self._latest = make()
            return self._latest

        return remember

    def log(self) -> str:
        """The last lines of the latest engine."""
        return "\n".join(str(line) for line in getattr(self._latest, "log", ()) or ())

    def _prepare(self) -> Callable[[], Any]:
        value = self._settings.value
        if value("engine") == "remote":
            from .EngineLink import RemoteEngine

            return partial(RemoteEngine, value("url"), value("apiKey"))
        from KA2ERSegment.engine.process import MEMORY_VARIABLE, LocalEngine

        python, environment = shutil.which("PythonSlicer") or "PythonSlicer", dict(os.environ)
        if value("engine") == "python":
            import slicer

            python, environment = value("python"), dict(slicer.util.startupEnvironment())
        environment[MEMORY_VARIABLE] = str(value("memoryMb"))
        return partial(LocalEngine, [python], value("bundle") or None, value("device"), environment)
