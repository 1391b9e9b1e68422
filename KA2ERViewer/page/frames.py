"""When a view is drawn, and when what it drew is sent.

trame-rca's own scheduler draws everything twice, the second time only for a better JPEG, and all views draw before the
first of them is sent. Here one view draws at a time, that with the pointer first, and is sent before the next one
draws; what nothing followed is sent again in a better quality, without drawing it again. A view that shows nothing of
a prompt before it is answered waits for that. Without a graphics card drawing is most of what a page does, and it takes
the cores that the answer is computed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from trame.app.asynchronous import create_task
from trame_rca.encoders import RcaImageEncoder
from trame_slicer.rca_view import rca_view_factory

logger = logging.getLogger("KA2ERViewer")

STILL_AFTER = 0.12
"""Seconds without anything new, after which a picture is sent again in its final quality."""
TURN = 0.1
"""Seconds after being drawn in which a view lets others go first."""
PATIENCE = 1.0
"""Seconds that a view waits at most for an answer."""
STILL_QUALITY = 92
"""Of JPEG."""


class Frames:
    """The pictures of one view; made by trame-slicer in the place of trame-rca's `RcaImageRenderScheduler`.

    Args:
        window: draws, and is asked for pixels by `img_cols_rows`.
        interactive_quality: of the JPEG that is sent at once.
        rca_encoder: makes the JPEG.
        target_fps: most pictures in a second; trame-slicer gives more to the view that the pointer is in.
    """

    every: list[Frames] = []  # noqa: RUF012 - one page is one process
    """Those of all views."""
    answering: Callable[[], bool] = staticmethod(lambda: False)
    """Whether a prompt is worked on, or what is shown of its answer."""
    _news = asyncio.Event()
    _painter: asyncio.Task[None] | None = None

    def __init__(
        self, window: Any, *, interactive_quality: int, rca_encoder: RcaImageEncoder, target_fps: float, **_: Any
    ) -> None:
        self.rca, self.target_fps = window, target_fps
        self._quality, self._encoder = interactive_quality, rca_encoder
        self._push: Callable[[bytes, dict[str, Any]], None] | None = None
        self.gives_way = False
        """Whether it waits for an answer while the pointer is in another view."""
        self._asked = False
        self._asked_at = 0.0
        self._latest: tuple[Any, int, int] | None = None  # not yet sent in its final quality
        self._begun = 0.0
        Frames.every.append(self)
        if Frames._painter is None:
            Frames._painter = create_task(_paint())

    def set_push_callback(self, push: Callable[[bytes, dict[str, Any]], None]) -> None:
        """What sends a picture to the browser."""
        self._push = push

    def schedule_render(self) -> None:
        """The view is different now."""
        if not self._asked:
            self._asked, self._asked_at = True, time.monotonic()
        Frames._news.set()

    @staticmethod
    def look_again() -> None:
        """What was waited for may have come."""
        Frames._news.set()

    @property
    def is_behind(self) -> bool:
        """Whether the view was not yet drawn as it is now."""
        return self._asked

    @property
    def is_waiting(self) -> bool:
        """Whether it is behind and lets the answer to a prompt come first."""
        elsewhere = any(other.target_fps > self.target_fps for other in Frames.every)
        waits = self._asked and self.gives_way and elsewhere and Frames.answering()
        return waits and time.monotonic() < self._asked_at + PATIENCE

    @property
    def is_still(self) -> bool:
        """Whether the picture of the view as it is now was sent in its final quality."""
        return not self._asked and self._latest is None

    def reset(self) -> None:
        """For encoders that remember; JPEG does not."""

    async def close(self) -> None:
        """No more pictures."""
        Frames.every.remove(self)

    def _due(self) -> float | None:
        """When there is something to do; None where there is not."""
        if self.is_waiting:
            return self._asked_at + PATIENCE
        if self._asked:
            return self._begun + 1 / self.target_fps
        return None if self._latest is None else self._begun + STILL_AFTER

    def _do(self) -> None:
        """Draw and send, or send again what nothing followed."""
        try:
            if self._asked:
                self._asked, self._begun = False, time.monotonic()
                self._latest = self.rca.img_cols_rows
                self._send(self._latest, self._quality)
            elif self._latest is not None:
                self._send(self._latest, STILL_QUALITY)
                self._latest = None
        except Exception:
            logger.exception("A view could not be drawn.")
            self._latest = None

    def _send(self, picture: tuple[Any, int, int], quality: int) -> None:
        content, meta, _ = self._encoder.encode(*picture, quality)
        if self._push is not None:
            self._push(content, meta)


async def _paint() -> None:
    """Take one view after the other."""
    while True:
        now = time.monotonic()
        due = {frames: when for frames in Frames.every if (when := frames._due()) is not None}
        ready = [frames for frames, when in due.items() if when <= now]
        if ready:
            _first(ready, now)._do()
            await asyncio.sleep(0.001)  # it leaves before the next one is drawn
            continue
        Frames._news.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(Frames._news.wait(), min(due.values()) - now if due else None)


def _first(ready: list[Frames], now: float) -> Frames:
    """Drawing comes before better pictures, and the view that the pointer is in before others, but not all the time."""
    asked = [frames for frames in ready if frames.is_behind] or ready
    others = [frames for frames in asked if now - frames._begun > TURN] or asked
    return max(others, key=lambda frames: frames.target_fps)


def use_frames() -> None:
    """Have trame-slicer make `Frames`. Goes once its factories take a scheduler as an argument."""
    rca_view_factory.RcaImageRenderScheduler = Frames
