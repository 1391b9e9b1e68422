"""A click in the browser viewer until the mask is on the page, with the real engine and a real Chromium.

    .venv-viewer/bin/python Testing/benchmarks/benchmark_viewer.py [VOLUME] [--clicks 20] [--device cpu]

Measured in the browser: from the pointer going down to the first picture of the axial view after the page knows of the
new mask. The first click computes features, later ones do not.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
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


def main(
    volume: Annotated[Path | None, typer.Argument(help="Default: the sample.")] = None,
    clicks: Annotated[int, typer.Option("--clicks", min=1, help="After the first one.")] = 20,
    device: Annotated[str, typer.Option("--device")] = "auto",
) -> None:
    """Print the seconds of the first click, and the median of the later ones, as JSON."""
    begin = [str(volume)] if volume else ["--sample"]
    command = [sys.executable, "-m", "KA2ERSegment.cli", "view", *begin, "--device", device, "--port", "0"]
    viewer = subprocess.Popen(
        [*command, "--no-browser"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert viewer.stdout is not None
        first, *later = _measure(viewer.stdout.readline().split()[-1], clicks + 1)
    finally:
        viewer.terminate()
        viewer.wait()
    middle = round(statistics.median(later), 3)
    typer.echo(json.dumps({"first": round(first, 3), "later_median": middle, "later_worst": round(max(later), 3)}))


def _measure(url: str, count: int) -> list[float]:
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(url)
        page.wait_for_selector(".volume-name", timeout=180_000)
        page.wait_for_selector(".engine-ready", timeout=180_000)
        page.wait_for_timeout(3000)
        seconds = [_click(page, n) for n in range(count)]
        browser.close()
    return seconds


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
    page.wait_for_timeout(500)
    return seconds


if __name__ == "__main__":
    typer.run(main)
