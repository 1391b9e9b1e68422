"""Prompts as markups nodes in the scene: saved with it, and moved or deleted like any other markup.

Points share one list node per segment and polarity (200 clicks are two nodes, not 200); every other prompt has a node
of its own: an ROI for a box, an open curve for a scribble, a closed one for a lasso. All that a prompt needs is in
the node's geometry, attributes and node references, so that nothing is lost by saving, by importing into another
scene or by a change of IDs. Nodes are under the volume's parent transform: they move with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import vtk

from KA2ERSegment.errors import GeometryError, PromptError
from KA2ERSegment.geometry import FloatArray, apply_affine
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, PointPrompt, Polarity, Prompt, ScribblePrompt
from SlicerKA2ERLib.VolumeIO import matrixBetween, toNumpy, toVtk

SEGMENT, POLARITY, KIND, NUMBER = "KA2ER.Segment", "KA2ER.Polarity", "KA2ER.Kind", "KA2ER.Number"
RADIUS, FRAME = "KA2ER.Radius", "KA2ER.Frame"
SEGMENTATION = "KA2ER.segmentation"
"""Role of the node reference to the segmentation: it follows when IDs change on import."""
CLASSES = {
    "point": "vtkMRMLMarkupsFiducialNode",
    "box": "vtkMRMLMarkupsROINode",
    "roi": "vtkMRMLMarkupsROINode",
    "scribble": "vtkMRMLMarkupsCurveNode",
    "lasso": "vtkMRMLMarkupsClosedCurveNode",
}
GREEN, RED = (0.25, 0.85, 0.35), (0.95, 0.3, 0.25)
MOVED = 1e-3
"""mm; less is rounding."""


@dataclass(frozen=True)
class Marker:
    """One prompt as it lies in the scene.

    Args:
        key: of the node, or of the node and the point in it.
        segmentId: it belongs to.
        kind: "point", "box", "roi", "scribble" or "lasso".
        number: order of placing.
        prompt: in the volume's local RAS.
    """

    key: str
    segmentId: str
    kind: str
    number: int
    prompt: Prompt

    @property
    def positive(self) -> bool:
        return self.prompt.polarity is Polarity.POSITIVE


class PromptNodes:
    """The prompts of one segmentation on one volume.

    Args:
        scene: the MRML scene.
        onChange: called (often) when a node of ours may have changed; read everything again then.
    """

    def __init__(self, scene: Any, onChange: Callable[[], None]) -> None:
        self._scene = scene
        self._onChange = onChange
        self._observed: dict[Any, list[int]] = {}
        self._held: set[Any] = set()
        self._highest: int | None = None  # number in use; None where nodes came that nobody counted
        self.volumeNode: Any = None
        self.segmentationNode: Any = None
        self._shown = ""
        self.frame = ""
        """Of a sequence: prompts belong to the frame that they were placed on."""

    # -- what there is -----------------------------------------------------------------------------------------------

    def setNodes(self, volumeNode: Any, segmentationNode: Any) -> None:
        """Whose prompts these are. Observers move along."""
        self.release()
        self.volumeNode, self.segmentationNode = volumeNode, segmentationNode
        for node in self._nodes():
            self._observe(node)

    def setFrame(self, frame: str) -> None:
        """Show the prompts of that frame and hide those of the others."""
        shown = self._shown
        self.show("")
        self.frame = frame
        self.show(shown)

    def show(self, segmentId: str) -> None:
        """Show the prompts of one segment alone: those of many would cover the image."""
        self._shown = segmentId
        for node in self._nodes():
            self._showOrHide(node)

    def _showOrHide(self, node: Any) -> None:
        if node.GetDisplayNode() is not None:
            node.GetDisplayNode().SetVisibility(node.GetAttribute(SEGMENT) == self._shown)

    def release(self) -> None:
        """Observe nothing any more."""
        for node, tags in self._observed.items():
            for tag in tags:
                node.RemoveObserver(tag)
        self._observed.clear()
        self._held.clear()
        self._highest = None

    @property
    def dragging(self) -> bool:
        """Whether the user holds a control point right now."""
        return bool(self._held)

    def markers(self) -> list[Marker]:
        """All prompts, in the order of placing. A node that makes no prompt (a curve of one point) is left out."""
        if self.volumeNode is None or self.segmentationNode is None:
            return []
        found = [marker for node in self._nodes() for marker in self._markersOf(node)]
        return sorted(found, key=lambda marker: marker.number)

    def nextNumber(self) -> int:
        """For the next prompt."""
        if self._highest is None:
            self._highest = max((marker.number for marker in self.markers()), default=0)
        self._highest += 1
        return self._highest

    def lookOf(self, key: str) -> tuple[str, int] | None:
        """Kind and number of a marker; None where it is gone."""
        node, n = self._find(key)
        if node is None:
            return None
        number = node.GetAttribute(NUMBER) if n is None else node.GetNthControlPointDescription(n)
        return node.GetAttribute(KIND) or "point", _whole(number)

    def hasPrompts(self) -> set[str]:
        """IDs of the segments that have prompts; cheap."""
        return {
            node.GetAttribute(SEGMENT)
            for node in self._nodes()
            if node.GetAttribute(KIND) != "point" or node.GetNumberOfControlPoints()
        }

    def _nodes(self) -> Iterator[Any]:
        """Our markups nodes of this segmentation, in the order of the scene."""
        if self.segmentationNode is None:
            return
        nodes = self._scene.GetNodesByClass("vtkMRMLMarkupsNode")
        nodes.UnRegister(None)
        for n in range(nodes.GetNumberOfItems()):
            node = nodes.GetItemAsObject(n)
            ours = node.GetAttribute(SEGMENT) and node.GetNodeReference(SEGMENTATION) is self.segmentationNode
            if ours and (node.GetAttribute(FRAME) or "") == self.frame:
                yield node

    def _markersOf(self, node: Any) -> Iterator[Marker]:
        kind, segmentId = node.GetAttribute(KIND) or "point", node.GetAttribute(SEGMENT)
        try:
            matrix = matrixBetween(node, self.volumeNode)
        except GeometryError:
            return
        if kind == "point":
            for n in range(node.GetNumberOfControlPoints()):
                if node.GetNthControlPointPositionStatus(n) != node.PositionDefined:
                    continue  # the preview that follows the mouse in Slicer's own place mode
                ras = _triple(apply_affine(matrix, node.GetNthControlPointPosition(n)))
                number = node.GetNthControlPointDescription(n)
                key = f"{node.GetID()}#{node.GetNthControlPointID(n)}"
                yield Marker(key, segmentId, kind, _whole(number), PointPrompt(ras, _polarity(node)))
            return
        prompt = _promptOf(node, kind, matrix)
        if prompt is not None:
            yield Marker(node.GetID(), segmentId, kind, _whole(node.GetAttribute(NUMBER)), prompt)

    # -- changes -----------------------------------------------------------------------------------------------------

    def place(self, segmentId: str, prompt: Prompt, kind: str, number: int) -> str:
        """Show a prompt; returns its key."""
        positive = prompt.polarity is Polarity.POSITIVE
        if isinstance(prompt, PointPrompt):
            node = self._pointList(segmentId, positive)
            n = node.AddControlPoint(vtk.vtkVector3d(*self._toNode(node, prompt.ras)), "+" if positive else "-")
            node.SetNthControlPointDescription(n, str(number))
            return f"{node.GetID()}#{node.GetNthControlPointID(n)}"
        node = self._newNode(segmentId, positive, kind)
        node.SetAttribute(NUMBER, str(number))
        self._shape(node, prompt)
        self._observe(node)
        return node.GetID()

    def move(self, key: str, prompt: Prompt) -> None:
        """Put a marker where its prompt is."""
        node, n = self._find(key)
        if node is None:
            return
        if n is not None and isinstance(prompt, PointPrompt):
            node.SetNthControlPointPosition(n, *self._toNode(node, prompt.ras))
        else:
            self._shape(node, prompt)

    def remove(self, key: str) -> None:
        """Take a marker out of the scene; nothing happens where it is gone."""
        node, n = self._find(key)
        if node is None:
            return
        if n is not None:
            node.RemoveNthControlPoint(n)
        if n is None or not node.GetNumberOfControlPoints():
            self.forget(node)
            removeNode(node)

    def removeSegment(self, segmentId: str) -> None:
        """Take all markers of a segment out of the scene."""
        for node in [node for node in self._nodes() if node.GetAttribute(SEGMENT) == segmentId]:
            self.forget(node)
            removeNode(node)

    def removeOrphans(self) -> None:
        """Take markers out of the scene whose segmentation is gone."""
        nodes = self._scene.GetNodesByClass("vtkMRMLMarkupsNode")
        nodes.UnRegister(None)
        for node in [nodes.GetItemAsObject(n) for n in range(nodes.GetNumberOfItems())]:
            if node.GetAttribute(SEGMENT) and node.GetNodeReference(SEGMENTATION) is None:
                self.forget(node)
                removeNode(node)

    def adopt(self, node: Any, segmentId: str, positive: bool, kind: str, number: int) -> None:
        """Make a node that Slicer itself placed (an ROI) a prompt."""
        self._mark(node, segmentId, positive, kind)
        node.SetAttribute(NUMBER, str(number))
        _style(node.GetDisplayNode(), kind, positive)
        self._observe(node)

    def _pointList(self, segmentId: str, positive: bool) -> Any:
        for node in self._nodes():
            kind, polarity = node.GetAttribute(KIND), node.GetAttribute(POLARITY)
            if (node.GetAttribute(SEGMENT), kind, polarity) == (segmentId, "point", _word(positive)):
                return node
        node = self._newNode(segmentId, positive, "point")
        self._observe(node)
        return node

    def _newNode(self, segmentId: str, positive: bool, kind: str) -> Any:
        node = self._scene.CreateNodeByClass(CLASSES[kind])
        node.UnRegister(None)
        segment = self.segmentationNode.GetSegmentation().GetSegment(segmentId)
        if kind in ("scribble", "lasso"):
            node.SetCurveTypeToLinear()  # what is seen is what the engine gets, not a spline through it
        node.SetName(f"{segment.GetName() if segment else segmentId} {'+' if positive else '-'} {kind}")
        self._mark(node, segmentId, positive, kind)
        selection = self._scene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
        theirs = selection.GetActivePlaceNodeID() if selection is not None else None
        self._scene.AddNode(node)
        if selection is not None:  # Slicer makes a new list the one that its own place mode adds to
            selection.SetActivePlaceNodeID(theirs)
        parent = self.volumeNode.GetParentTransformNode()
        node.SetAndObserveTransformNodeID(parent.GetID() if parent else None)
        node.CreateDefaultDisplayNodes()
        _style(node.GetDisplayNode(), kind, positive)
        return node

    def _mark(self, node: Any, segmentId: str, positive: bool, kind: str) -> None:
        node.SetAttribute(SEGMENT, segmentId)
        node.SetAttribute(POLARITY, _word(positive))
        node.SetAttribute(KIND, kind)
        node.SetNodeReferenceID(SEGMENTATION, self.segmentationNode.GetID())
        if self.frame:
            node.SetAttribute(FRAME, self.frame)

    def _shape(self, node: Any, prompt: Prompt) -> None:
        """Give a node the geometry of its prompt."""
        matrix = np.linalg.inv(matrixBetween(node, self.volumeNode))
        if isinstance(prompt, BoxPrompt):
            edges = np.array(prompt.edges) @ matrix[:3, :3].T
            corner = apply_affine(matrix, prompt.corner)
            size = np.linalg.norm(edges, axis=1)
            pose = np.eye(4)
            pose[:3, :3] = (edges / size[:, None]).T
            if np.linalg.det(pose[:3, :3]) < 0:  # an ROI's axes are right-handed
                pose[:3, 0] *= -1
            pose[:3, 3] = corner + edges.sum(axis=0) / 2
            node.SetAndObserveObjectToNodeMatrix(toVtk(pose))
            node.SetSize(*size)
            node.SetCenter(*pose[:3, 3])
            return
        if isinstance(prompt, ScribblePrompt):
            node.SetAttribute(RADIUS, repr(prompt.radius))
        points = apply_affine(matrix, prompt.points)
        data = vtk.vtkPoints()
        data.SetDataTypeToDouble()
        for point in points:
            data.InsertNextPoint(point)
        node.SetControlPointPositionsWorld(data) if node.GetParentTransformNode() is None else _setLocal(node, points)

    def _toNode(self, node: Any, ras: Any) -> tuple[float, float, float]:
        return _triple(apply_affine(np.linalg.inv(matrixBetween(node, self.volumeNode)), ras))

    def _find(self, key: str) -> tuple[Any, int | None]:
        nodeId, _, point = key.partition("#")
        node = self._scene.GetNodeByID(nodeId)
        if node is None or not point:
            return node, None
        n = node.GetNthControlPointIndexByID(point)
        return (node, n) if n >= 0 else (None, None)

    # -- observers ---------------------------------------------------------------------------------------------------

    def lookAgain(self) -> None:
        """What changed earlier can be dealt with only now."""
        self._onChange()

    def noticeNew(self) -> None:
        """Observe nodes that came by other ways: scene import, a copy."""
        self._highest = None
        for node in self._nodes():
            self._observe(node)

    def lock(self, segmentId: str, locked: bool) -> None:
        """Keep the mouse from moving the prompts of a segment, or let it."""
        for node in self._nodes():
            if node.GetAttribute(SEGMENT) == segmentId:
                node.SetLocked(locked)

    def _observe(self, node: Any) -> None:
        if node in self._observed:
            return
        self._showOrHide(node)
        events = (
            vtk.vtkCommand.ModifiedEvent,
            node.PointModifiedEvent,
            node.PointPositionDefinedEvent,
            node.PointRemovedEvent,
        )
        tags = [node.AddObserver(event, lambda *_: self._onChange()) for event in events]
        tags.append(node.AddObserver(node.PointStartInteractionEvent, lambda *_: self._held.add(node)))
        tags.append(node.AddObserver(node.PointEndInteractionEvent, lambda *_: self._letGo(node)))
        self._observed[node] = tags

    def _letGo(self, node: Any) -> None:
        self._held.discard(node)
        self._onChange()

    def forget(self, node: Any) -> bool:
        """Observe a node no more; whether it was observed."""
        tags = self._observed.pop(node, ())
        for tag in tags:
            node.RemoveObserver(tag)
        self._held.discard(node)
        return bool(tags)


def removeNode(node: Any) -> None:
    """Take a node out of its scene, and what shows and stores it: Slicer leaves those behind."""
    scene = node.GetScene()
    parts = [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]
    parts += [node.GetNthStorageNode(n) for n in range(node.GetNumberOfStorageNodes())]
    scene.RemoveNode(node)
    for part in parts:
        if part is not None and part.GetScene() is scene:  # Slicer's window takes some away by itself
            scene.RemoveNode(part)


def same(a: Prompt, b: Prompt) -> bool:
    """Whether two prompts are the same to a thousandth of a millimetre."""
    if type(a) is not type(b) or a.polarity is not b.polarity:
        return False
    if isinstance(a, BoxPrompt):
        # an ROI may name another corner of the same box
        return _near(_corners(a), _corners(b))
    if isinstance(a, PointPrompt):
        return _near(a.ras, b.ras)
    if isinstance(a, ScribblePrompt) and abs(a.radius - b.radius) > MOVED:
        return False
    return len(a.points) == len(b.points) and _near(a.points, b.points)


def _near(a: Any, b: Any) -> bool:
    return bool(np.abs(np.asarray(a) - np.asarray(b)).max() < MOVED)


def _corners(box: BoxPrompt) -> FloatArray:
    """Centre and the diagonal's extent along each world axis: the same for every naming of its corners."""
    edges = np.array(box.edges)
    centre = np.array(box.corner) + edges.sum(axis=0) / 2
    return np.concatenate([centre[None], (edges.T @ edges)])


def _promptOf(node: Any, kind: str, matrix: FloatArray) -> Prompt | None:
    polarity = _polarity(node)
    try:
        if kind in ("box", "roi"):
            return _boxOf(node, matrix, polarity)
        points = [node.GetNthControlPointPosition(n) for n in range(node.GetNumberOfControlPoints())]
        if not points:
            return None
        ras = tuple(map(_triple, apply_affine(matrix, points)))
        if kind == "scribble":
            return ScribblePrompt(ras, float(node.GetAttribute(RADIUS) or 1.0), polarity)
        return LassoPrompt(ras, None, polarity)
    except PromptError:
        return None  # still being drawn, or bent out of its plane


def _boxOf(node: Any, matrix: FloatArray, polarity: Polarity) -> BoxPrompt | None:
    size = np.array(node.GetSize())
    if size.min() <= 0 or not node.GetNumberOfDefinedControlPoints():
        return None
    pose = matrix @ toNumpy(node.GetObjectToNodeMatrix())
    edges = (pose[:3, :3] * size).T
    corner = pose[:3, 3] - edges.sum(axis=0) / 2
    return BoxPrompt(_triple(corner), tuple(map(_triple, edges)), polarity)


def _setLocal(node: Any, points: FloatArray) -> None:
    state = node.StartModify()
    while node.GetNumberOfControlPoints() > len(points):
        node.RemoveNthControlPoint(node.GetNumberOfControlPoints() - 1)
    for n, point in enumerate(points):
        if n < node.GetNumberOfControlPoints():
            node.SetNthControlPointPosition(n, *point)
        else:
            node.AddControlPoint(vtk.vtkVector3d(*point))
    node.EndModify(state)


def _style(display: Any, kind: str, positive: bool) -> None:
    color = GREEN if positive else RED
    display.SetColor(*color)
    display.SetSelectedColor(*color)
    display.SetActiveColor(*(min(1.0, c + 0.3) for c in color))
    display.SetPointLabelsVisibility(False)
    display.SetPropertiesLabelVisibility(False)
    display.SetSnapMode(display.SnapModeUnconstrained)
    display.SetGlyphScale(1.6 if kind == "point" else 0.8)
    display.SetLineThickness(0.3)
    if kind in ("box", "roi"):
        display.SetFillOpacity(0.05)
        display.SetHandlesInteractive(kind == "roi")  # to be fitted; a box drawn on a slice is as it was drawn


def _polarity(node: Any) -> Polarity:
    return Polarity.NEGATIVE if node.GetAttribute(POLARITY) == "negative" else Polarity.POSITIVE


def _word(positive: bool) -> str:
    return "positive" if positive else "negative"


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _whole(text: str | None) -> int:
    """A number that somebody may have edited: anything else counts as the first."""
    return int(text) if text and text.isdecimal() else 0
