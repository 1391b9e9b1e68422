"""Window and level of a volume."""

from __future__ import annotations

from typing import Any

from trame_slicer.core.volume_window_level import VolumeWindowLevel

PRESETS: dict[str, tuple[float, float] | None] = {
    "Automatic": None,
    "CT abdomen": (350, 40),
    "CT bone": (1500, 400),
    "CT brain": (80, 40),
    "CT lung": (1400, -500),
    "Full range": (0, 0),
}
"""Name -> window and level; None: from the histogram; (0, 0): all values."""


AIR = -900
"""HU; only CT has values as low."""


def apply(node: Any, name: str) -> None:
    """Give a volume one of PRESETS."""
    preset = PRESETS[name]
    if preset is None and VolumeWindowLevel.get_volume_scalar_range(node)[0] <= AIR:
        preset = PRESETS["CT abdomen"]  # a histogram of a CT is mostly air
    if preset is None:
        automatic = VolumeWindowLevel.get_volume_auto_min_max_range(node)
        VolumeWindowLevel.set_volume_node_display_min_max_range(node, *automatic)
    elif preset == (0, 0):
        VolumeWindowLevel.set_volume_node_display_min_max_range(node, *VolumeWindowLevel.get_volume_scalar_range(node))
    else:
        VolumeWindowLevel.set_volume_node_window_level(node, *preset)
