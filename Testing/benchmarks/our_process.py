"""One fresh process of ours: time from its start to the first mask, then clicks, features and peak memory.

Started by `benchmark_first_mask.py`; prints one line of JSON. `sys.argv`: image, bundle folder or "-", clicks, threads,
and `time.time()` of the moment when this process was started.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """Largest resident size of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held before the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Wall and CPU seconds of named functions, replaced in their modules while it measures."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count the time spent in `owner.attribute` as `name`."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wall[name] += time.perf_counter() - wall
                self.cpu[name] += time.process_time() - cpu

        setattr(owner, attribute, timed)

    def lap(self) -> tuple[dict[str, float], dict[str, float]]:
        """What was counted since the last lap."""
        counted = dict(self.wall), dict(self.cpu)
        self.wall.clear()
        self.cpu.clear()
        return counted


def middle(laps: list[dict[str, float]]) -> dict[str, float]:
    """Median of each name over the laps."""
    return {name: round(statistics.median(lap.get(name, 0.0) for lap in laps), 4) for name in laps[0]}


def main(image: str, bundle_folder: str, clicks: int, threads: int, started: float) -> dict[str, Any]:
    """Measure; the keys say what, all in seconds or bytes."""
    split: dict[str, float] = {}
    last = started

    def mark(name: str) -> None:
        nonlocal last
        now = time.time()
        split[name] = round(now - last, 3)
        last = now

    import torch

    torch.set_num_threads(threads)
    mark("Python and torch")
    from KA2ERSegment import BoxPrompt, PointPrompt, Polarity, Session, Volume, load_bundle

    mark("import the library")
    session = Session(load_bundle(None if bundle_folder == "-" else bundle_folder), device="cpu")
    mark("bundle and network")
    volume = Volume.read(image)
    session.set_volume(volume)
    mark("reading the volume")
    i, j, k = volume.shape_ijk
    box = (i * 5 // 32, j * 9 // 32, k // 4), (i // 2, j * 21 // 32, k * 3 // 4)
    first = session.add(BoxPrompt.from_ijk(*box, volume))
    voxels = int(first.mask.sum())
    mark("box prompt to mask")
    result: dict[str, Any] = {
        "first_mask": {
            "split": split,
            "total": round(last - started, 3),
            "cpu": round(time.process_time(), 3),
            "voxels": voxels,
        },
        "peak_at_first_mask": peak_memory(),
    }

    import numpy as np

    from KA2ERSegment import mask_decoder, model, refinement, sharing, voting
    from KA2ERSegment import session as session_module

    watch = Stopwatch()
    watch.watch(model, "dense_maps", "prompt maps")
    watch.watch(mask_decoder.MaskDecoder, "forward", "decoders")
    watch.watch(voting.VotingHead, "forward", "vote")
    watch.watch(refinement.Refiner, "detail", "refinement")
    watch.watch(refinement.Detail, "at_voxels", "upsampling")
    watch.watch(sharing, "honour", "clicks honoured")
    watch.watch(model.PromptableModel, "encode", "features of a patch")
    rng = np.random.default_rng(0)
    walls, cpus, computed = [], [], 0
    centre = (np.array(box[0]) + np.array(box[1])) // 2
    reach = (np.array(box[1]) - np.array(box[0])) // 3
    for n in range(clicks):
        ijk = tuple(int(x) for x in rng.integers(centre - reach, centre + reach))
        polarity = Polarity.NEGATIVE if n % 2 else Polarity.POSITIVE
        wall, cpu = time.perf_counter(), time.process_time()
        session.add(PointPrompt.from_ijk(ijk, volume, polarity))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        parts = watch.lap()
        computed += "features of a patch" in parts[0]  # the click left the patch: no click of the kind measured
        if "features of a patch" not in parts[0]:
            for whole, part, laps in ((wall, parts[0], walls), (cpu, parts[1], cpus)):
                laps.append({**part, "the rest": whole - sum(part.values()), "whole click": whole})
    if not walls:
        message = f"none of the {clicks} clicks stayed inside the patch: give more."
        raise SystemExit(message)
    result["click"] = {"count": len(walls), "left_the_patch": computed, "wall": middle(walls), "cpu": middle(cpus)}
    wall = time.perf_counter()
    first.mask.any()
    result["mask_on_the_volume"] = round(time.perf_counter() - wall, 4)

    image_patch = torch.randn(1, 2, *(session.bundle.plans.patch_size,) * 3)
    network = session_module.build_model(session.bundle.plans, session.bundle.weights())
    with torch.inference_mode():
        for _ in range(4):
            network.encode(image_patch)
            wall_part, cpu_part = watch.lap()
    result["features_of_a_patch"] = {
        "wall": round(wall_part["features of a patch"], 4),
        "cpu": round(cpu_part["features of a patch"], 4),
    }
    result["peak"] = peak_memory()
    result["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0], "threads": threads}
    result["bundle"] = session.bundle.identity
    result["load_average"] = os.getloadavg()
    return result


if __name__ == "__main__":
    measured = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    sys.stdout.write(json.dumps(measured) + "\n")
