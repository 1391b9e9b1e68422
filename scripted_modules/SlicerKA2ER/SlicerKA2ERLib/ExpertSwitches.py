"""Which experts of a bundle are switched off, in the application's settings: both modules read and write it there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PREFIX = "KA2ERSegment/experts/"


def switchedOff(stored: Any) -> tuple[str, ...]:
    """Names in a stored value: text with commas, or what QSettings makes of a list (None, one text, several)."""
    if stored is None:
        return ()
    parts = stored.split(",") if isinstance(stored, str) else stored
    return tuple(str(part).strip() for part in parts if str(part).strip())


def toStored(names: Iterable[str]) -> str:
    """Text, as QSettings tells a list of one from a text no more once it is written."""
    return ",".join(sorted(set(names)))
