"""`Session`: prompts in, masks out, for one volume. Read `add` first.

    volume -> patch -> features (once per patch, kept) --+
    prompts -> maps and tokens on the patch -------------+-> mask decoder -> finished, promises kept -> prediction

A session is a sequence of immutable states (`states.py`): undo and redo only move along it, and a refused or cancelled
verb leaves it as it was. Which objects there are and which is selected is no part of the states, but for removed ones:
undo takes back what was done to an object, never a choice of one. All work happens on the volume's canonical view; only
`Prediction` turns results back to the volume's own axes. `answering.py` asks the network, `sharing.py` keeps what
prompts, hand edits and other objects are promised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from KA2ERSegment.answering import Answerer
from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.cancellation import checkpoint, checkpoints
from KA2ERSegment.constraints import finished
from KA2ERSegment.errors import DeviceError, PromptError, SessionStateError
from KA2ERSegment.geometry import Box
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.prediction import FloatImage, PackedMask, Prediction
from KA2ERSegment.prompts import MaskPrompt, Prompt, Suggestion
from KA2ERSegment.rasterise import Evidence, samples_in
from KA2ERSegment.sharing import (
    by_hand,
    close_to,
    drawing_of,
    final_mask,
    losers,
    refuse_claimed,
    seen_as_outside,
)
from KA2ERSegment.states import NOTHING, ObjectState, SessionState
from KA2ERSegment.steps import (
    FORMAT,
    Edit,
    Finish,
    Neighbours,
    Step,
    experts_from_json,
    parse_steps,
    read_steps_file,
    write_steps_file,
)
from KA2ERSegment.suggestion import suggest
from KA2ERSegment.volume import Volume
from KA2ERSegment.zoom import Answer

FIRST_OBJECT = "object"
HISTORY = 64
"""States kept: the present one and those that undo goes back to."""


class Session:
    """Prompts in, masks out, for one volume and any number of named objects.

    Args:
        bundle: the model; the one that the package ships by default.
        device: "auto", "cpu" or "cuda" (or "cuda:1").
        feature_memory_mb: bound on the features that are kept.
        model: the bundle's network where it is there already; any number of sessions can share one (`Session.model`).

    Attributes:
        model: the network.
        checkpoint: called many times a second while a verb works, before every layer of the network among others;
            what it raises (`CancelledError`, say) ends the verb and leaves the session as it was.

    Raises:
        DeviceError: CUDA was asked for and is not there.
        BundleError: the bundle does not fit this version.
    """

    def __init__(
        self,
        bundle: Bundle | None = None,
        device: str = "auto",
        feature_memory_mb: float = 512.0,
        model: PromptableModel | None = None,
    ) -> None:
        self.bundle = bundle if bundle is not None else load_bundle()
        self.device = find_device(device)
        if model is None:
            model = build_model(self.bundle.plans, self.bundle.weights())
        self.model: PromptableModel = model.to(self.device)
        self.checkpoint: Callable[[], None] | None = None
        self._feature_bytes = feature_memory_mb * 1e6
        self._volume: Volume | None = None
        self._answerer: Answerer | None = None
        self._experts = self.model.arms[1:]
        self._start()

    # -- volume and objects ------------------------------------------------------------------------------------------

    def set_volume(self, volume: Volume) -> None:
        """Work on another volume: prompts, masks, features and history of the former one are dropped. Cheap."""
        if not isinstance(volume, Volume):
            message = f"a session needs a Volume, got {type(volume).__name__}. Use Volume(array_kji, ijk_to_ras)."
            raise SessionStateError(message)
        if self._answerer is not None:
            self._answerer.close()
        plans, canonical = self.bundle.plans, volume.canonical()
        self._answerer = Answerer(self.model, plans, self.device, canonical, self._feature_bytes)
        self._volume = volume
        self._start()

    def forget_features(self) -> None:
        """Free the memory of kept features; the next prompt computes its own again."""
        if self._answerer is not None:
            self._answerer.forget()

    def _start(self) -> None:
        self._names: tuple[str, ...] = ()
        self._selected = FIRST_OBJECT
        self._history = [SessionState()]
        self._now = 0
        self._changed = NOTHING

    @property
    def volume(self) -> Volume:
        """The volume; SessionStateError before `set_volume`."""
        return self._require_volume()[0]

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the objects, oldest first; where there are none, the nameless first one."""
        return tuple(name for name in self._names if name not in self._state.removed) or (FIRST_OBJECT,)

    @property
    def selected(self) -> str:
        """Name of the object that prompts go to."""
        return self._selected

    @property
    def prediction(self) -> Prediction | None:
        """Of the selected object; None before its first prompt."""
        return self._state.of(self._selected).prediction

    @property
    def changed(self) -> Box:
        """Half-open box on the volume's grid: outside it the last verb, undo or redo left all masks alone."""
        return self._changed

    def prompts(self, name: str | None = None) -> tuple[Prompt, ...]:
        """Prompts of an object (the selected one by default), oldest first."""
        return self._object(name).prompts

    def select(self, name: str) -> Prediction | None:
        """Let prompts go to the object of that name; it is made where there is none. Returns its prediction.

        Nothing is done to any object, so `undo` does not take it back, and `redo` stays possible.
        """
        _check_name(name)
        if name not in self.objects:
            if name in self._state.removed:  # a new one of that name
                state = replace(self._state, removed=self._state.removed - {name})
                self._history = [*self._history[: self._now], state, *self._history[self._now + 1 :]]
            self._know(name)
        self._selected = name
        return self.prediction

    def rename(self, old: str, new: str) -> None:
        """Give an object another name. Like `select` no step: undo never takes it back.

        Raises:
            SessionStateError: there is no such object, or the new name is taken, be it by one that undo can bring back.
        """
        self._object(old)
        _check_name(new)
        if new == old:
            return
        if new in self._names or any(step.name == new for state in self._history for step in state.steps):
            message = f"an object's new name must be free; {new!r} is or was another object's. Choose another name."
            raise SessionStateError(message)
        self._know(old)
        self._names = tuple(new if name == old else name for name in self._names)
        self._history = [state.renamed(old, new) for state in self._history]
        self._selected = new if self._selected == old else self._selected

    def remove(self, name: str | None = None) -> Prediction | None:
        """Take an object away (the selected one by default), its prompts and mask with it; `undo` brings it back.

        Returns:
            The prediction of the object that is selected now.

        Raises:
            SessionStateError: there is no such object, or it is locked.
        """
        self._object(name)
        name = name or self._selected
        self._require_unlocked(name, "its removal")
        if name in self._names:
            self._push(self._state.after(Step(name, "remove"), {name: ObjectState()}))
        return self.prediction

    def lock(self, name: str | None = None) -> None:
        """Protect an object (the selected one by default): no prompt changes it any more, its own neither."""
        self._set_lock(name, True)

    def unlock(self, name: str | None = None) -> None:
        """Let an object change again."""
        self._set_lock(name, False)

    def _set_lock(self, name: str | None, locked: bool) -> None:
        own, name = self._object(name), name or self._selected
        if own.locked != locked:
            step = Step(name, "lock" if locked else "unlock")
            self._push(self._state.after(step, {name: replace(own, locked=locked)}))

    def prediction_of(self, name: str) -> Prediction | None:
        """The prediction of any object."""
        return self._object(name).prediction

    def label_map(self) -> tuple[npt.NDArray[np.uint16], tuple[str, ...]]:
        """All objects in one (K, J, I) uint16 array; object n of the returned names has value n + 1.

        Where objects overlap, the newest one shows.
        """
        volume, _ = self._require_volume()
        labels = np.zeros(volume.shape_kji, dtype=np.uint16)
        for value, name in enumerate(self.objects, start=1):
            mask = self._state.of(name).mask
            if mask.box.size:
                volume.to_canonical(labels)[mask.box.slices][mask.unpack()] = value
        return labels, self.objects

    # -- experts -----------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that take part in the next prompt; the foundation always does."""
        return self._experts

    def use_experts(self, names: Iterable[str] | None) -> None:
        """Choose the experts that take part from the next prompt on, None for all. Like `select` no step of undo.

        Raises:
            SessionStateError: the bundle has no expert of such a name.
        """
        everyone = self.model.arms[1:]
        chosen = set(everyone if names is None else names)
        unknown = sorted(str(name) for name in chosen - set(everyone))
        if unknown:
            message = f"experts must be among the bundle's, {list(everyone)}; got {unknown}. Use another bundle."
            raise SessionStateError(message)
        self._experts = tuple(name for name in everyone if name in chosen)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def add(self, prompt: Prompt, neighbours: Neighbours = Neighbours.COMPETE) -> Prediction:
        """Give one prompt to the selected object.

        Args:
            prompt: what the user says.
            neighbours: whether other objects keep their voxels, compete for them or may be overlapped.

        Raises:
            SessionStateError: no volume yet, or the object is locked.
            PromptError: the prompt does not fit the volume, or contradicts another one.
        """
        _, answerer = self._require_volume()
        name, own, neighbours = self._selected, self._state.of(self._selected), _neighbours(neighbours)
        self._require_unlocked(name, f"a {type(prompt).__name__}")
        with checkpoints(self.checkpoint):
            newest = Evidence().plus(prompt, answerer.canonical)
            evidence = own.evidence.plus(prompt, answerer.canonical)
            others = self._state.others(name)
            refuse_claimed(newest, own.mask, others, neighbours, name)
            told = replace(own, prompts=(*own.prompts, prompt), evidence=evidence)
            answer = answerer.answer(told, newest, seen_as_outside(own, others, neighbours), self._experts)
            if newest.start is not None:  # a new mask to start from replaces what a hand drew
                told = replace(told, drawing=None)
            if told.drawing is not None:
                near = (*told.drawing.near, *close_to(newest, answer.patch))
                told = replace(told, drawing=replace(told.drawing, near=near))
            chosen = None if self._experts == self.model.arms[1:] else self._experts
            state = self._settled(self._state, Step(name, prompt, neighbours, chosen), told, answer)
        return self._push_prediction(state, name)

    def edit(self, mask: MaskPrompt, amend: bool = False, neighbours: Neighbours = Neighbours.OVERLAP) -> Prediction:
        """Let the selected object's mask be exactly this one, drawn by hand; the network is not asked.

        Later prompts start from it and change only what they change in the network's answer; what the hand changed,
        and a little around it, they change only close to themselves. Prompts that contradict the mask no longer count.

        Args:
            mask: positive, on the volume's grid; an empty one empties the object.
            amend: one undo takes back this together with what was done before.
            neighbours: with COMPETE others lose these voxels, but locked ones; with KEEP this object gets none of
                theirs.

        Raises:
            SessionStateError: no volume yet, or the object is locked.
            PromptError: the mask is negative or on another grid.
        """
        _, answerer = self._require_volume()
        name, own, neighbours = self._selected, self._state.of(self._selected), _neighbours(neighbours)
        self._require_unlocked(name, "a hand edit")
        with checkpoints(self.checkpoint):
            edit = Edit.of(mask)
            others = self._state.others(name)
            drawn = by_hand(PackedMask.pack(*mask.region(answerer.canonical)), others, neighbours)
            checkpoint()
            evidence = own.evidence.under(drawn)
            answer = answerer.drawn(own.answer, drawn, evidence)
            told = replace(own, evidence=evidence)
            state = self._settled(self._state, Step(name, edit, neighbours, amend=bool(amend)), told, answer, drawn)
        return self._push_prediction(state, name, amend)

    def finish(self, smoothing_mm: float = 0.0, islands: bool = True) -> Prediction | None:
        """Choose how the selected object's mask is made from its probability, now and from now on; quick.

        Clicks stay honoured, what a hand drew stays, and other objects lose nothing. Finishing the same object again
        takes the place of the time before: one undo takes back a slider's whole way.

        Args:
            smoothing_mm: standard deviation of the Gaussian that smooths the logits.
            islands: False drops the parts that no positive prompt touches.

        Raises:
            SessionStateError: no volume yet, or the object is locked.
            PromptError: values out of range.
        """
        self._require_volume()
        name = self._selected
        self._require_unlocked(name, "its finishing")
        finish = Finish(smoothing_mm, islands)
        again = self._ends_with_finish(name)
        base = self._history[self._now - 1] if again else self._state
        own = replace(base.of(name), finish=finish)
        if finish == base.of(name).finish:
            if again:
                self._move_to(self._now - 1)
                self._history = self._history[: self._now + 1]
            return self.prediction
        step = Step(name, finish, Neighbours.KEEP)
        if own.answer is None:  # for later
            self._push(base.after(step, {name: own}), amend=again)
            return self.prediction
        with checkpoints(self.checkpoint):
            state = self._settled(base, step, own, own.answer)
        return self._push_prediction(state, name, again)

    def _ends_with_finish(self, name: str) -> bool:
        """Whether the present state differs from the one before by an object's finishing alone."""
        steps = self._state.steps
        if not steps or steps[-1].name != name or not isinstance(steps[-1].done, Finish):
            return False
        return self._now > 0 and self._history[self._now - 1].steps == steps[:-1]

    def reset(self) -> None:
        """Drop the selected object's prompts and mask; `undo` brings them back."""
        self._require_unlocked(self._selected, "its reset")
        if self._state.of(self._selected) != ObjectState():
            self._push(self._state.after(Step(self._selected, "reset"), {self._selected: ObjectState()}))

    def suggest(self) -> Suggestion | None:
        """Where the next click for the selected object is expected to help most; None where it would help little.

        Never on a click that was made nor in a locked object. Quick: the network is not asked.
        """
        prediction = self.prediction
        if prediction is None:
            return None
        states = self._state.objects
        clicks = [ijk for state in states.values() for ijk, _ in state.evidence.clicks]
        taken = [state.mask for name, state in states.items() if state.locked and name != self._selected]
        with checkpoints(self.checkpoint):
            return suggest(prediction, clicks, taken)

    # -- undo and redo -----------------------------------------------------------------------------------------------

    def undo(self) -> Prediction | None:
        """Take back the last thing done to whatever object; the selection stays as it is.

        Returns:
            The selected object's prediction; its `changed` is the session's: where any object may differ now.

        Raises:
            SessionStateError: there is nothing to undo.
        """
        return self._step(-1, "undo")

    def redo(self) -> Prediction | None:
        """Bring back what `undo` took; returns as `undo` does, SessionStateError where there is nothing."""
        return self._step(+1, "redo")

    def _step(self, direction: int, verb: str) -> Prediction | None:
        if not 0 <= self._now + direction < len(self._history):
            message = f"there is nothing to {verb} in this session."
            raise SessionStateError(message)
        self._move_to(self._now + direction)
        return self._as_changed()

    @property
    def can_undo(self) -> bool:
        """Whether `undo` would succeed."""
        return self._now > 0

    @property
    def can_redo(self) -> bool:
        """Whether `redo` would succeed."""
        return self._now < len(self._history) - 1

    # -- saving ------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[Step, ...]:
        """All that was done to all objects, in its order; `revise` takes such a list."""
        return self._state.steps

    def revise(self, steps: Sequence[Step]) -> Prediction | None:
        """Let all that was done be these steps: some deleted, some changed. One undo brings back what was.

        Work starts at the newest state of the history from which these steps go on.

        Returns:
            The selected object's prediction; its `changed` is the session's.

        Raises:
            SessionStateError: no volume yet, or a step is not possible after those before it; nothing was changed.
            PromptError: a prompt does not fit any more; nothing was changed.
        """
        self._require_volume()
        steps = tuple(steps)
        for step in steps:
            if not isinstance(step, Step):
                message = f"steps must be those of `Session.steps`, got {type(step).__name__}."
                raise PromptError(message)
        begun = [state for state in self._history if state.steps == steps[: len(state.steps)]]
        start = max(begun, key=lambda state: len(state.steps), default=SessionState())
        before = self._everything()
        try:
            self._history, self._now = [start], 0
            self._do_all(steps[len(start.steps) :])
            state, names = self._state, self._names
        finally:
            self._names, self._selected, self._history, self._now, self._changed = before
        self._names = names
        self._push(state)
        return self._as_changed()

    def to_json(self, steps: bool = True) -> dict[str, Any]:
        """All that was done to all objects in its order, in RAS mm; no image content and no file name.

        What was undone is left out. What was reset is there: while it lasted, other objects kept off it.

        Args:
            steps: False leaves them out, for those who keep the steps themselves.
        """
        volume, _ = self._require_volume()
        chosen = {} if self._experts == self.model.arms[1:] else {"experts": list(self._experts)}
        about: dict[str, Any] = {
            "format": FORMAT,
            "bundle": self.bundle.identity,
            "grid": {"shape_kji": list(volume.shape_kji), "ijk_to_ras": volume.ijk_to_ras.tolist()},
            **chosen,
            "objects": list(self.objects),
            "selected": self._selected,
        }
        return {**about, "steps": [step.to_json() for step in self._state.steps]} if steps else about

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompts as JSON; the file appears whole or not at all."""
        write_steps_file(Path(path), self.to_json())

    @classmethod
    def replay(
        cls, path: str | os.PathLike[str], volume: Volume, bundle: Bundle | None = None, device: str = "auto"
    ) -> Session:
        """A new session to which everything in a file is done again, in its order.

        Prompts are in patient space, so the volume may be another one than they were drawn on; mask prompts and hand
        edits need its grid. With the same volume and bundle the masks come out the same.

        Raises:
            PromptError: a file that is no prompts file, or prompts that do not fit the volume.
        """
        saved = read_steps_file(Path(path))
        session = cls(bundle, device)
        session.set_volume(volume)
        session.give(saved)
        return session

    def give(self, saved: Mapping[str, Any]) -> None:
        """Do again what `to_json` described; all of it or, where something is refused, nothing.

        Raises:
            PromptError: it is no such description, or a prompt does not fit the volume.
            SessionStateError: no volume yet, an object of that name is locked here, or an expert is not in the bundle.
        """
        self._require_volume()
        names, selected, steps = parse_steps(saved)
        chosen = experts_from_json(saved.get("experts"))
        before, experts = self._everything(), self._experts
        try:
            for name in names:
                self.select(name)
                if len(names) > 1:  # also a first object without a name of its own keeps its place
                    self._know(name)
            self._do_all(steps)
            for name in (*names, selected):  # also those made anew after their removal
                self.select(name)
            self.use_experts(chosen)
        except BaseException:
            self._names, self._selected, self._history, self._now, self._changed = before
            self._experts = experts
            raise

    def _do_all(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.select(step.name)
            self._do(step)

    def _do(self, step: Step) -> None:
        match step.done:
            case "lock":
                self.lock()
            case "unlock":
                self.unlock()
            case "reset":
                self.reset()
            case "remove":
                self.remove()
            case Edit() as edit:
                self.edit(edit.mask, step.amend, step.neighbours)
            case Finish(smoothing_mm, islands):
                self.finish(smoothing_mm, islands)
            case prompt:
                chosen = self._experts
                self.use_experts(step.experts)
                try:
                    self.add(prompt, step.neighbours)
                finally:
                    self._experts = chosen

    def _everything(self) -> tuple[tuple[str, ...], str, list[SessionState], int, Box]:
        return self._names, self._selected, self._history, self._now, self._changed

    # -- state -------------------------------------------------------------------------------------------------------

    def _settled(
        self, state: SessionState, step: Step, own: ObjectState, answer: Answer, drawn: PackedMask | None = None
    ) -> SessionState:
        """The state after a step that gave an object an answer of the network, or a mask drawn by hand.

        Args:
            state: before it.
            step: what was done.
            own: the object with it, but for answer and prediction.
            answer: what the next prompt builds on.
            drawn: the whole mask, where a hand drew it.
        """
        volume, answerer = self._require_volume()
        before, others = state.of(step.name).mask, state.others(step.name)
        shown = replace(answer, logits=self._finished(own, answer))
        detail = answerer.detail_of(shown, own)
        if drawn is None:
            packed = final_mask(own, shown, detail(), others, step.neighbours, before, answerer.canonical)
        else:
            packed = drawn
            former_own = state.of(step.name)
            drawing = drawing_of(former_own, drawn, shown, detail(), answerer.canonical) if drawn.box.size else None
            own = replace(own, drawing=drawing)
        checkpoint()
        lost: Mapping[str, ObjectState] = {}
        touched = NOTHING
        if step.neighbours is Neighbours.COMPETE:
            lost, touched = losers(packed, before, others, answerer.canonical)
        former = before.box.union(self._state.of(step.name).mask.box)
        prediction = Prediction(
            volume=volume,
            canonical=answerer.canonical,
            name=step.name,
            patch=shown.patch,
            logits=shown.logits,
            detail=detail,
            packed=packed,
            changed=volume.from_canonical_box(former.union(packed.box).union(touched)),
            arms=("foundation", *answer.experts) if len(answer.weights) else (),
            weights=answer.weights,
            opinion=answerer.opinion_of(answer),
            gate=answer.gate,
            decoders=answer.decoders,
            calibration=self.bundle.plans.calibration,
            decoder=answerer.decoder_of(answer),
            votes=answer.votes,
            voters=answerer.voters_of(answer),
            ballots=answerer.ballots_of(answer),
        )
        # negative prompts alone leave nothing to build on: the first positive one chooses its patch as if it were first
        kept = answer if own.evidence.extent() is not None else None
        return state.after(step, {**lost, step.name: replace(own, answer=kept, prediction=prediction)})

    def _finished(self, own: ObjectState, answer: Answer) -> FloatImage:
        if own.finish == Finish():
            return answer.logits
        positive = np.zeros(answer.logits.shape, dtype=bool)
        if answer.prompts is not None:
            positive = positive | answer.prompts.positive[0].numpy()
        if own.evidence.start is not None:
            positive = positive | samples_in(own.evidence.start, answer.patch)
        _, answerer = self._require_volume()
        spacing = np.array(answer.patch.step) * answerer.canonical.spacing
        return finished(answer.logits, positive, spacing, own.finish)

    @property
    def _state(self) -> SessionState:
        return self._history[self._now]

    def _push(self, state: SessionState, amend: bool = False) -> None:
        """Go on to a new state; `amend` lets it take the place of the present one."""
        former, shown = self._history[: self._now + (0 if amend and self._now else 1)], self._state
        for name in state.objects:
            self._know(name)
        self._history = [*former, state][-HISTORY:]
        self._now = len(self._history) - 1
        self._changed = self._difference(shown, state)
        self._keep_selection()

    def _push_prediction(self, state: SessionState, name: str, amend: bool = False) -> Prediction:
        self._push(state, amend)
        prediction = state.of(name).prediction
        assert prediction is not None, "made by `_settled`"
        return prediction

    def _move_to(self, moment: int) -> None:
        before, self._now = self._state, moment
        self._changed = self._difference(before, self._state)
        self._keep_selection()

    def _as_changed(self) -> Prediction | None:
        """The selected object's prediction, `changed` being the session's."""
        return self.prediction and replace(self.prediction, changed=self._changed)

    def _know(self, name: str) -> None:
        if name not in self._names:
            self._names = (*self._names, name)

    def _keep_selection(self) -> None:
        if self._selected not in self.objects:
            self._selected = self.objects[-1]

    def _difference(self, a: SessionState, b: SessionState) -> Box:
        """Box on the volume's grid around the masks of all objects whose masks differ between two states."""
        box = NOTHING
        for name in {*a.objects, *b.objects}:
            masks = a.of(name).mask, b.of(name).mask
            if masks[0] is not masks[1]:
                box = box.union(masks[0].box).union(masks[1].box)
        return self._volume.from_canonical_box(box) if self._volume and box.size else NOTHING

    def _object(self, name: str | None) -> ObjectState:
        name = self._selected if name is None else name
        if name not in self.objects:
            message = f"there is no object {name!r}; there are {list(self.objects)}. Use `select` to make one."
            raise SessionStateError(message)
        return self._state.of(name)

    def _require_unlocked(self, name: str, what: str) -> None:
        if self._state.of(name).locked:
            message = f"object {name!r} is locked; got {what}. Unlock it, or select another object."
            raise SessionStateError(message)

    def _require_volume(self) -> tuple[Volume, Answerer]:
        if self._volume is None or self._answerer is None:
            message = "this session has no volume yet. Call `set_volume` first."
            raise SessionStateError(message)
        return self._volume, self._answerer


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        message = f"an object's name must be text and not empty, got {name!r}."
        raise SessionStateError(message)


def _neighbours(value: Neighbours | str) -> Neighbours:
    try:
        return Neighbours(value)
    except ValueError:
        message = f"neighbours must be one of {[n.value for n in Neighbours]}, got {value!r}."
        raise PromptError(message) from None


def find_device(name: str) -> torch.device:
    """The compute device of that name; "auto" takes CUDA where it is there.

    Raises:
        DeviceError: unknown, or asked for and not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        message = f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got {name!r}."
        raise DeviceError(message)
    if name == "cpu":
        return torch.device("cpu")
    if not available:
        message = f"device {name!r} was asked for; torch {torch.__version__} finds no CUDA here. Use 'cpu' or 'auto'."
        raise DeviceError(message)
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        message = f"device {name!r} was asked for; there are {torch.cuda.device_count()} CUDA devices. Use 'cuda'."
        raise DeviceError(message)
    return device
