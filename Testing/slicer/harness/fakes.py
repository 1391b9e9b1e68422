"""Doubles of the panel's partners: they answer at once and write down what they were asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class FakeLogic:
    """PromptLogicProtocol: a scene's worth of state without engine and scene; `calls` is what the panel did.

    A test sets the state and says `tell(event)`, as the real logic does when something comes back from the engine.
    """

    def __init__(self, protocols: Any) -> None:
        self._protocols = protocols
        self.observers: list[Callable[[str], None]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.raises: dict[str, Exception] = {}
        self.engineState = "none"
        self.bundleIdentity = "ka2er-test@0123"
        self.volumeNode: Any = None
        self.segmentationNode: Any = None
        self.segmentEditorNode: Any = None
        self.saveStateForUndo: Callable[[], Any] | None = None
        self.selectedSegment = ""
        self.segmentRows: list[Any] = []
        self.promptRows: dict[str, list[Any]] = {}
        self.expertRows: list[Any] = []
        self.tool, self.positive, self.brushRadius = "none", True, 2.0
        self.canUndo = self.canRedo = False
        self.neighbours, self.smoothingMm, self.islands = "compete", 0.0, True
        self.busy, self.elapsedSeconds, self.progress = "", 0.0, ("", None)
        self.lastError = ""
        self.timings: dict[str, list[float]] = {}
        self.quality: float | None = None
        self.disagreementShown = False
        self.suggestion: Any = None
        self.hasFrames = False
        self.sliceViews: list[Any] = []
        self.polls = 0

    # what a test says

    def tell(self, event: str) -> None:
        for observer in list(self.observers):
            observer(event)

    def haveSegment(self, name: str, **more: Any) -> str:
        values = {"color": (0.9, 0.6, 0.1), "status": "in progress", "quality": None, "hasPrompts": True, **more}
        self.segmentRows.append(self._protocols.SegmentRow(id=name, name=name, **values))
        self.selectedSegment = name
        return name

    def change(self, rows: list[Any], index: int, **values: Any) -> None:
        rows[index] = dataclasses.replace(rows[index], **values)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of each call of that verb."""
        return [call[1:] for call in self.calls if call[0] == name]

    def _note(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if name in self.raises:
            raise self.raises[name]

    # what the panel asks

    def connectEngine(self, engineFactory: Any) -> None:
        self._note("connectEngine", engineFactory)
        self.engineState = "stopped"

    def warmUp(self) -> None:
        self._note("warmUp")
        self.engineState = "starting" if self.engineState == "stopped" else self.engineState

    def journal(self) -> dict[str, Any]:
        self._note("journal")
        return {}

    def setVolumeNode(self, node: Any) -> None:
        self._note("setVolumeNode", node)
        self.volumeNode = node
        self.tell("state")

    def setSegmentationNode(self, node: Any) -> None:
        self._note("setSegmentationNode", node)
        self.segmentationNode = node
        self.tell("state")

    def addSliceView(self, interactor: Any, sliceNode: Any) -> None:
        self._note("addSliceView", interactor, sliceNode)
        self.sliceViews.append(sliceNode)

    def removeSliceViews(self) -> None:
        self._note("removeSliceViews")
        self.sliceViews = []

    def segments(self) -> list[Any]:
        return list(self.segmentRows)

    def selectSegment(self, segmentId: str) -> None:
        self._note("selectSegment", segmentId)
        self.selectedSegment = segmentId
        self.tell("state")

    def addSegment(self, name: str | None = None) -> str:
        self._note("addSegment", name)
        return self.haveSegment(name or f"Segment_{len(self.segmentRows) + 1}", hasPrompts=False)

    def nextSegment(self) -> str:
        self._note("nextSegment")
        segment = self.haveSegment(f"Segment_{len(self.segmentRows) + 1}", hasPrompts=False)
        self.tell("state")
        return segment

    def removeSegment(self, segmentId: str) -> None:
        self._note("removeSegment", segmentId)
        self.segmentRows = [row for row in self.segmentRows if row.id != segmentId]
        self.selectedSegment = self.segmentRows[-1].id if self.segmentRows else ""
        self.tell("state")

    def setTerminology(self, segmentId: str, entry: str) -> None:
        self._note("setTerminology", segmentId, entry)

    def setStatus(self, segmentId: str, status: str) -> None:
        self._note("setStatus", segmentId, status)
        index = [row.id for row in self.segmentRows].index(segmentId)
        self.change(self.segmentRows, index, status=status)
        self.tell("state")

    def setLocked(self, segmentId: str, locked: bool) -> None:
        self._note("setLocked", segmentId, locked)
        self.change(self.segmentRows, [row.id for row in self.segmentRows].index(segmentId), locked=locked)
        self.tell("state")

    def setTool(self, tool: str) -> None:
        self._note("setTool", tool)
        self.tool = tool
        self.tell("state")

    def setPolarity(self, positive: bool) -> None:
        self._note("setPolarity", positive)
        self.positive = positive
        self.tell("state")

    def setBrushRadius(self, millimetres: float) -> None:
        self._note("setBrushRadius", millimetres)
        self.brushRadius = millimetres

    def addPoint(self, ras: Any, positive: bool | None = None) -> None:
        self._note("addPoint", ras, positive)

    def addBox(self, corner: Any, edges: Sequence[Any], positive: bool | None = None) -> None:
        self._note("addBox", corner, edges, positive)

    def addScribble(self, points: Sequence[Any], positive: bool | None = None, radius: float | None = None) -> None:
        self._note("addScribble", points, positive, radius)

    def addLasso(self, points: Sequence[Any], positive: bool | None = None) -> None:
        self._note("addLasso", points, positive)

    def prompts(self, segmentId: str | None = None) -> list[Any]:
        return list(self.promptRows.get(segmentId or self.selectedSegment, ()))

    def deletePrompt(self, nodeId: str) -> None:
        self._note("deletePrompt", nodeId)
        for segment, rows in self.promptRows.items():
            self.promptRows[segment] = [row for row in rows if row.nodeId != nodeId]
        self.tell("prompts")

    def undo(self) -> None:
        self._note("undo")

    def redo(self) -> None:
        self._note("redo")

    def reset(self) -> None:
        self._note("reset")

    def setNeighbours(self, neighbours: str) -> None:
        self._note("setNeighbours", neighbours)
        self.neighbours = neighbours

    def setFinish(self, smoothingMm: float, islands: bool) -> None:
        self._note("setFinish", smoothingMm, islands)
        self.smoothingMm, self.islands = smoothingMm, islands

    def cancel(self) -> None:
        self._note("cancel")
        self.busy = ""
        self.tell("busy")

    def experts(self) -> list[Any]:
        return list(self.expertRows)

    def _changeExpert(self, name: str, **values: Any) -> None:
        self.change(self.expertRows, [row.name for row in self.expertRows].index(name), **values)
        self.tell("experts")

    def setExpertShown(self, name: str, shown: bool) -> None:
        self._note("setExpertShown", name, shown)
        self._changeExpert(name, shown=shown)

    def setExpertKind(self, name: str, kind: str) -> None:
        self._note("setExpertKind", name, kind)
        self._changeExpert(name, kind=kind)

    def setExpertOpacity(self, name: str, opacity: float) -> None:
        self._note("setExpertOpacity", name, opacity)
        self._changeExpert(name, opacity=opacity)

    def setExpertEnabled(self, name: str, enabled: bool) -> None:
        self._note("setExpertEnabled", name, enabled)
        self._changeExpert(name, enabled=enabled)

    def setDisagreementShown(self, shown: bool) -> None:
        self._note("setDisagreementShown", shown)
        self.disagreementShown = shown

    def suggest(self) -> Any:
        self._note("suggest")

    def segmentThisFrame(self) -> None:
        self._note("segmentThisFrame")

    def propagate(self) -> None:
        self._note("propagate")

    def poll(self) -> None:
        self.polls += 1
        if "poll" in self.raises:
            raise self.raises["poll"]

    def close(self) -> None:
        self._note("close")


class FakeInstaller:
    """InstallerProtocol: `missing` is what it says is not there; `fails` are the reasons of the next tries."""

    def __init__(self, protocols: Any, missing: Sequence[str] = (), fails: Iterable[str] = ()) -> None:
        self._protocols = protocols
        self.missing, self.fails, self.reason = list(missing), list(fails), ""
        self.installs = 0
        self.duringInstall: Callable[[], None] = lambda: None

    def plan(self) -> Any:
        return self._protocols.InstallPlan(tuple(self.missing), 250 if self.missing else 0, self.reason)

    def install(self, onProgress: Callable[[str, float | None], None]) -> None:
        self.installs += 1
        onProgress("Downloading", None)
        self.duringInstall()
        if self.fails:
            self.reason = self.fails.pop(0)
            raise RuntimeError(self.reason)
        onProgress("Done", 1.0)
        self.missing, self.reason = [], ""


class FakeDialogs:
    """DialogsProtocol: answers with `answer`, and remembers what it was asked."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.errors: list[tuple[str, str]] = []

    def confirm(self, text: str, details: str = "") -> bool:
        self.asked.append(text)
        return self.answer

    def error(self, text: str, details: str = "") -> None:
        self.errors.append((text, details))
