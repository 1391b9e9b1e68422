"""Keyboard shortcuts that live while the module is open, in the views and in the panel only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

DEFAULT_KEYS = {
    "point": "P",
    "box": "X",
    "roi": "C",
    "scribble": "S",
    "lasso": "L",
    "polarity": "N",
    "undo": "Ctrl+Z",
    "redo": "Ctrl+Y",
    "reset": "Shift+R",
    "suggest": "J",
    "nextSegment": "E",
    "cancel": "Esc",
}

TAKEN = {
    "slice views": "G T F B V R Left Right Up Down Shift+V [ ] { } Delete",
    "3D views": "+ - Ctrl+B End PgDown Home Ins Clear",
    "Slicer": "Ctrl+O Ctrl+S Ctrl+W Ctrl+X Ctrl+C Ctrl+V Ctrl+F Ctrl+H Ctrl+0 Ctrl+2 Ctrl+3 Ctrl+4 Ctrl+5 Ctrl+6 "
    "Ctrl+` Ctrl+Left Ctrl+Right Ctrl+Shift+A Ctrl+Shift+T Ctrl+Shift+Space Ctrl+Shift+Left Ctrl+Shift+Right "
    "Ctrl+Shift+Down",
    "Segment Editor": "1 2 3 4 5 6 7 8 9 0 Shift+1 Shift+2 Shift+3 Shift+4 Shift+5 Shift+6 Shift+7 Shift+8 Shift+9 "
    "Shift+0 Space Z Y Q W / * , . > < I",
}
"""What keys do elsewhere in Slicer 5.12 and newer. Ctrl+Z, Ctrl+Y and Esc mean the same here as there."""


def conflicts(keys: dict[str, str]) -> list[tuple[str, str, str]]:
    """(action, keys, who else uses them) for each of `keys` that is taken, or that two actions share."""
    users = {key.lower(): place for place, text in TAKEN.items() for key in text.split()}
    found = []
    for action, key in keys.items():
        if key.strip():
            found += [(action, key, users[key.lower()])] if key.lower() in users else []
            users[key.lower()] = action
    return found


class Shortcuts:
    """Installed on entering the module, removed on leaving it.

    A shortcut belongs to a widget and works while the keyboard is in it. Belonging to the views and to the panel, not
    to the main window, ours leave the Python console, other panels and the Segment Editor's keys alone.

    Args:
        actions: what each action does.
        keys: the keys of an action, "" for none.
        widgets: where shortcuts work; asked anew at each `install`, because layouts come and go.
    """

    def __init__(
        self,
        actions: dict[str, Callable[[], Any]],
        keys: Callable[[str], str],
        widgets: Callable[[], Iterable[Any]],
    ) -> None:
        self._actions, self._keys, self._widgets = actions, keys, widgets
        self.active: list[Any] = []

    def install(self) -> None:
        import qt

        self.remove()
        for widget in self._widgets():
            for action, do in self._actions.items():
                keys = qt.QKeySequence(self._keys(action))
                if keys.isEmpty():
                    continue
                shortcut = qt.QShortcut(keys, widget)
                shortcut.setContext(qt.Qt.WidgetWithChildrenShortcut)
                shortcut.activated.connect(do)
                self.active.append(shortcut)

    def remove(self) -> None:
        for shortcut in self.active:
            shortcut.setEnabled(False)  # deleted later, silent from now on
            shortcut.deleteLater()
        self.active = []
