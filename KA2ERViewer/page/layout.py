"""Puts the page together: the template `page.html`, its look `page.css`, and what it needs in the browser `page.js`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trame.ui.vuetify3 import VAppLayout
from trame.widgets import html

from KA2ERViewer.page.bridge import KEYS
from KA2ERViewer.page.windows import PRESETS

HERE = Path(__file__).parent
TOOLS = {
    "point": ("mdi-crosshairs", "Point", "Click on the structure, or beside it"),
    "box": ("mdi-select", "Box", "Drag a box around the structure"),
    "roi": ("mdi-cube-outline", "3D box", "Click at two opposite corners, then drag the handles in any view"),
    "scribble": ("mdi-draw", "Scribble", "Draw along the structure"),
    "lasso": ("mdi-lasso", "Lasso", "Draw around the structure"),
    "brush": ("mdi-brush", "Brush", "Paint voxels by hand; the next prompt starts from them"),
    "eraser": ("mdi-eraser-variant", "Eraser", "Erase voxels by hand"),
    "window": ("mdi-contrast-circle", "Window", "Drag in a slice: sideways for the window, up and down for the level"),
}
SAVES = {
    "seg.nrrd": ("Segmentation", ".seg.nrrd, for 3D Slicer: names, colours, overlaps"),
    "seg.dcm": ("DICOM segmentation", ".seg.dcm, for archives: names, codes, the study of the series"),
    "nii.gz": ("Label map", ".nii.gz: the first segment is 1, the second 2"),
    "json": ("Prompts", ".json: every click, to be replayed"),
    "mrb": ("Scene", ".mrb: volume, segments and prompts, opens in 3D Slicer"),
}
VIEWS = {"Red": "Axial", "ThreeD": "3D", "Green": "Coronal", "Yellow": "Sagittal"}
LAYOUTS = {
    "Four": "Four views",
    "Large": "Axial large",
    "Row": "Three slices",
    **{name: f"{title} only" for name, title in VIEWS.items()},
}
SHOWN = {
    "Four": tuple(VIEWS),
    "Large": tuple(VIEWS),
    "Row": ("Red", "Green", "Yellow"),
    **{name: (name,) for name in VIEWS},
}
"""Layout -> views in it."""
WORDS = {
    "polarity": "Structure or not structure",
    "undo": "Undo",
    "redo": "Redo",
    "reset": "Empty the segment",
    "suggest": "Where to click next",
    "nextSegment": "Next segment",
    "lock": "Lock or unlock the segment",
    "cancel": "Cancel",
}
VIEW_KEYS = {
    "← → ↑ ↓": "Move the crosshair by a voxel, with Shift by ten; turn the 3D view",
    "Enter": "Place there; begin and end a box, a line or a stroke. With Alt: the other polarity",
    "PgUp PgDn": "Next slice, slice before",
    "+ -": "Zoom",
}
"""While the keyboard is in a view: Tab goes there."""
ENGINE = {
    "none": "No engine",
    "stopped": "Engine sleeps",
    "starting": "Engine starting…",
    "ready": "Engine ready",
    "dead": "Engine stopped",
}
DARK = {
    "defaultTheme": "reading",
    "themes": {
        "reading": {
            "dark": True,
            "colors": {
                "background": "#0b0e13",
                "surface": "#161c26",
                "primary": "#6cb6ff",
                "success": "#5fd08a",
                "error": "#ff8a80",
                "warning": "#f3c969",
            },
        }
    },
}
"""For reading rooms; all text on it has a contrast of at least 4.5."""


def build(server: Any) -> None:
    """Make the page of a server."""
    state = server.state
    state.trame__title = "KA2ER Segment"
    state.update(
        {
            "layout": "Four",
            "help": False,
            "tools": [{"name": name, "icon": i, "title": t, "hint": h} for name, (i, t, h) in TOOLS.items()],
            "saves": [{"kind": kind, "title": t, "subtitle": s} for kind, (t, s) in SAVES.items()],
            "layouts": [{"name": name, "title": title} for name, title in LAYOUTS.items()],
            "views": [{"name": name, "title": title} for name, title in VIEWS.items()],
            "shown": SHOWN,
            "tool_titles": {name: title for name, (_, title, _) in TOOLS.items()},
            "tool_hints": {name: hint for name, (_, _, hint) in TOOLS.items()},
            "windows": list(PRESETS),
            "engine_words": ENGINE,
            "shortcuts": [{"key": KEYS[name], "title": title} for name, title in _titles().items()],
            "view_keys": [{"key": key, "title": title} for key, title in VIEW_KEYS.items()],
        }
    )
    server.enable_module({"serve": {"ka2er": str(HERE / "static")}, "styles": ["ka2er/page.css"]})
    config = {"theme": DARK, "defaults": {"VBtn": {"variant": "tonal", "size": "small", "rounded": "md"}}}
    with VAppLayout(server, vuetify_config=config):
        html.Div((HERE / "page.html").read_text(encoding="utf-8"), classes="whole")


def _titles() -> dict[str, str]:
    return {**{name: title for name, (_, title, _) in TOOLS.items()}, **WORDS}
