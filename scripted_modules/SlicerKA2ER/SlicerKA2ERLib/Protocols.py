"""What the parts of the module promise each other, and the plain values that travel between them.

    widget  -> PromptLogicProtocol -> EngineProtocol -> (another process)
    widget  -> InstallerProtocol, SettingsProtocol, DialogsProtocol

Nothing here needs Slicer, so that each side can be tested with a stand-in for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TOOLS = ("none", "point", "box", "roi", "scribble", "lasso")
"""`roi` places a 3D box with Slicer's own ROI node; all others are drawn on a slice."""
NEIGHBOURS = ("keep", "compete", "overlap")
STATUSES = ("not started", "in progress", "completed", "flagged")
EVENTS = ("state", "busy", "result", "error", "experts", "prompts")
"""What observers of the logic are called with:

state     nodes, segments, selection, tool, undo and redo, options: read everything again
busy      `busy`, `progress` or `elapsedSeconds` changed
result    a segment changed by a prediction, undo or redo; `quality` and the experts' shares are new
error     `lastError` is a new message for the user
experts   the list of experts, or how one of them is shown
prompts   a prompt was placed, moved or deleted
"""

MODES = ("amalgamation", "decoders", "head")
"""Of experts: their features are merged; one of them decodes; they vote on the answer."""

Ras = tuple[float, float, float]
Color = tuple[float, float, float]


@dataclass(frozen=True)
class SegmentRow:
    """One segment of the segmentation.

    Args:
        id: of the segment in its segmentation node.
        color: red, green and blue, 0..1.
        status: one of STATUSES.
        quality: Dice to expect, 0..1; None where nothing was predicted since the last edit by hand.
        hasPrompts: whether prompts of it are in the scene.
        locked: whether it must stay as it is.
    """

    id: str
    name: str
    color: Color
    status: str
    quality: float | None
    hasPrompts: bool
    locked: bool = False


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a segment, oldest first.

    Args:
        nodeId: what `deletePrompt` takes: the ID of its markups node, for a point with "#" and the ID of the point.
        kind: "point", "box", "roi", "scribble" or "lasso".
        positive: whether it marks the segment or what is not.
        number: order of placing, over all segments.
    """

    nodeId: str
    kind: str
    positive: bool
    number: int


@dataclass(frozen=True)
class ExpertRow:
    """One expert.

    Args:
        name: as the engine calls it; "foundation" is the model without any expert.
        title: for people.
        color: of its overlay, 0..1.
        share: mean weight inside the current segment, 0..1; those of a mode sum to 1. None before the first prediction.
        shown: whether its overlay is in the slice views.
        kind: "probability" or "share": what the overlay shows.
        opacity: of the overlay, 0..1.
        enabled: whether it takes part in the next predictions.
        mode: how it takes part, one of MODES.
    """

    name: str
    title: str
    color: Color
    share: float | None
    shown: bool
    kind: str
    opacity: float
    enabled: bool
    mode: str = "amalgamation"

    @property
    def canBeLeftOut(self) -> bool:
        """Encoders can; the foundation always takes part, and decoders and voters do what their encoders are told."""
        return self.mode == "amalgamation" and self.name != "foundation"


class ClientProtocol(Protocol):
    """A running engine: `KA2ERSegment.engine.client.EngineClient`."""

    def info(self) -> dict[str, Any]: ...

    def open(self, array_kji: Any, ijk_to_ras: Any, name: str = "volume") -> Any:
        """A session (`RemoteSession`) on that volume."""


class EngineProtocol(Protocol):
    """Starts, watches and stops an engine: `KA2ERSegment.engine.process.LocalEngine`, or `Engines.RemoteEngine`."""

    log: Any
    """Its last lines, for the user who asks why it died."""

    def start(self) -> None:
        """Does not wait. Starts again where it died."""

    def poll(self) -> str:
        """ "starting", "ready" or "dead"."""

    def client(self) -> ClientProtocol: ...

    def restart(self) -> None:
        """Kill it at once and start another: for a prediction that does not stop when it is cancelled."""

    def stop(self) -> None: ...


class PromptLogicProtocol(Protocol):
    """All that the widget needs. Main thread only; nothing here waits for the engine.

    What cannot be done at once because of what the user gave raises a KA2ERError with a message for the user (a
    nonlinear transform, a prompt outside the volume). What the engine refuses later arrives as "error".
    """

    observers: list[Callable[[str], None]]

    # engine
    def connectEngine(self, engineFactory: Callable[[], EngineProtocol] | None) -> None:
        """How to make an engine when one is needed. One that runs is stopped; its prompts are replayed in the next."""

    def warmUp(self) -> None:
        """Start the engine and hand over the volume in the background, before the first prompt."""

    def journal(self) -> dict[str, Any]:
        """All prompts that the engine was told, as `Session.to_json` has them; empty before the first one."""

    bundleIdentity: str
    """Of the bundle that the engine runs; empty before an engine answered."""
    engineState: str
    """"none" (nothing to connect to), "stopped", "starting", "ready" or "dead"."""

    # nodes; node arguments and values are MRML nodes or None
    volumeNode: Any
    segmentationNode: Any

    def setVolumeNode(self, node: Any) -> None: ...

    def setSegmentationNode(self, node: Any) -> None:
        """None: one is made at the first prompt."""

    segmentEditorNode: Any
    """The vtkMRMLSegmentEditorNode whose masking and overwrite mode are respected; set it to the embedded editor's."""

    def addSliceView(self, interactor: Any, sliceNode: Any) -> None:
        """Let the tools work in a slice view: its vtkRenderWindowInteractor and vtkMRMLSliceNode."""

    def removeSliceViews(self) -> None: ...

    # segments
    selectedSegment: str
    """Its ID; "" before the first one."""

    def segments(self) -> list[SegmentRow]: ...

    def selectSegment(self, segmentId: str) -> None: ...

    def addSegment(self, name: str | None = None) -> str: ...

    def nextSegment(self) -> str:
        """A new segment, selected; returns its ID. An empty selected one without prompts is taken instead."""

    def removeSegment(self, segmentId: str) -> None: ...

    def setTerminology(self, segmentId: str, entry: str) -> None:
        """A terminology entry as Slicer serialises it; its name and recommended colour come with it."""

    def setStatus(self, segmentId: str, status: str) -> None: ...

    def setLocked(self, segmentId: str, locked: bool) -> None:
        """No prompt, undo, redo, reset or removal changes a locked segment: what would is refused with a message."""

    # tools and prompts
    tool: str
    positive: bool
    brushRadius: float
    """Of the scribble, mm."""

    def setTool(self, tool: str) -> None: ...

    def setPolarity(self, positive: bool) -> None: ...

    def setBrushRadius(self, millimetres: float) -> None: ...

    def addPoint(self, ras: Ras, positive: bool | None = None) -> None:
        """World RAS mm. `positive` is the current polarity where it is left out."""

    def addBox(self, corner: Ras, edges: Sequence[Ras], positive: bool | None = None) -> None: ...

    def addScribble(self, points: Sequence[Ras], positive: bool | None = None, radius: float | None = None) -> None: ...

    def addLasso(self, points: Sequence[Ras], positive: bool | None = None) -> None: ...

    def prompts(self, segmentId: str | None = None) -> list[PromptRow]:
        """Of the selected segment by default."""

    def deletePrompt(self, nodeId: str) -> None: ...

    canUndo: bool
    canRedo: bool

    def undo(self) -> None: ...

    def redo(self) -> None: ...

    def reset(self) -> None:
        """Empty the selected segment and drop its prompts; `undo` brings them back."""

    # options
    neighbours: str
    smoothingMm: float
    islands: bool

    def setNeighbours(self, neighbours: str) -> None: ...

    def setFinish(self, smoothingMm: float, islands: bool) -> None:
        """Smoothness and islands of the selected segment, from its probability; moves of a slider coalesce."""

    # work under way
    busy: str
    """What is being done, for people: "" where nothing is."""
    elapsedSeconds: float
    progress: tuple[str, float | None]
    """What the engine says it is doing, and how far it is (0..1) where it knows."""
    lastError: str
    timings: dict[str, list[float]]
    """Seconds of the latest prompts by part: "event", "queue", "engine", "network", "write", "overlays"."""

    def cancel(self) -> None:
        """Stop what is under way and forget what waits; their markups are removed."""

    # confidence
    quality: float | None
    disagreementShown: bool

    def experts(self) -> list[ExpertRow]: ...

    def setExpertShown(self, name: str, shown: bool) -> None: ...

    def setExpertKind(self, name: str, kind: str) -> None: ...

    def setExpertOpacity(self, name: str, opacity: float) -> None: ...

    def setExpertEnabled(self, name: str, enabled: bool) -> None: ...

    def setDisagreementShown(self, shown: bool) -> None: ...

    def suggest(self) -> Ras | None:
        """Ask where to click next. The views jump there when the answer comes ("state"), also in `suggestion`."""

    suggestion: tuple[Ras, bool] | None
    """World RAS and polarity of the latest answer of `suggest`; None before one, or where nothing would improve."""

    # sequences
    hasFrames: bool
    """Whether the volume is the proxy of a sequence."""

    def segmentThisFrame(self) -> None:
        """Keep one segmentation per frame from now on."""

    def propagate(self) -> None:
        """Go to the next frame and segment it from this one's mask and positive points."""

    # life
    def poll(self) -> None:
        """Deliver what is ready; call it every 15 ms while busy."""

    def close(self) -> None:
        """Stop the engine, remove overlays and observers. Prompts and segments stay in the scene."""


@dataclass(frozen=True)
class InstallPlan:
    """What has to be installed before the local engine can start.

    Args:
        packages: names for people, in order; empty where everything is there.
        megabytes: to download, roughly.
        reason: why the last try failed, or "".
    """

    packages: tuple[str, ...]
    megabytes: int
    reason: str = ""


class InstallerProtocol(Protocol):
    """First run. Quick where everything is there; never asks the network to find out."""

    def plan(self) -> InstallPlan: ...

    def install(self, onProgress: Callable[[str, float | None], None]) -> None:
        """Only after the user agreed. Raises RuntimeError with the reason; can be called again."""


class SettingsProtocol(Protocol):
    """The application's settings of this module, read when needed: a change counts from the next engine start."""

    def value(self, key: str) -> Any:
        """Of the keys in `SettingsPanel.DEFAULTS`; the default where none was set."""

    def setValue(self, key: str, value: Any) -> None: ...


class DialogsProtocol(Protocol):
    """Everything that stops and asks the user."""

    def confirm(self, text: str, details: str = "") -> bool: ...

    def error(self, text: str, details: str = "") -> None: ...
