"""What the application provides: settings, questions to the user, and a Python to run commands with."""

from __future__ import annotations

import shutil
from typing import Any

import slicer
from slicer.i18n import tr as _

from .CommandRunner import CommandRunner


class ApplicationSettings:
    """SettingsProtocol over QSettings.

    Args:
        store: the application's by default.
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store if store is not None else slicer.app.settings()

    def value(self, key: str) -> Any:
        return self._store.value(key)

    def setValue(self, key: str, value: Any) -> None:
        self._store.setValue(key, value)


class Dialogs:
    """DialogsProtocol with Slicer's own boxes, which answer for themselves in testing mode."""

    def confirm(self, text: str, details: str = "") -> bool:
        return bool(slicer.util.confirmOkCancelDisplay(text, _("KA2ER Experts"), detailedText=details))

    def error(self, text: str, details: str = "") -> None:
        slicer.util.errorDisplay(text, _("KA2ER Experts"), detailedText=details)


def makeRunner(settings: ApplicationSettings) -> CommandRunner:
    """With the Python that the main module's engine uses on this computer."""
    other = str(settings.value("KA2ERSegment/python") or "")
    if str(settings.value("KA2ERSegment/engine") or "") == "python" and other:
        return CommandRunner([other], slicer.util.startupEnvironment())
    return CommandRunner([shutil.which("PythonSlicer") or "PythonSlicer"])
