"""Who is drawn when: one view at a time, and the 3D view after the answer to a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trame_slicer")

from KA2ERViewer.page import frames
from KA2ERViewer.page.frames import Frames


class View:
    """A window and its encoder: notes when it is drawn."""

    def __init__(self, name: str, drawn: list[str], fps: float) -> None:
        self.name, self.drawn = name, drawn
        self.frames = Frames(self, interactive_quality=75, rca_encoder=self, target_fps=fps)

    @property
    def img_cols_rows(self) -> tuple[Any, int, int]:
        self.drawn.append(self.name)
        return np.zeros((2, 2, 3), np.uint8), 2, 2

    def encode(self, *_: Any) -> tuple[bytes, dict[str, Any], float]:
        return b"", {}, 0.0


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Its last entry is whether a prompt is worked on."""
    state = [False]
    monkeypatch.setattr(Frames, "every", [])
    monkeypatch.setattr(Frames, "_news", asyncio.Event())
    monkeypatch.setattr(Frames, "_painter", None)
    monkeypatch.setattr(Frames, "answering", lambda: state[-1])
    return state


async def _until(drawn: list[str], *expected: str) -> None:
    """For as long as it takes: a test that waits for ever is ended by its limit."""
    while sorted(drawn) != sorted(expected):
        await asyncio.sleep(0.005)


def _views(drawn: list[str], red_fps: float = 30.0, solid_fps: float = 20.0) -> tuple[View, View]:
    """A slice and a 3D view; the pointer is in that with more pictures a second."""
    red, solid = View("red", drawn, red_fps), View("solid", drawn, solid_fps)
    solid.frames.gives_way = True
    return red, solid


def test_the_3d_view_is_drawn_once_the_prompt_is_answered(
    answering: list[bool], monkeypatch: pytest.MonkeyPatch, run_apart: Callable[..., Any]
) -> None:
    monkeypatch.setattr(frames, "PATIENCE", 1e6)

    async def use() -> None:
        drawn: list[str] = []
        red, solid = _views(drawn)
        answering.append(True)
        solid.frames.schedule_render()
        red.frames.schedule_render()
        await _until(drawn, "red")
        while not red.frames.is_still:
            await asyncio.sleep(0.005)
        assert drawn == ["red"]
        assert solid.frames.is_behind
        assert solid.frames.is_waiting
        assert not solid.frames.is_still

        answering.append(False)
        Frames.look_again()
        await _until(drawn, "red", "solid")
        assert not solid.frames.is_waiting

    run_apart(use())


@pytest.mark.parametrize(
    ("patience", "red_fps", "solid_fps"),
    [(0.05, 30.0, 20.0), (1e6, 20.0, 30.0)],
    ids=["for ever", "while the pointer is in it"],
)
def test_it_does_not_wait(
    answering: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    run_apart: Callable[..., Any],
    patience: float,
    red_fps: float,
    solid_fps: float,
) -> None:
    monkeypatch.setattr(frames, "PATIENCE", patience)

    async def use() -> None:
        drawn: list[str] = []
        _, solid = _views(drawn, red_fps, solid_fps)
        answering.append(True)
        solid.frames.schedule_render()
        await _until(drawn, "solid")

    run_apart(use())
