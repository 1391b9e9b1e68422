"""`ka2ersegment demo`: a real brain MR and the bundle that is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from KA2ERSegment.cli.common import BundleOption, Device, DeviceOption, JsonOption, running, table_of


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the mask and the picture.")] = Path(
        "output"
    ),
    *,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Segment a structure of a real brain MR from a box and a point, with the bundle that is shipped."""
    with running(as_json) as run:
        with run.step("Starting"):
            from KA2ERSegment.demo import run_demo
        with run.step("Segmenting the sample"):
            done = run_demo(output, bundle=bundle, device=device.value)
        run.result(done.to_json())
        table = table_of("Dice against the sample's own label", "after", "Dice", "seconds")
        for step in done.steps:
            table.add_row(step.after, f"{step.dice:.3f}", f"{step.seconds:.2f}")
        run.say(table)
        for path in done.files:
            run.say(f"written to {path}")
        run.say(f"\nOn your own file:\n  {done.own_file_command}")
