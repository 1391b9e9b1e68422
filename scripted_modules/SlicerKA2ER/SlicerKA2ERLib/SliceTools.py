"""The mouse in slice views: points, boxes, scribbles and lassos, on slices of any orientation.

Observers of the view's interactor that come before Slicer's own and keep from it what is ours: the left button alone
or with Alt, which flips the polarity. Of the modifiers, Alt is the one that Slicer's slice views leave free with the
left button: Shift pans, Ctrl blends layers, Ctrl+Alt and Shift+Alt move slices. Wheel, middle and right button stay
Slicer's. A point that is there already is Slicer's too: it is dragged, not clicked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import slicer
import vtk

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import FloatArray
from SlicerKA2ERLib.PromptNodes import GREEN, RED, SEGMENT, removeNode
from SlicerKA2ERLib.VolumeIO import ijkToRas, matrixBetween, toNumpy

BEFORE_SLICER = 10.0
"""Priority of our observers; Slicer's own have 0."""
DRAWN = ("box", "scribble", "lasso")
LEAST_DRAG = 4
"""Pixels; a shorter drag of a box was none."""
ROUGH = 0.7
"""Pixels that a drawn line may be off: a curve of 500 points is slow to draw and says no more than one of 50."""


class SliceTools:
    """The tools of one logic in any number of slice views.

    Args:
        scene: the MRML scene.
        applicationLogic: Slicer's.
        logic: `PromptLogic`: what is drawn goes there, and which tool it is comes from there.
    """

    def __init__(self, scene: Any, applicationLogic: Any, logic: Any) -> None:
        self._scene, self._applicationLogic, self._logic = scene, applicationLogic, logic
        self._views: list[_View] = []
        self._roi: Any = None

    def add(self, interactor: Any, sliceNode: Any) -> None:
        """Work in a slice view."""
        if all(view.interactor is not interactor for view in self._views):
            self._views.append(_View(interactor, sliceNode, self._logic))

    def removeAll(self) -> None:
        """Leave all slice views as they were."""
        self.placeRoi(False)
        for view in self._views:
            view.release()
        self._views.clear()

    def abort(self) -> None:
        """Forget what is being drawn."""
        for view in self._views:
            view.abort()

    # -- 3D box ------------------------------------------------------------------------------------------------------

    def placeRoi(self, on: bool) -> None:
        """Let Slicer place an ROI by two clicks, in whatever view; or stop that."""
        interaction, selection = self._interaction()
        if interaction is None:
            return
        if not on:
            if self._roi is not None or self._logic.tool != "none":  # Slicer's place mode would compete for the click
                if interaction.GetCurrentInteractionMode() == interaction.Place:
                    interaction.SetCurrentInteractionMode(interaction.ViewTransform)
                self._dropRoi()
            return
        node = self._scene.CreateNodeByClass("vtkMRMLMarkupsROINode")
        node.UnRegister(None)
        node.SetName(f"{'+' if self._logic.positive else '-'} roi")
        self._scene.AddNode(node)
        node.CreateDefaultDisplayNodes()
        selection.SetReferenceActivePlaceNodeClassName("vtkMRMLMarkupsROINode")
        selection.SetActivePlaceNodeID(node.GetID())
        interaction.SetPlaceModePersistence(0)
        interaction.SetCurrentInteractionMode(interaction.Place)
        self._roi = node

    def poll(self) -> None:
        """An ROI that is placed becomes a prompt."""
        interaction, _ = self._interaction()
        if self._roi is None or interaction is None or interaction.GetCurrentInteractionMode() == interaction.Place:
            return
        node, self._roi = self._roi, None
        if node.GetScene() is not self._scene:
            return
        if node.GetNumberOfDefinedControlPoints() and min(node.GetSize()) > 0:
            try:
                self._logic.giveRoi(node)
            except KA2ERError as error:
                removeNode(node)
                self._logic.report(error)
        else:
            removeNode(node)
        if self._logic.tool == "roi":
            self._logic.setTool("none")

    def _dropRoi(self) -> None:
        node, self._roi = self._roi, None
        if node is not None and node.GetScene() is self._scene:
            removeNode(node)

    def _interaction(self) -> tuple[Any, Any]:
        if self._applicationLogic is None:
            return None, None
        return self._applicationLogic.GetInteractionNode(), self._applicationLogic.GetSelectionNode()


class _View:
    """One slice view: what is drawn in it right now, and its observers."""

    def __init__(self, interactor: Any, sliceNode: Any, logic: Any) -> None:
        self.interactor, self._node, self._logic = interactor, sliceNode, logic
        self._path: list[tuple[int, int]] = []
        self._positive = True
        self._down = False
        self._preview = _Preview(interactor)
        handlers = {
            "LeftButtonPressEvent": self._onPress,
            "LeftButtonDoubleClickEvent": self._onPress,  # the second of two quick clicks; Slicer would maximise
            "MouseMoveEvent": self._onMove,
            "LeftButtonReleaseEvent": self._onRelease,
            "KeyPressEvent": self._onKey,
        }
        self._tags = {event: self._observe(event, handler) for event, handler in handlers.items()}

    def _observe(self, event: str, handler: Callable[[], bool]) -> int:
        def callback(interactor: Any, _event: str) -> None:
            if handler():  # it was ours: Slicer's own observers must not react to it
                interactor.GetCommand(self._tags[event]).SetAbortFlag(1)

        return int(self.interactor.AddObserver(event, callback, BEFORE_SLICER))

    def release(self) -> None:
        self.abort()
        for tag in self._tags.values():
            self.interactor.RemoveObserver(tag)
        self._tags.clear()

    def abort(self) -> None:
        self._path = []
        self._preview.hide()

    # -- events: true where the event was ours -----------------------------------------------------------------------

    def _onPress(self) -> bool:
        tool, interactor = self._logic.tool, self.interactor
        if self._down:
            return True  # a double click comes as press, double click and one release
        if tool not in ("point", *DRAWN) or interactor.GetShiftKey() or interactor.GetControlKey():
            return False
        if tool == "point" and self._overMarker():
            return False
        self._down = True
        self._positive = self._logic.positive != bool(interactor.GetAltKey())
        at = self._position()
        if tool == "point":
            _reporting(self._logic, lambda: self._logic.addPoint(self._ras(at), self._positive))
        else:
            self._path = [at]
        return True

    def _onMove(self) -> bool:
        if not self._down:
            return False
        at = self._position()
        if self._path and at != self._path[-1]:
            self._path = [self._path[0], at] if self._logic.tool == "box" else [*self._path, at]
            self._preview.show(self._outline(), self._positive, self._thickness())
        return True

    def _onRelease(self) -> bool:
        if not self._down:
            return False
        self._down = False
        path, self._path = self._path, []
        self._preview.hide()
        if path:
            _reporting(self._logic, lambda: self._finish(path))
        return True

    def _onKey(self) -> bool:
        if self.interactor.GetKeySym() != "Escape" or not self._path:
            return False
        self.abort()
        return True

    # -- what was drawn ----------------------------------------------------------------------------------------------

    def _finish(self, path: list[tuple[int, int]]) -> None:
        tool = self._logic.tool
        if tool == "box":
            size = np.abs(np.subtract(path[0], path[-1]))
            if size.min() >= LEAST_DRAG:
                self._logic.addBox(*self._box(path[0], path[-1]), self._positive)
            return
        points = [self._ras(at) for at in simplified(path, ROUGH)]
        if tool == "scribble":
            self._logic.addScribble(points, self._positive)
        elif tool == "lasso" and len(points) >= 3 and np.ptp(path, axis=0).min() >= LEAST_DRAG:
            self._logic.addLasso(points, self._positive)

    def _box(self, a: tuple[int, int], b: tuple[int, int]) -> tuple[Any, list[Any]]:
        """Corner and edges in world mm: along the slice's own axes, one slice thick."""
        toRas = toNumpy(self._node.GetSliceToRAS())
        right, up, normal = (toRas[:3, n] / np.linalg.norm(toRas[:3, n]) for n in range(3))
        first, last = np.array(self._ras(a)), np.array(self._ras(b))
        diagonal = last - first
        across = normal * self._spacingAlong(normal)
        corner = first - across / 2
        return _tuple(corner), [_tuple(right * (diagonal @ right)), _tuple(up * (diagonal @ up)), _tuple(across)]

    def _spacingAlong(self, direction: FloatArray) -> float:
        """mm from one slice of the volume to the next, along the direction that the view looks in."""
        volume = self._logic.volumeNode
        if volume is None:
            return 1.0
        toIjk = np.linalg.inv(matrixBetween(volume, None) @ ijkToRas(volume))
        return float(1 / np.abs(toIjk[:3, :3] @ direction).max())

    def _position(self) -> tuple[int, int]:
        x, y = self.interactor.GetEventPosition()
        return int(x), int(y)

    def _ras(self, at: tuple[int, int]) -> tuple[float, float, float]:
        """World mm; also in a view that shows several slices beside each other."""
        xyz = [0.0, 0.0, 0.0]
        slicer.vtkMRMLAbstractSliceViewDisplayableManager.ConvertDeviceToXYZ(self.interactor, self._node, *at, xyz)
        return _tuple(self._node.GetXYToRAS().MultiplyPoint((*xyz, 1.0))[:3])

    def _outline(self) -> list[tuple[int, int]]:
        if self._logic.tool != "box":
            return [*self._path, self._path[0]] if self._logic.tool == "lasso" else self._path
        (x0, y0), (x1, y1) = self._path[0], self._path[-1]
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]

    def _thickness(self) -> float:
        """Pixels: the brush as wide as it is, other lines thin."""
        if self._logic.tool != "scribble":
            return 2.0
        pixel = np.linalg.norm(toNumpy(self._node.GetXYToRAS())[:3, 0])
        return float(np.clip(2 * self._logic.brushRadius / pixel, 2, 60))

    def _overMarker(self) -> bool:
        """Whether the mouse is over a control point or handle of a prompt: Slicer drags it."""
        nodes = self._node.GetScene().GetNodesByClass("vtkMRMLMarkupsNode")
        nodes.UnRegister(None)
        for n in range(nodes.GetNumberOfItems()):
            node = nodes.GetItemAsObject(n)
            display = node.GetDisplayNode()
            if node.GetAttribute(SEGMENT) and display is not None and display.HasActiveComponent():
                kind = display.GetActiveComponentType()
                if kind not in (display.ComponentNone, display.ComponentLine, display.ComponentPlane):
                    return True
        return False


class _Preview:
    """A line over a slice view while the mouse draws."""

    def __init__(self, interactor: Any) -> None:
        self._interactor = interactor
        self._data = vtk.vtkPolyData()
        mapper = vtk.vtkPolyDataMapper2D()
        mapper.SetInputData(self._data)
        self._actor = vtk.vtkActor2D()
        self._actor.SetMapper(mapper)
        self._renderer: Any = None

    def show(self, path: list[tuple[int, int]], positive: bool, thickness: float) -> None:
        points = vtk.vtkPoints()
        for x, y in path:
            points.InsertNextPoint(x, y, 0)
        line = vtk.vtkCellArray()
        line.InsertNextCell(len(path))
        for n in range(len(path)):
            line.InsertCellPoint(n)
        self._data.SetPoints(points)
        self._data.SetLines(line)
        self._actor.GetProperty().SetColor(*(GREEN if positive else RED))
        self._actor.GetProperty().SetLineWidth(thickness)
        self._actor.GetProperty().SetOpacity(0.5 if thickness > 3 else 1.0)
        if self._renderer is None:
            window = self._interactor.GetRenderWindow()
            self._renderer = window.GetRenderers().GetFirstRenderer() if window is not None else None
            if self._renderer is None:
                return
            self._renderer.AddViewProp(self._actor)
        self._interactor.Render()

    def hide(self) -> None:
        if self._renderer is not None:
            self._renderer.RemoveViewProp(self._actor)
            self._renderer = None
            self._interactor.Render()


def simplified(path: list[tuple[int, int]], tolerance: float) -> list[tuple[int, int]]:
    """The corners of a path that matter: no dropped point is farther than `tolerance` from what is left."""
    points = np.array(path, dtype=float)
    keep = np.zeros(len(points), dtype=bool)
    keep[[0, -1]] = True
    spans = [(0, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        chord = points[last] - points[first]
        offset = points[first + 1 : last] - points[first]
        length = np.hypot(*chord)
        if length:
            along = np.clip(offset @ chord / length**2, 0, 1)
            distance = np.hypot(*(offset - along[:, None] * chord).T)
        else:
            distance = np.hypot(*offset.T)
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return [point for point, kept in zip(path, keep, strict=True) if kept]


def _reporting(logic: Any, action: Callable[[], None]) -> None:
    """A refusal must not end in VTK, which would print it and go on."""
    try:
        action()
    except KA2ERError as error:
        logic.report(error)


def _tuple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z
