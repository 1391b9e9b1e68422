"""`Bridge`: the logic of the Slicer module on one side, the page's state on the other. It decides nothing itself.

What the user does in the page calls the logic; the logic tells its observers; `refresh` then reads everything from the
logic and puts it into the page's state, of which trame sends what changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import slicer

from KA2ERSegment.errors import KA2ERError, SessionStateError
from KA2ERViewer.page.cursor import KeyboardCursor
from KA2ERViewer.page.frames import Frames
from KA2ERViewer.page.hands import EFFECTS, HandEdits
from KA2ERViewer.page.scene import SLICES, ViewerScene
from KA2ERViewer.page.structures import forget_structure, structure_text
from KA2ERViewer.page.surfaces import Surfaces
from SlicerKA2ERLib.PromptLogic import PromptLogic
from SlicerKA2ERLib.Protocols import TOOLS
from SlicerKA2ERLib.Shortcuts import DEFAULT_KEYS
from SlicerKA2ERLib.Structures import structures

logger = logging.getLogger("KA2ERViewer")

BUSY_INTERVAL, IDLE_INTERVAL = 0.015, 0.1
"""Seconds between two looks at the logic."""
PALETTE = ("#f2b45c", "#5fc7e8", "#8fd16a", "#e887b8", "#b59cf2", "#f0e06a", "#ff8f6b", "#5fdcc0")
"""Of new segments: told apart from each other, from grey, and from the green and red of prompts."""
BUSY_SHOWN_AFTER = 0.3
"""Seconds: what is quicker shows no progress, so that nothing flickers at every click."""


class Bridge:
    """One logic, shown and driven by one page.

    Args:
        server: trame's.
        around: scene and views.
        engine: makes the engine (`EngineProtocol`).
    """

    def __init__(self, server: Any, around: ViewerScene, engine: Callable[[], Any]) -> None:
        self.state, self.around = server.state, around
        # Slicer's legends keep the size of the window that they were made in: the page has its own.
        self.logic = PromptLogic(around.scene, around.logic, legends=False)
        self.surfaces = Surfaces(around.scene)
        self.hands = HandEdits(around.app.segmentation_editor, self.logic)
        around.app.segmentation_editor.segmentation_modified.connect(self._on_stroke)
        Frames.answering = lambda: bool(self.logic.busy) or self.surfaces.outdated
        self.cursor = KeyboardCursor(around.scene, around.slices, self.logic, lambda: self.tool)
        self._display: tuple[Any, int] | None = None  # of the volume, and our observer of it
        self._changed = True
        self._notice = ""
        self._latest_tool = "point"
        self._colored: set[str] = set()
        self.logic.observers.append(self._on_logic)
        self.logic.connectEngine(engine)
        for view in around.slices.values():
            self.logic.addSliceView(view.interactor(), view.get_view_node())
        known = structures(slicer.modules.terminologies.logic())
        self._structures = {name.lower(): entry for name, entry in known}
        self.state.update({**NOTHING_YET, "structures": [name for name, _ in known]})
        for name, action in self.actions().items():
            server.trigger(name)(self._guarded(action))
        server.trigger("settled")(self.settled)

    # -- what the page can ask for -----------------------------------------------------------------------------------

    def actions(self) -> dict[str, Callable[..., None]]:
        """Name of a trigger -> what it does. Shortcuts have the names of the Slicer module's."""
        logic = self.logic
        names = (*(tool for tool in TOOLS if tool != "none"), *EFFECTS, WINDOW)
        tools = {tool: lambda tool=tool: self.choose_tool(tool) for tool in names}
        return {
            **tools,
            "polarity": lambda: logic.setPolarity(not logic.positive),
            "positive": lambda: logic.setPolarity(True),
            "negative": lambda: logic.setPolarity(False),
            "radius": lambda millimetres: logic.setBrushRadius(millimetres),
            "undo": self.undo,
            "redo": self.redo,
            "reset": logic.reset,
            "cancel": self.cancel,
            "suggest": logic.suggest,
            "nextSegment": logic.nextSegment,
            "selectSegment": logic.selectSegment,
            "removeSegment": logic.removeSegment,
            "renameSegment": self.rename_segment,
            "colorSegment": self.color_segment,
            "showSegment": self.show_segment,
            "lockSegment": self.lock_segment,
            "lock": self.lock_selected,
            "showExpert": lambda name, shown: logic.setExpertShown(name, bool(shown)),
            "expertKind": lambda name, kind: logic.setExpertKind(name, kind),
            "expertOpacity": lambda name, percent: logic.setExpertOpacity(name, float(percent) / 100),
            "enableExpert": lambda name, enabled: logic.setExpertEnabled(name, bool(enabled)),
            "disagreement": lambda shown: logic.setDisagreementShown(bool(shown)),
            "finish": lambda millimetres, islands: logic.setFinish(float(millimetres), bool(islands)),
            "neighbours": lambda name: logic.setNeighbours(name),
            "fill": self.set_fill,
            "dismiss": self.dismiss,
            "deletePrompt": logic.deletePrompt,
            "cursorMove": self.cursor.move,
            "cursorPress": self.cursor.press,
            "cursorScroll": self.cursor.scroll,
            "cursorHide": self.cursor.hide,
        }

    def choose_tool(self, tool: str) -> None:
        """The chosen one is put away by choosing it again."""
        chosen = "none" if self.tool == tool else tool
        self.cursor.let_go()
        self.hands.put_away()
        self._adjust_window(False)
        if chosen in EFFECTS:
            self.hands.choose(chosen)
        elif chosen == WINDOW:
            self.logic.setTool("none")
            self._adjust_window(True)
        else:
            self.logic.setTool(chosen)

    def _adjust_window(self, on: bool) -> None:
        """Slicer's own mouse mode, in which dragging in a slice view changes window and level."""
        node = self.around.logic.GetInteractionNode()
        if on or node.GetCurrentInteractionMode() == node.AdjustWindowLevel:
            node.SetCurrentInteractionMode(node.AdjustWindowLevel if on else node.ViewTransform)

    @property
    def tool(self) -> str:
        """A prompt tool, the brush, the eraser or "window"; "none" where none is chosen."""
        node = self.around.logic.GetInteractionNode()
        if node.GetCurrentInteractionMode() == node.AdjustWindowLevel:
            return WINDOW
        return self.hands.tool or str(self.logic.tool)

    def undo(self) -> None:
        """The last stroke where the brush is in the hand, else the last prompt."""
        if self.hands.tool:
            self.hands.undo() if self.hands.can_undo else None
        elif self.logic.canUndo:
            self.logic.undo()

    def redo(self) -> None:
        """What `undo` took back."""
        if self.hands.tool:
            self.hands.redo() if self.hands.can_redo else None
        elif self.logic.canRedo:
            self.logic.redo()

    def cancel(self) -> None:
        """What is under way; where nothing is, the tool is put away, and what is being drawn with it."""
        if self.logic.busy:
            self.logic.cancel()
        else:
            self.choose_tool(self.tool)
            self.cursor.hide()

    def rename_segment(self, segment: str, name: str) -> None:
        """A structure's name brings code and colour. Names are unique: files could not tell two of one name apart."""
        name = name.strip()
        if not name:
            message = "a segment must have a name, got an empty one."
            raise SessionStateError(message)
        if any(row.name == name and row.id != segment for row in self.logic.segments()):
            message = f"segments must have different names, {name!r} is taken. Choose another one."
            raise SessionStateError(message)
        found, entry = self._segment(segment), self._structures.get(name.lower())
        if entry is not None:
            self.logic.setTerminology(segment, entry)
            self.surfaces.outdated = True  # it has the colour of the structure now
        else:
            forget_structure(found)
        found.SetName(name)

    def color_segment(self, segment: str, color: str) -> None:
        """`color` as #rrggbb."""
        self._segment(segment).SetColor(*rgb(color))
        self.surfaces.outdated = True

    def show_segment(self, segment: str, shown: bool) -> None:
        """In all views."""
        self._segment(segment)
        self.logic.segmentationNode.GetDisplayNode().SetSegmentVisibility(segment, bool(shown))
        self.surfaces.outdated = self._changed = True

    def lock_segment(self, segment: str, locked: bool) -> None:
        """Nothing changes it until it is unlocked."""
        self.logic.setLocked(segment, bool(locked))
        self.hands.forget()

    def lock_selected(self) -> None:
        """Lock the selected segment, or unlock it."""
        row = next((row for row in self.logic.segments() if row.id == self.logic.selectedSegment), None)
        if row is not None:
            self.lock_segment(row.id, not row.locked)

    def set_fill(self, percent: float) -> None:
        """How opaque segments are in slice views."""
        self.state.fill = float(percent)
        self._apply_fill()

    def dismiss(self) -> None:
        """The message was read."""
        self.state.error = self._notice = ""
        self._changed = True

    def notice(self, text: str) -> None:
        """Something that the user should know, and that is no error."""
        self._notice, self._changed = text, True

    def fail(self, text: str) -> None:
        """Something went wrong."""
        self.state.error = text

    def _segment(self, segment: str) -> Any:
        node = self.logic.segmentationNode
        found = node.GetSegmentation().GetSegment(segment) if node is not None else None
        if found is None:
            message = "that segment is there no more. Choose one of the list."
            raise SessionStateError(message)
        return found

    def _guarded(self, action: Callable[..., Any]) -> Callable[..., None]:
        def act(*arguments: Any) -> None:
            try:
                action(*arguments)
            except KA2ERError as error:
                self.fail(str(error))
            self._changed = True
            self.refresh()

        return act

    # -- volumes -----------------------------------------------------------------------------------------------------

    def show_volume(self, node: Any) -> None:
        """Work on another volume: its segments are its own, and the former volume leaves the scene."""
        logic, scene = self.logic, self.around.scene
        self.hands.put_away()
        self.cursor.forget()
        former = logic.volumeNode, logic.segmentationNode
        logic.setSegmentationNode(None)
        logic.setVolumeNode(node)
        self.surfaces.clear()
        for old in former:
            if old is not None and old is not node:
                scene.RemoveNode(old)
        for name, view in self.around.slices.items():
            view.set_background_volume_id(node.GetID())
            view.set_orientation(SLICES[name])  # an oblique volume before this one has turned it
            view.get_view_node().RotateToVolumePlane(node) if _oblique(node) else None
            view.fit_view_to_content()
        self.around.solid.reset_view()
        self._follow_window(node)
        logic.warmUp()
        if logic.tool == "none":
            logic.setTool(self._latest_tool)
        self.dismiss()
        self.refresh()

    def _follow_window(self, node: Any) -> None:
        """Window and level change by dragging too."""
        if self._display is not None:
            self._display[0].RemoveObserver(self._display[1])
        display = node.GetDisplayNode()
        self._display = display, display.AddObserver("ModifiedEvent", lambda *_: self._on_window())

    def _on_window(self) -> None:
        self._changed = True

    # -- logic -> page -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at the logic for as long as the page lives."""
        while True:
            try:
                self.logic.poll()
                self.refresh()
                self._follow_surfaces()
            except Exception:
                logger.exception("The page could not follow the logic.")
            await asyncio.sleep(BUSY_INTERVAL if self.logic.busy else IDLE_INTERVAL)

    def settled(self) -> bool:
        """Whether nothing is under way or shown for a moment only, and the browser has what came of it.

        For tests, which ask again: while one answer is awaited, nothing else that the page sends is heard.
        """
        self.logic.poll()  # what the mouse just did may still wait to be noticed
        waits = not self.logic.isIdle or self._changed or self.surfaces.outdated
        return not waits and not self.logic.outlinesChange and all(frames.is_still for frames in Frames.every)

    def _on_logic(self, event: str) -> None:
        self._changed = True
        if event == "error":
            self.state.error = self.logic.lastError
        elif event == "result":
            self.surfaces.outdated = True
            self._apply_fill()
        elif event == "state":
            self._color_new_segments()

    def refresh(self) -> None:
        """Read everything from the logic; trame sends what is different."""
        busy = self._busy()
        if not self._changed and not busy["busy"] and not self.state.busy:
            return
        with self.state:
            self.state.update(busy)
            if self._changed:
                self._changed = False
                self.hands.follow()
                self.state.update(self._read())
        Frames.look_again()

    def _follow_surfaces(self) -> None:
        """The slices come first: people look at them while they click."""
        drawn = all(frames.is_waiting or not frames.is_behind for frames in Frames.every)
        if not self.surfaces.outdated or self.logic.busy or not drawn:
            return
        if self.surfaces.update(self.logic.segmentationNode):
            self.around.solid.fit_view_to_content()
        Frames.look_again()

    def _busy(self) -> dict[str, Any]:
        logic = self.logic
        seconds = logic.elapsedSeconds
        shown = logic.busy if seconds > BUSY_SHOWN_AFTER or (logic.busy and logic.engineState != "ready") else ""
        text, share = logic.progress
        return {
            "busy": text or shown if shown else "",
            "busy_percent": -1 if share is None else round(100 * share),
            "busy_seconds": int(seconds) if shown else 0,
            "engine": logic.engineState,
        }

    def _read(self) -> dict[str, Any]:
        logic = self.logic
        display = logic.segmentationNode.GetDisplayNode() if logic.segmentationNode is not None else None
        rows = [
            {
                "id": row.id,
                "name": row.name,
                "color": css(row.color),
                "quality": percent(row.quality),
                "shown": bool(display.GetSegmentVisibility(row.id)) if display is not None else True,
                "selected": row.id == logic.selectedSegment,
                "locked": row.locked,
                "structure": structure_text(self._segment(row.id)),
            }
            for row in logic.segments()
        ]
        experts = [
            {
                "name": row.name,
                "title": row.title,
                "color": css(row.color),
                "share": percent(row.share),
                "shown": row.shown,
                "kind": row.kind,
                "opacity": round(100 * row.opacity),
                "enabled": row.enabled,
                "fixed": not row.canBeLeftOut,
                "mode": row.mode,
            }
            for row in logic.experts()
        ]
        prompts = [
            {"id": row.nodeId, "kind": row.kind, "positive": row.positive}
            for row in (logic.prompts() if logic.selectedSegment else ())
        ]
        shown = logic.volumeNode.GetDisplayNode() if logic.volumeNode is not None else None
        window, level = (shown.GetWindow(), shown.GetLevel()) if shown is not None else (0.0, 0.0)
        return {
            "has_volume": logic.volumeNode is not None,
            "volume_name": logic.volumeNode.GetName() if logic.volumeNode is not None else "",
            "tool": self.tool,
            "positive": logic.positive,
            "radius": logic.brushRadius,
            "can_undo": self.hands.can_undo if self.hands.tool else logic.canUndo,
            "can_redo": self.hands.can_redo if self.hands.tool else logic.canRedo,
            "segments": rows,
            "prompt_count": len(prompts),
            "prompts": prompts,
            "window": _rounded(window),
            "level": _rounded(level),
            "cursor_text": self.cursor.text,
            "quality": percent(logic.quality),
            "experts": experts,
            "disagreement_shown": logic.disagreementShown,
            "suggestion": suggestion_text(logic.suggestion),
            "smoothing": logic.smoothingMm,
            "islands": logic.islands,
            "neighbours_mode": logic.neighbours,
            "notice": self._notice,
        }

    def _on_stroke(self, *_: Any) -> None:
        self.surfaces.outdated = self._changed = True

    def _color_new_segments(self) -> None:
        """Slicer takes their colours from a table that only comes with the application."""
        for n, row in enumerate(self.logic.segments()):
            if row.id not in self._colored:
                self._colored.add(row.id)
                self._segment(row.id).SetColor(*rgb(PALETTE[n % len(PALETTE)]))

    def _apply_fill(self) -> None:
        node = self.logic.segmentationNode
        display = node.GetDisplayNode() if node is not None else None
        if display is not None:
            display.SetOpacity2DFill(self.state.fill / 100)
            display.SetOpacity2DOutline(1.0)
            display.SetVisibility3D(False)  # `Surfaces` shows them there

    def close(self) -> None:
        """The page is over."""
        self.surfaces.clear()
        self.logic.close()


def css(color: tuple[float, float, float]) -> str:
    """#rrggbb of a colour in 0..1."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)


def rgb(color: str) -> tuple[float, float, float]:
    """Of #rrggbb, in 0..1."""
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return red, green, blue


def percent(share: float | None) -> int:
    """-1 where there is none: JavaScript and None do not go well together in templates."""
    return -1 if share is None else round(100 * share)


def _rounded(value: float) -> float:
    """Three digits tell windows of CT apart, and those of images between 0 and 1."""
    return float(f"{value:.4g}")


def suggestion_text(suggestion: Any) -> str:
    """Where to click next, for people."""
    if suggestion is None:
        return ""
    (r, a, s), positive = suggestion
    kind = "inside" if positive else "outside"
    ways = ("R" if r > 0 else "L", "A" if a > 0 else "P", "S" if s > 0 else "I")
    where = ", ".join(f"{way} {abs(value):.0f}" for way, value in zip(ways, (r, a, s), strict=True))
    return f"Click {kind} the structure at {where} mm: the views are there."


def _oblique(node: Any) -> bool:
    """Whether no voxel axis is along R, A or S."""
    matrix = slicer.util.arrayFromVTKMatrix(_directions(node))
    return bool((abs(matrix[:3, :3]).max(axis=0) < 0.999).any())


def _directions(node: Any) -> Any:
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASDirectionMatrix(matrix)
    return matrix


WINDOW = "window"
"""The tool that adjusts window and level."""
KEYS = {**DEFAULT_KEYS, "brush": "B", "eraser": "D", WINDOW: "W", "lock": "K"}
"""The Slicer module's keys, and those of what has none there."""
NOTHING_YET: dict[str, Any] = {
    "has_volume": False,
    "volume_name": "",
    "from_dicom": False,
    "tool": "none",
    "positive": True,
    "radius": 3.0,
    "can_undo": False,
    "can_redo": False,
    "segments": [],
    "prompt_count": 0,
    "prompts": [],
    "window": 0,
    "level": 0,
    "cursor_text": "",
    "quality": -1,
    "experts": [],
    "disagreement_shown": False,
    "suggestion": "",
    "smoothing": 0.0,
    "islands": True,
    "neighbours_mode": "keep",
    "busy": "",
    "busy_percent": -1,
    "busy_seconds": 0,
    "engine": "stopped",
    "error": "",
    "notice": "",
    "reading": "",
    "fill": 35,
    "keys": KEYS,
}
"""The page's state before anything happened. Its names are those that `layout` uses."""
