"""What the parts of the module promise each other, and the plain values that travel between them.

widget -> ExpertsLogic -> RunnerProtocol (another process), SettingsProtocol
widget -> DialogsProtocol
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

EVENTS = ("bundle", "busy", "done", "error")
"""What observers of the logic are called with:

bundle   another bundle is shown, or an expert was switched: read everything again
busy     `busy` or `progress` changed
done     `message` says what was done
error    `message` says what went wrong
"""


@dataclass(frozen=True)
class ExpertRow:
    """One expert of the bundle.

    Args:
        licence: "" where the bundle's own licence covers it.
        origin: the nnU-Net it was taken from; "" for the bundle's own experts.
        sha256: of its checkpoint file.
        note: how its arm was trained.
        enabled: whether it takes part in new predictions.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    licence: str
    origin: str
    sha256: str
    note: str
    enabled: bool


@dataclass(frozen=True)
class AddRequest:
    """What a user asks for when adding an nnU-Net.

    Args:
        results: folder TRAINER__PLANS__CONFIGURATION.
        licence: of its weights, in words.
        name: of the expert; made from the data set's where it is "".
        fold: "0" to "4", "all", or "" for the first that is there.
        images: raw data set to train its arm on, or "".
        minutes: for that.
    """

    results: str
    licence: str
    name: str = ""
    fold: str = ""
    images: str = ""
    minutes: float = 5.0


class RunnerProtocol(Protocol):
    """Runs one `ka2ersegment` command at a time in another process."""

    def start(self, arguments: Sequence[str]) -> None: ...

    def poll(self) -> tuple[list[str], int | None]:
        """New lines of stderr, and the exit code once it ended (None while it runs)."""

    def output(self) -> str:
        """All of stdout, once it ended."""

    def cancel(self) -> None:
        """End it and what it started."""


class SettingsProtocol(Protocol):
    """The application's settings, by their full keys."""

    def value(self, key: str) -> Any:
        """None where none was set."""

    def setValue(self, key: str, value: Any) -> None: ...


class DialogsProtocol(Protocol):
    """Everything that stops and asks the user."""

    def confirm(self, text: str, details: str = "") -> bool: ...

    def error(self, text: str, details: str = "") -> None: ...
