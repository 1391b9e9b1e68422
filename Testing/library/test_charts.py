"""Charts: written without a display, one line for each name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from KA2ERSegment import charts
from KA2ERSegment.calibration import Reliability
from KA2ERSegment.charts import chart_of_reliability, chart_of_rows, chart_of_sources

pytest.importorskip("matplotlib", reason="charts need matplotlib: pip install ka2ersegment[pictures]")

CLICKS = {f"dsc{n}": 0.1 * n for n in range(1, 6)}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is drawn."""
    drawn: list[Any] = []
    make = charts._figure

    def figure(*size: float) -> Any:
        drawn.append(make(*size))
        return drawn[-1]

    monkeypatch.setattr(charts, "_figure", figure)
    return drawn


def test_dice_against_clicks_has_one_line_per_source(tmp_path: Path, figures: list[Any]) -> None:
    sources: dict[str, dict[str, float | None]] = {
        "a": {"box_dice": 0.05, "dsc_auc": 1.2, **CLICKS},
        "mean over sources": {"box_dice": 0.05, "dsc_auc": 1.2, **CLICKS},
    }
    chart_of_sources(tmp_path / "with.png", sources)
    for means in sources.values():
        means["box_dice"] = None
    chart_of_sources(tmp_path / "without.png", sources)
    with_box, without = (figure.axes[0] for figure in figures)
    assert list(with_box.lines[0].get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert list(with_box.lines[0].get_ydata()) == pytest.approx([0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert list(without.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert [text.get_text() for text in with_box.get_legend().get_texts()] == [f"{s}  (AUC 1.20)" for s in sources]
    assert (tmp_path / "without.png").read_bytes().startswith(b"\x89PNG")


def test_rows_keep_their_names_and_growcut_is_dotted(tmp_path: Path, figures: list[Any]) -> None:
    means: dict[str, float | None] = {"box_dice": 0.3, "dsc_auc": 2.5, **CLICKS}
    chart_of_rows(tmp_path / "rows.png", {"all": means, "growcut": means, "no gate": means})
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == [f"{name}  (AUC 2.50)" for name in ("all", "growcut", "no gate")]
    assert len({line.get_color() for line in lines}) == 3
    assert [line.get_linestyle() for line in lines] == ["-", ":", "-"]
    assert list(lines[0].get_ydata()) == pytest.approx([0.3, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_reliability_is_drawn_as_counted(tmp_path: Path, figures: list[Any]) -> None:
    curve = Reliability.of(np.repeat([0.1, 0.9], 100), np.arange(200) % 100 < np.repeat([20, 60], 100))
    chart_of_reliability(tmp_path / "r.png", {"mask": curve, "expert": curve})
    line = figures[0].axes[0].lines[1]  # after the diagonal
    assert list(line.get_xdata()) == pytest.approx([0.1, 0.9])
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.6])
    assert line.get_label() == "mask  (ECE 0.200)"
