"""A mouse for those who have none: Slicer's crosshair, moved by keys, that presses and releases as a left button does.

Slicer's views and our tools see mouse events and need to know nothing of keys: whatever the mouse can place, draw,
paint or adjust in a slice, the keyboard can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from SlicerKA2ERLib.VolumeIO import toNumpy

CLICKED = ("point", "roi")
"""Tools of which one press is all; with the others what is between press and release counts."""
FAR = 10
"""Steps in one, with Shift."""


class KeyboardCursor:
    """The crosshair of one page.

    Args:
        scene: the MRML scene.
        slices: trame-slicer's slice views by name.
        logic: `PromptLogic`, for the volume.
        tool: the tool in the hand.
    """

    def __init__(self, scene: Any, slices: dict[str, Any], logic: Any, tool: Callable[[], str]) -> None:
        self._crosshair = scene.GetFirstNodeByClass("vtkMRMLCrosshairNode")
        self._crosshair.SetCrosshairThickness(self._crosshair.Fine)
        self._slices, self._logic, self._tool = slices, logic, tool
        self._drawing: Any = None  # view in which the button is held
        self._at: np.ndarray | None = None  # world mm; None: not used yet

    @property
    def shown(self) -> bool:
        """Whether the crosshair is in the views."""
        return bool(self._crosshair.GetCrosshairMode() != self._crosshair.NoCrosshair)

    @property
    def text(self) -> str:
        """Where it is, and whether it draws, for people."""
        if not self.shown or self._at is None:
            return ""
        ends = zip(("LR", "PA", "IS"), self._at, strict=True)
        where = ", ".join(f"{ways[int(value >= 0)]} {abs(value):.1f}" for ways, value in ends)
        return f"Crosshair at {where} mm" + (": drawing" if self._drawing is not None else "")

    def forget(self) -> None:
        """Another volume: begin in the middle again."""
        self.hide()
        self._at = None

    def hide(self) -> None:
        """The mouse is used again."""
        self.let_go()
        self._crosshair.SetCrosshairMode(self._crosshair.NoCrosshair)

    # -- keys --------------------------------------------------------------------------------------------------------

    def move(self, name: str, right: int, up: int, far: bool) -> None:
        """One step on the slice of a view: a voxel, or a pixel where that is more."""
        view = self._slices[name]
        x, y = self._position(view)
        step = self._step(view) * (FAR if far else 1)
        width, height = view.render_window().GetSize()
        self._show(view, min(max(x + right * step, 0), width - 1), min(max(y + up * step, 0), height - 1))
        self._mouse(view, "MouseMoveEvent")

    def press(self, name: str, flip: bool) -> None:
        """What a click does there; where something is to be drawn, the second press ends it."""
        view = self._slices[name]
        self._show(view, *self._position(view))
        if self._drawing is not None:
            self.let_go()
            return
        self._mouse(view, "MouseMoveEvent")
        self._mouse(view, "LeftButtonPressEvent", flip)
        self._drawing = view
        if self._tool() in CLICKED or self._tool() == "none":
            self.let_go()

    def scroll(self, name: str, slices: int) -> None:
        """Go through the slices of a view; the crosshair comes along."""
        view = self._slices[name]
        x, y = self._position(view)
        least, most = view.get_slice_range()
        wanted = view.get_slice_value() + slices * abs(view.get_slice_step())
        view.set_slice_value(min(max(wanted, least), most))
        if self.shown:
            self._show(view, x, y)

    def let_go(self) -> None:
        """Release the button, if it is held."""
        view, self._drawing = self._drawing, None
        if view is not None:
            self._mouse(view, "LeftButtonReleaseEvent")

    # -- where it is -------------------------------------------------------------------------------------------------

    def _position(self, view: Any) -> tuple[float, float]:
        """Pixels in a view; its middle where the crosshair is not in sight."""
        width, height = view.render_window().GetSize()
        if self._at is not None:
            x, y = (np.linalg.inv(toNumpy(view.get_view_node().GetXYToRAS())) @ (*self._at, 1.0))[:2]
            if 0 <= x < width and 0 <= y < height:
                return float(x), float(y)
        return width / 2, height / 2

    def _show(self, view: Any, x: float, y: float) -> None:
        self._at = (toNumpy(view.get_view_node().GetXYToRAS()) @ (x, y, 0.0, 1.0))[:3]
        self._crosshair.SetCrosshairRAS(*self._at)
        self._crosshair.SetCrosshairMode(self._crosshair.ShowBasic)

    def _step(self, view: Any) -> float:
        """Pixels."""
        volume = self._logic.volumeNode
        pixel = np.linalg.norm(toNumpy(view.get_view_node().GetXYToRAS())[:3, 0])
        return max(1.0, float(min(volume.GetSpacing()) / pixel)) if volume is not None else 1.0

    def _mouse(self, view: Any, event: str, flip: bool = False) -> None:
        interactor = view.interactor()
        x, y = self._position(view)
        interactor.SetEventInformation(round(x), round(y), 0, 0, "\0", 0, None)
        interactor.SetAltKey(flip)
        interactor.InvokeEvent(event)
        interactor.SetAltKey(False)
