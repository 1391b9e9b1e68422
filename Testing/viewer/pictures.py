"""The pictures of the documentation: `python Testing/viewer/pictures.py docs` in the viewer's environment.

Starts the viewer with the sample (or with `--volume`), marks a structure as a user does, and keeps what is on the
screen.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, Tab, chromium, keep_picture

LARGEST = 300_000
"""Bytes of a picture in the repository."""
BOX = ((-0.23, -0.44), (0.23, 0.44))
"""Corners in the axial view, as parts of its width and height from the middle: the sample's brain."""
CLICKS = ((-0.08, -0.15), (0.08, 0.2))


def main() -> None:
    """Make them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--volume", help="another one than the sample")
    options.add_argument("--name", default="viewer")
    options.add_argument("--expert", type=int, default=2, help="line of the expert that is shown")
    options.add_argument("--size", type=int, nargs=2, default=(1440, 900))
    options.add_argument("--box", type=float, nargs=4, default=(*BOX[0], *BOX[1]))
    options.add_argument("--slice", type=float, nargs=3, metavar="MM", help="axial, coronal and sagittal")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "KA2ERSegment.cli", "view", given.volume or "--sample", "--port", "0"]
    viewer = subprocess.Popen(
        [*command, "--no-browser", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert viewer.stdout is not None
        url = viewer.stdout.readline().split()[-1]
        with sync_playwright() as api:
            browser = api.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"])
            width, height = given.size
            page = browser.new_context(viewport={"width": width, "height": height}).new_page()
            segment(Tab(page, url), given)
            shot = given.folder / f"{given.name}.webp"
            keep_picture(page, shot)
            browser.close()
        require_small(shot)
    finally:
        viewer.terminate()
        viewer.wait(20)


def segment(tab: Any, given: argparse.Namespace) -> None:
    """A box, two clicks, and the eye of one expert."""
    for view, millimetres in zip(("Red", "Green", "Yellow"), given.slice or (), strict=False):
        tab.page.evaluate(f"window.trame.state.set('slice_{view}', {millimetres})")
    tab.still()
    area = tab.page.locator(".view-Red").bounding_box()

    def at(across: float, down: float) -> tuple[float, float]:
        return area["x"] + (0.5 + across) * area["width"], area["y"] + (0.5 + down) * area["height"]

    mouse = tab.page.mouse
    tab.page.keyboard.press("x")
    tab.until(lambda: tab.state("tool") == "box")
    left, top, right, bottom = given.box
    mouse.move(*at(left, top))
    mouse.down()
    mouse.move(*at(right, bottom), steps=5)
    mouse.up()
    tab.still()
    assert tab.state("prompt_count") == 1, tab.state("error")
    tab.page.keyboard.press("p")
    tab.until(lambda: tab.state("tool") == "point")
    for n, click in enumerate(CLICKS if not given.volume else ()):
        mouse.click(*at(*click))
        tab.still()
        assert tab.state("prompt_count") == n + 2, tab.state("error")
    mouse.move(2, 2)
    tab.still()
    before = tab.picture("Green")
    tab.page.locator(".show-expert").nth(given.expert).click()
    tab.until(lambda: abs(tab.picture("Green") - before).mean() > 1, 300)
    tab.still()


def require_small(path: Path) -> None:
    """Enough for the repository."""
    size = path.stat().st_size
    if size > LARGEST:
        message = f"a picture must have at most {LARGEST} bytes, {path} has {size}. Make it smaller with --size."
        raise SystemExit(message)


if __name__ == "__main__":
    main()
