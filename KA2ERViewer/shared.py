"""Where the code that the viewer shares with the Slicer module is: `SlicerKA2ERLib`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACES = (HERE / "SlicerKA2ER", HERE.parent / "scripted_modules" / "SlicerKA2ER")
"""In an installed package, and in a checkout."""


def module_folder() -> Path:
    """The Slicer module's folder.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    for place in PLACES:
        if (place / "SlicerKA2ERLib").is_dir():
            return place
    message = f"the viewer needs the folder SlicerKA2ERLib in {PLACES[0]} or {PLACES[1]}, it is in neither. Reinstall."
    raise FileNotFoundError(message)


def use_shared_code() -> None:
    """Make `SlicerKA2ERLib` importable, as Slicer does with every module's folder."""
    folder = str(module_folder())
    if folder not in sys.path:
        sys.path.append(folder)
