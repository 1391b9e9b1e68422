"""Charts of measurements, by matplotlib, without a display: reliability, and Dice against clicks of several methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from KA2ERSegment.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
_STYLES = ("-", "--", ":")


def chart_of_reliability(
    path: str | os.PathLike[str], curves: Mapping[str, Reliability], title: str = "Reliability near the object"
) -> None:
    """How often a voxel lies in the object, against the probability that was promised; below, how many voxels said so.

    Args:
        path: picture to write.
        curves: by name; the first is drawn thick.
        title: above the picture.
    """
    figure = _figure(6.4, 5.6)
    axes, below = figure.add_axes((0.11, 0.30, 0.52, 0.62)), figure.add_axes((0.11, 0.1, 0.52, 0.15))
    axes.plot([0, 1], [0, 1], color="#9aa0a6", linewidth=1, linestyle=(0, (4, 3)))
    for n, (name, curve) in enumerate(curves.items()):
        promised, true, share = (list(column) for column in zip(*curve.bins, strict=True))
        thick: dict[str, Any] = {"color": "black", "linewidth": 3.2, "zorder": 1}
        style = thick if n == 0 else {"linewidth": 1.4, **_style(n - 1)}
        label = f"{name}  (ECE {curve.error:.3f})"
        axes.plot(promised, true, marker="o", markersize=4.5 if n == 0 else 3, label=label, **style)
        below.plot(promised, share, **style)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], ylabel="share of voxels in the object")
    below.set(xlim=(0, 1), yscale="log", xlabel="probability promised", ylabel="voxels")
    axes.set_title(title, loc="left", fontsize=12)
    below.tick_params(which="minor", left=False, labelleft=False)
    for part in (axes, below):
        _tidy(part)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5)
    figure.savefig(Path(path), dpi=110, bbox_inches="tight")


def chart_of_sources(
    path: str | os.PathLike[str], sources: Mapping[str, Mapping[str, float | None]], title: str = "Dice against clicks"
) -> None:
    """One line per source: Dice with the box alone (where there was one) and after each click.

    Args:
        path: picture to write.
        sources: name to means with `box_dice` and `dsc1` to `dsc5`; `mean over sources` is drawn thick.
        title: above the picture.
    """
    figure = _figure(8.6, 5.2)
    axes = figure.add_axes((0.075, 0.11, 0.56, 0.8))
    with_box = any(means["box_dice"] is not None for means in sources.values())
    for n, (source, means) in enumerate(sources.items()):
        scores = [means["box_dice"], *(means[f"dsc{c}"] for c in range(1, 6))]
        points = [(x, y) for x, y in enumerate(scores) if y is not None]
        x, y = [p[0] for p in points], [p[1] for p in points]
        label = f"{source}  (AUC {means['dsc_auc']:.2f})"
        if source == "mean over sources":
            axes.plot(x, y, color="black", linewidth=3, marker="o", markersize=6, label=label, zorder=5)
        else:
            axes.plot(x, y, linewidth=1.4, marker="o", markersize=3.5, label=label, **_style(n))
    axes.set_xlim(-0.15 if with_box else 0.85, 5.15)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(0 if with_box else 1, 6), [*(["box"] if with_box else []), *"12345"])
    axes.set_xlabel("clicks" + (" after the box" if with_box else ", no box"))
    axes.set_ylabel("Dice, mean per source")
    axes.set_title(title, loc="left", fontsize=12)
    _tidy(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5)
    figure.savefig(Path(path), dpi=110, bbox_inches="tight")  # long names of sources stay whole


def chart_of_rows(
    path: str | os.PathLike[str], rows: Mapping[str, Mapping[str, float | None]], title: str = "Dice against clicks"
) -> None:
    """One line for each method: Dice with the box alone (where there was one) and after each click.

    Args:
        path: picture to write.
        rows: name to means over sources with `box_dice`, `dsc1` to `dsc5` and `dsc_auc`; `growcut` is drawn dotted.
        title: above the picture.
    """
    figure = _figure(7.6, 4.8)
    axes = figure.add_axes((0.09, 0.12, 0.56, 0.8))
    with_box = any(means["box_dice"] is not None for means in rows.values())
    ours = [name for name in rows if name != "growcut"]
    for name, means in rows.items():
        scores = [means["box_dice"], *(means[f"dsc{n}"] for n in range(1, 6))]
        x = [at for at, score in enumerate(scores) if score is not None]
        y = [score for score in scores if score is not None]
        style = _style(ours.index(name)) if name in ours else {"color": "black", "linestyle": ":"}
        axes.plot(
            x, y, marker="o", markersize=3.5, linewidth=1.6, label=f"{name}  (AUC {means['dsc_auc']:.2f})", **style
        )
    axes.set_xticks(range(0 if with_box else 1, 6), [*(["box"] if with_box else []), *"12345"])
    axes.set_xlabel("clicks" + (" after the box" if with_box else ", no box"))
    axes.set_ylabel("Dice, mean over sources")
    axes.set_title(title, loc="left", fontsize=12)
    _tidy(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5)
    figure.savefig(Path(path), dpi=110, bbox_inches="tight")


def chart_of_tables(path: str | os.PathLike[str], tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Tables of numbers from 0 to 1 side by side, each cell as dark as its number is large.

    Args:
        path: picture to write.
        tables: title to rows to columns to number; all rows of a table have the same columns.
    """
    sizes = [(len(rows), len(next(iter(rows.values())))) for rows in tables.values()]
    figure = _figure(sum(2.2 + 0.95 * columns for _, columns in sizes), 1.6 + 0.5 * max(rows for rows, _ in sizes))
    parts = figure.subplots(1, len(tables), squeeze=False, width_ratios=[columns for _, columns in sizes])[0]
    for axes, (title, rows) in zip(parts, tables.items(), strict=True):
        columns = list(next(iter(rows.values())))
        values = [[row[column] for column in columns] for row in rows.values()]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                ink = "white" if value > 0.6 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_title(title, loc="left", fontsize=12)
        axes.tick_params(length=0)
        for side in ("top", "right", "bottom", "left"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(path), dpi=110, bbox_inches="tight")


def _style(n: int) -> dict[str, Any]:
    return {"color": _LINES[n % len(_LINES)], "linestyle": _STYLES[n // len(_LINES) % len(_STYLES)]}


def _tidy(axes: Axes) -> None:
    axes.grid(visible=True, color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")  # not pyplot: no display, and nothing global
    FigureCanvasAgg(figure)
    return figure
