"""Results of several methods on the same objects, side by side, with intervals of what each brings.

Differences to the first row are paired: object by object. Intervals are those of a percentile bootstrap (Efron 1979) of
what was drawn independently: subjects. Where a source has fewer than five of them, its objects are drawn instead, which
says nothing of other subjects; such intervals are marked. Of fewer than five objects there is no interval: all of them
would too often be on one side by chance. For the mean over sources, sources are drawn first, then subjects in each, so
that the interval speaks of further sources too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.evaluation import ObjectResult, means_per_source, result_from_row

SCORES = ("dsc_auc", "nsd_auc", "box_dice", "dsc1", "dsc_final")
TITLES = {
    "dsc_auc": "DSC AUC (of 4)",
    "nsd_auc": "NSD AUC (of 4)",
    "box_dice": "Dice, box",
    "dsc1": "Dice, 1 click",
    "dsc_final": "Dice, 5 clicks",
}
OVERALL = "mean over sources"
DRAWS = 4000
FEWEST = 5
"""Units that can be drawn from."""
SAME = ("split", "with_box", "max_objects_per_item", "min_voxels", "manifests")
"""Settings that must be the same in all rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method: what `ka2ersegment evaluate` left in a folder."""

    name: str
    settings: Mapping[str, Any]
    about: Mapping[str, float | None]
    results: tuple[ObjectResult, ...]

    @property
    def sources(self) -> dict[str, dict[str, float | None]]:
        """Means per source and over sources."""
        return means_per_source(self.results)


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more than the first row a row has, with the 95 % interval.

    Args:
        mean: of the row less the first one.
        low: end of the interval; None without one.
        high: other end.
        few: objects were drawn, because there are too few subjects.
    """

    mean: float
    low: float | None
    high: float | None
    few: bool

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def read_row(text: str) -> Row:
    """A row from `folder` or `name=folder`; without a name, the folder's own.

    Raises:
        KA2ERError: the folder holds no results, or a run that was interrupted.
    """
    name, _, path = text.rpartition("=")
    folder = Path(path)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        with (folder / "objects.csv").open(newline="", encoding="utf-8") as file:
            results = tuple(result_from_row(row) for row in csv.DictReader(file))
        settings, complete = summary["settings"], summary["complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path!r} must be a folder that `ka2ersegment evaluate` wrote: {error}."
        raise KA2ERError(message) from error
    if not complete:
        message = f"{path!r} holds an interrupted run. Complete it with `ka2ersegment evaluate --resume`."
        raise KA2ERError(message)
    return Row(name or folder.name, settings, summary.get("about", {}), results)


def check_comparable(rows: Sequence[Row]) -> None:
    """KA2ERError where rows have the same name, other settings of the run, or other objects."""
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        message = f"each row must have a name of its own, got {names}. Give name=folder."
        raise KA2ERError(message)
    first, *others = rows
    objects = {(r.item, r.label) for r in first.results}
    for row in others:
        different = [key for key in SAME if row.settings.get(key) != first.settings.get(key)]
        if different:
            message = f"rows must come from runs of the same settings; {row.name!r} differs from {first.name!r} in "
            raise KA2ERError(message + f"{', '.join(different)}. Evaluate it anew.")
        theirs = {(r.item, r.label) for r in row.results}
        if theirs != objects:
            some = sorted(f"{item} label {label}" for item, label in theirs ^ objects)[:3]
            message = f"rows must have the same objects; {row.name!r} and {first.name!r} differ in {some}."
            raise KA2ERError(message)


def differences(first: Row, other: Row, score: str, seed: int = 0) -> dict[str, Difference]:
    """What a row has more than the first one, per source and over sources; empty where a score was not taken.

    Args:
        first: to compare with.
        other: with the same objects.
        score: a column of `objects.csv`.
        seed: of the draws.
    """
    before = {(r.item, r.label): r for r in first.results}
    pairs = [(r, getattr(r, score), getattr(before[r.item, r.label], score)) for r in other.results]
    if any(a is None or b is None for _, a, b in pairs):
        return {}
    rng = np.random.default_rng(seed)
    found: dict[str, Difference] = {}
    drawn = []
    for source in sorted({r.source for r, _, _ in pairs}):
        sums, weights, few = _units([(r, a - b) for r, a, b in pairs if r.source == source])
        at = rng.integers(len(sums), size=(DRAWS, len(sums)))
        means = sums[at].sum(1) / weights[at].sum(1)
        drawn.append(means)
        found[source] = _difference(float(sums.sum() / weights.sum()), means, len(sums), few)
    stacked = np.stack(drawn)
    chosen = rng.integers(len(drawn), size=(DRAWS, len(drawn)))
    overall = stacked[chosen, rng.integers(DRAWS, size=chosen.shape)].mean(1)
    mean = float(np.mean([difference.mean for difference in found.values()]))
    found[OVERALL] = _difference(mean, overall, len(drawn), few=False)
    return found


def _units(
    differences: Sequence[tuple[ObjectResult, float]],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], bool]:
    """What is drawn: of each unit the weighted sum of its differences and its weight; objects of an item share 1."""
    of_item: dict[str, int] = {}
    for result, _ in differences:
        of_item[result.item] = of_item.get(result.item, 0) + 1
    subjects: dict[str, list[tuple[float, float]]] = {}
    for result, difference in differences:
        weight = 1 / of_item[result.item]
        subjects.setdefault(result.subject or result.item, []).append((weight * difference, weight))
    few = len(subjects) < FEWEST
    groups = [[pair] for members in subjects.values() for pair in members] if few else list(subjects.values())
    sums, weights = (np.array([sum(pair[part] for pair in group) for group in groups]) for part in (0, 1))
    return sums, weights, few


def _difference(mean: float, draws: npt.NDArray[np.float64], units: int, few: bool) -> Difference:
    if units < FEWEST:
        return Difference(mean, None, None, few)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Difference(mean, float(low), float(high), few)


def compare(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain data: means of all rows, and differences to the first of all others, for every score.

    Raises:
        KA2ERError: the rows are not comparable.
    """
    check_comparable(rows)
    first = rows[0]
    return {
        "settings": {key: first.settings.get(key) for key in SAME},
        "objects": len(first.results),
        "rows": [
            {
                "name": row.name,
                "method": row.settings.get("method"),
                "about": dict(row.about),
                "means": {source: {score: means[score] for score in SCORES} for source, means in row.sources.items()},
                "differences": {}
                if row is first
                else {
                    score: {
                        source: {"mean": d.mean, "low": d.low, "high": d.high, "few": d.few, "clear": d.clear}
                        for source, d in differences(first, row, score).items()
                    }
                    for score in SCORES
                },
            }
            for row in rows
        ],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of `compare`: one over sources, one of DSC AUC per source."""
    rows = found["rows"]
    first = rows[0]
    scores = [score for score in SCORES if first["means"][OVERALL][score] is not None]
    prompts = "a box, then five clicks" if found["settings"]["with_box"] else "five clicks, no box"
    titles = [TITLES[score] for score in scores]
    lines = [
        f"Split {found['settings']['split']}, {prompts}, {found['objects']} objects; mean over sources; in brackets "
        f"what a row has more than {first['name']}, with its 95 % interval (paired bootstrap over sources and "
        "subjects). Bold: the interval leaves out 0.",
        "",
        "| | " + " | ".join(titles) + " | parameters | s per patch | s per click |",
        "|---|" + "---|" * (len(titles) + 3),
    ]
    for row in rows:
        about = row["about"]
        count = about.get("parameters")
        seconds = [about.get(key) for key in ("seconds_per_patch", "seconds_per_click")]
        cells = [_cell(row, score, OVERALL) for score in scores]
        cells += ["" if count is None else f"{count / 1e6:.2f} M", *("" if s is None else f"{s:.2f}" for s in seconds)]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    names = [row["name"] for row in rows]
    lines += ["", "DSC AUC per source:", "", "| source | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [
        f"| {source} | " + " | ".join(_cell(row, "dsc_auc", source) for row in rows) + " |" for source in first["means"]
    ]
    marked = any(
        d["few"] and d["low"] is not None for row in rows for d in row["differences"].get("dsc_auc", {}).values()
    )
    if marked:
        lines += [
            "",
            f"\\* fewer than {FEWEST} subjects: the interval is over their objects, and of these subjects alone.",
        ]
    return "\n".join([*lines, ""])


def _cell(row: Mapping[str, Any], score: str, source: str) -> str:
    value = f"{row['means'][source][score]:.3f}"
    difference = row["differences"].get(score, {}).get(source)
    if difference is None:
        return value
    text = f"{difference['mean']:+.3f}"
    if difference["low"] is not None:
        text += f", {difference['low']:+.3f} to {difference['high']:+.3f}"
    mark = "\\*" if difference["few"] and difference["low"] is not None else ""
    return f"{value} ({f'**{text}**' if difference['clear'] else text}){mark}"


def write_comparison(found: Mapping[str, Any], output: Path) -> None:
    """Write Markdown to `output` and the numbers beside it, with the ending `.json`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(markdown(found), encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
