"""Patches per second of a training stage, and the share of the time that it waits for data: see README.md."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main(
    cache: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Packed items.")] = Path("cache/train"),
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = ROOT
    / "KA2ERSegment/training/configs/gpu.json",
    stage: Annotated[str, typer.Option(help="Stage to measure; its experts are those of --start.")] = "amalgamation",
    start: Annotated[Path, typer.Option(exists=True, file_okay=False)] = ROOT / "Resources/Models/ka2er-base",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option(help="Batches to measure, one after the other.")] = None,
    workers: Annotated[
        list[int] | None, typer.Option(help="Numbers of workers to measure, each with each batch.")
    ] = None,
    steps: Annotated[int, typer.Option(min=3, help="Steps of each measurement; the first one is not counted.")] = 20,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Run a few steps of a stage as training does, for each batch and number of workers."""
    from KA2ERSegment.training.__main__ import train
    from KA2ERSegment.training.config import read_config

    settings = read_config(config)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in batch or [settings[stage]["batch"]]:
            for count in workers if workers is not None else [0]:
                changes = {"batch": size, "accumulate": 1, "steps": steps, "minutes": 60}
                path = folder / "config.json"
                path.write_text(json.dumps({**settings, stage: {**settings[stage], **changes}}))
                place = folder / f"{size}-{count}"
                train(path, place, start=start, stage=stage, cache=cache, device=device, workers=count, save_every=60.0)
                found += json.loads((place / "log.json").read_text())
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    typer.echo(f"\n{stage} on {found[0]['hardware']}, load {about['load'][0]:.1f} on {about['cores']} cores")
    typer.echo("| batch | workers | patches/s | waiting for data | GPU memory, GB |\n|---|---|---|---|---|")
    for row in found:
        cells = (row["batch"], row["workers"], row["patches_per_second"], f"{row['waiting_for_data']:.1%}")
        typer.echo("| " + " | ".join(map(str, (*cells, row.get("gpu_memory_gb", "")))) + " |")
    if output is not None:
        output.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
