"""When a view is drawn, and when what it drew is sent.

trame-rca's own scheduler draws everything twice, the second time only for a better JPEG, and all views draw before the
first of them is sent. Here one view draws at a time and is sent before the next one draws; what nothing followed is
sent again in a better quality, without drawing it again. Without a graphics card drawing is most of what a page does.
"""

from __future__ import annotations

import asyncio
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
STILL_QUALITY = 92
"""Of JPEG."""


class Frames:
    """The pictures of one view; made by trame-slicer in the place of trame-rca's `RcaImageRenderScheduler`.

    Args:
        window: draws, and is asked for pixels by `img_cols_rows`.
        interactive_quality: of the JPEG that is sent at once.
        rca_encoder: makes the JPEG.
        target_fps: most pictures in a second.
    """

    every: list[Frames] = []  # noqa: RUF012 - one page is one process
    """Those of all views."""
    _turn = asyncio.Lock()

    def __init__(
        self, window: Any, *, interactive_quality: int, rca_encoder: RcaImageEncoder, target_fps: float, **_: Any
    ) -> None:
        self.rca, self.target_fps = window, target_fps
        self._quality, self._encoder = interactive_quality, rca_encoder
        self._push: Callable[[bytes, dict[str, Any]], None] | None = None
        self._asked, self._drawn = asyncio.Event(), asyncio.Event()
        self._drawn.set()
        Frames.every.append(self)
        self._task = create_task(self._draw())

    def set_push_callback(self, push: Callable[[bytes, dict[str, Any]], None]) -> None:
        """What sends a picture to the browser."""
        self._push = push

    def schedule_render(self) -> None:
        """The view is different now."""
        self._drawn.clear()
        self._asked.set()

    async def drawn(self) -> None:
        """Returns once the picture of the view as it is now was sent in its final quality."""
        await self._drawn.wait()

    def reset(self) -> None:
        """For encoders that remember; JPEG does not."""

    async def close(self) -> None:
        """No more pictures."""
        self._task.cancel()
        Frames.every.remove(self)

    async def _draw(self) -> None:
        while True:
            await self._asked.wait()
            async with Frames._turn:
                self._asked.clear()
                begin = time.monotonic()
                try:
                    picture = self.rca.img_cols_rows
                    self._send(picture, self._quality)
                except Exception:
                    logger.exception("A view could not be drawn.")
                    self._drawn.set()
                    continue
                await asyncio.sleep(0.001)  # it leaves before the next view draws
            await asyncio.sleep(max(0.0, 1 / self.target_fps - (time.monotonic() - begin)))
            if not await self._is_asked_within(STILL_AFTER):
                self._send(picture, STILL_QUALITY)
                self._drawn.set()

    async def _is_asked_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._asked.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    def _send(self, picture: tuple[Any, int, int], quality: int) -> None:
        content, meta, _ = self._encoder.encode(*picture, quality)
        if self._push is not None:
            self._push(content, meta)


def use_frames() -> None:
    """Have trame-slicer make `Frames`. Goes once its factories take a scheduler as an argument."""
    rca_view_factory.RcaImageRenderScheduler = Frames
