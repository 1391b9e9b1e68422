"""`ka2ersegment evaluate`: a method under the challenge protocol."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from KA2ERSegment.cli.common import BundleOption, Device, DeviceOption, JsonOption, running, table_of

if TYPE_CHECKING:
    from rich.table import Table


class Method(str, Enum):
    """What is evaluated."""

    KA2ER = "ka2er"
    GROWCUT = "growcut"


class System(str, Enum):
    """What can be switched off: `KA2ERSegment.plans.SYSTEMS`."""

    EXPERTS = "experts"
    DOMAINS = "domains"
    GATE = "gate"
    VOTING = "voting"
    CALIBRATION = "calibration"
    REFINEMENT = "refinement"


def evaluate(
    manifest: Annotated[list[Path], typer.Argument(help="Manifest CSV; several are evaluated as one.")],
    split: Annotated[str, typer.Option("--split", help="Split of the manifest.")] = "val",
    method: Annotated[Method, typer.Option("--method", help="growcut: Slicer's Grow from seeds.")] = Method.KA2ER,
    *,
    no_box: Annotated[bool, typer.Option("--no-box", help="Clicks only.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results; default output/evaluate-METHOD-PROMPTS.")
    ] = None,
    max_objects_per_item: Annotated[
        int | None,
        typer.Option("--max-objects-per-item", min=1, help="Objects of one item, chosen by a fixed seed; default all."),
    ] = None,
    without: Annotated[list[System] | None, typer.Option("--without", help="Switch a system off; repeat.")] = None,
    min_voxels: Annotated[int, typer.Option("--min-voxels", min=1, help="Smaller objects are left out.")] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Score a method under the challenge protocol: a drawn box, then five clicks in the largest error."""
    off = [system.value for system in without or ()]
    if off and method is Method.GROWCUT:
        message = "there is nothing to switch off in growcut: leave out --without."
        raise typer.BadParameter(message)
    if output is None:
        what = "-without-".join([method.value, *off])
        output = Path("output") / f"evaluate-{what}-{'clicks' if no_box else 'box'}"
    with running(as_json) as run:
        with run.step("Starting"):
            from KA2ERSegment import evaluation

            if method is Method.GROWCUT:
                segmenter, about = _growcut(), None
            else:
                segmenter = evaluation.SessionSegmenter.of(bundle, off, device.value)
                about = segmenter.facts()
        with run.bar("Evaluating") as on_progress:
            done = evaluation.evaluate(
                manifest,
                segmenter,
                output,
                split=split,
                with_box=not no_box,
                max_objects_per_item=max_objects_per_item,
                min_voxels=min_voxels,
                resume=resume,
                about=about,
                on_progress=lambda count, total, _: on_progress(count, total),
            )
        run.result({"output": str(output), **done.to_json()})
        run.say(_table_of_sources(f"{method.value}, {'clicks only' if no_box else 'box and clicks'}", done.sources))
        maps = sum(1 for entry in done.left_out if not entry.name)
        objects = len(done.left_out) - maps
        run.say(f"left out: {maps} label maps without an image, {objects} objects (see summary.json)")
        run.say(f"written to {output}")


def _growcut() -> Any:
    from KA2ERSegment.growcut import GrowCut

    return GrowCut()


def _table_of_sources(title: str, sources: dict[str, dict[str, float | None]]) -> Table:
    columns = ("box_dice", "dsc1", "dsc_final", "dsc_auc", "nsd_final", "nsd_auc", "seconds_per_click")
    heads = ("box", "1 click", "5 clicks", "DSC AUC", "NSD 5", "NSD AUC", "s/click")
    table = table_of(title, "source", "items", "objects", *heads)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for source, means in sources.items():
        if source == "mean over sources":
            table.add_section()
        cells = ["" if means[c] is None else f"{means[c]:.3f}" for c in columns]
        table.add_row(source, f"{means['items']:.0f}", f"{means['objects']:.0f}", *cells)
    return table
