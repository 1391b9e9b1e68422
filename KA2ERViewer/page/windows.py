"""Window and level of a volume."""

from __future__ import annotations

from typing import Any

from trame_slicer.core.volume_window_level import VolumeWindowLevel

PRESETS: dict[str, tuple[float, float] | None] = {
    "Automatic": None,
    "CT abdomen": (350, 40),
    "CT bone": (1000, 400),
    "CT brain": (100, 50),
    "CT lung": (1400, -500),
    "MR": (0, 1),
    "Full range": (0, 0),
}
"""Name -> window and level; those of CT are Slicer's presets.

None: what fits CT or MR; (0, 1): from the histogram; (0, 0): all values.
"""

AIR = -900
"""HU; only CT has values as low."""


def apply(node: Any, name: str) -> None:
    """Give a volume one of PRESETS."""
    preset = PRESETS[name]
    if preset is None:
        ct = VolumeWindowLevel.get_volume_scalar_range(node)[0] <= AIR
        preset = PRESETS["CT abdomen" if ct else "MR"]  # a histogram of a CT is mostly air
    if preset == PRESETS["MR"]:
        automatic = VolumeWindowLevel.get_volume_auto_min_max_range(node)
        VolumeWindowLevel.set_volume_node_display_min_max_range(node, *automatic)
    elif preset == (0, 0):
        VolumeWindowLevel.set_volume_node_display_min_max_range(node, *VolumeWindowLevel.get_volume_scalar_range(node))
    else:
        assert preset is not None, "dealt with above"
        adjust(node, *preset)


def adjust(node: Any, window: float, level: float) -> None:
    """Show values from level - window / 2 to level + window / 2, black to white."""
    VolumeWindowLevel.set_volume_node_window_level(node, max(window, 1e-6), level)
