"""A click in a slice view until the mask is on the screen, part by part, with the real engine: see README.md."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "scripted_modules" / "SlicerKA2ER")]

from benchmark_first_mask import bind_to, hardware, trunk  # noqa: E402

INTERVAL = 0.015
"""Seconds of the module's timer while it is busy."""
BLOCKED = 0.05
"""Seconds that nothing of ours may keep Slicer's main thread."""
AIMS = {"total": 0.4, "outside the network": 0.1, "ready": 6.0, "memory": 50e6}
CENTRE, RADII = np.array([170, 240, 150]), np.array([80, 90, 70])
"""Voxels: the large ellipsoid of the trunk."""
VIEW = (800, 700)
COMPUTED = 3.0
"""Times the fastest click in the network: a slower one computed features, of a patch that it left again."""
console = Console(stderr=True)


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """One request of the client."""

    path: str
    begin: float
    end: float = 0.0
    engine: float = 0.0  # seconds inside it
    network: float = 0.0


@dataclass
class Watch:
    """Requests of the client, and how long the main thread was kept."""

    requests: list[Sent] = field(default_factory=list)
    kept: dict[str, list[float]] = field(default_factory=dict)

    def install(self) -> None:
        """Note each request from now on."""
        from KA2ERSegment.engine.client import EngineClient, RemoteSession

        request, do = EngineClient.request, RemoteSession._do

        def requested(client: Any, method: str, path: str, *arguments: Any, **keywords: Any) -> bytes:
            sent = Sent(path.rpartition("/")[2], time.perf_counter())
            self.requests.append(sent)
            try:
                return request(client, method, path, *arguments, **keywords)
            finally:
                sent.end = time.perf_counter()

        def done(session: Any, verb: str, **arguments: Any) -> Any:
            change = do(session, verb, **arguments)
            sent = self.last(verb)  # the change itself is not kept: its mask would count as the module's memory
            sent.engine, sent.network = change.seconds, change.network
            return change

        EngineClient.request, RemoteSession._do = requested, done  # type: ignore[method-assign]

    def last(self, path: str) -> Sent:
        """The newest request of a verb."""
        return next(sent for sent in reversed(self.requests) if sent.path == path and sent.end)

    @contextlib.contextmanager
    def keeping(self, what: str) -> Iterator[None]:
        """Something of ours that runs in Slicer's main thread."""
        begin = time.perf_counter()
        yield
        self.kept.setdefault(what, []).append(time.perf_counter() - begin)


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def given_back() -> int:
    """The same, after the C library gave back what is freed already, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def slicer_like(folder: Path) -> Any:
    """The scene of the module's own tests."""
    spec = importlib.util.spec_from_file_location("slicer_like", ROOT / "Testing" / "slicer" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SlicerLikeScene(folder)


class Desk:
    """Slicer's main thread: a scene with a volume, one slice view, the logic and its timer."""

    def __init__(self, around: Any, view: Any, volume: Any, make_engine: Callable[[], Any], watch: Watch) -> None:
        from SlicerKA2ERLib.PromptLogic import PromptLogic

        self.view, self.volume, self.watch = view, volume, watch
        self.logic = PromptLogic(around.scene, around.applicationLogic)
        self.logic.connectEngine(make_engine)
        self.logic.setVolumeNode(volume)
        self.logic.addSliceView(view.interactor, view.node)
        self.logic.setTool("point")
        self._next = 0.0

    def wait(self) -> float:
        """Let the timer tick until nothing is under way; returns when the last of it began."""
        began = time.perf_counter()
        self._next = began + INTERVAL
        while True:
            pause = self._next - time.perf_counter()
            if pause > 0:
                time.sleep(pause)  # as an idle event loop does
            began, self._next = time.perf_counter(), max(self._next, time.perf_counter()) + INTERVAL
            with self.watch.keeping("poll"):
                self.logic.poll()
            if self.logic.isIdle:
                assert not self.logic.lastError, self.logic.lastError
                return began

    def click(self, ijk: Any, positive: bool) -> dict[str, float] | None:
        """Seconds of one click by part; None where there is a marker already, which Slicer would drag."""
        matrix = np.array(self._ijk_to_ras())
        ras = (matrix @ [*ijk, 1])[:3]
        self.view.jumpTo(ras)
        self.view.render()
        self.logic.setPolarity(positive)
        at = self.view.pixel(ras)
        self.view.event("MouseMoveEvent", *at)
        written = len(self.logic.timings["write"])
        begin = time.perf_counter()
        with self.watch.keeping("mouse press"):
            self.view.event("LeftButtonPressEvent", *at)
        with self.watch.keeping("mouse release"):
            self.view.event("LeftButtonReleaseEvent", *at)
        pressed = time.perf_counter()
        if not self.logic.busy:
            return None
        self.view.render()  # the marker appears while the engine works
        marker = time.perf_counter() - pressed
        delivering = self._wait_for_result(written)
        shown = time.perf_counter()
        self.view.render()
        end = time.perf_counter()
        self.view.render()
        again = time.perf_counter() - end
        overlays = time.perf_counter()
        self.wait()
        self.view.render()
        overlays = time.perf_counter() - overlays if self.shown else 0.0
        sent = self.watch.last("add")
        network, engine = sent.network, sent.engine
        return {
            "mouse press to request sent": sent.begin - begin,
            "request and answer on their way": sent.end - sent.begin - engine,
            "engine around the network": engine - network,
            "network": network,
            "until the timer ticks": max(0.0, delivering - sent.end),
            "written into the segment": self.logic.timings["write"][-1],
            "rest of that tick": shown - delivering - self.logic.timings["write"][-1],
            "slice view drawn": end - shown,
            "total": end - begin,
            "outside the network": end - begin - network,
            "(marker drawn meanwhile)": marker,
            "(slice view drawn again, nothing changed)": again,
            "(overlays asked for, written and drawn)": overlays,
        }

    def _wait_for_result(self, written: int) -> float:
        """Let the timer tick until the result is in the segment; returns when that tick began."""
        self._next = time.perf_counter() + INTERVAL
        while True:
            pause = self._next - time.perf_counter()
            if pause > 0:
                time.sleep(pause)
            began, self._next = time.perf_counter(), max(self._next, time.perf_counter()) + INTERVAL
            with self.watch.keeping("poll with a result"):
                self.logic.poll()
            assert not self.logic.lastError, self.logic.lastError
            if len(self.logic.timings["write"]) > written:
                return began
            self.watch.kept.setdefault("poll", []).append(self.watch.kept["poll with a result"].pop())

    @property
    def shown(self) -> list[str]:
        """Overlays that are on."""
        return [row.name for row in self.logic.experts() if row.shown]

    def patch(self) -> Any:
        """Where the network looks now: another one means that features were computed."""
        logic = self.logic
        return logic._engine.link.session.opinion(logic.selectedSegment, "foundation").ijk_to_ras.tolist()

    def _ijk_to_ras(self) -> Any:
        from SlicerKA2ERLib.VolumeIO import ijkToRas

        return ijkToRas(self.volume)


def places(count: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Voxels for clicks in slices around the middle of the ellipsoid: positive ones inside, negative ones beside it."""
    rng = np.random.default_rng(1)
    for n in range(count):
        positive, angle, height = n % 2 == 0, rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
        reach = (rng.uniform(0.2, 0.85) if positive else rng.uniform(1.1, 1.25)) * np.sqrt(1 - height**2)
        yield np.rint(CENTRE + RADII * (reach * np.cos(angle), reach * np.sin(angle), height)).astype(int), positive


def clicks(desk: Desk, count: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Clicks inside a computed patch, and those for which features of another one were computed."""
    laps: list[dict[str, float]] = []
    patch = desk.patch()
    stayed = []
    for ijk, positive in places(4 * count):
        lap = desk.click(ijk, positive)
        before, patch = patch, desk.patch()
        if lap is not None:
            laps.append(lap)
            stayed.append(before == patch)
        decoded = COMPUTED * min(lap["network"] for lap in laps) if laps else 0.0
        inside = [lap for lap, same in zip(laps, stayed, strict=True) if same and lap["network"] < decoded]
        if len(inside) == count:
            return inside, [lap for lap in laps if all(lap is not other for other in inside)]
    message = f"only {len(inside)} of {4 * count} clicks stayed inside a computed patch."
    raise SystemExit(message)


def spread(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile and largest."""
    return {
        "median": round(statistics.median(values), 4),
        "p90": round(float(np.percentile(values, 90)), 4),
        "max": round(max(values), 4),
    }


def parts(laps: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The spread of each part."""
    return {name: spread([lap[name] for lap in laps]) for name in laps[0]}


# -- the whole ---------------------------------------------------------------------------------------------------------


def measure(bundle: Path | None, device: str, threads: int, count: int, starts: int) -> dict[str, Any]:
    """Everything; seconds and bytes."""
    result: dict[str, Any] = {"hardware": hardware(), "clicks": count, "threads": threads}
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        around = slicer_like(Path(scratch))
        array, affine = trunk()
        volume = around.addVolume(array, affine, "trunk")
        del array
        view = around.addView(size=VIEW)
        view.show(volume)
        view.render()
        before, before_at_least = resident(), given_back()

        from KA2ERSegment.engine.process import LocalEngine

        watch.install()
        engines: list[Any] = []

        def make_engine() -> Any:
            engines.append(LocalEngine([sys.executable], bundle, device, arguments=["--threads", str(threads)]))
            return engines[-1]

        desk = Desk(around, view, volume, make_engine, watch)
        try:
            result["start"] = cold_start(desk, engines, watch)
            inside, others = clicks(desk, count)
            result["click"] = parts(inside)
            if others:
                result["click with features of another patch"] = {"count": len(others), **parts(others)}
            result["memory"] = {
                "before the module": before,
                "growth without overlays": resident() - before,
                "growth without overlays, freed memory given back": given_back() - before_at_least,
            }
            kept, watch.kept = watch.kept, {}
            for row in desk.logic.experts()[:2]:
                desk.logic.setExpertShown(row.name, True)
            desk.wait()
            result["click with two overlays"] = parts(clicks(desk, count)[0])
            result["memory"]["growth with two overlays"] = resident() - before
            result["memory"]["growth with two overlays, freed memory given back"] = given_back() - before_at_least
            result["main thread"] = {name: spread(values) for name, values in kept.items()}
            result["main thread with two overlays"] = {name: spread(values) for name, values in watch.kept.items()}
            result["torch in this process"] = "torch" in sys.modules
        finally:
            desk.logic.close()
        ready = [engines[0].seconds_to_ready]
        for _ in range(starts - 1):
            engine = make_engine()
            engine.start()
            engine.wait(120)
            ready.append(engine.seconds_to_ready)
            engine.stop()
        result["start"]["ready"] = spread(ready)
        around.close()
    result["load_average after"] = os.getloadavg()
    return result


def cold_start(desk: Desk, engines: list[Any], watch: Watch) -> dict[str, Any]:
    """The first click of a session, while no engine runs."""
    first = desk.click(CENTRE, True)
    assert first is not None, "the scene has no markers yet"
    opened, added = watch.last("session"), watch.last("add")
    return {
        "first click to first mask on the screen": round(first["total"], 4),
        "engine start to ready": round(engines[0].seconds_to_ready, 4),
        "volume handed over": round(opened.end - opened.begin, 4),
        "first prompt, features and all, in the engine": round(added.engine, 4),
        "of these in the network": round(added.network, 4),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables for people."""
    load = result["hardware"]["load_average"][0]
    lines = [f"{result['hardware']['cpu']}, {result['threads']} threads, load {load:.1f}.", ""]
    for title in ("click", "click with two overlays"):
        lines += [f"| {title}, ms | median | 90 % | longest | aim |", "|---|---|---|---|---|"]
        for name, values in result[title].items():
            numbers = " | ".join(f"{1000 * values[key]:.1f}" for key in ("median", "p90", "max"))
            lines.append(f"| {name} | {numbers} | {1000 * AIMS[name] if name in AIMS else ''} |")
        lines.append("")
    if others := result.get("click with features of another patch"):
        lines += [f"{others['count']} clicks more had features computed: {others['total']['median']:.2f} s each.", ""]
    lines += ["| main thread kept by, ms | median | longest | aim |", "|---|---|---|---|"]
    for title in ("main thread", "main thread with two overlays"):
        for name, values in result[title].items():
            late = " **exceeded**" if values["max"] > BLOCKED else ""
            label = name + title.removeprefix("main thread")
            lines.append(
                f"| {label} | {1000 * values['median']:.1f} | {1000 * values['max']:.1f}{late} | {1000 * BLOCKED:.0f} |"
            )
    lines += ["", "| start, s | | aim |", "|---|---|---|"]
    for name, value in result["start"].items():
        shown = f"{value['median']:.2f} (longest {value['max']:.2f})" if isinstance(value, dict) else f"{value:.2f}"
        lines.append(f"| {name} | {shown} | {AIMS.get(name, '')} |")
    lines += ["", "| memory of Slicer's process, MB | | aim |", "|---|---|---|"]
    for name, value in result["memory"].items():
        aim = f"{AIMS['memory'] / 1e6:.0f}" if name == "growth without overlays" else ""
        lines.append(f"| {name} | {value / 1e6:.0f} | {aim} |")
    return "\n".join(lines) + "\n"


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file; standard output by default.")] = None,
    table: Annotated[Path | None, typer.Option(help="Markdown file; standard error by default.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder; the shipped one by default.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    clicks: Annotated[int, typer.Option(min=3)] = 20,
    starts: Annotated[int, typer.Option(min=1, help="How often the engine is started.")] = 3,
) -> None:
    """Measure on as many cores as threads: Slicer's side here, the engine in a process of its own."""
    bind_to(threads)
    result = measure(bundle, device, threads, clicks, starts)
    text, tables = json.dumps(result, indent=1) + "\n", markdown(result)
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    if table:
        table.write_text(tables, encoding="utf-8")
    else:
        sys.stderr.write(tables)
    load = result["hardware"]["load_average"][0]
    if load > 0.5:
        console.print(f"[yellow]The machine was busy (load {load:.1f}): times are too long.")


if __name__ == "__main__":
    typer.run(main)
