"""The panel. It connects the .ui to the logic and decides nothing else: read `ExpertsLogic` for what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .ExpertsLogic import ExpertsLogic
from .Protocols import AddRequest, DialogsProtocol, ExpertRow

INTERVAL = 30
"""ms between two looks at the logic."""
CARD = "model_card.md"


class ExpertsWidget:
    """The panel around a logic.

    Args:
        logic: what the panel shows and drives.
        dialogs: asks where the user must decide.
        resources: folder with UI/.
    """

    def __init__(self, logic: ExpertsLogic, dialogs: DialogsProtocol, resources: Path) -> None:
        self.logic, self.dialogs = logic, dialogs
        self.widget = slicer.util.loadUI(str(Path(resources) / "UI" / "SlicerKA2ERExperts.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.switches: dict[str, Any] = {}
        self._folders: list[Path] = []
        self._documents: dict[str, str] = {}
        self._refreshing = False
        self._setUpTable()
        self._connect()
        self.timer = qt.QTimer()
        self.timer.setInterval(INTERVAL)
        self.timer.timeout.connect(logic.poll)
        logic.observers.append(self.onLogicEvent)
        logic.load()

    def enter(self) -> None:
        """The bundle may have been changed in the settings."""
        if not self.logic.busy:
            self.logic.load()

    def cleanup(self) -> None:
        self.timer.stop()
        self.logic.close()

    # -- from the logic ----------------------------------------------------------------------------------------------

    def onLogicEvent(self, event: str) -> None:
        if event == "bundle":
            self.refresh()
        elif event == "busy":
            self._showBusy()
        elif event == "error":
            self.ui.statusLabel.setText("")
            self.dialogs.error(self.logic.message)
        elif event == "done":
            self.ui.statusLabel.setText(self.logic.message)
            written = self.logic.written
            if written is not None and written == self.logic.folder and not self.logic.isUsed():
                self.logic.written = None
                if self.dialogs.confirm(self.logic.message + "\n\n" + _("Work with this bundle from now on?")):
                    self.logic.use()

    def refresh(self) -> None:
        self._refreshing = True
        try:
            self._showBundles()
            self._showExperts(self.logic.rows())
            self._showDocuments()
        finally:
            self._refreshing = False
        self._showExpert()
        self._showBusy()

    def _showBundles(self) -> None:
        self._folders = self.logic.folders()
        combo = self.ui.bundleComboBox
        combo.clear()
        for folder in self._folders:
            combo.addItem(folder.name)
        folder = self.logic.folder
        if folder is not None:
            combo.setCurrentIndex(self._folders.index(folder.absolute()))
            combo.setToolTip(str(folder))
        text = _("{identity}, {size} MB.").format(identity=self.logic.identity(), size=f"{self.logic.megabytes():.1f}")
        used = _("In use.") if self.logic.isUsed() else _("Not in use.")
        self.ui.bundleLabel.setText(f"{text} {used}" if folder is not None else _("The bundle cannot be read."))

    def _showExperts(self, rows: list[ExpertRow]) -> None:
        table, selected = self.ui.expertsTable, self._selected()
        table.setRowCount(0)
        table.setRowCount(len(rows))
        self.switches = {}
        for index, row in enumerate(rows):
            switch = qt.QCheckBox()
            switch.setChecked(row.enabled)
            switch.setToolTip(_("Whether it takes part in new predictions with this bundle."))
            switch.toggled.connect(lambda on, name=row.name: self.logic.setExpertEnabled(name, bool(on)))
            table.setCellWidget(index, 0, switch)
            self.switches[row.name] = switch
            licence = row.licence or _("the bundle's")
            for column, text in enumerate((row.name, row.task, licence), start=1):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(text)
                table.setItem(index, column, item)
            if row.name == selected:
                table.selectRow(index)

    def _showExpert(self) -> None:
        """Where the selected expert comes from."""
        name = self._selected()
        row = next((row for row in self.logic.rows() if row.name == name), None)
        lines = []
        if row is not None:
            lines = [_("{name}: {classes}").format(name=row.name, classes=", ".join(row.classes))]
            lines += [_("From {origin}").format(origin=row.origin)] if row.origin else []
            lines += [_("SHA-256 {sum}").format(sum=row.sha256)] if row.sha256 else []
            lines += [row.note] if row.note else []
        self.ui.expertLabel.setText("\n".join(lines))
        self.ui.removeButton.setEnabled(row is not None and not self.logic.busy)

    def _showDocuments(self) -> None:
        """The card first, then each licence."""
        combo = self.ui.documentComboBox
        self._documents = {CARD: self.logic.card(), **self.logic.licences()}
        combo.clear()
        combo.addItems(list(self._documents))
        self._showDocument()

    def _showDocument(self) -> None:
        names = list(self._documents)
        name = names[max(0, self.ui.documentComboBox.currentIndex)] if names else ""
        text = self._documents.get(name, "")
        if name == CARD:
            self.ui.documentBrowser.setMarkdown(text)
        else:
            self.ui.documentBrowser.setPlainText(text)

    def _showBusy(self) -> None:
        ui, logic = self.ui, self.logic
        busy = bool(logic.busy)
        for widget in (ui.bundleComboBox, ui.verifyButton, ui.addButton, ui.useButton, ui.removeButton):
            widget.setEnabled(not busy and logic.folder is not None)
        ui.bundleComboBox.setEnabled(not busy)
        ui.useButton.setEnabled(not busy and logic.folder is not None and not logic.isUsed())
        ui.removeButton.setEnabled(not busy and bool(self._selected()))
        ui.progressBar.setVisible(busy)
        ui.cancelButton.setVisible(busy)
        if busy:
            text, share = logic.progress
            ui.statusLabel.setText(text)
            ui.progressBar.setMaximum(0 if share is None else 1000)  # 0: no end is known, the bar only moves
            ui.progressBar.setValue(round(1000 * (share or 0)))
        if busy and not self.timer.isActive():
            self.timer.start()
        elif not busy and self.timer.isActive():
            self.timer.stop()

    # -- from the user -----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        ui = self.ui
        ui.bundleComboBox.activated.connect(self.onBundleChosen)
        ui.useButton.clicked.connect(lambda *_args: self.logic.use())
        ui.verifyButton.clicked.connect(lambda *_args: self.logic.verify())
        ui.addButton.clicked.connect(self.onAdd)
        ui.removeButton.clicked.connect(self.onRemove)
        ui.cancelButton.clicked.connect(lambda *_args: self.logic.cancel())
        ui.expertsTable.itemSelectionChanged.connect(self.onSelection)
        ui.documentComboBox.currentIndexChanged.connect(self.onDocumentChosen)

    def onBundleChosen(self, *_args: Any) -> None:
        index = self.ui.bundleComboBox.currentIndex
        if 0 <= index < len(self._folders):
            self.logic.load(self._folders[index])

    def onSelection(self) -> None:
        if not self._refreshing:
            self._showExpert()

    def onDocumentChosen(self, *_args: Any) -> None:
        if not self._refreshing:
            self._showDocument()

    def onAdd(self, *_args: Any) -> None:
        ui = self.ui
        self.logic.add(
            AddRequest(
                results=str(ui.resultsPathLineEdit.currentPath),
                licence=str(ui.licenceLineEdit.text),
                name=str(ui.nameLineEdit.text).strip(),
                fold=str(ui.foldLineEdit.text).strip(),
                images=str(ui.imagesPathLineEdit.currentPath),
                minutes=float(ui.minutesSpinBox.value),
            )
        )

    def onRemove(self, *_args: Any) -> None:
        name = self._selected()
        question = _("Write a new bundle without {name}? This one stays as it is.").format(name=name)
        if name and self.dialogs.confirm(question):
            self.logic.remove(name)

    def _selected(self) -> str:
        """Name of the expert whose row is selected, or ""."""
        table = self.ui.expertsTable
        items = table.selectedItems()
        return str(table.item(items[0].row(), 1).text()) if items else ""

    def _setUpTable(self) -> None:
        titles = columnTexts()
        table = self.ui.expertsTable
        table.setColumnCount(len(titles))
        table.setHorizontalHeaderLabels(list(titles))
        for column, tip in enumerate(titles.values()):
            table.horizontalHeaderItem(column).setToolTip(tip)
        header = table.horizontalHeader()
        header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(2, qt.QHeaderView.Stretch)
        table.verticalHeader().setVisible(False)


def columnTexts() -> dict[str, str]:
    """Header -> what the column means, in one sentence."""
    return {
        _("Use"): _("Whether it takes part from the next prompt on."),
        _("Expert"): _("Its name, as in the overlays."),
        _("Task"): _("What it was trained for."),
        _("Licence"): _("Under which its weights may be used."),
    }
