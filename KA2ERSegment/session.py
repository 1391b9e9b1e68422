"""`Session`: prompts in, masks out, for one volume. Read `add` first.

    volume -> patch -> features (once per patch, kept) --+
    prompts -> maps and tokens on the patch -------------+-> mask decoder -> promises kept -> prediction

A session is a sequence of immutable states: undo and redo only move along it, and a refused prompt leaves it as it
was. Which objects there are and which is selected is no part of the states: undo takes back what was done to an
object, never a choice of one. All work happens on the volume's canonical view; only `Prediction` turns results back
to the volume's own axes.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.constraints import (
    MARGIN,
    SPECK,
    click_reach,
    honour,
    keep_change_local,
    keep_in_box,
    remove_islands,
    remove_specks,
)
from KA2ERSegment.errors import DeviceError, PromptError, SessionStateError
from KA2ERSegment.geometry import Box
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.prediction import FloatImage, PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch, normalise, sample_image, upsample
from KA2ERSegment.prompt_encoder import PatchPrompts
from KA2ERSegment.prompts import PointPrompt, Polarity, Prompt
from KA2ERSegment.rasterise import Evidence, mask_on_patch, patch_prompts
from KA2ERSegment.steps import FORMAT, Step, parse_steps, read_steps_file, write_steps_file
from KA2ERSegment.volume import Volume
from KA2ERSegment.zoom import Answer, fits, mask_faces, mask_voxels, regrown, trust

FIRST_OBJECT = "object"
HISTORY = 64
"""States kept: the present one and those that undo goes back to."""
NOTHING = Box((0, 0, 0), (0, 0, 0))


@dataclass(frozen=True, slots=True)
class ObjectState:
    """One object: its prompts, oldest first, and what they gave.

    Args:
        prompts: of this object alone.
        answer: that the next prompt builds on; None before the first positive prompt.
        prediction: None before the first prompt.
        locked: no prompt changes it.
    """

    prompts: tuple[Prompt, ...] = ()
    answer: Answer | None = None
    prediction: Prediction | None = None
    locked: bool = False

    @property
    def positive_clicks(self) -> list[PointPrompt]:
        """Its clicks that no other object may take."""
        return [p for p in self.prompts if isinstance(p, PointPrompt) and p.polarity is Polarity.POSITIVE]


@dataclass(frozen=True, slots=True)
class SessionState:
    """Everything that undo brings back: the objects to which something was done, and all that was done."""

    objects: Mapping[str, ObjectState] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    def of(self, name: str) -> ObjectState:
        """The state of an object, as new where nothing was done to it."""
        return self.objects.get(name, ObjectState())

    def after(self, step: Step, changed: Mapping[str, ObjectState]) -> SessionState:
        """The state after one more step that changed some objects."""
        objects = {name: state for name, state in {**self.objects, **changed}.items() if state != ObjectState()}
        return SessionState(objects, (*self.steps, step) if objects else ())


class Session:
    """Prompts in, masks out, for one volume and any number of named objects.

    Args:
        bundle: the model; the one that the package ships by default.
        device: "auto", "cpu" or "cuda" (or "cuda:1").
        feature_memory_mb: bound on the features that are kept.

    Raises:
        DeviceError: CUDA was asked for and is not there.
        BundleError: the bundle does not fit this version.
    """

    def __init__(self, bundle: Bundle | None = None, device: str = "auto", feature_memory_mb: float = 512.0) -> None:
        self.bundle = bundle if bundle is not None else load_bundle()
        self.device = find_device(device)
        self._model: PromptableModel = build_model(self.bundle.plans, self.bundle.weights()).to(self.device)
        self._feature_bytes = feature_memory_mb * 1e6
        self._volume: Volume | None = None
        self._canonical: Volume | None = None
        self._features: OrderedDict[Patch, PatchFeatures] = OrderedDict()
        self._start()

    # -- volume and objects ------------------------------------------------------------------------------------------

    def set_volume(self, volume: Volume) -> None:
        """Work on another volume: prompts, masks, features and history of the former one are dropped. Cheap."""
        if not isinstance(volume, Volume):
            message = f"a session needs a Volume, got {type(volume).__name__}. Use Volume(array_kji, ijk_to_ras)."
            raise SessionStateError(message)
        self._canonical = volume.canonical()
        self._volume = volume
        self._features.clear()
        self._start()

    def _start(self) -> None:
        self._names: tuple[str, ...] = (FIRST_OBJECT,)
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
        """Names of the objects, oldest first."""
        return self._names

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
        """Half-open box on the volume's grid: outside it the last add, undo, redo or reset left all masks alone."""
        return self._changed

    def prompts(self, name: str | None = None) -> tuple[Prompt, ...]:
        """Prompts of an object (the selected one by default), oldest first."""
        return self._object(name).prompts

    def select(self, name: str) -> Prediction | None:
        """Let prompts go to the object of that name; it is made where there is none. Returns its prediction.

        Nothing is done to any object, so `undo` does not take it back, and `redo` stays possible.
        """
        if not isinstance(name, str) or not name:
            message = f"an object's name must be text and not empty, got {name!r}."
            raise SessionStateError(message)
        if self._names == (FIRST_OBJECT,) and not any(state.objects for state in self._history):
            self._names = (name,)  # nothing was done with the nameless first object
        elif name not in self._names:
            self._names = (*self._names, name)
        self._selected = name
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
            self._push(Step(name, "lock" if locked else "unlock"), {name: replace(own, locked=locked)})

    def prediction_of(self, name: str) -> Prediction | None:
        """The prediction of any object."""
        return self._object(name).prediction

    def label_map(self) -> tuple[npt.NDArray[np.uint16], tuple[str, ...]]:
        """All objects in one (K, J, I) uint16 array; object n of the returned names has value n + 1."""
        volume, _ = self._require_volume()
        labels = np.zeros(volume.shape_kji, dtype=np.uint16)
        for value, name in enumerate(self.objects, start=1):
            prediction = self._state.of(name).prediction
            if prediction is not None and prediction.packed.box.size:
                part = volume.to_canonical(labels)[prediction.packed.box.slices]
                part[prediction.packed.unpack()] = value
        return labels, self.objects

    # -- prompts -----------------------------------------------------------------------------------------------------

    def add(self, prompt: Prompt) -> Prediction:
        """Give one prompt to the selected object.

        Raises:
            SessionStateError: no volume yet, or the object is locked.
            PromptError: the prompt does not fit the volume, or contradicts another one.
        """
        volume, canonical = self._require_volume()
        name, own = self._selected, self._state.of(self._selected)
        if own.locked:
            message = f"object {name!r} is locked; got a {type(prompt).__name__}. Unlock it, or select another object."
            raise SessionStateError(message)
        prompts = (*own.prompts, prompt)
        evidence, newest = Evidence.of(prompts, canonical), Evidence.of([prompt], canonical)
        self._refuse_claimed_voxels(newest)
        answer = self._answer(own, evidence, newest)
        packed = self._keep_promises(answer, evidence)
        others, touched = self._others_without(packed)
        before = own.prediction.packed.box if own.prediction else NOTHING
        changed = volume.from_canonical_box(before.union(packed.box).union(touched))
        prediction = Prediction(
            volume=volume,
            canonical=canonical,
            name=name,
            patch=answer.patch,
            logits=answer.logits,
            packed=packed,
            changed=changed,
            quality=answer.quality,
            arms=self._model.arms,
            opinion=self._opinion_of(answer),
        )
        # negative prompts alone leave nothing to build on: the first positive one chooses its patch as if it were first
        kept = answer if evidence.extent() is not None else None
        self._push(Step(name, prompt), {**others, name: ObjectState(prompts, kept, prediction)})
        return prediction

    def undo(self) -> Prediction | None:
        """Take back the last prompt, lock, unlock or reset, of whatever object; the selection stays as it is.

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
        prediction = self.prediction
        return None if prediction is None else replace(prediction, changed=self._changed)

    @property
    def can_undo(self) -> bool:
        """Whether `undo` would succeed."""
        return self._now > 0

    @property
    def can_redo(self) -> bool:
        """Whether `redo` would succeed."""
        return self._now < len(self._history) - 1

    def reset(self) -> None:
        """Drop the selected object's prompts and mask; `undo` brings them back."""
        own = self._state.of(self._selected)
        if own.locked:
            message = f"object {self._selected!r} is locked. Unlock it before its reset."
            raise SessionStateError(message)
        if own.prompts:
            self._push(Step(self._selected, "reset"), {self._selected: ObjectState()})

    # -- saving ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All that was done to all objects in its order, in RAS mm; no image content and no file name.

        What was undone is left out. What was reset is there: while it lasted, other objects kept off it.
        """
        volume, _ = self._require_volume()
        return {
            "format": FORMAT,
            "bundle": self.bundle.identity,
            "grid": {"shape_kji": list(volume.shape_kji), "ijk_to_ras": volume.ijk_to_ras.tolist()},
            "objects": list(self._names),
            "selected": self._selected,
            "steps": [step.to_json() for step in self._state.steps],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompts as JSON; the file appears whole or not at all."""
        write_steps_file(Path(path), self.to_json())

    @classmethod
    def replay(
        cls, path: str | os.PathLike[str], volume: Volume, bundle: Bundle | None = None, device: str = "auto"
    ) -> Session:
        """A new session to which everything in a file is done again, in its order.

        Prompts are in patient space, so the volume may be another one than they were drawn on; mask prompts need its
        grid. With the same volume and bundle the masks come out the same.

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
            SessionStateError: no volume yet, or an object of that name is locked here.
        """
        self._require_volume()
        names, selected, steps = parse_steps(saved)
        before = self._names, self._selected, self._history, self._now, self._changed
        try:
            for name in names:
                self.select(name)
            for step in steps:
                self.select(step.name)
                self._do(step)
            self.select(selected)
        except BaseException:
            self._names, self._selected, self._history, self._now, self._changed = before
            raise

    def _do(self, step: Step) -> None:
        match step.done:
            case "lock":
                self.lock()
            case "unlock":
                self.unlock()
            case "reset":
                self.reset()
            case prompt:
                self.add(prompt)

    # -- from prompts to an answer -----------------------------------------------------------------------------------

    def _answer(self, own: ObjectState, evidence: Evidence, newest: Evidence) -> Answer:
        """Choose patches and decode until the object fits its patch."""
        plans = self.bundle.plans
        if own.answer is not None and newest.box is None and newest.start is None and fits(own.answer.patch, newest):
            answer = self._decode(own.answer.patch, evidence, own.answer, newest)
        elif evidence.box is None and evidence.start is None and evidence.extent() is not None and own.answer is None:
            answer = self._first_click(evidence, newest)
        else:
            answer = self._decode(self._patch_around(evidence, own.answer), evidence, own.answer, newest)
        if evidence.extent() is None:  # nobody has said where the object is
            return replace(answer, logits=np.minimum(answer.logits, np.float32(-MARGIN)))
        if evidence.box is not None and evidence.flat is None:  # a 3D box bounds the object
            return answer
        for _ in range(4):
            patch = regrown(answer, evidence, own.answer, self._require_volume()[1], plans.margin)
            if patch is None:
                break
            fitted = self._decode(patch, evidence, None, newest)
            if not (fitted.logits > 0).any():
                break
            answer = fitted
        return answer

    def _patch_around(self, evidence: Evidence, before: Answer | None) -> Patch:
        """The patch for a box, a mask to start from, or prompts beyond the former patch."""
        _, canonical = self._require_volume()
        extent = evidence.extent()
        start, stop = (np.array(extent.start, float), np.array(extent.stop, float)) if extent else (None, None)
        if start is None or stop is None:  # negative prompts alone: look where they are
            boxes = [Box(ijk, (ijk[0] + 1, ijk[1] + 1, ijk[2] + 1)) for ijk, _ in evidence.clicks]
            around = boxes[0] if boxes else evidence.regions[0][0]
            start, stop = np.array(around.start, float), np.array(around.stop, float)
        if evidence.flat is not None and evidence.box is not None:  # the object's reach across the slice is unknown
            spacing = np.array(canonical.spacing)
            length = np.delete((stop - start) * spacing, evidence.flat).max() / spacing[evidence.flat]
            middle = (start[evidence.flat] + stop[evidence.flat]) / 2
            start[evidence.flat] = min(start[evidence.flat], middle - length / 2)
            stop[evidence.flat] = max(stop[evidence.flat], middle + length / 2)
        if before is not None and evidence.box is None:
            found = mask_faces(before)
            if found is not None:
                start, stop = np.minimum(start, found[0]), np.maximum(stop, found[1])
        plans = self.bundle.plans
        return Patch.fit(start, stop, canonical.spacing, plans.patch_size, plans.margin)

    def _first_click(self, evidence: Evidence, newest: Evidence) -> Answer:
        """Without a box the size is unknown: look at several zooms and keep the answer that the model trusts most."""
        _, canonical = self._require_volume()
        extent = evidence.extent()
        assert extent is not None, "checked by the caller"
        centre = (np.array(extent.start) + np.array(extent.stop) - 1) / 2
        least = ((np.array(extent.stop) - np.array(extent.start)) * canonical.spacing).max() * 1.3
        plans = self.bundle.plans
        most = (np.array(canonical.shape_ijk) * canonical.spacing).max()
        sides = [max(min(side, most), least, 8 * min(canonical.spacing)) for side in plans.zooms_mm]
        answers = [
            self._decode(Patch.cube(centre, side, canonical.spacing, plans.patch_size), evidence, None, newest)
            for side in dict.fromkeys(sides)
        ]
        return max(answers, key=trust)

    def _decode(self, patch: Patch, evidence: Evidence, before: Answer | None, newest: Evidence) -> Answer:
        """One pass of prompt encoder and mask decoder; features come from the store where it has them."""
        same = before is not None and before.patch == patch
        previous: FloatImage | None = None
        if newest.start is not None:
            previous = mask_on_patch(newest.start, patch)
        elif before is not None and same:
            previous = np.asarray(1 / (1 + np.exp(-before.logits)), dtype=np.float32)
        elif evidence.start is not None:
            previous = mask_on_patch(evidence.start, patch)
        others = [other.packed for _, _, other in self._others()]
        prompts = patch_prompts(evidence, patch, previous, others)
        with torch.inference_mode():
            decoded = self._model.decode(self._features_of(patch), _to(prompts, self.device))
        logits: FloatImage = decoded.logits[0].cpu().numpy()
        if before is not None and same and newest.box is None and newest.start is None:
            logits = keep_change_local(logits, before.logits, _samples(newest, patch))
        if evidence.box is not None and evidence.flat is None:
            logits = keep_in_box(logits, prompts.box[0].numpy(), prompts.positive[0].numpy())
        logits = remove_islands(logits, prompts.positive[0].numpy())
        return Answer(patch, logits, float(decoded.quality[0]), prompts)

    def _features_of(self, patch: Patch) -> PatchFeatures:
        if patch in self._features:
            self._features.move_to_end(patch)
            return self._features[patch]
        _, canonical = self._require_volume()
        image, inside = sample_image(canonical.array_kji, patch)
        with torch.inference_mode():
            features = self._model.encode(normalise(image[None], inside[None]).to(self.device))
        self._features[patch] = features
        while len(self._features) > 1 and sum(kept.nbytes for kept in self._features.values()) > self._feature_bytes:
            self._features.popitem(last=False)
        return features

    def _opinion_of(self, answer: Answer) -> Callable[[int], tuple[FloatImage, FloatImage]]:
        """What `Prediction.experts` calls: one arm's logits and weight on the patch."""
        volume = self._volume

        def opinion(arm: int) -> tuple[FloatImage, FloatImage]:
            if self._volume is not volume:
                message = "the experts of a prediction can be asked while its volume is the session's; it was changed."
                raise SessionStateError(message)
            with torch.inference_mode():
                features = self._features_of(answer.patch)
                alone = self._model.decode(self._model.only(features, arm), _to(answer.prompts, self.device))
                share = torch.nn.functional.interpolate(
                    features.weights[:, arm : arm + 1].float(), size=answer.logits.shape, mode="trilinear"
                )
            return alone.logits[0].cpu().numpy(), share[0, 0].cpu().numpy()

        return opinion

    # -- promises ----------------------------------------------------------------------------------------------------

    def _others(self) -> list[tuple[str, ObjectState, Prediction]]:
        """The objects with a mask, but for the selected one; oldest first."""
        states = [(name, self._state.of(name)) for name in self._names if name != self._selected]
        return [(name, state, state.prediction) for name, state in states if state.prediction is not None]

    def _refuse_claimed_voxels(self, newest: Evidence) -> None:
        """A positive click may take a voxel from another object, but not a locked one's nor another's own click."""
        _, canonical = self._require_volume()
        for name, state, other in self._others():
            claimed = {click.ijk(canonical) for click in state.positive_clicks}
            for ijk, sign in newest.clicks:
                if sign > 0 and state.locked and other.packed.contains(ijk):
                    message = (
                        f"a positive click must lie outside locked objects; the click lies in {name!r}. "
                        f"Unlock {name!r}, or click beside it."
                    )
                    raise PromptError(message)
                if sign > 0 and ijk in claimed:
                    message = (
                        f"a voxel can only belong to one object; the click for {self._selected!r} lies on the voxel of "
                        f"a positive click for {name!r}. Undo that one, or click beside it."
                    )
                    raise PromptError(message)

    def _keep_promises(self, answer: Answer, evidence: Evidence) -> PackedMask:
        """The mask at the volume's own resolution: inside the patch, clicks honoured, other objects respected.

        Each voxel that another object has goes to the more probable of the two. Locked objects keep theirs, and
        positive clicks of other objects count as negative ones here.
        """
        _, canonical = self._require_volume()
        domain = answer.patch.box(canonical.shape_kji)
        clicks = list(evidence.clicks)
        for _, state, _ in self._others():
            clicks += [(click.ijk(canonical), -1) for click in state.positive_clicks]
        clicks = list(dict.fromkeys(clicks))
        candidates = mask_voxels(answer).intersect(domain)
        box = candidates
        for ijk, sign in clicks:
            near = click_reach(answer.patch, ijk).dilate(SPECK).intersect(domain)
            if sign > 0 or near.intersect(candidates).size:
                box = box.union(near)
        logits = upsample(answer.logits, answer.patch, box)
        blocked = np.zeros(box.shape_kji, dtype=bool)
        for _, state, other in self._others():
            common = other.packed.box.intersect(box)
            if common.size == 0:
                continue
            inside, theirs = common.within(box).slices, other.packed.on(common)
            if state.locked:
                blocked[inside] |= theirs
            else:  # by how much this object is the more probable one
                lead = np.maximum(upsample(other.logits, other.patch, common), 0)
                logits[inside] -= np.where(theirs, lead, 0)
        return PackedMask.pack(box, honour(logits, box, answer.patch, clicks, blocked))

    def _others_without(self, mine: PackedMask) -> tuple[dict[str, ObjectState], Box]:
        """Other objects that lose voxels to a mask, and a box of the canonical volume around all that they lose.

        What is left of them has no new specks, and all their positive clicks: `_keep_promises` saw to that.
        """
        _, canonical = self._require_volume()
        changed: dict[str, ObjectState] = {}
        touched = NOTHING
        for name, state, other in self._others():
            common = other.packed.box.intersect(mine.box)
            lost = Box.around(other.packed.on(common) & mine.on(common))
            if lost is None:
                continue
            box = other.packed.box
            rest = other.packed.unpack()
            rest[common.within(box).slices] &= ~mine.on(common)
            near = lost.shift(common.start).dilate(1).intersect(box)
            remove_specks(rest, box, near, [click.ijk(canonical) for click in state.positive_clicks])
            reach = near.dilate(SPECK).intersect(box)
            shrunk = replace(other, packed=PackedMask.pack(box, rest), changed=other.volume.from_canonical_box(reach))
            changed[name] = replace(state, prediction=shrunk)
            touched = touched.union(reach)
        return changed, touched

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> SessionState:
        return self._history[self._now]

    def _push(self, step: Step, changed: Mapping[str, ObjectState]) -> None:
        state = self._state.after(step, changed)
        self._history = [*self._history[: self._now + 1], state][-HISTORY:]
        self._now = len(self._history) - 1
        self._changed = self._difference(self._history[self._now - 1], state)

    def _move_to(self, moment: int) -> None:
        before, self._now = self._state, moment
        self._changed = self._difference(before, self._state)

    def _difference(self, a: SessionState, b: SessionState) -> Box:
        """Box on the volume's grid around the masks of all objects whose masks differ between two states."""
        box = NOTHING
        for name in {*a.objects, *b.objects}:
            masks = [prediction and prediction.packed for prediction in (a.of(name).prediction, b.of(name).prediction)]
            if masks[0] is not masks[1]:
                for mask in masks:
                    box = box.union(mask.box) if mask else box
        return self._volume.from_canonical_box(box) if self._volume and box.size else NOTHING

    def _object(self, name: str | None) -> ObjectState:
        name = self._selected if name is None else name
        if name not in self._names:
            message = f"there is no object {name!r}; there are {list(self._names)}. Use `select` to make one."
            raise SessionStateError(message)
        return self._state.of(name)

    def _require_volume(self) -> tuple[Volume, Volume]:
        if self._volume is None or self._canonical is None:
            message = "this session has no volume yet. Call `set_volume` first."
            raise SessionStateError(message)
        return self._volume, self._canonical


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


def _samples(newest: Evidence, patch: Patch) -> list[tuple[int, int, int]]:
    """Samples (K, J, I) of the newest clicks and regions; a region gives at most a hundred."""
    voxels = [np.array(ijk) for ijk, _ in newest.clicks]
    for box, crop, _ in newest.regions:
        inside = np.argwhere(crop)[:, ::-1] + np.array(box.start)
        voxels += list(inside[:: max(1, len(inside) // 100)])
    samples = []
    for voxel in voxels:
        i, j, k = np.clip(np.round(patch.to_patch(voxel)), 0, patch.size - 1).astype(int).tolist()
        samples.append((k, j, i))
    return samples


def _to(prompts: PatchPrompts, device: torch.device) -> PatchPrompts:
    tensors = {name: getattr(prompts, name).to(device) for name in PatchPrompts.__slots__}
    return PatchPrompts(**tensors)
