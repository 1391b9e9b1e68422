"""Pictures of predictions and of evaluations, by matplotlib, without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.volume import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from KA2ERSegment.prediction import ExpertOpinion

_INK, _PAPER, _FAINT = "#e8eaed", "#15181c", "#9aa0a6"
_MASK, _REFERENCE, _BOX = "#ffd23f", "#4cc9f0", "#ff9e64"
_POSITIVE, _NEGATIVE = "#52e07c", "#ff5a5f"


@dataclass(frozen=True, slots=True)
class _Plane:
    """One orthogonal slice of a canonical (RAS) volume, shown as radiologists look at it.

    Columns of the picture run against RAS axis `across` (the patient's right, or front, is on the left of the
    picture) and rows against `down` (front, or head, on top).
    """

    title: str
    normal: int
    across: int
    down: int
    letters: str
    """Patient directions at the left, right, top and bottom of the picture."""


_AXIAL = _Plane("axial", 2, 0, 1, "RLAP")
_CORONAL = _Plane("coronal", 1, 0, 2, "RLSI")
_SAGITTAL = _Plane("sagittal", 0, 1, 2, "APSI")


def picture_of_prediction(
    path: str | os.PathLike[str],
    volume: Volume,
    mask: BoolArray,
    prompts: Sequence[Prompt],
    experts: Mapping[str, ExpertOpinion],
    reference: BoolArray | None = None,
) -> None:
    """Three orthogonal slices through the object, and below them one confidence map per expert.

    Args:
        path: picture to write, for instance `.png`.
        volume: the image.
        mask: (K, J, I) bool, the result; its contour is drawn.
        prompts: points are drawn as + and -, boxes as rectangles, of other prompts the part in each slice; fainter
            where they lie in another slice than the one shown.
        experts: name to opinion with `.probability` (K, J, I) in 0..1 and `.mean_weight`.
        reference: (K, J, I) bool, a label to compare with; its contour is dashed.
    """
    scene = _Scene(volume, mask, reference, prompts)
    columns = max(3, len(experts))
    rows = 2 if experts else 1
    figure = _figure(4.1 * columns + 0.7, 4.35 * rows + 0.75, _PAPER)
    wide = figure.add_gridspec(
        rows, columns * 3, left=0.03, right=0.94, top=1 - 0.4 / (4.35 * rows), bottom=0.75 / (4.35 * rows), hspace=0.16
    )
    for n, plane in enumerate((_AXIAL, _CORONAL, _SAGITTAL)):
        axes = figure.add_subplot(wide[0, n * columns : (n + 1) * columns])
        scene.draw(axes, plane)
        scene.draw_prompts(axes, plane)
        axes.set_title(plane.title, color=_INK, fontsize=12)
    overlay = None
    plane = scene.native_plane()
    first = (columns - len(experts)) * 3 // 2  # fewer than three are centred
    for n, (name, opinion) in enumerate(experts.items()):
        axes = figure.add_subplot(wide[1, first + n * 3 : first + (n + 1) * 3])
        overlay = scene.draw(axes, plane, np.asarray(volume.to_canonical(opinion.probability)))
        axes.set_title(f"expert {name}, weight {100 * opinion.mean_weight:.0f} %", color=_INK, fontsize=12)
    if overlay is not None:
        bottom = 0.75 / (4.35 * rows) + 0.03
        bar: Any = figure.colorbar(overlay, cax=figure.add_axes((0.952, bottom, 0.009, 0.36)))
        bar.solids.set_alpha(1.0)
        bar.set_label("confidence (probability by this expert)", color=_INK, fontsize=9)
        bar.ax.tick_params(colors=_INK, labelsize=9)
        bar.outline.set_edgecolor(_FAINT)
    _legend(figure, prompts, with_reference=reference is not None)
    figure.savefig(Path(path), dpi=100, facecolor=_PAPER)


@dataclass(frozen=True, slots=True)
class Opinions:
    """One case of `picture_of_opinions`.

    Args:
        title: beside its row.
        volume: the image.
        mask: (K, J, I) bool, the result.
        reference: (K, J, I) bool, a label to compare with.
        maps: title to (K, J, I) map in 0..1: what each expert says, how far they disagree.
    """

    title: str
    volume: Volume
    mask: BoolArray
    reference: BoolArray
    maps: Mapping[str, npt.NDArray[Any]]


def picture_of_opinions(path: str | os.PathLike[str], cases: Sequence[Opinions]) -> None:
    """A row for each case: a slice with mask and reference, then the same slice under each map.

    Args:
        path: picture to write.
        cases: with the same number of maps, at least one.
    """
    columns = 1 + max(len(case.maps) for case in cases)
    rows = len(cases)
    height = 2.85 * rows + 0.6
    figure = _figure(2.5 * columns, height, _PAPER)
    edges = {"left": 0.03, "right": 0.99, "top": 1 - 0.5 / height, "bottom": 0.4 / height}
    grid = figure.add_gridspec(rows, columns, **edges, hspace=0.18, wspace=0.04)
    for row, case in enumerate(cases):
        scene = _Scene(case.volume, case.mask, case.reference, ())
        plane = scene.native_plane()
        axes = figure.add_subplot(grid[row, 0])
        scene.draw(axes, plane)
        axes.set_title(case.title, color=_INK, fontsize=8.5)
        for column, (name, values) in enumerate(case.maps.items(), start=1):
            axes = figure.add_subplot(grid[row, column])
            scene.draw(axes, plane, np.asarray(case.volume.to_canonical(values)))
            axes.set_title(name, color=_INK, fontsize=8.5)
    _legend(figure, (), with_reference=True)
    figure.savefig(Path(path), dpi=80, facecolor=_PAPER)


class _Scene:
    """What is shown, on the canonical grid: one window in mm around everything, and slices through the object."""

    def __init__(self, volume: Volume, mask: BoolArray, reference: BoolArray | None, prompts: Sequence[Prompt]) -> None:
        self._view = volume.canonical()
        self._mask = np.asarray(volume.to_canonical(mask))
        self._reference = None if reference is None else np.asarray(volume.to_canonical(reference))
        self._prompts = prompts
        self._window = self._around_everything()
        self._centre = self._through_the_object()
        shown = self._window.crop(self._view.array_kji)
        self._low, self._high = (float(x) for x in np.percentile(shown, (0.5, 99.5)))
        if self._low == self._high:
            self._low, self._high = float(shown.min()), float(shown.max()) + 1e-6

    def native_plane(self) -> _Plane:
        """The plane in which the image was most likely taken: across its coarsest axis, else axial."""
        spacing = self._view.spacing
        return next(p for p in (_AXIAL, _CORONAL, _SAGITTAL) if spacing[p.normal] > 0.99 * max(spacing))

    def draw(self, axes: Axes, plane: _Plane, confidence_kji: npt.NDArray[Any] | None = None) -> Any:
        """The image of one slice with contours; with a confidence map over it, that map's picture is returned."""
        extent = self._extent(plane)
        axes.set_facecolor("black")
        axes.imshow(
            self._slice(self._view.array_kji, plane),
            cmap="gray",
            vmin=self._low,
            vmax=self._high,
            extent=extent,
            origin="lower",
            interpolation="nearest",
        )
        overlay = None
        if confidence_kji is not None:
            shown = self._slice(confidence_kji, plane).astype(np.float32)
            overlay = axes.imshow(
                shown,
                cmap="inferno",
                vmin=0,
                vmax=1,
                alpha=np.clip(1.6 * shown, 0.0, 0.8),
                extent=extent,
                origin="lower",
                interpolation="nearest",
            )
        width = 1.7 if overlay is None else 1.0
        self._contour(axes, plane, self._mask, _MASK, "solid", width)
        if self._reference is not None and overlay is None:
            self._contour(axes, plane, self._reference, _REFERENCE, "dashed", width)
        axes.set_xlim(extent[1], extent[0])  # mirrored: the patient's right, or front, on the left
        axes.set_ylim(extent[2], extent[3])
        axes.set_anchor("N")  # slabs keep their titles in line with the others
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_edgecolor("#3a3f45")
        places = (
            (0.02, 0.5, "left", "center"),
            (0.98, 0.5, "right", "center"),
            (0.5, 0.98, "center", "top"),
            (0.5, 0.02, "center", "bottom"),
        )
        for letter, (x, y, horizontal, vertical) in zip(plane.letters, places, strict=True):
            _outlined(
                axes.text(
                    x,
                    y,
                    letter,
                    transform=axes.transAxes,
                    ha=horizontal,
                    va=vertical,
                    color=_INK,
                    fontsize=10,
                    fontweight="bold",
                )
            )
        return overlay

    def draw_prompts(self, axes: Axes, plane: _Plane) -> None:
        """Every prompt in this plane; fainter where it lies in another slice."""
        from matplotlib.patches import Rectangle

        spacing = self._view.spacing
        for prompt in self._prompts:
            positive = prompt.polarity is Polarity.POSITIVE
            box, covered = prompt.region(self._view)
            here = box.start[plane.normal] <= self._centre[plane.normal] < box.stop[plane.normal]
            if isinstance(prompt, PointPrompt):
                x, y = (box.start[axis] * spacing[axis] for axis in (plane.across, plane.down))
                _click(axes, x, y, positive=positive, here=here)
            elif isinstance(prompt, BoxPrompt):
                x0, x1 = ((box_end[plane.across] - 0.5) * spacing[plane.across] for box_end in (box.start, box.stop))
                y0, y1 = ((box_end[plane.down] - 0.5) * spacing[plane.down] for box_end in (box.start, box.stop))
                axes.add_patch(
                    Rectangle(
                        (x0, y0),
                        x1 - x0,
                        y1 - y0,
                        fill=False,
                        linewidth=1.4,
                        edgecolor=_BOX if positive else _NEGATIVE,
                        linestyle=(0, (6, 2)) if here else (0, (1, 3)),
                        alpha=1.0 if here else 0.6,
                    )
                )
            elif here:
                full = np.zeros(self._view.shape_kji, dtype=bool)
                box.paste(covered, full)
                self._contour(axes, plane, full, _POSITIVE if positive else _NEGATIVE, "solid", 1.1)

    def _around_everything(self) -> Box:
        """The objects and prompts with a margin, as near to a cube in mm as the volume allows."""
        boxes = [Box.around(m) for m in (self._mask, self._reference) if m is not None]
        boxes += [prompt.region(self._view)[0] for prompt in self._prompts]
        there = [box for box in boxes if box is not None]
        around = there[0] if there else self._view.box
        for box in there[1:]:
            around = around.union(box)
        spacing = self._view.spacing
        side = 1.3 * max((b - a) * s for a, b, s in zip(around.start, around.stop, spacing, strict=True)) + 16.0
        starts, stops = [], []
        for a, b, s, size in zip(around.start, around.stop, spacing, self._view.shape_ijk, strict=True):
            half, middle = side / s / 2, (a + b) / 2
            starts.append(max(0, int(np.floor(middle - half))))
            stops.append(min(size, int(np.ceil(middle + half))))
        return Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))

    def _through_the_object(self) -> Ijk:
        """For each axis the slice with most of the object; of the window's middle where there is none."""
        centre = []
        for axis, (a, b) in enumerate(zip(self._window.start, self._window.stop, strict=True)):
            for array in (self._mask, self._reference):
                area = None if array is None else array.sum(axis=tuple(n for n in range(3) if n != 2 - axis))
                if area is not None and area.any():
                    centre.append(int(np.median(np.flatnonzero(area >= 0.98 * area.max()))))
                    break
            else:
                centre.append((a + b) // 2)
        return centre[0], centre[1], centre[2]

    def _slice(self, array_kji: npt.NDArray[Any], plane: _Plane) -> npt.NDArray[Any]:
        """(down, across) of the window, at the slice shown."""
        cut = list(self._window.slices)
        at = self._centre[plane.normal]
        cut[2 - plane.normal] = slice(at, at + 1)
        return array_kji[tuple(cut)].squeeze(axis=2 - plane.normal)

    def _extent(self, plane: _Plane) -> tuple[float, float, float, float]:
        """Outer edges of the window in mm from voxel 0: across from and to, down from and to."""
        spacing, (start, stop) = self._view.spacing, (self._window.start, self._window.stop)
        ends = [(end[axis] - 0.5) * spacing[axis] for axis in (plane.across, plane.down) for end in (start, stop)]
        return ends[0], ends[1], ends[2], ends[3]

    def _contour(self, axes: Axes, plane: _Plane, mask_kji: BoolArray, colour: str, style: str, width: float) -> None:
        cut = np.pad(self._slice(mask_kji, plane).astype(np.float32), 1)
        if not cut.any():
            return
        spacing = self._view.spacing
        x = (np.arange(cut.shape[1]) + self._window.start[plane.across] - 1) * spacing[plane.across]
        y = (np.arange(cut.shape[0]) + self._window.start[plane.down] - 1) * spacing[plane.down]
        axes.contour(x, y, cut, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)


def _figure(width: float, height: float, paper: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=paper)  # not pyplot: no display, and nothing global
    FigureCanvasAgg(figure)
    return figure


def _outlined(artist: Any, width: float = 2.5) -> None:
    from matplotlib.patheffects import withStroke

    artist.set_path_effects([withStroke(linewidth=width, foreground="black")])


def _click(axes: Axes, x: float, y: float, *, positive: bool, here: bool) -> None:
    colour = _POSITIVE if positive else _NEGATIVE
    marker = "P" if positive else "_"
    axes.plot(
        [x],
        [y],
        marker=marker,
        markersize=11,
        markerfacecolor=colour,
        markeredgecolor="black" if positive else colour,
        markeredgewidth=0.9 if positive else 3.5,
        linestyle="none",
        alpha=1.0 if here else 0.4,
        zorder=6,
    )


def _legend(figure: Figure, prompts: Sequence[Prompt], *, with_reference: bool) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, label: str) -> Line2D:
        edge = 3.5 if marker == "_" else 0.9
        return Line2D(
            [], [], marker=marker, color=colour, markersize=10, markeredgewidth=edge, linestyle="none", label=label
        )

    entries = [Line2D([], [], color=_MASK, linewidth=2, label="mask")]
    if with_reference:
        entries.append(Line2D([], [], color=_REFERENCE, linewidth=2, linestyle="dashed", label="reference label"))
    if any(isinstance(p, BoxPrompt) for p in prompts):
        entries.append(Line2D([], [], color=_BOX, linewidth=1.5, linestyle=(0, (6, 2)), label="box"))
    points = [p for p in prompts if isinstance(p, PointPrompt)]
    if any(p.polarity is Polarity.POSITIVE for p in points):
        entries.append(mark("P", _POSITIVE, "positive click"))
    if any(p.polarity is Polarity.NEGATIVE for p in points):
        entries.append(mark("_", _NEGATIVE, "negative click"))
    legend = figure.legend(
        handles=entries,
        loc="lower center",
        ncols=len(entries),
        frameon=False,
        labelcolor=_INK,
        fontsize=11,
        title="fainter: prompt in another slice" if prompts else None,
        title_fontsize=9,
    )
    legend.get_title().set_color(_FAINT)
