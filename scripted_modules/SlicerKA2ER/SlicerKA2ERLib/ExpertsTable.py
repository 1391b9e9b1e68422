"""The table of experts: how much each counts in the current segment, and how its overlay is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import qt
from slicer.i18n import tr as _

from .Protocols import MODES, Color, ExpertRow, PromptLogicProtocol

KINDS = ("probability", "share")
MOST_ROWS = 8
"""More are scrolled."""


@dataclass
class Row:
    """The widgets of one expert."""

    item: Any
    share: Any
    shown: Any
    kind: Any
    opacity: Any
    enabled: Any
    color: Color | None = None


class ExpertsTable:
    """Fills a QTableWidget; rows are made once and then only updated, so that nothing flickers at a click.

    Args:
        table: the empty QTableWidget.
        logic: what is shown and changed.
        do: calls a method of the logic and shows what it raises.
        setEnabled: called with an expert's name and whether it takes part.
    """

    def __init__(
        self,
        table: Any,
        logic: PromptLogicProtocol,
        do: Callable[..., Any],
        setEnabled: Callable[[str, bool], None],
    ) -> None:
        self.table, self._logic, self._do, self._setEnabled = table, logic, do, setEnabled
        self.rows: dict[str, Row] = {}
        self._refreshing = False
        titles = columnTexts()
        table.setColumnCount(len(titles))
        table.setHorizontalHeaderLabels(list(titles))
        for column, tip in enumerate(titles.values()):
            table.horizontalHeaderItem(column).setToolTip(tip)
        header = table.horizontalHeader()
        header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(0, qt.QHeaderView.Stretch)
        table.verticalHeader().setVisible(False)

    def refresh(self) -> None:
        experts = self._logic.experts()
        self._refreshing = True
        try:
            if list(self.rows) != [expert.name for expert in experts]:
                self._makeRows(experts)
            for expert in experts:
                self._show(self.rows[expert.name], expert)
        finally:
            self._refreshing = False

    def _makeRows(self, experts: list[ExpertRow]) -> None:
        modes = [mode for mode in MODES if any(expert.mode == mode for expert in experts)]
        headed = len(modes) > 1
        self.table.clearSpans()
        self.table.setRowCount(0)
        self.table.setRowCount(len(experts) + (len(modes) if headed else 0))
        self.rows = {}
        index, former = -1, ""
        for expert in experts:
            index += 1
            if headed and expert.mode != former:
                self._makeHeading(index, expert.mode)
                index, former = index + 1, expert.mode
            item = qt.QTableWidgetItem(expert.title)
            item.setToolTip(expert.title)
            row = Row(item, qt.QProgressBar(), qt.QCheckBox(), qt.QComboBox(), qt.QSlider(), qt.QCheckBox())
            self.table.setItem(index, 0, item)
            row.share.setMaximum(100)
            row.kind.addItems([_("Probability"), _("Share")])
            row.opacity.setOrientation(qt.Qt.Horizontal)
            row.opacity.setMaximum(100)
            row.opacity.setFixedWidth(56)
            row.share.setFixedWidth(64)
            for column, widget in enumerate((row.share, row.shown, row.kind, row.opacity, row.enabled), start=1):
                widget.setToolTip(list(columnTexts().values())[column])
                self.table.setCellWidget(index, column, widget)
            self._connect(expert.name, row)
            self.rows[expert.name] = row
        heights = [self.table.rowHeight(index) for index in range(min(self.table.rowCount, MOST_ROWS))]
        header = self.table.fontMetrics().lineSpacing() + 10
        self.table.setFixedHeight(header + sum(heights) + 4)

    def _makeHeading(self, index: int, mode: str) -> None:
        """One line over the experts of a mode."""
        text, tip = modeTexts()[mode]
        item = qt.QTableWidgetItem(text)
        item.setToolTip(tip)
        item.setFlags(qt.Qt.ItemIsEnabled)
        font = item.font()
        font.setBold(True)
        item.setFont(font)
        self.table.setItem(index, 0, item)
        self.table.setSpan(index, 0, 1, len(columnTexts()))

    def _connect(self, name: str, row: Row) -> None:
        logic, change = self._logic, self._change
        row.shown.toggled.connect(lambda on: change(logic.setExpertShown, name, bool(on)))
        row.kind.currentIndexChanged.connect(
            lambda *_args: change(logic.setExpertKind, name, KINDS[row.kind.currentIndex])
        )
        row.opacity.valueChanged.connect(lambda value: change(logic.setExpertOpacity, name, value / 100))
        row.enabled.toggled.connect(lambda on: change(self._setEnabled, name, bool(on)))

    def _change(self, do: Callable[..., Any], *args: Any) -> None:
        if not self._refreshing:
            self._do(do, *args)

    def _show(self, row: Row, expert: ExpertRow) -> None:
        if row.color != expert.color:
            row.color = expert.color
            row.item.setIcon(swatch(expert.color))
        row.share.setValue(round(100 * (expert.share or 0)))
        row.share.setFormat("%p %" if expert.share is not None else "")
        row.shown.setChecked(expert.shown)
        row.kind.setCurrentIndex(KINDS.index(expert.kind))
        row.opacity.setValue(round(100 * expert.opacity))
        row.opacity.setEnabled(expert.shown)
        row.kind.setEnabled(expert.shown)
        row.enabled.setChecked(expert.enabled)
        row.enabled.setEnabled(expert.canBeLeftOut)


def swatch(color: Color) -> Any:
    pixmap = qt.QPixmap(14, 14)
    pixmap.fill(qt.QColor.fromRgbF(*color))
    return qt.QIcon(pixmap)


def modeTexts() -> dict[str, tuple[str, str]]:
    """Mode -> its name, and what experts do in it."""
    return {
        "amalgamation": (
            _("Merged encoders"),
            _("What they see is merged into one picture of the image, at each place by these shares (KA2ER)."),
        ),
        "decoders": (
            _("Mask decoders"),
            _("The general one always answers; the gate hears one specialist beside it, or none (SAM-Med3D-MoE)."),
        ),
        "head": (
            _("Voters"),
            _("Each corrects the decoders' answer; at each place they count by these shares (IC-MoE)."),
        ),
    }


def columnTexts() -> dict[str, str]:
    """Header -> what the column means, in one sentence."""
    return {
        _("Expert"): _("An encoder, a decoder or a voter of its own; the foundation was trained for all tasks."),
        _("Share"): _("How much it counted in the current segment among its like, on average over the mask."),
        _("Show"): _("Shows it over the slices, with a colour legend."),
        _("What"): _("Probability: what this expert alone would answer. Share: where it was listened to."),
        _("Opacity"): _("Opacity of its overlay."),
        _("Use"): _("Whether it takes part from the next prompt on."),
    }
