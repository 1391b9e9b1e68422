"""What a session remembers: immutable states, so that undo and redo only move along them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from KA2ERSegment.geometry import Box
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompts import Prompt
from KA2ERSegment.rasterise import Evidence
from KA2ERSegment.steps import Finish, Step
from KA2ERSegment.zoom import Answer

NOTHING = Box((0, 0, 0), (0, 0, 0))
NO_MASK = PackedMask(NOTHING, np.zeros(0, dtype=np.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """What a hand made of an object's mask. Later prompts change of it what they change in the network's answer.

    Args:
        mask: as the hand left it.
        held: what the hand changed, and a little around it: changed by later prompts only close to them.
        patch: of the network's answer at that time, or a finer grid of the same part.
        logits: (n, n, n) of that answer there, finished; float16 on a finer grid.
        near: voxels close to each prompt given since.
    """

    mask: PackedMask
    held: PackedMask
    patch: Patch
    logits: npt.NDArray[np.floating]
    near: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectState:
    """One object: its prompts, oldest first, and what they gave.

    Args:
        prompts: of this object alone.
        evidence: what of them counts: a hand edit takes out what contradicts it.
        answer: that the next prompt builds on; None before the first positive prompt.
        prediction: None before the first prompt.
        drawing: None where no hand edited the mask.
        finish: how the mask is made from the answer.
        locked: no prompt changes it.
    """

    prompts: tuple[Prompt, ...] = ()
    evidence: Evidence = field(default_factory=Evidence)
    answer: Answer | None = None
    prediction: Prediction | None = None
    drawing: Drawing | None = None
    finish: Finish = field(default_factory=Finish)
    locked: bool = False

    @property
    def mask(self) -> PackedMask:
        """Its voxels on the canonical volume."""
        return self.prediction.packed if self.prediction else NO_MASK


@dataclass(frozen=True, slots=True)
class SessionState:
    """Everything that undo brings back: the objects to which something was done, and all that was done.

    Args:
        objects: by name.
        steps: that led here.
        removed: names of objects that are no longer there.
    """

    objects: Mapping[str, ObjectState] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    removed: frozenset[str] = frozenset()

    def of(self, name: str) -> ObjectState:
        """The state of an object, as new where nothing was done to it."""
        return self.objects.get(name, ObjectState())

    def after(self, step: Step, changed: Mapping[str, ObjectState]) -> SessionState:
        """The state after one more step that changed some objects."""
        objects = {name: state for name, state in {**self.objects, **changed}.items() if state != ObjectState()}
        removed = self.removed | {step.name} if step.done == "remove" else self.removed - {step.name}
        return SessionState(objects, (*self.steps, step) if objects else (), removed)

    def renamed(self, old: str, new: str) -> SessionState:
        """The same with another name for an object."""
        objects = {new if name == old else name: state for name, state in self.objects.items()}
        if new in objects:
            prediction = objects[new].prediction
            named = prediction and replace(prediction, name=new)
            objects[new] = replace(objects[new], prediction=named)
        steps = tuple(replace(step, name=new) if step.name == old else step for step in self.steps)
        return SessionState(objects, steps, frozenset(new if name == old else name for name in self.removed))

    def others(self, name: str) -> list[tuple[str, ObjectState, Prediction]]:
        """The objects with a mask, but for one."""
        rest = [(other, state, state.prediction) for other, state in self.objects.items() if other != name]
        return [(other, state, prediction) for other, state, prediction in rest if prediction is not None]
