"""The viewer as users start it, and a real browser in front of it. Fixtures are named as things."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PICTURES = os.environ.get("KA2ERSEGMENT_PICTURES", "")
"""Folder for screenshots of the main states; none are kept without it."""
SHAPE_KJI = (44, 60, 52)
SPACING = (1.6, 1.4, 2.0)
BALL = (6.0, -4.0, 8.0)
"""Centre of the bright ball in `a_phantom`, RAS mm: off the middle, so that a swapped axis shows."""
RADIUS = 17.0
SIZE = {"width": 1280, "height": 720}
"""Of the window."""
LOOKS = (
    *("volume_name", "from_dicom", "layout", "tool", "positive", "radius", "segments", "prompts", "window", "level"),
    *("experts", "disagreement_shown", "suggestion", "smoothing", "islands", "neighbours_mode", "fill"),
    *("busy", "error", "notice", "cursor_text", "slice_Red", "slice_Green", "slice_Yellow"),
)
"""State of a page that tests change."""
EXPERT = {"enableExpert": "enabled", "showExpert": "shown", "expertKind": "kind", "expertOpacity": "opacity"}
"""What a button does -> what it changes of an expert."""
SETTINGS = {
    "disagreement": ("disagreement_shown",),
    "finish": ("smoothing", "islands"),
    "neighbours": ("neighbours_mode",),
    "fill": ("fill",),
    "radius": ("radius",),
    "windowLevel": ("window", "level"),
}
"""The same for the state of a page."""
FRAME = 6
"""Pixels of the ring around the view that has the keyboard."""
PATIENCE = 150.0
"""Seconds that anything may take: the machine may be busy with other things."""
LIMIT = 300.0
"""Seconds for a test with all that it begins and ends. It is there for what waits for ever, not for what is slow."""
AGAIN = 30.0
"""Seconds after `LIMIT` in which the test may end, and what it used: each step that waits longer is interrupted too."""
COUNTED = """(() => {
  const send = WebSocket.prototype.send;
  window.sent = 0;
  WebSocket.prototype.send = function (...given) { window.sent += 1; return send.apply(this, given); };
})()"""
"""How many messages the page sent."""
STILL = """async () => {
  const painted = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const fits = (one) => one?.naturalWidth && Math.abs(one.naturalWidth / devicePixelRatio - one.clientWidth) < 2;
  let before, settled, pictures;
  const rest = async () => {
    do {
      before = window.sent;
      settled = await window.trame.trigger("settled");
      // a view sends what the mouse did one by one, the next thing 10 ms after the answer to the last
      await new Promise((done) => setTimeout(done, 40));
      await painted();
      // asked for anew each time: a page that was just loaded may not have them yet
      const views = [...document.querySelectorAll(".view")].filter((view) => view.offsetWidth);
      pictures = views.map((view) => view.querySelector("img"));
      await Promise.all(pictures.map((one) => one?.decode().catch(() => {})));
      await painted();
    } while (!settled || window.sent > before + 1 || !pictures.length || !pictures.every(fits));
  };
  const found = () => JSON.stringify({ settled, sent: window.sent - before,
    pictures: pictures?.map((one) => `${one?.naturalWidth} in ${one?.clientWidth}`) });
  const late = new Promise((_, fail) => setTimeout(
    () => fail(new Error(`the page never came to rest: ${found()}`)), PATIENCE * 1000));
  await Promise.race([rest(), late]);
}""".replace("PATIENCE", str(PATIENCE))
"""The page's process has nothing to do any more, and what it drew last is on the screen."""
SEEN = """() => JSON.stringify({
  loading: document.readyState,
  lost: document.getElementById("lost")?.innerText,
  ...Object.fromEntries(["engine", "busy", "error", "reading", "tool", "prompt_count"].map(
    (name) => [name, window.trame?.state.get(name)])),
  pictures: [...document.querySelectorAll(".view img")].map((one) => `${one.naturalWidth} in ${one.clientWidth}`),
  text: document.body?.innerText.slice(0, 500),
})"""
"""What a page shows, where it should show something else."""
viewers: list[Viewer] = []
"""Those that run."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """No test waits for ever, whatever it waits for: many calls of Playwright have no limit of their own."""
    if not hasattr(signal, "setitimer"):  # Windows
        return (yield)
    before = signal.signal(signal.SIGALRM, _interrupt)
    # Again and again, because the event loop drops what is raised in its callbacks, and endings can wait too.
    signal.setitimer(signal.ITIMER_REAL, LIMIT, AGAIN)
    faulthandler.dump_traceback_later(LIMIT + 10 * AGAIN, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupt(*_: object) -> NoReturn:
    message = f"a test may take {LIMIT:.0f} s, this one did not end: what it waited for is above, what was there below."
    raise TimeoutError(message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What pages and viewers showed when a test failed."""
    report = yield
    if report.failed:
        browser = getattr(item, "funcargs", {}).get("a_browser")
        contexts = browser.contexts if browser is not None and browser.is_connected() else []
        report.sections += [_shown(page) for context in contexts for page in context.pages]
        report.sections += [(f"viewer {viewer.process.args}", viewer.said()) for viewer in viewers]
    return report


def _shown(page: Any) -> tuple[str, str]:
    try:
        seen = page.wait_for_function(SEEN, timeout=5000).json_value()  # `evaluate` has no limit
    except Exception as error:
        seen = f"the page does not answer: {error}"
    words = [f"{one.type}: {one.text}" for one in page.console_messages()]
    return f"page {page.url}", "\n".join([seen, *words, *map(str, page.page_errors())])


@pytest.fixture(scope="session")
def run_apart() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """`asyncio.run` in a thread of its own: Playwright leaves a running event loop in the main one."""

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(asyncio.run(coroutine))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # nobody waits for it when the test was interrupted
        return done.result()

    return run


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def a_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright ball in a darker block, with noise: what a click on it must find."""
    import nibabel

    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = [-spacing * (size - 1) / 2 for spacing, size in zip(SPACING, SHAPE_KJI[::-1], strict=True)]
    i, j, k = np.meshgrid(*(np.arange(size) for size in SHAPE_KJI[::-1]), indexing="ij")
    world = np.stack([i, j, k], axis=-1) * SPACING + affine[:3, 3]
    array = np.where(np.linalg.norm(world - BALL, axis=-1) < RADIUS, 160.0, 40.0)
    array += np.random.default_rng(0).normal(0, 6, array.shape)
    path = tmp_path_factory.mktemp("phantom") / "ball.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), path)
    return path


@dataclass
class Viewer:
    """A viewer that runs in a process of its own."""

    process: subprocess.Popen[str]
    errors: Path
    """What it and all that it started write to standard error."""
    token: str = ""

    @cached_property
    def url(self) -> str:
        """What it prints first."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, f"the viewer said {line!r} and not where it is"
        return line.split()[-1]

    def said(self) -> str:
        """For who reads why a test failed."""
        state = self.process.poll()
        lines = self.errors.read_text(errors="replace").splitlines()
        return "\n".join(["it runs" if state is None else f"it ended with {state}", *lines[-40:]])

    def end(self) -> list[str]:
        """What users would have seen in their terminal, where VTK or Python complained there."""
        with contextlib.suppress(ValueError):
            viewers.remove(self)
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        lines = self.errors.read_text(errors="replace").splitlines()
        self.errors.unlink()
        bad = re.compile(r"traceback|warn|\berr\b|error: in", re.IGNORECASE)
        return lines if any(map(bad.search, lines)) else []


def start_viewer(*arguments: str, token: str = "", **variables: str) -> Viewer:
    """`ka2ersegment view` on a free port of this machine."""
    pytest.importorskip("trame_slicer", reason="needs the viewer's environment: make test-view")
    command = [sys.executable, "-m", "KA2ERSegment.cli", "view", *arguments, "--no-browser"]
    if "--engine" not in arguments:
        command += ["--device", "cpu"]
    if "--port" not in arguments:
        command += ["--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment["KA2ERSEGMENT_VIEWER_TOKEN"] = token
    number, errors = tempfile.mkstemp(prefix="viewer-errors-")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=number, text=True, env=environment)
    os.close(number)
    viewers.append(Viewer(process, Path(errors), token))
    return viewers[-1]


@pytest.fixture(scope="session")
def a_viewer(a_phantom: Path) -> Iterator[Viewer]:
    """Started by the command line, with the shipped bundle."""
    viewer = start_viewer(str(a_phantom))
    yield viewer
    said = viewer.end()
    assert not said, "\n".join(said)


@pytest.fixture(scope="session")
def a_guarded_viewer() -> Iterator[Viewer]:
    """It asks for a token, and begins without a volume."""
    viewer = start_viewer(token="a long random text")
    yield viewer
    viewer.end()


@pytest.fixture
def another_viewer() -> Iterator[Callable[..., Viewer]]:
    """Starts one for this test alone."""
    started = []

    def start(*arguments: str, **variables: str) -> Viewer:
        started.append(start_viewer(*arguments, **variables))
        return started[-1]

    yield start
    for viewer in started:
        viewer.end()


@pytest.fixture(scope="session")
def a_browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-view")
    executable = chromium()
    if executable is None:
        _without_browser("tests in a browser need Chromium: sudo apt-get install -y chromium")
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as api:
        try:
            browser = api.chromium.launch(executable_path=executable, args=arguments, timeout=1000 * PATIENCE)
        except playwright.Error as error:
            _without_browser(f"{executable} does not start: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


def _without_browser(reason: str) -> NoReturn:
    """CI must not pass for want of a browser."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def keep_picture(page: Any, path: Path) -> None:
    """A screenshot, as WebP: PNG is ten times larger, or has too few colours for both words and images."""
    from PIL import Image

    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.thumbnail((1920, 1920), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=88, method=6)


class Tab:
    """One tab, and what a user does in it."""

    BALL, RADIUS, PATIENCE = BALL, RADIUS, PATIENCE

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.foreign = page, []
        self._origin = "/".join(url.split("/")[:3])
        page.on("request", self._note)
        page.add_init_script(COUNTED)
        page.goto(url)
        self.wait_until_ready()
        self._first = self._looks()

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self._origin, f"blob:{self._origin}", "data:")):
            self.foreign.append(request.url)

    def wait_until_ready(self) -> None:
        """A volume is shown, and the engine can be asked."""
        self.page.wait_for_selector(".volume-name")
        self.page.wait_for_selector(".engine-ready")
        self.still()

    def start_over(self, volume: Path) -> bool:
        """Make it as it was when it was opened. Whether that worked: else another one is needed."""
        self.page.mouse.up()
        self.page.set_viewport_size(SIZE)
        self.page.emulate_media(reduced_motion="no-preference")
        self.page.reload()
        self.wait_until_ready()
        first = self._first
        if self.state("volume_name") != first["volume_name"]:
            self.open(volume)
        if self.state("busy"):
            self.tell("cancel")
        now = self._looks()
        for row in now["segments"]:
            self.tell("lockSegment", row["id"], False)
            self.tell("removeSegment", row["id"])
        for row, begun in zip(now["experts"], first["experts"], strict=False):
            for action, part in EXPERT.items():
                if row[part] != begun[part]:
                    self.tell(action, row["name"], begun[part])
        for action, names in SETTINGS.items():
            if any(now[name] != first[name] for name in names):
                self.tell(action, *(first[name] for name in names))
        self.tell("positive")
        self.tell("cursorHide")
        if self.state("tool") != first["tool"]:
            self.tell(first["tool"])
        for view in ("Red", "Green", "Yellow"):
            self.tell("fit", view)
            self.page.evaluate(f"window.trame.state.set('slice_{view}', {first[f'slice_{view}']})")
        self.page.evaluate(f"window.trame.state.set('layout', '{first['layout']}')")
        self.tell("dismiss")
        self.still()
        self.foreign.clear()
        return self._looks() == first

    def _looks(self) -> dict[str, Any]:
        """What a test may leave different."""
        asked = "(names) => Object.fromEntries(names.map((name) => [name, window.trame.state.get(name)]))"
        looks = dict(self.page.evaluate(asked, list(LOOKS)))
        looks["experts"] = [{**row, "share": None} for row in looks["experts"]]
        return looks

    def tell(self, name: str, *arguments: Any) -> None:
        """What a button or a key does, without it."""
        self.page.evaluate("([name, given]) => window.trame.trigger(name, given)", [name, list(arguments)])

    def still(self) -> None:
        """Nothing is under way, and the screen shows what came of it."""
        self.page.evaluate(STILL)

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait for what comes by itself, such as the answer to a question."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"did not come true within {seconds:.0f} s"
            self.page.wait_for_timeout(50)

    def picture(self, view: str) -> np.ndarray:
        """(rows, columns, 3) of what is on the screen."""
        from PIL import Image

        shot = self.page.locator(f".view-{view} img").first.screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def at(self, view: str, ras: tuple[float, float, float]) -> tuple[float, float]:
        """Where a point is on the screen, from the scene's geometry: views are fitted, and R is left."""
        box = self.page.locator(f".view-{view}").bounding_box()
        axes = {"Red": (0, 1), "Green": (0, 2), "Yellow": (1, 2)}[view]
        sizes = [SPACING[n] * SHAPE_KJI[::-1][n] for n in axes]
        scale = min(box["width"] / sizes[0], box["height"] / sizes[1])
        x, y = (ras[n] * scale for n in axes)
        return box["x"] + box["width"] / 2 - x, box["y"] + box["height"] / 2 - y

    @staticmethod
    def kji(ras: tuple[float, float, float]) -> tuple[int, int, int]:
        """Voxel of `a_phantom` at a point."""
        k, j, i = (
            round(value / spacing + (size - 1) / 2)
            for value, spacing, size in zip(ras[::-1], SPACING[::-1], SHAPE_KJI, strict=True)
        )
        return k, j, i

    def colored(self, view: str) -> np.ndarray:
        """Where a picture is not grey, as a segment or an overlay makes it: (rows, columns) bool."""
        picture = self.picture(view)
        found = picture.max(axis=-1) - picture.min(axis=-1) > 30
        inside = np.zeros_like(found)
        inside[FRAME:-FRAME, FRAME:-FRAME] = True
        return found & inside

    def middle_of(self, view: str, where: np.ndarray) -> tuple[float, float]:
        """Mean position of true pixels on the screen."""
        box = self.page.locator(f".view-{view} img").first.bounding_box()
        rows, columns = np.nonzero(where)
        return box["x"] + columns.mean() + 0.5, box["y"] + rows.mean() + 0.5

    def state(self, name: str) -> Any:
        """Of the page's state."""
        return self.page.evaluate(f"window.trame.state.get('{name}')")

    def cursor(self) -> tuple[float, float, float] | None:
        """Where the keyboard's crosshair is, RAS mm; None where it is not shown."""
        found = re.findall(r"([LRPAIS]) ([0-9.]+)", self.state("cursor_text"))
        values = [float(value) * (1 if end in "RAS" else -1) for end, value in found]
        return (values[0], values[1], values[2]) if values else None

    def voxels(self, segment: str) -> np.ndarray:
        """Of a segment, by its name, as the page saves it: (k, j, i) bool."""
        import nrrd

        address = self.page.evaluate("new URL('save/seg.nrrd', document.baseURI).href")
        answer = self.page.request.get(address)
        assert answer.status == 200, f"the viewer answered {answer.status}: {self.state('error')!r}"
        body = answer.body()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "segmentation.seg.nrrd"
            path.write_bytes(body)
            array, header = nrrd.read(str(path), index_order="C")
        found = next(n for n in range(100) if header[f"Segment{n}_Name"] == segment)
        layers = array if array.ndim == 4 else array[..., None]
        layer, value = (int(header[f"Segment{found}_{what}"]) for what in ("Layer", "LabelValue"))
        return layers[..., layer] == value

    def click(self, view: str, ras: tuple[float, float, float]) -> None:
        """Place a point, and wait for what comes of it."""
        before = self.state("prompt_count")
        self.page.mouse.click(*self.at(view, ras))
        self.still()
        assert self.state("prompt_count") == before + 1, f"no point was placed: {self.state('error')!r}"

    def drag(self, view: str, corners: list[tuple[float, float, float]]) -> None:
        self.page.mouse.move(*self.at(view, corners[0]))
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*self.at(view, corner), steps=6)
        self.page.mouse.up()
        self.still()

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)
        self.still()

    def open(self, path: Path | list[Path]) -> None:
        """Choose files, as with the button, and wait until they are read or refused."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/open")):
            with self.page.expect_file_chooser() as chooser:
                self.page.locator("[data-open=files]").first.click()
            chooser.value.set_files(path)
        self.until(lambda: not self.state("reading"))
        self.still()

    def save(self, kind: str, folder: Path) -> Path:
        """The file that *Save* gives."""
        self.page.locator(".save-button").click()
        with self.page.expect_download() as download:
            self.page.locator(f'[data-save="{kind}"]').click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        self.page.keyboard.press("Escape")
        return path

    def keep(self, name: str) -> None:
        """A screenshot for the documentation."""
        if PICTURES:
            keep_picture(self.page, Path(PICTURES) / f"viewer_{name}.webp")


@pytest.fixture
def a_page(a_browser: Any) -> Iterator[Any]:
    """An empty page."""
    context = a_browser.new_context(viewport=SIZE)
    context.set_default_timeout(1000 * PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture
def open_tab(a_viewer: Viewer, a_browser: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a tab with a session of its own, or that of an address."""
    yield from _opener(a_viewer, a_browser)


@pytest.fixture(scope="module")
def open_shared_tab(a_viewer: Viewer, a_browser: Any) -> Iterator[Callable[..., Tab]]:
    """The same for a tab that several tests look at and leave as it was: opening one takes longest."""
    yield from _opener(a_viewer, a_browser)


def _opener(a_viewer: Viewer, a_browser: Any) -> Iterator[Callable[..., Tab]]:
    contexts = []

    def opened(url: str | None = None, **more: Any) -> Tab:
        context = a_browser.new_context(**{"viewport": SIZE, "accept_downloads": True, **more})
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        return Tab(context.new_page(), url or a_viewer.url)

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def used_tabs(a_viewer: Viewer, a_browser: Any) -> Iterator[list[Tab]]:
    """The one that `a_tab` begins with, once there is one."""
    tabs: list[Tab] = []
    yield tabs
    for tab in tabs:
        tab.page.context.close()


@pytest.fixture
def a_tab(a_viewer: Viewer, a_browser: Any, a_phantom: Path, used_tabs: list[Tab]) -> Tab:
    """A tab in which nothing was done yet, or all was taken back: in a new one features are computed for seconds."""
    if used_tabs and not used_tabs[-1].start_over(a_phantom):
        used_tabs.pop().page.context.close()
    if not used_tabs:
        context = a_browser.new_context(viewport=SIZE, accept_downloads=True)
        context.set_default_timeout(1000 * PATIENCE)
        used_tabs.append(Tab(context.new_page(), a_viewer.url))
    return used_tabs[-1]
