"""What the engine knows of the segments, and what it has to be told before the next prompt.

The scene is the truth: segments are made, edited, hidden and deleted by many tools. Before each prompt `plan` compares
the scene with what the engine knows (main thread, copies only what changed), and `Plan.carryOut` tells the engine
(worker thread): segments it does not know, edits by hand, what masking kept from being written, prompts that came
with a saved scene.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import BoolArray, Box
from KA2ERSegment.prompts import MaskPrompt, Prompt
from KA2ERSegment.steps import Neighbours
from SlicerKA2ERLib.SegmentWriter import NOTHING, SegmentWriter, segmentIds
from SlicerKA2ERLib.VolumeIO import VolumeData, VolumeGrid

Steps = tuple[dict[str, Any], ...]
UNKNOWN = -1
"""No object has this modification time."""


@dataclass
class Known:
    """One segment as the engine has it.

    Args:
        mtime: of its voxels in the scene when both agreed.
        differs: masking kept the engine's answer from being written as it was.
        quality: Dice that the engine expects.
        shares: mean weight of each expert in it.
    """

    mtime: int
    differs: bool = False
    quality: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Layer:
    """Label values of one or many segments, copied in the main thread and looked at in the worker.

    Args:
        box: of the volume.
        labels: (K, J, I) in it.
        count: segments of it that are looked at.
    """

    box: Box
    labels: np.ndarray = field(repr=False)
    count: int = 0
    _places: list[Any] | None = None

    def mask(self, value: int) -> tuple[Box, BoolArray]:
        """One segment: smallest box around it, and (K, J, I) bool in it. Worker thread."""
        labels, box = self.labels, self.box
        if self.count > 2 and labels.size:  # one pass finds the boxes of all: a hundred passes take seconds
            if self._places is None:
                from scipy.ndimage import find_objects

                self._places = find_objects(labels.astype(np.int32, copy=False))
            place = self._places[value - 1] if 0 < value <= len(self._places) else None
            if place is None:
                return NOTHING, np.zeros((0, 0, 0), dtype=bool)
            labels = labels[place]
            box = box_of(place).shift(box.start)
        inside = labels == value
        tight = Box.around(inside)
        if tight is None:
            return NOTHING, np.zeros((0, 0, 0), dtype=bool)
        return tight.shift(box.start), tight.crop(inside)


@dataclass(frozen=True, eq=False)
class SegmentCopy:
    """One segment as it was when the plan was made.

    Args:
        layer: that it lies in.
        value: of this segment.
        amend: part of what was done last, not a step of its own.
    """

    name: str
    layer: Layer
    value: int
    amend: bool


@dataclass(eq=False)
class Plan:
    """What the engine has to be told first.

    Args:
        grid: of the volume.
        copies: segments that it does not know, or not like this.
        replay: segment whose prompts it does not know, and those prompts; "" where it knows them.
        gone: objects whose segments are gone.
        told: segments and objects of which it was carried out: also before a refusal or a cancel.
        pushed: states that this added to the engine's history.
        floor: the engine's journal after it; None where it was stopped before its end.
    """

    grid: VolumeGrid
    copies: list[SegmentCopy]
    replay: tuple[str, tuple[Prompt, ...]]
    gone: tuple[str, ...]
    mtimes: dict[str, int]
    told: set[str] = field(default_factory=set)
    pushed: int = 0
    floor: Steps | None = None

    @classmethod
    def nothing(cls, data: VolumeData) -> Plan:
        return cls(data.grid, [], ("", ()), (), {})

    def carryOut(self, session: Any) -> None:
        """Worker thread. What the engine answers is in the scene already."""
        self.told, self.pushed = set(), 0  # it may be a second try, after the engine died
        self.floor = None
        for name in self.gone:
            if name in session.names:
                session.remove(name)
                self.pushed += 1
            self.told.add(name)
        segment, prompts = self.replay
        for copy in self.copies:
            if copy.name != segment:
                self._tell(session, copy, copy.amend)
        if segment:
            select(session, segment)
            self._replay(session, prompts)
            for copy in self.copies:
                if copy.name == segment:
                    self._tell(session, copy, bool(prompts))
            self.told.add(segment)
        self.floor = session.steps

    def _replay(self, session: Any, prompts: Sequence[Prompt]) -> None:
        """All of them or none: who is cancelled here is told all of them again the next time."""
        done = 0
        try:
            for prompt in prompts:
                # nobody loses anything here: the voxels that all segments have are known already
                session.add(prompt, Neighbours.OVERLAP)
                done += 1
        except KA2ERError:
            for _ in range(done):
                session.undo()
            raise
        self.pushed += done

    def _tell(self, session: Any, copy: SegmentCopy, amend: bool) -> None:
        self._edit(session, copy, amend)
        self.told.add(copy.name)

    def _edit(self, session: Any, copy: SegmentCopy, amend: bool) -> None:
        box, mask = copy.layer.mask(copy.value)
        if copy.name in session.names:
            known, present = session.mask(copy.name)
            if known.size == 0 == box.size or (known == box and np.array_equal(present, mask)):
                return  # another segment of its layer changed, or masking was undone
        elif box.size == 0:
            return
        select(session, copy.name)
        session.edit(MaskPrompt(mask, box, self.grid.ijk_to_ras, self.grid.shape_kji), amend=amend)
        self.pushed += not amend


class EngineMirror:
    """What the engine knows of one segmentation on one volume.

    Args:
        writer: reads the segments.
    """

    def __init__(self, writer: SegmentWriter) -> None:
        self._writer = writer
        self.epoch = 0
        self._volumeKey: tuple[Any, ...] | None = None
        self._begin()

    def forgetAll(self, busy: bool = False) -> None:
        """The next session begins with nothing. One that was opened and never used is as good as new.

        Args:
            busy: whether something is under way that nobody wants any more.
        """
        if busy or self.floor is not None or self.known:
            self.epoch += 1
        self._begin()

    def _begin(self) -> None:
        self._volumeKey = None
        self.known: dict[str, Known] = {}
        self.steps: Steps = ()
        self.floor: Steps | None = None
        self.depth = 0
        self.canUndo = self.canRedo = False
        self.expertsTold: frozenset[str] | None = None
        self.finishes: dict[str, tuple[float, bool]] = {}

    def isOf(self, data: VolumeData) -> bool:
        """Whether the volume is still the one that the engine has, voxel for voxel."""
        return self._volumeKey in (None, data.key)

    def sessionKey(self, data: VolumeData) -> VolumeData:
        """The volume, with a key that another session has another one of."""
        self._volumeKey = data.key
        return replace(data, key=(*data.key, self.epoch))

    def plan(
        self, segmentationNode: Any, volumeNode: Any, data: VolumeData, segment: str, prompts: Sequence[Prompt]
    ) -> Plan:
        """Main thread.

        Args:
            segment: that the next verb is about; "" for none.
            prompts: of it that came with the scene and were not told.
        """
        present = segmentIds(segmentationNode)
        replayed = bool(segment and prompts)
        copies: list[SegmentCopy] = []
        copied: dict[Any, tuple[Box, np.ndarray]] = {}
        layers: dict[int, Layer] = {}
        mtimes: dict[str, int] = {}
        for name in present:
            known, mtime = self.known.get(name), self._writer.mtime(segmentationNode, name)
            mtimes[name] = mtime
            agreed = known is not None and known.mtime == mtime and not known.differs
            if agreed and not (replayed and name == segment):
                continue
            box, labels, value = self._writer.labels(segmentationNode, name, volumeNode, data, copied)
            layer = layers.setdefault(id(labels), Layer(box, labels))
            layer.count += 1
            amend = known is not None and known.differs and known.mtime == mtime
            if known is not None and known.mtime != mtime:
                known.quality = None
            copies.append(SegmentCopy(name, layer, value, amend))
        gone = tuple(name for name in self.known if name not in present)
        return Plan(data.grid, copies, (segment, tuple(prompts)) if replayed else ("", ()), gone, mtimes)

    def noteTold(self, plan: Plan) -> None:
        """Main thread, after `carryOut`, whatever became of it and of the verb after it.

        What the scene held before the first verb is the floor: no undo goes below it.
        """
        if self.floor is None:
            self.floor = plan.floor
        else:
            self.depth += plan.pushed
        for name in plan.told.difference(plan.gone):
            known = self.known.setdefault(name, Known(0))
            known.mtime, known.differs = plan.mtimes.get(name, 0), False
        for name in plan.told.intersection(plan.gone):
            self.known.pop(name, None)

    def noteWritten(self, segmentationNode: Any, change: Any, equal: bool, edited: bool) -> None:
        """Main thread, after one object's change was written.

        Args:
            equal: whether it could be written as the engine said.
            edited: whether a hand had changed the segment meanwhile: the engine must still be told.
        """
        known = self.known.setdefault(change.name, Known(0))
        known.mtime = UNKNOWN if edited else self._writer.mtime(segmentationNode, change.name)
        known.differs = known.differs or not equal
        known.quality, known.shares = change.quality, change.shares

    def finishOf(self, segmentId: str) -> tuple[float, bool]:
        """Smoothness in mm, and whether islands stay."""
        return self.finishes.get(segmentId, (0.0, True))

    def readFinishes(self) -> None:
        """From the journal: undo may have changed them."""
        self.finishes = {
            step["object"]: (step["finish"]["smoothing_mm"], step["finish"]["islands"])
            for step in self.steps
            if "finish" in step
        }

    def isEdited(self, segmentationNode: Any, segmentId: str) -> bool:
        """Whether a hand changed a segment that the engine knows since both agreed."""
        known = self.known.get(segmentId)
        return known is not None and known.mtime != self._writer.mtime(segmentationNode, segmentId)


def box_of(place: tuple[slice, slice, slice]) -> Box:
    """The box of an index of a (K, J, I) array."""
    k, j, i = place
    return Box((i.start, j.start, k.start), (i.stop, j.stop, k.stop))


def select(session: Any, name: str) -> None:
    if session.selected != name or name not in session.names:
        session.select(name)
