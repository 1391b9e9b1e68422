"""Click, features, memory and first mask on two CPU cores, beside a pass of nnInteractive's network: see README.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
AIMS = {"click": 0.15, "first mask": 8.0, "peak": 3e9, "ratio": 100.0}
console = Console(stderr=True)


def trunk() -> tuple[np.ndarray, np.ndarray]:
    """(K, J, I) int16 of 300x512x512 voxels like a CT of the trunk, noise everywhere, and its affine."""
    rng = np.random.default_rng(0)
    k, j, i = np.ogrid[:300, :512, :512]
    array = np.full((300, 512, 512), -1000, dtype=np.int16)
    array[np.broadcast_to(((j - 256) / 180) ** 2 + ((i - 256) / 220) ** 2 < 1, array.shape)] = 0
    array[((j - 240) / 90) ** 2 + ((i - 170) / 80) ** 2 + ((k - 150) / 70) ** 2 < 1] = 110
    array[((j - 330) / 45) ** 2 + ((i - 330) / 50) ** 2 + ((k - 150) / 40) ** 2 < 1] = 60
    for plane in array:  # slice by slice: the noise of the whole would take 600 MB
        plane += rng.normal(0, 12, plane.shape).astype(np.int16)
    return array, np.diag([-0.8, -0.8, 1.0, 1.0])


def write_volumes(folder: Path) -> list[Path]:
    """The trunk as `.nii.gz` and `.nii`."""
    import nibabel

    array, affine = trunk()
    paths = [folder / "volume.nii.gz", folder / "volume.nii"]
    for path in paths:
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return paths


def run(script: str, *arguments: str, threads: int) -> dict[str, Any]:
    """A fresh Python with that many threads; its JSON, and its whole wall time from outside."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    started = time.time()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments, str(started)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["process"] = round(time.time() - started, 3)
    return result


def hardware() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "load_average": os.getloadavg()}


def bind_to(cores: int) -> None:
    """Keep this process and all that it starts on that many cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    table = Table("what", "wall", "CPU", "aim")
    click = result["nii.gz"]["click"]
    for name in click["wall"]:
        aim = f"{AIMS['click']} s" if name == "whole click" else ""
        label = name if name == "whole click" else f"  {name}"
        table.add_row(label, f"{click['wall'][name]:.3f} s", f"{click['cpu'][name]:.3f} s", aim)
    table.add_row("whole mask on the volume's grid", f"{result['nii.gz']['mask_on_the_volume']:.3f} s", "", "")
    features = result["nii.gz"]["features_of_a_patch"]
    table.add_row("features of a patch", f"{features['wall']:.3f} s", f"{features['cpu']:.3f} s", "")
    for kind in ("nii.gz", "nii"):
        first = result[kind]["first_mask"]
        table.add_row(
            f"first mask, .{kind}", f"{first['total']:.2f} s", f"{first['cpu']:.2f} s", f"{AIMS['first mask']} s"
        )
        for name, seconds in first["split"].items():
            table.add_row(f"  {name}", f"{seconds:.2f} s", "", "")
    table.add_row("peak memory", f"{result['nii.gz']['peak'] / 1e9:.2f} GB", "", f"{AIMS['peak'] / 1e9:.0f} GB")
    peer = result.get("peer")
    if peer:
        mark = f" (from {peer['size']}^3)" if peer["extrapolated"] else ""
        table.add_row(
            f"peer's pass at 192^3{mark}", f"{peer['at_192']['wall']:.1f} s", f"{peer['at_192']['cpu']:.1f} s", ""
        )
        table.add_row("peer's pass / click", f"{result['ratio']['wall']:.0f}", f"{result['ratio']['cpu']:.0f}", "100")
    console.print(table)
    load = result["hardware"]["load_average"][0]
    if load > 0.5:
        console.print(f"[yellow]The machine was busy (load {load:.1f}): wall times are too long, CPU times less so.")


def main(
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder; the shipped one by default.")] = None,
    peer_size: Annotated[
        int, typer.Option(help="Cube of the peer's pass; under 192 it is extrapolated by volume.")
    ] = 192,
    peer: Annotated[bool, typer.Option(help="Run the peer's pass at all.")] = True,
    clicks: Annotated[int, typer.Option(min=3)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file; standard output by default.")] = None,
) -> None:
    """Measure on as many cores as threads, each part in a fresh process."""
    if peer_size % 32 or peer_size < 64:
        message = f"the peer's cube must be a multiple of 32 samples and 64 at least, got {peer_size}."
        raise typer.BadParameter(message, param_hint="--peer-size")
    bind_to(threads)
    result: dict[str, Any] = {"hardware": hardware()}
    folder = str(bundle.resolve()) if bundle else "-"
    with tempfile.TemporaryDirectory() as scratch, console.status("writing the volumes") as status:
        for path in write_volumes(Path(scratch)):
            kind = path.name.removeprefix("volume.")
            status.update(f"first mask and clicks, .{kind}")
            result[kind] = run("our_process.py", str(path), folder, str(clicks), str(threads), threads=threads)
        if peer:
            status.update(f"the peer's network at {peer_size}^3")
            result["peer"] = run("peer_process.py", str(peer_size), str(threads), threads=threads)
            click = result["nii.gz"]["click"]
            result["ratio"] = {
                clock: round(result["peer"]["at_192"][clock] / click[clock]["whole click"], 1)
                for clock in ("wall", "cpu")
            }
    show(result)
    text = json.dumps(result, indent=1) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    typer.run(main)
