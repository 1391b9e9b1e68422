"""The browser viewer's start, and clicks until the mask is on the page, with the real engine and a real Chromium.

    .venv-viewer/bin/python Testing/benchmarks/benchmark_viewer.py [VOLUME] [--clicks 20] [--device cpu]

Start: from the command to a page that shows the volume, with an engine that answers. Clicks, measured in the browser:
from the pointer going down to the first picture of the axial view after the page knows of the new mask. The first click
computes features, later ones do not.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
WATCH = """() => new Promise((done) => {
  const state = window.trame.state, count = state.get("prompt_count");
  const picture = document.querySelector(".view-Red img");
  addEventListener("pointerdown", () => {
    const begin = performance.now();
    const look = () => {
      if (state.get("prompt_count") !== count + 1 || !state.get("can_undo")) return void setTimeout(look, 4);
      picture.addEventListener("load", () => done((performance.now() - begin) / 1000), { once: true });
    };
    look();
  }, { once: true, capture: true });
})"""

SETTLED = """async () => {
  while (!(await window.trame.trigger("settled"))) await new Promise((next) => setTimeout(next, 50));
}"""


def main(
    volume: Annotated[Path | None, typer.Argument(help="Default: the sample.")] = None,
    clicks: Annotated[int, typer.Option("--clicks", min=1, help="After the first one.")] = 20,
    device: Annotated[str, typer.Option("--device")] = "auto",
) -> None:
    """Print the seconds of the start, of the first click, and the median of the later ones, as JSON.

    Beside them the processes that wanted to run in the minute before: more than none make it slower.
    """
    begin = [str(volume)] if volume else ["--sample"]
    command = [sys.executable, "-m", "KA2ERSegment.cli", "view", *begin, "--device", device, "--port", "0"]
    load = os.getloadavg()[0]
    started = time.perf_counter()
    viewer = subprocess.Popen(
        [*command, "--no-browser"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert viewer.stdout is not None
        usable, (first, *later) = _measure(viewer.stdout.readline().split()[-1], clicks + 1)
    finally:
        viewer.terminate()
        viewer.wait()
    seconds = {
        "start": usable - started,
        "first": first,
        "later_median": statistics.median(later),
        "later_worst": max(later),
        "load_before": load,
    }
    typer.echo(json.dumps({name: round(value, 3) for name, value in seconds.items()}))


def _measure(url: str, count: int) -> tuple[float, list[float]]:
    """When the page was usable, and the seconds of each click."""
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(300_000)
        page.goto(url)
        page.wait_for_selector(".volume-name")
        page.wait_for_selector(".engine-ready")
        page.evaluate(SETTLED)
        usable = time.perf_counter()
        seconds = [_click(page, n) for n in range(count)]
        browser.close()
    return usable, seconds


def _click(page: Any, n: int) -> float:
    """Each a little away from the one before: a click on a marker would drag it."""
    box = page.locator(".view-Red").bounding_box()
    page.evaluate(f"() => {{ window.measured = ({WATCH})(); }}")
    page.mouse.move(
        box["x"] + box["width"] * (0.4 + 0.03 * (n % 7)), box["y"] + box["height"] * (0.4 + 0.06 * (n // 7))
    )
    page.mouse.down()
    page.mouse.up()
    seconds = float(page.evaluate("() => window.measured"))
    page.evaluate(SETTLED)
    return seconds


if __name__ == "__main__":
    typer.run(main)
