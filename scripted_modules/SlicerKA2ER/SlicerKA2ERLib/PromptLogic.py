"""`PromptLogic`: prompts in a viewer, segments in the scene. Read `addPoint`, `_give` and `_apply` first.

    click -> marker in the scene -> request: what the engine must know + the prompt -> changed boxes -> segments

The scene is the truth. Markers and segments may be changed by anybody at any time: what a hand changed is told to the
engine before the next prompt (`EngineMirror`), and markers that moved or went are found by comparing them with what
the engine was told (`PromptLedger`). Only the main thread touches MRML; a worker thread asks the engine
(`Conversation`).

No Qt here: the same class runs in Slicer, in tests on a bare scene, and in a browser viewer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer
import vtk

from KA2ERSegment.errors import CancelledError, KA2ERError, SessionStateError
from KA2ERSegment.geometry import BoolArray, Box, apply_affine
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, MaskPrompt, PointPrompt, Polarity, Prompt, ScribblePrompt
from KA2ERSegment.steps import Neighbours
from SlicerKA2ERLib import Terminology
from SlicerKA2ERLib.Confidence import Confidence
from SlicerKA2ERLib.Conversation import SEGMENTING, UPDATING, Conversation, Outcome, Request
from SlicerKA2ERLib.EngineMirror import EngineMirror, select
from SlicerKA2ERLib.Outline import Outline
from SlicerKA2ERLib.PromptLedger import PromptLedger, revised
from SlicerKA2ERLib.PromptNodes import PromptNodes
from SlicerKA2ERLib.Protocols import (
    NEIGHBOURS,
    STATUSES,
    TOOLS,
    Color,
    EngineProtocol,
    ExpertRow,
    PromptRow,
    Ras,
    SegmentRow,
)
from SlicerKA2ERLib.SegmentWriter import (
    LOCKED,
    SegmentWriter,
    bindToVolume,
    isLocked,
    newSegment,
    newSegmentation,
    requireLabelmaps,
    segmentIds,
)
from SlicerKA2ERLib.SequenceLogic import SequenceLogic
from SlicerKA2ERLib.SliceTools import SliceTools
from SlicerKA2ERLib.VolumeIO import matrixBetween, volumeData

logger = logging.getLogger("KA2ERSegment")
STAYS = "undo and redo must not change a locked segment, {name!r} is locked. Unlock it first."


@dataclass(frozen=True)
class Seed:
    """What a segment of the next frame begins with."""

    segment: str
    mask: MaskPrompt
    points: tuple[PointPrompt, ...]


class PromptLogic:
    """`Protocols.PromptLogicProtocol` on a MRML scene.

    Args:
        scene: the MRML scene.
        applicationLogic: Slicer's vtkMRMLApplicationLogic (`slicer.app.applicationLogic()`).
        legends: in slice views, of the overlays; a viewer that has its own leaves them out.
    """

    def __init__(self, scene: Any, applicationLogic: Any, legends: bool = True) -> None:
        self.observers: list[Callable[[str], None]] = []
        self.volumeNode: Any = None
        self.segmentationNode: Any = None
        self.segmentEditorNode: Any = None
        self._selectedSegment = ""
        self.tool, self.positive, self.brushRadius = "none", True, 3.0
        self.neighbours = "keep"
        self.lastError = ""
        self.suggestion: tuple[Ras, bool] | None = None
        self._scene, self._applicationLogic = scene, applicationLogic
        self._writer = SegmentWriter(scene, applicationLogic)
        self._mirror = EngineMirror(self._writer)
        self._markers = PromptNodes(scene, self._onMarkersChanged)
        self._ledger = PromptLedger(self._markers)
        self._engine = Conversation(self._mirror, self._ledger, self._apply, self._onFailure)
        self._confidence = Confidence(scene, applicationLogic, self._engine, legends)
        self._outline = Outline(scene)
        self._tools = SliceTools(scene, applicationLogic, self)
        self._sequence = SequenceLogic(scene, self)
        self._experts: frozenset[str] | None = None  # that take part; None: all
        self._markersChanged = False
        self._appearance: dict[str, tuple[str, Color]] = {}
        self._removed: dict[str, tuple[str, Color]] = {}
        self._segmentsChanged = False
        self._segmentationTags: list[tuple[Any, int]] = []
        self._sceneTags = [
            scene.AddObserver(slicer.vtkMRMLScene.StartCloseEvent, lambda *_: self._onSceneCloses()),
            scene.AddObserver(slicer.vtkMRMLScene.EndImportEvent, lambda *_: self._onSceneImported()),
            scene.AddObserver(slicer.vtkMRMLScene.NodeRemovedEvent, _withNode(self._onNodeRemoved)),
        ]

    # -- engine ------------------------------------------------------------------------------------------------------

    def connectEngine(self, engineFactory: Callable[[], EngineProtocol] | None) -> None:
        link = self._engine.link
        if link.isStopped:
            link.replaceFactory(engineFactory)
            self._notify("state")
        else:
            news = lambda _: self._notify("state", "experts")  # noqa: E731
            self._engine.inWorker(lambda: link.replaceFactory(engineFactory), news)

    @property
    def engineState(self) -> str:
        return self._engine.link.state

    @property
    def engineLog(self) -> list[str]:
        """The engine's last lines: no image content, no names."""
        return list(self._engine.link.log)

    @property
    def bundleIdentity(self) -> str:
        """Of the bundle that the engine runs; empty before an engine answered."""
        return str(self._engine.link.info.get("bundle", {}).get("identity", ""))

    def journal(self) -> dict[str, Any]:
        journal = self._engine.link.journal
        return dict(journal) if journal else {}

    def warmUp(self) -> None:
        if self.volumeNode is not None and self.engineState != "none":
            self._engine.ask("warmUp", lambda session: None, lambda _: self._notify("state", "experts"))
            self._notify("state")

    # -- nodes -------------------------------------------------------------------------------------------------------

    def setVolumeNode(self, node: Any) -> None:
        if node is not self.volumeNode:
            self._work(node, self.segmentationNode)

    def setSegmentationNode(self, node: Any) -> None:
        if node is not self.segmentationNode:
            ids = segmentIds(node) if node is not None else []
            self.selectedSegment = ids[0] if ids else ""
            self._work(self.volumeNode, node)

    def _work(self, volumeNode: Any, segmentationNode: Any, keepMarkers: bool = False) -> None:
        """Change what is worked on. What is under way for the former is cancelled, and its markers go."""
        if not keepMarkers:
            self._ledger.withdraw(list(self._ledger.pending))
        self._engine.abandon()
        self._confidence.clear()
        self._outline.clear()
        self._tools.abort()
        self.suggestion = None
        self._observeSegmentation(segmentationNode)
        self.volumeNode, self.segmentationNode = volumeNode, segmentationNode
        self._engine.volumeNode, self._engine.segmentationNode = volumeNode, segmentationNode
        self._markers.frame = self._sequence.begin()
        self._markers.setNodes(volumeNode, segmentationNode)
        self._ledger.adopt()
        self._markersChanged = False
        self._notify("state", "prompts", "experts", "busy")

    def addSliceView(self, interactor: Any, sliceNode: Any) -> None:
        self._tools.add(interactor, sliceNode)

    def removeSliceViews(self) -> None:
        self._tools.removeAll()

    @property
    def saveStateForUndo(self) -> Callable[[], Any] | None:
        """Of the Segment Editor on the screen (`qMRMLSegmentEditorWidget.saveStateForUndo`): its Undo knows us then."""
        return self._writer.saveStateForUndo

    @saveStateForUndo.setter
    def saveStateForUndo(self, save: Callable[[], Any] | None) -> None:
        self._writer.saveStateForUndo = save

    @property
    def selectedSegment(self) -> str:
        return self._selectedSegment

    @selectedSegment.setter
    def selectedSegment(self, segmentId: str) -> None:
        self._selectedSegment = segmentId
        self._markers.show(segmentId)

    # -- segments ----------------------------------------------------------------------------------------------------

    def segments(self) -> list[SegmentRow]:
        if self.segmentationNode is None:
            return []
        prompted = self._markers.hasPrompts()
        return [self._segmentRow(segmentId, segmentId in prompted) for segmentId in segmentIds(self.segmentationNode)]

    def _segmentRow(self, segmentId: str, hasPrompts: bool) -> SegmentRow:
        segment = self.segmentationNode.GetSegmentation().GetSegment(segmentId)
        status, quality = Terminology.status(segment), self._qualityOf(segmentId)
        locked = bool(segment.HasTag(LOCKED))
        return SegmentRow(segmentId, segment.GetName(), segment.GetColor(), status, quality, hasPrompts, locked)

    def _qualityOf(self, segmentId: str) -> float | None:
        known = self._mirror.known.get(segmentId)
        if known is None or self._mirror.isEdited(self.segmentationNode, segmentId):
            return None
        return known.quality

    def selectSegment(self, segmentId: str) -> None:
        if segmentId != self.selectedSegment:
            self._requireSegment(segmentId)
            self.selectedSegment = segmentId
            self.suggestion = None
            self._showConfidence()
            self._notify("state", "prompts", "experts")

    def addSegment(self, name: str | None = None) -> str:
        node = self.requireSegmentation()
        if not segmentIds(node) and self.volumeNode is not None:
            bindToVolume(node, self.volumeNode)
        segmentId = newSegment(node, name or "")
        self.selectSegment(segmentId)
        return segmentId

    def nextSegment(self) -> str:
        current = self.selectedSegment
        if current and current not in self._markers.hasPrompts() and self._isEmpty(current):
            return current
        return self.addSegment()

    def removeSegment(self, segmentId: str) -> None:
        self._requireSegment(segmentId)
        self.requireUnlocked(segmentId)
        self.segmentationNode.GetSegmentation().RemoveSegment(segmentId)
        self._followSegments()

    def setTerminology(self, segmentId: str, entry: str) -> None:
        Terminology.apply(self._requireSegment(segmentId), entry, self._applicationLogic)
        self._notify("state")

    def setStatus(self, segmentId: str, status: str) -> None:
        if status not in STATUSES:
            message = f"a status must be one of {', '.join(STATUSES)}, got {status!r}."
            raise SessionStateError(message)
        Terminology.setStatus(self._requireSegment(segmentId), status)
        self._notify("state")

    def setLocked(self, segmentId: str, locked: bool) -> None:
        segment = self._requireSegment(segmentId)
        if locked:
            segment.SetTag(LOCKED, "1")
        else:
            segment.RemoveTag(LOCKED)
        self._markers.lock(segmentId, bool(locked))
        self._notify("state")

    def isTaken(self, segmentId: str, box: Box) -> BoolArray | None:
        """Where in a box of the volume a hand must not paint a segment, so that its neighbours keep what is theirs."""
        if self.neighbours == "overlap":
            return None
        others = [other for other in segmentIds(self.segmentationNode) if other != segmentId]
        if self.neighbours == "compete":
            others = [other for other in others if isLocked(self.segmentationNode, other)]
        return self._writer.covered(self.segmentationNode, others, box, self.volumeNode, volumeData(self.volumeNode))

    def requireUnlocked(self, *names: str) -> None:
        """SessionStateError where one of these segments is locked."""
        for segmentId in names:
            if self._isLocked(segmentId):
                name = self.segmentationNode.GetSegmentation().GetSegment(segmentId).GetName()
                message = (
                    f"the segment must not be locked to be changed, {name!r} is. Unlock it, or choose another one."
                )
                raise SessionStateError(message)

    def _isLocked(self, segmentId: str) -> bool:
        return self.segmentationNode is not None and isLocked(self.segmentationNode, segmentId)

    def _isEmpty(self, segmentId: str) -> bool:
        if self.volumeNode is None:
            return False
        data = volumeData(self.volumeNode)
        _, labels, value = self._writer.labels(self.segmentationNode, segmentId, self.volumeNode, data, {})
        return not (labels == value).any()

    def _requireSegment(self, segmentId: str) -> Any:
        node = self.segmentationNode
        segment = node.GetSegmentation().GetSegment(segmentId) if node is not None else None
        if segment is None:
            message = f"there is no segment {segmentId!r}. Choose one of the list."
            raise SessionStateError(message)
        return segment

    def requireSegmentation(self) -> Any:
        """The segmentation; a new one where there is none."""
        if self.segmentationNode is None:
            volume = self._requireVolume()
            self.setSegmentationNode(newSegmentation(self._scene, volume, f"{volume.GetName()} segmentation"))
        return self.segmentationNode

    def _requireVolume(self) -> Any:
        if self.volumeNode is None:
            message = "a volume must be chosen before the first prompt."
            raise SessionStateError(message)
        return self.volumeNode

    # -- tools and prompts -------------------------------------------------------------------------------------------

    def setTool(self, tool: str) -> None:
        if tool not in TOOLS:
            message = f"a tool must be one of {', '.join(TOOLS)}, got {tool!r}."
            raise SessionStateError(message)
        if tool == self.tool:
            return
        self._tools.abort()
        self.tool = tool
        self._tools.placeRoi(tool == "roi")
        self._notify("state")

    def setPolarity(self, positive: bool) -> None:
        self.positive = bool(positive)
        self._notify("state")

    def setBrushRadius(self, millimetres: float) -> None:
        self.brushRadius = max(0.1, float(millimetres))
        self._notify("state")

    def addPoint(self, ras: Ras, positive: bool | None = None) -> None:
        """One click, world RAS."""
        begin = time.perf_counter()
        (local,) = self._toVolume([ras])
        prompt = PointPrompt(local, self._polarity(positive))
        prompt.ijk(volumeData(self.volumeNode).grid)
        self._give(prompt, "point", begin)

    def addBox(self, corner: Ras, edges: Sequence[Ras], positive: bool | None = None, kind: str = "box") -> None:
        begin = time.perf_counter()
        points = self._toVolume([corner, *(np.add(corner, edge) for edge in edges)])
        sides = tuple(_triple(np.subtract(point, points[0])) for point in points[1:])
        prompt = BoxPrompt(points[0], sides, self._polarity(positive))
        prompt.box(volumeData(self.volumeNode).grid)
        self._give(prompt, kind, begin)

    def addScribble(self, points: Sequence[Ras], positive: bool | None = None, radius: float | None = None) -> None:
        begin = time.perf_counter()
        prompt = ScribblePrompt(
            tuple(self._toVolume(points)), self.brushRadius if radius is None else radius, self._polarity(positive)
        )
        prompt.region(volumeData(self.volumeNode).grid)
        self._give(prompt, "scribble", begin)

    def addLasso(self, points: Sequence[Ras], positive: bool | None = None) -> None:
        begin = time.perf_counter()
        prompt = LassoPrompt(tuple(self._toVolume(points)), None, self._polarity(positive))
        prompt.region(volumeData(self.volumeNode).grid)
        self._give(prompt, "lasso", begin)

    def prompts(self, segmentId: str | None = None) -> list[PromptRow]:
        wanted = self.selectedSegment if segmentId is None else segmentId
        return [
            PromptRow(marker.key, marker.kind, marker.positive, marker.number)
            for marker in self._markers.markers()
            if marker.segmentId == wanted
        ]

    def deletePrompt(self, nodeId: str) -> None:
        self.requireUnlocked(*(marker.segmentId for marker in self._markers.markers() if marker.key == nodeId))
        self._markers.remove(nodeId)
        self._markersChanged = True
        self.poll()

    def _polarity(self, positive: bool | None) -> Polarity:
        return Polarity.POSITIVE if (self.positive if positive is None else positive) else Polarity.NEGATIVE

    def _toVolume(self, points: Sequence[Ras]) -> list[Ras]:
        """World RAS -> the volume's local RAS; GeometryError under a nonlinear transform."""
        matrix = matrixBetween(None, self._requireVolume())
        return [_triple(point) for point in apply_affine(matrix, points)]

    def _give(self, prompt: Prompt, kind: str, begin: float) -> None:
        """Show a prompt that fits the volume, and hand it to the engine when its turn comes."""
        self._readyForPrompts()
        key = self._markers.place(self.selectedSegment, prompt, kind, self._markers.nextNumber())
        self._submitPrompt(self.selectedSegment, prompt, key)
        self._engine.time("event", time.perf_counter() - begin)
        self._notify("prompts", "busy")

    def giveRoi(self, node: Any) -> None:
        """An ROI that Slicer placed becomes a prompt: found by `_followMarkers` like any other marker."""
        self._readyForPrompts()
        self._markers.adopt(node, self.selectedSegment, self.positive, "roi", self._markers.nextNumber())
        self._markersChanged = True

    def _readyForPrompts(self) -> None:
        """An engine to ask, a segmentation and a segment to write to."""
        if self.engineState == "none":
            message = "no engine is set up. Finish the installation first."
            raise SessionStateError(message)
        node = self.requireSegmentation()
        requireLabelmaps(node)
        if node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is None:
            node.SetReferenceImageGeometryParameterFromVolumeNode(self._requireVolume())  # export to DICOM looks for it
        if not self.selectedSegment:
            self.addSegment()
        self.requireUnlocked(self.selectedSegment)

    def _submitPrompt(self, segment: str, prompt: Prompt, key: str) -> None:
        self._ledger.pending[key] = segment, prompt
        neighbours, experts, mirror = self._effectiveNeighbours(), self._experts, self._mirror

        def verb(session: Any) -> tuple[Any, ...]:
            if experts != mirror.expertsTold:
                session.use_experts(None if experts is None else sorted(experts))
                mirror.expertsTold = experts
            select(session, segment)
            return (session.add(prompt, neighbours),)

        self._engine.submit(Request(SEGMENTING, verb, segment, (key,), ("prompt", key)))

    def _effectiveNeighbours(self) -> Neighbours:
        """The Segment Editor's overwrite mode can only forbid: nothing is taken from segments unless both allow it."""
        editor = self.segmentEditorNode
        if self.neighbours == "compete" and editor is not None and editor.GetOverwriteMode() == editor.OverwriteNone:
            return Neighbours.OVERLAP
        return Neighbours(self.neighbours)

    # -- undo, redo, options -----------------------------------------------------------------------------------------

    @property
    def canUndo(self) -> bool:
        return self._mirror.canUndo and self._mirror.depth > 0 and not self._ledger.pending

    @property
    def canRedo(self) -> bool:
        return self._mirror.canRedo and not self._ledger.pending

    def undo(self) -> None:
        floor = self._mirror.floor or ()

        locked = self._locked()

        def verb(session: Any) -> tuple[Any, ...]:
            before = session.steps
            change = session.undo()
            if session.steps[: len(floor)] != floor:
                return change, session.redo()  # what was in the scene before the first prompt is not ours to take back
            if (name := _stepsOn(before, session.steps, locked)) is not None:
                session.redo()
                raise SessionStateError(STAYS.format(name=name))
            return (change,)

        self._engine.submit(Request(UPDATING, verb, direction=-1))
        self._notify("busy")

    def redo(self) -> None:
        locked = self._locked()

        def verb(session: Any) -> tuple[Any, ...]:
            before = session.steps
            change = session.redo()
            if (name := _stepsOn(before, session.steps, locked)) is not None:
                session.undo()
                raise SessionStateError(STAYS.format(name=name))
            return (change,)

        self._engine.submit(Request(UPDATING, verb, direction=+1))
        self._notify("busy")

    def _locked(self) -> frozenset[str]:
        if self.segmentationNode is None:
            return frozenset()
        return frozenset(one for one in segmentIds(self.segmentationNode) if self._isLocked(one))

    def reset(self) -> None:
        if self.selectedSegment:
            self.requireUnlocked(self.selectedSegment)
            self._submitOn(self.selectedSegment, lambda session: session.reset())

    def setNeighbours(self, neighbours: str) -> None:
        if neighbours not in NEIGHBOURS:
            message = f"neighbours must be one of {', '.join(NEIGHBOURS)}, got {neighbours!r}."
            raise SessionStateError(message)
        self.neighbours = neighbours
        self._notify("state")

    @property
    def smoothingMm(self) -> float:
        return self._mirror.finishOf(self.selectedSegment)[0]

    @property
    def islands(self) -> bool:
        return self._mirror.finishOf(self.selectedSegment)[1]

    def setFinish(self, smoothingMm: float, islands: bool) -> None:
        segment, wanted = self.selectedSegment, (float(smoothingMm), bool(islands))
        if not segment or wanted == self._mirror.finishOf(segment):
            return
        self.requireUnlocked(segment)
        self._mirror.finishes[segment] = wanted
        self._submitOn(segment, lambda session: session.finish(*wanted), ("finish", segment))
        self._notify("state")

    def _submitOn(self, segment: str, verb: Callable[[Any], Any], jobKey: Any = None) -> None:
        """Queue a verb on one segment that brings no prompt."""

        def onSegment(session: Any) -> tuple[Any, ...]:
            select(session, segment)
            return (verb(session),)

        self._engine.submit(Request(UPDATING, onSegment, segment, jobKey=jobKey))
        self._notify("busy")

    # -- work under way ----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> str:
        return self._engine.busy

    @property
    def isIdle(self) -> bool:
        """Whether nothing is under way or waits: no verb, no question, no marker that was not looked at."""
        return self._engine.isIdle and not self._markersChanged and not self._segmentsChanged

    @property
    def outlinesChange(self) -> bool:
        """Whether what the latest prompt changed is outlined in the views just now."""
        return self._outline.isShown

    @property
    def elapsedSeconds(self) -> float:
        return self._engine.elapsedSeconds

    @property
    def progress(self) -> tuple[str, float | None]:
        return self._engine.progress

    @property
    def timings(self) -> dict[str, list[float]]:
        return self._engine.timings

    def cancel(self) -> None:
        self._engine.cancel()
        self._notify("busy", "prompts")

    def _apply(self, outcome: Outcome, direction: int) -> None:
        """Write what changed, and show it."""
        begin = time.perf_counter()
        mirror = self._mirror
        mirror.depth = max(0, mirror.depth + outcome.pushed)
        mirror.steps = outcome.steps
        mirror.readFinishes()
        last = outcome.changes[-1]
        mirror.canUndo, mirror.canRedo = last.can_undo, last.can_redo
        self._write(outcome.changes, direction != 0)
        self._engine.reconcile()
        self.suggestion = None
        self._engine.time("write", time.perf_counter() - begin)
        self._showConfidence()
        self._notify("result", "prompts", "state", "busy")

    def _write(self, changes: Sequence[Any], inHistory: bool) -> None:
        data = volumeData(self.volumeNode)
        node, mirror = self.segmentationNode, self._mirror
        saved, keptOff = False, () if self.neighbours == "overlap" else tuple(self._locked())
        for change in (one for several in changes for one in several.objects):
            if node.GetSegmentation().GetSegment(change.name) is None and not (
                inHistory and change.exists and self._bringBack(change.name)
            ):
                continue  # deleted meanwhile
            if not saved and change.box.size and self._writer.saveStateForUndo is not None:
                saved = True
                self._writer.saveStateForUndo()
            edited = mirror.isEdited(node, change.name)
            written = self._writer.write(
                node, change.name, change.box, change.mask, self.volumeNode, data, self.segmentEditorNode, keptOff
            )
            mirror.noteWritten(node, change, written.equal, edited)
            if change.name == self.selectedSegment:
                self._outline.show(node, self.volumeNode, data, change.box, written.changed)

    def _bringBack(self, segmentId: str) -> bool:
        """A segment that was deleted and whose deletion was undone."""
        if segmentId not in self._removed:
            return False
        name, color = self._removed.pop(segmentId)
        newSegment(self.segmentationNode, name, segmentId, color)
        return True

    def _onFailure(self, error: BaseException) -> None:
        if not isinstance(error, CancelledError):
            ours = isinstance(error, KA2ERError)
            self.lastError = self._withNames(str(error)) if ours else f"something went wrong in the module: {error!r}"
            logger.warning("A request failed: %s", type(error).__name__, exc_info=None if ours else error)
            self._notify("error")
        self._notify("prompts", "state", "busy")

    def _withNames(self, text: str) -> str:
        """The engine knows segments by their IDs, the user by their names."""
        for segmentId in segmentIds(self.segmentationNode) if self.segmentationNode is not None else ():
            name = self.segmentationNode.GetSegmentation().GetSegment(segmentId).GetName()
            text = text.replace(repr(segmentId), repr(name))
        return text

    def report(self, error: KA2ERError) -> None:
        """A prompt that a tool drew was refused at once."""
        self._onFailure(error)

    # -- markers that the user changed -------------------------------------------------------------------------------

    def _onMarkersChanged(self) -> None:
        self._markersChanged = True

    def _followMarkers(self) -> None:
        """Tell the engine of markers that were moved, deleted, or placed by other tools."""
        self._markersChanged = False
        if self.segmentationNode is None or self.volumeNode is None:
            return
        found = self._ledger.differences()
        if found.withdrawn:
            self._engine.withdraw(found.withdrawn)
        for marker in found.new:
            if self._isLocked(marker.segmentId):
                self._markers.remove(marker.key)
                self._reportLocked(marker.segmentId)
            else:
                self._submitPrompt(marker.segmentId, marker.prompt, marker.key)
        for segment in found.moved:
            if self._isLocked(segment):
                self._engine.reconcile(restore=True)
                self._reportLocked(segment)
            else:
                self._submitRevision(segment)
        if found.moved or found.new or found.withdrawn:
            self._notify("prompts", "state", "busy")

    def _reportLocked(self, segment: str) -> None:
        try:
            self.requireUnlocked(segment)
        except SessionStateError as error:
            self.report(error)

    def _submitRevision(self, segment: str) -> None:
        request = Request(UPDATING, lambda session: (), segment, jobKey=("revise", segment), isRevision=True)
        request.verb = lambda session: (session.revise(revised(session.steps, segment, request.revises)),)
        self._engine.submit(request)

    # -- confidence --------------------------------------------------------------------------------------------------

    @property
    def quality(self) -> float | None:
        return self._qualityOf(self.selectedSegment) if self.selectedSegment else None

    def experts(self) -> list[ExpertRow]:
        known = self._mirror.known.get(self.selectedSegment)
        return self._confidence.rows(known.shares if known is not None else {}, self._experts)

    @property
    def disagreementShown(self) -> bool:
        return self._confidence.disagreementShown

    def setExpertShown(self, name: str, shown: bool) -> None:
        self._confidence.setShown(name, shown)
        self._showConfidence()
        self._notify("experts")

    def setExpertKind(self, name: str, kind: str) -> None:
        self._confidence.setKind(name, kind)
        self._showConfidence()
        self._notify("experts")

    def setExpertOpacity(self, name: str, opacity: float) -> None:
        self._confidence.setOpacity(name, opacity)
        self._notify("experts")

    def setExpertEnabled(self, name: str, enabled: bool) -> None:
        """From the next prompt on."""
        names = self._confidence.experts()
        if name not in names:
            message = f"expert must be one of {', '.join(names)}, got {name!r}."
            raise SessionStateError(message)
        taking = set(names if self._experts is None else self._experts)
        taking = taking | {name} if enabled else taking - {name}
        self._experts = None if taking == set(names) else frozenset(taking)
        self._notify("experts")

    def setDisagreementShown(self, shown: bool) -> None:
        self._confidence.setDisagreementShown(shown)
        self._showConfidence()
        self._notify("experts")

    def _showConfidence(self) -> None:
        """Ask for the overlays that are shown; nothing where none is."""
        segment = self.selectedSegment
        known = self._mirror.known.get(segment)
        answered = known.shares if known is not None else ()
        self._confidence.show(self.volumeNode, self.segmentationNode, segment, answered)

    def suggest(self) -> Ras | None:
        segment = self.selectedSegment
        if segment in self._mirror.known:
            self._engine.ask("suggest", lambda session: session.suggest(segment), self._onSuggestion)
        return None

    def _onSuggestion(self, suggestion: Any) -> None:
        self.suggestion = None
        if suggestion is not None:
            ras = _triple(apply_affine(matrixBetween(self.volumeNode, None), suggestion.ras))
            self.suggestion = ras, suggestion.polarity is Polarity.POSITIVE
            slicer.vtkMRMLSliceNode.JumpAllSlices(self._scene, *ras)
        self._notify("state")

    # -- sequences ---------------------------------------------------------------------------------------------------

    @property
    def hasFrames(self) -> bool:
        return self._sequence.hasFrames

    def segmentThisFrame(self) -> None:
        self._sequence.keepFrames()

    def propagate(self) -> None:
        self._sequence.propagate()

    def setFrame(self, frame: str) -> None:
        """Another frame of the sequence is on the screen."""
        self._ledger.withdraw(list(self._ledger.pending))
        self._markers.setFrame(frame)
        self._work(self.volumeNode, self.segmentationNode)

    def seedsOfFrame(self) -> list[Seed]:
        """What the next frame begins with: the mask of each segment that has one, and its positive points."""
        data = volumeData(self._requireVolume())
        points: dict[str, list[PointPrompt]] = {}
        for marker in self._markers.markers():
            if isinstance(marker.prompt, PointPrompt) and marker.positive:
                points.setdefault(marker.segmentId, []).append(marker.prompt)
        seeds = []
        for name in segmentIds(self.segmentationNode):
            if self._isLocked(name):
                continue  # giving it what another frame has would change it
            box, labels, value = self._writer.labels(self.segmentationNode, name, self.volumeNode, data, {})
            inside = labels == value
            if inside.any():
                mask = MaskPrompt(inside, box, data.grid.ijk_to_ras, data.grid.shape_kji)
                seeds.append(Seed(name, mask, tuple(points.get(name, ()))))
        return seeds

    def giveSeed(self, seed: Seed) -> None:
        """Begin a segment of this frame with what it was in the last one."""
        keys = []
        for point in seed.points:
            key = self._markers.place(seed.segment, point, "point", self._markers.nextNumber())
            self._ledger.pending[key] = seed.segment, point
            keys.append(key)
        neighbours = self._effectiveNeighbours()

        def verb(session: Any) -> tuple[Any, ...]:
            select(session, seed.segment)
            changes = [session.reset(), session.add(seed.mask, neighbours)]
            return (*changes, *(session.add(point, neighbours) for point in seed.points))

        self._engine.submit(Request(SEGMENTING, verb, seed.segment, tuple(keys)))
        self._notify("prompts", "busy")

    # -- life --------------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        self._sequence.poll()
        if self._segmentsChanged:
            self._followSegments()
        news = self._engine.poll()
        self._outline.poll()
        self._tools.poll()
        if self._markersChanged and not self._markers.dragging:
            self._followMarkers()
        if news:
            self._notify("busy")

    def close(self) -> None:
        for tag in self._sceneTags:
            self._scene.RemoveObserver(tag)
        self._sceneTags.clear()
        self._tools.removeAll()
        self._observeSegmentation(None)
        self._markers.release()
        self._confidence.clear()
        self._outline.clear()
        self._writer.release()
        self._engine.close()
        self.observers.clear()

    def _onSceneCloses(self) -> None:
        self.tool, self.selectedSegment = "none", ""
        self._removed.clear()
        self._markers.release()
        self._work(None, None, keepMarkers=True)

    def _onSceneImported(self) -> None:
        self._markers.noticeNew()
        self._ledger.adopt()
        self._notify("state", "prompts")

    def _onNodeRemoved(self, node: Any) -> None:
        if self._scene.IsClosing():
            return
        if node is self.volumeNode:
            self._work(None, self.segmentationNode)
        elif node is self.segmentationNode:
            self.selectedSegment = ""
            self._work(self.volumeNode, None)
        if node.IsA("vtkMRMLSegmentationNode"):
            self._markers.removeOrphans()
        elif node.IsA("vtkMRMLMarkupsNode") and self._markers.forget(node):
            self._markersChanged = True

    def _observeSegmentation(self, node: Any) -> None:
        for segmentation, tag in self._segmentationTags:
            segmentation.RemoveObserver(tag)
        self._segmentationTags.clear()
        self._segmentsChanged = False
        self._appearance.clear()
        self._removed.clear()
        if node is None:
            return
        segmentation = node.GetSegmentation()
        for event, callback in (
            (segmentation.SegmentRemoved, _withText(self._onSegmentRemoved)),
            (segmentation.SegmentAdded, self._onSegmentsChanged),
            (segmentation.SegmentModified, self._onSegmentsChanged),
        ):
            self._segmentationTags.append((segmentation, segmentation.AddObserver(event, callback)))
        self._noteAppearance(node)

    def _noteAppearance(self, node: Any) -> None:
        """Names and colours, for the case that a segment's deletion is undone."""
        for segmentId in segmentIds(node):
            segment = node.GetSegmentation().GetSegment(segmentId)
            self._appearance[segmentId] = segment.GetName(), segment.GetColor()

    def _onSegmentsChanged(self, *_: Any) -> None:
        self._segmentsChanged = True

    def _onSegmentRemoved(self, segmentId: str) -> None:
        """Looked at later: a sequence that shows another frame takes all segments away and puts them back."""
        self._removed[segmentId] = self._appearance.pop(segmentId, (segmentId, (0.5, 0.8, 0.5)))
        self._segmentsChanged = True

    def _followSegments(self) -> None:
        """Segments that went take their prompts along, and what is under way for them.

        The engine is told before the next prompt.
        """
        self._segmentsChanged = False
        if self.segmentationNode is None:
            return
        present = segmentIds(self.segmentationNode)
        for segmentId in [segmentId for segmentId in self._removed if segmentId not in present]:
            self._engine.forgetSegment(segmentId)
            self._markers.removeSegment(segmentId)
        self._noteAppearance(self.segmentationNode)
        if self.selectedSegment not in present:
            self.selectedSegment = present[0] if present else ""
            self.suggestion = None
            self._showConfidence()
        self._notify("state", "prompts", "experts")

    def _notify(self, *events: str) -> None:
        for event in events:
            for observer in list(self.observers):
                observer(event)


def _stepsOn(before: Sequence[Any], after: Sequence[Any], segments: Collection[str]) -> str | None:
    """The one of some segments whose steps are others in two journals; None where all are the same."""
    for name in segments:
        if [one for one in before if one["object"] == name] != [one for one in after if one["object"] == name]:
            return name
    return None


def _triple(values: Any) -> Ras:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _withNode(callback: Callable[[Any], None]) -> Callable[..., None]:
    """A VTK callback that is given a node."""

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def called(_caller: Any, _event: str, node: Any) -> None:
        callback(node)

    return called


def _withText(callback: Callable[[str], None]) -> Callable[..., None]:
    """A VTK callback that is given text."""

    @vtk.calldata_type(vtk.VTK_STRING)
    def called(_caller: Any, _event: str, text: str) -> None:
        callback(text)

    return called
