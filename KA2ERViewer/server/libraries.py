"""What the system must have for views to be drawn without a display."""

from __future__ import annotations

import ctypes
import sys

from KA2ERViewer.options import ViewerError

NEEDED = {
    "libEGL.so.1": "libegl1",
    "libEGL_mesa.so.0": "libegl-mesa0",
    "libGL.so.1": "libgl1",
    "libGLX.so.0": "libglx0",
    "libX11.so.6": "libx11-6",
}
"""Library -> the Debian package that has it."""
DRIVERS = "libgl1-mesa-dri"
"""What Mesa draws with; no library that could be looked for."""


def require_libraries(needed: dict[str, str] | None = None) -> None:
    """On Linux; elsewhere they are part of the system.

    Raises:
        ViewerError: with the command that installs what is missing.
    """
    if not sys.platform.startswith("linux"):
        return
    missing = {library: package for library, package in (needed or NEEDED).items() if not _is_there(library)}
    if missing:
        packages = " ".join((*missing.values(), DRIVERS))
        message = (
            f"drawing views needs {', '.join(missing)}. On Debian and Ubuntu:\n"
            f"    sudo apt-get install -y --no-install-recommends {packages}"
        )
        raise ViewerError(message)


def _is_there(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
