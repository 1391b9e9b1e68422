"""Configs: plain JSON; one may say only where it differs from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from KA2ERSegment.errors import BundleError


def read_config(path: Path) -> dict[str, Any]:
    """A config's settings.

    Args:
        path: JSON. With "extends": name of another config in the same folder, whose settings hold where this one says
            nothing. Objects are merged, anything else is replaced; null takes a setting away.

    Raises:
        BundleError: no JSON object, a setting that is said twice, or configs that extend each other in a circle.
    """
    return _read(path, ())


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path in below:
        message = f"config {path.name!r} must not extend itself, by way of {[p.name for p in below]}."
        raise BundleError(message)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_said_once)
    except (OSError, ValueError) as error:
        message = f"config {path.name!r} must be JSON: {error}"
        raise BundleError(message) from error
    if not isinstance(settings, dict):
        message = f"config {path.name!r} must be a JSON object, got {type(settings).__name__}."
        raise BundleError(message)
    base = settings.pop("extends", None)
    return settings if base is None else _merged(_read(path.parent / str(base), (*below, path)), settings)


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON itself would let the last one win: half of a section is lost where two changes are merged."""
    settings = dict(pairs)
    if len(settings) < len(pairs):
        twice = sorted({key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1})
        message = f"each setting must be said once, {', '.join(map(repr, twice))} is there twice."
        raise ValueError(message)
    return settings


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merged(base[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged
