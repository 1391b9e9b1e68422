"""The table of `docs/results.md` from bundles: every row evaluated with a box and without, compared, and drawn.

    python Testing/benchmarks/ablation_table.py "foundation=Resources/Models/ka2er-base:experts" "all=BUNDLE" growcut

A row is `name=bundle`, `name=bundle:system,system` with systems switched off, or `growcut` (Slicer's Grow from seeds).
The first row is the one that all others are compared with. Rows that are done are not evaluated again; one that was
interrupted goes on. In the output folder: a folder for each row and mode, `box.md`, `clicks.md` and their JSON, and
`box.png`, `clicks.png`.

With `--times ROUNDS` nothing is evaluated: `times.md` and `times.json` say how many seconds the features of a patch and
a click take, medians over rounds in which the rows take turns, so that other work on the machine is unfair to none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.charts import chart_of_rows
from KA2ERSegment.comparison import OVERALL, compare, read_row, write_comparison
from KA2ERSegment.evaluation import ObjectResult, SessionSegmenter, evaluate, identity_of
from KA2ERSegment.geometry import Ijk
from KA2ERSegment.plans import SYSTEMS
from KA2ERSegment.prompts import BoxPrompt, PointPrompt
from KA2ERSegment.volume import Volume

MODES = {"box": True, "clicks": False}
CLICKS_TIMED = 4
"""Of one round."""
MANIFESTS = ("permissive/manifest.csv", "share_alike/manifest.csv")


@dataclass(frozen=True)
class Row:
    """One row of the table; `bundle` is None for Grow from seeds."""

    name: str
    bundle: Path | None
    off: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Row:
        """`growcut`, or name=bundle with :system,system behind it."""
        if text == "growcut":
            return cls("growcut", None)
        name, equals, rest = text.partition("=")
        folder, colon, last = rest.rpartition(":")
        off = tuple(last.split(",")) if colon else ()
        if not equals or not name or not all(system in SYSTEMS for system in off):
            message = f"a row is name=bundle, name=bundle:{','.join(SYSTEMS)} (some of them) or growcut, got {text!r}."
            raise argparse.ArgumentTypeError(message)
        return cls(name, Path(folder if colon else rest), off)

    def gave(self, method: str) -> bool:
        """Whether results are named as this row's would be."""
        if self.bundle is None:
            return method.startswith("growcut ")
        return method == identity_of(load_bundle(self.bundle), self.off)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Row.parse, metavar="ROW")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the manifests' folders")
    parser.add_argument("--output", type=Path, default=Path("output/ablation"))
    parser.add_argument("--split", default="val")
    parser.add_argument("--max-objects-per-item", type=int, default=6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument(
        "--times", type=int, default=0, metavar="ROUNDS", help="measure seconds only, in so many rounds"
    )
    arguments = parser.parse_args(words)
    if arguments.times:
        time_rows(arguments.rows, arguments.times, arguments.output, arguments.device)
        return
    for mode in arguments.modes:
        for row in arguments.rows:
            run_row(row, mode, arguments)
        write_tables(arguments.rows, mode, arguments.output)


def run_row(row: Row, mode: str, arguments: argparse.Namespace) -> None:
    """Evaluate one row in one mode, as far as that is not done yet."""
    folder = arguments.output / f"{row.name}-{mode}"
    summary = folder / "summary.json"
    if summary.exists():
        earlier = json.loads(summary.read_text(encoding="utf-8"))
        asked = {"split": arguments.split, "max_objects_per_item": arguments.max_objects_per_item}
        same = asked.items() <= earlier["settings"].items() and row.gave(earlier["settings"]["method"])
        if earlier["complete"] and same:
            say(f"{row.name}, {mode}: done before")
            return
    segmenter = segmenter_of(row, arguments.device)
    about = None if row.bundle is None else segmenter.facts()

    def tell(count: int, total: int, result: ObjectResult | None) -> None:
        if result is not None:
            say(f"{row.name}, {mode}: {count} of {total}, {result.item}, DSC AUC {result.dsc_auc:.2f}")

    evaluate(
        [path for path in (arguments.data / name for name in MANIFESTS) if path.is_file()],
        segmenter,
        folder,
        split=arguments.split,
        with_box=MODES[mode],
        max_objects_per_item=arguments.max_objects_per_item,
        resume=True,
        about=about,
        on_progress=tell,
    )


def time_rows(rows: list[Row], rounds: int, output: Path, device: str) -> None:
    """Write how long the features of a patch and a click take with each row."""
    volume, start, stop = a_volume()
    segmenters = {row.name: segmenter_of(row, device) for row in rows}
    patch: dict[str, list[float]] = {row.name: [] for row in rows}
    click: dict[str, list[float]] = {row.name: [] for row in rows}
    parameters: dict[str, float] = {}
    for number in range(rounds):
        for name, segmenter in segmenters.items():
            facts = segmenter.facts() if isinstance(segmenter, SessionSegmenter) else {}
            if facts:
                parameters[name] = facts["parameters"]
                patch[name].append(facts["seconds_per_patch"])
            segmenter.start(volume)
            segmenter.add(BoxPrompt.from_ijk(start, stop, volume))
            for n in range(CLICKS_TIMED):
                begin = time.perf_counter()
                segmenter.add(PointPrompt.from_ijk(np.array(start) + 6 + 3 * n, volume))
                click[name].append(time.perf_counter() - begin)
        say(f"round {number + 1} of {rounds}")
    found = {
        row.name: {
            "parameters": parameters.get(row.name),
            "seconds_per_patch": float(np.median(patch[row.name])) if patch[row.name] else None,
            "seconds_per_click": float(np.median(click[row.name])),
        }
        for row in rows
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "times.json").write_text(json.dumps({"rounds": rounds, "rows": found}, indent=1), encoding="utf-8")
    lines = ["| | parameters | s per patch | s per click |", "|---|---|---|---|"]
    for name, row in found.items():
        millions = f"{row['parameters'] / 1e6:.2f} M" if row["parameters"] else ""
        seconds = f"{row['seconds_per_patch']:.2f}" if row["seconds_per_patch"] else ""
        lines.append(f"| {name} | {millions} | {seconds} | {row['seconds_per_click']:.2f} |")
    (output / "times.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"written to {output / 'times.md'} and .json")


def segmenter_of(row: Row, device: str) -> Any:
    """The method of a row, ready."""
    if row.bundle is not None:
        return SessionSegmenter.of(row.bundle, row.off, device)
    from KA2ERSegment.growcut import GrowCut

    return GrowCut()


def a_volume() -> tuple[Volume, Ijk, Ijk]:
    """Noise with a brighter block on anisotropic voxels, and the block's corners (I, J, K)."""
    start, stop = (40, 50, 20), (88, 98, 52)
    values = np.random.default_rng(0).normal(0, 20, (72, 150, 140)).astype(np.int16)
    values[start[2] : stop[2], start[1] : stop[1], start[0] : stop[0]] += 80
    return Volume(values, np.diag([0.9, 0.9, 1.5, 1.0])), start, stop


def write_tables(rows: list[Row], mode: str, output: Path) -> None:
    """Compare the rows of one mode."""
    read = [read_row(f"{row.name}={output / f'{row.name}-{mode}'}") for row in rows]
    write_comparison(compare(read), output / f"{mode}.md")
    title = "Dice against clicks, " + ("after a box" if MODES[mode] else "without a box")
    chart_of_rows(output / f"{mode}.png", {row.name: row.sources[OVERALL] for row in read}, title)
    say(f"written to {output / mode}.md, .json and .png")


def say(text: str) -> None:
    """Where it stands."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
