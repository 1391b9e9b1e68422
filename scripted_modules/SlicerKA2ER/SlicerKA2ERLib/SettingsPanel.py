"""The module's page in the application's settings. Slicer reads and writes the values; `Settings` knows the keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctk
import qt
import slicer
from slicer.i18n import tr as _

from .PromptWidget import actionTexts
from .Settings import DEFAULTS, PREFIX
from .Shortcuts import conflicts

__all__ = ["DEFAULTS", "SettingsPanel"]


class SettingsPanel(ctk.ctkSettingsPanel):
    """Made once, after the application has started, where there is a main window.

    Args:
        resources: folder with UI/.
    """

    def __init__(self, resources: Path, *args: Any) -> None:
        ctk.ctkSettingsPanel.__init__(self, *args)
        layout = qt.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self.form = slicer.util.loadUI(str(Path(resources) / "UI" / "SettingsPanel.ui"))
        layout.addWidget(self.form)
        self.ui = slicer.util.childWidgetVariables(self.form)
        self.shortcutEdits: dict[str, Any] = {}
        self._fill()
        self._register()
        self.showUsed()

    def _fill(self) -> None:
        for choice, text in engineTexts().items():
            self.ui.engineComboBox.addItem(text, choice)
        for device, text in deviceTexts().items():
            self.ui.deviceComboBox.addItem(text, device)
        layout = qt.QFormLayout(self.ui.shortcutsWidget)
        layout.setContentsMargins(0, 0, 0, 0)
        for action, text in actionTexts().items():
            edit = qt.QLineEdit(DEFAULTS["shortcut/" + action])
            edit.setToolTip(_("Keys as text, for example P, Shift+R or Ctrl+Z. Empty: none."))
            edit.textChanged.connect(self.showConflicts)
            layout.addRow(text, edit)
            self.shortcutEdits[action] = edit

    def _register(self) -> None:
        """Key -> widget, its property and the signal of a change. The widgets show the defaults at this moment."""
        ui = self.ui
        text, path = "textChanged(QString)", "currentPathChanged(QString)"
        rows = [
            ("engine", ui.engineComboBox, "currentUserDataAsString", "currentIndexChanged(int)"),
            ("device", ui.deviceComboBox, "currentUserDataAsString", "currentIndexChanged(int)"),
            ("python", ui.pythonPathLineEdit, "currentPath", path),
            ("url", ui.urlLineEdit, "text", text),
            ("apiKey", ui.apiKeyLineEdit, "text", text),
            ("bundle", ui.bundlePathLineEdit, "currentPath", path),
            ("memoryMb", ui.memorySpinBox, "value", "valueChanged(int)"),
            ("offline", ui.offlineCheckBox, "checked", "toggled(bool)"),
            *(("shortcut/" + action, edit, "text", text) for action, edit in self.shortcutEdits.items()),
        ]
        for key, widget, name, signal in rows:
            self.registerProperty(PREFIX + key, widget, name, str(qt.SIGNAL(signal)))
        ui.engineComboBox.currentIndexChanged.connect(self.showUsed)

    def showUsed(self, *_args: Any) -> None:
        """Only what the chosen engine uses can be changed."""
        ui, engine = self.ui, list(engineTexts())[self.ui.engineComboBox.currentIndex]
        ui.pythonPathLineEdit.setEnabled(engine == "python")
        for widget in (ui.urlLineEdit, ui.apiKeyLineEdit):
            widget.setEnabled(engine == "remote")
        for widget in (ui.deviceComboBox, ui.bundlePathLineEdit, ui.memorySpinBox):
            widget.setEnabled(engine != "remote")

    def showConflicts(self, *_args: Any) -> None:
        """Say which keys do something else already. They are allowed: a user may want that."""
        texts = actionTexts()
        lines = [
            _("{keys} ({action}) is also used by: {other}.").format(
                keys=keys, action=texts[action], other=texts.get(other, other)
            )
            for action, keys, other in conflicts({name: str(edit.text) for name, edit in self.shortcutEdits.items()})
        ]
        self.ui.shortcutsNoteLabel.setText("\n".join(lines))


def engineTexts() -> dict[str, str]:
    """Value of the setting `engine` -> what it means."""
    return {
        "local": _("On this computer, in Slicer's own Python"),
        "python": _("On this computer, in another Python"),
        "remote": _("Remote, on another computer"),
    }


def deviceTexts() -> dict[str, str]:
    return {
        "auto": _("GPU where there is one"),
        "cpu": _("CPU"),
        "cuda": _("NVIDIA GPU"),
    }
