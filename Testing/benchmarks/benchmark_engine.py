"""The engine: start to ready, a volume handed over, and where the time of a click goes: see README.md."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from KA2ERSegment.engine.client import EngineClient
from KA2ERSegment.engine.process import LocalEngine
from KA2ERSegment.engine.wire import Change, change_from_head, change_to_head, pack_frame, unpack_frame
from KA2ERSegment.errors import CancelledError
from KA2ERSegment.prompts import BoxPrompt, PointPrompt
from KA2ERSegment.volume import Volume

AIMS = {"start to ready": 6.0, "click": 0.4, "click, outside the network": 0.1, "cancel": 0.5}
"""Seconds, on two CPU cores."""
MIDDLE = (170, 240, 150)
console = Console(stderr=True)


def a_volume(size: int) -> Volume:
    """512x512x300 int16 (for size 512) like a CT of the trunk, noise everywhere."""
    rng = np.random.default_rng(0)
    k, j, i = np.ogrid[: size * 300 // 512, :size, :size]
    f = 512 / size
    array = np.full((size * 300 // 512, size, size), -1000, dtype=np.int16)
    array[np.broadcast_to(((j * f - 256) / 180) ** 2 + ((i * f - 256) / 220) ** 2 < 1, array.shape)] = 0
    array[((j * f - 240) / 90) ** 2 + ((i * f - 170) / 80) ** 2 + ((k * f - 150) / 70) ** 2 < 1] = 110
    for plane in array:
        plane += rng.normal(0, 12, plane.shape).astype(np.int16)
    return Volume(array, np.diag([-0.8 * f, -0.8 * f, f, 1.0]))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def click_parts(click: Callable[[], Change]) -> dict[str, float]:
    """Seconds of one click by part."""
    total, change = timed(click)
    head, masks = change_to_head(change)
    packing, frame = timed(lambda: pack_frame(head, masks))
    unpacking, _ = timed(lambda: change_from_head(*unpack_frame(frame)))
    return {
        "click": total,
        "network": change.network,
        "session around it": change.seconds - change.network,
        "mask packed and unpacked": packing + unpacking,
        "request": total - change.seconds - packing - unpacking,
        "kilobytes": len(frame) / 1000,
    }


def clicks_of(ijk: tuple[int, int, int], size: int, count: int) -> list[tuple[int, int, int]]:
    """Voxels near the middle of the object."""
    rng = np.random.default_rng(1)
    scale = size / 512
    spots = rng.integers(-40, 40, (count, 3)) + np.array(ijk)
    return [(int(a * scale), int(b * scale), int(c * scale)) for a, b, c in spots]


def measure_ours(engine: LocalEngine, volume: Volume, size: int, count: int) -> dict[str, Any]:
    """By our own client: the volume by both ways, then clicks inside a computed patch."""
    client = engine.client()
    by_file, session = timed(lambda: client.open(volume.array_kji, volume.ijk_to_ras))
    other = EngineClient(client.url, engine.api_key)
    by_body, second = timed(lambda: other.open(volume.array_kji, volume.ijk_to_ras))
    second.close()
    start, stop = ((int(x * size / 512) for x in corner) for corner in ((85, 145, 75), (255, 335, 225)))
    box = BoxPrompt.from_ijk(tuple(start), tuple(stop), volume)
    first, _ = timed(lambda: session.add(box))
    laps = [
        click_parts(lambda ijk=ijk: session.add(PointPrompt.from_ijk(ijk, volume)))
        for ijk in clicks_of(MIDDLE, size, count)
    ]
    middle = {part: statistics.median(lap[part] for lap in laps) for part in laps[0]}
    middle["click, outside the network"] = statistics.median(lap["click"] - lap["network"] for lap in laps)
    undo, _ = timed(session.undo)
    arm = client.info()["experts"]["amalgamation"][-1]
    opinion, said = timed(lambda: session.opinion("object", arm))
    client.close()
    return {
        "volume through the folder": by_file,
        "volume as a body": by_body,
        "first box": first,
        **middle,
        "undo": undo,
        "opinion of one expert": opinion,
        "opinion, kilobytes": (said.probability.nbytes + said.weight.nbytes) / 1000,
    }


def measure_cancel(engine: LocalEngine, volume: Volume) -> dict[str, float]:
    """From the call that cancels a first click, while the network computes features, to its end."""
    session = engine.client().open(volume.array_kji, volume.ijk_to_ras)
    i, j, k = (n // 3 for n in volume.shape_ijk)
    ends: list[float] = []

    def work() -> None:
        with contextlib.suppress(CancelledError):
            session.add(PointPrompt.from_ijk((i, j, k), volume))
        ends.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    while session.progress()[0] != "Computing features" and thread.is_alive():
        pass
    begin = time.perf_counter()
    session.cancel()
    thread.join()
    return {"cancel": ends[0] - begin}


def measure_theirs(engine: LocalEngine, volume: Volume, size: int, count: int) -> dict[str, float]:
    """By nnInteractive's client: the same image and clicks."""
    from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession

    with nnInteractiveRemoteInferenceSession(engine.client().url, engine.api_key) as viewer:
        sending, _ = timed(lambda: viewer.set_image(volume.array_kji[None], {"spacing": volume.spacing[::-1]}))
        viewer.set_target_buffer(np.zeros(volume.shape_kji, dtype=np.uint8))
        sides = [[int(a * size / 512), int(b * size / 512)] for a, b in ((75, 225), (145, 335), (85, 255))]
        first, _ = timed(lambda: viewer.add_bbox_interaction(sides, True))
        laps = [
            timed(lambda ijk=ijk: viewer.add_point_interaction(ijk[::-1], True))[0]
            for ijk in clicks_of(MIDDLE, size, count)
        ]
    return {"set_image": sending, "first box": first, "click": statistics.median(laps)}


def main(
    output: Annotated[Path | None, typer.Option("--output", help="JSON file.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Default: the shipped one.")] = None,
    device: Annotated[str, typer.Option("--device")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1)] = 2,
    starts: Annotated[int, typer.Option("--starts", min=1, help="How often the engine is started.")] = 3,
    clicks: Annotated[int, typer.Option("--clicks", min=1)] = 20,
    size: Annotated[int, typer.Option("--size", min=64, help="Voxels along I and J; 512 is 512x512x300.")] = 512,
) -> None:
    """Measure the engine on this machine."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    engine = LocalEngine([sys.executable], bundle, device, arguments=["--threads", str(threads)])
    laps, processor = [], []
    try:
        for _ in range(starts):
            engine.stop()
            engine.start()
            engine.wait(300)
            laps.append(engine.seconds_to_ready or 0.0)
            times = psutil.Process(engine.pid).cpu_times()
            processor.append(times.user + times.system)
        volume = a_volume(size)
        ours = measure_ours(engine, volume, size, clicks)
        theirs = measure_theirs(engine, volume, size, clicks)
        ours |= measure_cancel(engine, volume)
        resident = psutil.Process(engine.pid).memory_info().rss
    finally:
        engine.stop()
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": threads,
            "device": device,
            "load average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "shape_kji": list(volume.shape_kji),
        "start": {"start to ready": statistics.median(laps), "of that processor time": statistics.median(processor)},
        "our client": ours,
        "nnInteractive's client": theirs,
        "resident megabytes": resident / 1e6,
        "aims": AIMS,
    }
    table = Table("seconds", "", "", "aim")
    for group in ("start", "our client", "nnInteractive's client"):
        for name, seconds in result[group].items():
            aim = AIMS.get(name) if group != "nnInteractive's client" else None
            text = f"{seconds:.0f} kB" if name.endswith("kilobytes") else f"{seconds:.3f}"
            table.add_row(group, name, text, "" if aim is None else f"{aim:.1f}")
    console.print(table)
    text = json.dumps(result, indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
