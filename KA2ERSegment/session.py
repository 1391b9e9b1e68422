"""`Session`: prompts in, masks out, for one volume. Read `add` first.

    volume -> patch -> features (once per patch, kept) --+
    prompts -> maps and tokens on the patch -------------+-> mask decoder -> promises kept -> prediction

A session is a sequence of immutable states: undo and redo only move along it, and a refused prompt leaves it as it
was. All work happens on the volume's canonical view; only `Prediction` turns results back to the volume's own axes.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.constraints import click_reach, honour, keep_change_local, remove_islands
from KA2ERSegment.errors import DeviceError, PromptError, SessionStateError
from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.prediction import FloatImage, PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch, normalise, sample_image, upsample
from KA2ERSegment.prompt_encoder import PatchPrompts
from KA2ERSegment.prompts import PointPrompt, Prompt, ScribblePrompt, prompt_from_json
from KA2ERSegment.rasterise import Evidence, mask_on_patch, patch_prompts
from KA2ERSegment.volume import Volume

FORMAT = 1
FIRST_OBJECT = "object"
HISTORY = 64
"""States kept for undo."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The network's answer for one object on one patch.

    Args:
        patch: that it saw.
        logits: (S, S, S) float32.
        quality: expected Dice, 0..1.
        prompts: as the network saw them.
    """

    patch: Patch
    logits: FloatImage
    quality: float
    prompts: PatchPrompts


@dataclass(frozen=True, slots=True)
class ObjectState:
    """One named object: its prompts (each with its number in the session) and what they gave."""

    prompts: tuple[tuple[int, Prompt], ...] = ()
    answer: Answer | None = None
    prediction: Prediction | None = None
    locked: bool = False


@dataclass(frozen=True, slots=True)
class SessionState:
    """Everything that undo brings back."""

    objects: dict[str, ObjectState]
    selected: str


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
        self._history = [_empty_state()]
        self._now = 0

    # -- volume and objects ------------------------------------------------------------------------------------------

    def set_volume(self, volume: Volume) -> None:
        """Work on another volume: prompts, masks, features and history of the former one are dropped. Cheap."""
        self._canonical = volume.canonical()
        self._volume = volume
        self._features.clear()
        self._history, self._now = [_empty_state()], 0

    @property
    def volume(self) -> Volume:
        """The volume; SessionStateError before `set_volume`."""
        return self._require_volume()[0]

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the objects, oldest first."""
        return tuple(self._state.objects)

    @property
    def selected(self) -> str:
        """Name of the object that prompts go to."""
        return self._state.selected

    @property
    def prediction(self) -> Prediction | None:
        """Of the selected object; None before its first prompt."""
        return self._state.objects[self.selected].prediction

    def prompts(self, name: str | None = None) -> tuple[Prompt, ...]:
        """Prompts of an object (the selected one by default), oldest first."""
        return tuple(prompt for _, prompt in self._object(name or self.selected).prompts)

    def select(self, name: str) -> Prediction | None:
        """Let prompts go to the object of that name; it is made where there is none. Returns its prediction."""
        if not name:
            message = "an object's name must not be empty."
            raise SessionStateError(message)
        objects = dict(self._state.objects)
        first = objects.get(FIRST_OBJECT)
        if name not in objects and first == ObjectState() and len(objects) == 1:
            del objects[FIRST_OBJECT]  # nothing was done with the nameless first object
        objects.setdefault(name, ObjectState())
        if (objects, name) != (self._state.objects, self.selected):
            self._push(SessionState(objects, name))
        return self.prediction

    def lock(self, name: str | None = None, locked: bool = True) -> None:
        """Protect an object (the selected one by default): no prompt changes it any more, its own neither."""
        name = name or self.selected
        self._push(self._with_object(name, replace(self._object(name), locked=locked)))

    def unlock(self, name: str | None = None) -> None:
        """Let an object change again."""
        self.lock(name, locked=False)

    def prediction_of(self, name: str) -> Prediction | None:
        """The prediction of any object."""
        return self._object(name).prediction

    def label_map(self) -> tuple[npt.NDArray[np.uint16], tuple[str, ...]]:
        """All objects in one (K, J, I) uint16 array; object n of the returned names has value n + 1."""
        volume, _ = self._require_volume()
        labels = np.zeros(volume.shape_kji, dtype=np.uint16)
        for value, name in enumerate(self.objects, start=1):
            prediction = self._state.objects[name].prediction
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
        name, own = self.selected, self._object(self.selected)
        if own.locked:
            message = f"object {name!r} is locked; got a {type(prompt).__name__}. Unlock it, or select another object."
            raise SessionStateError(message)
        evidence = Evidence.of([*(p for _, p in own.prompts), prompt], canonical)
        newest = Evidence.of([prompt], canonical)
        self._refuse_locked_voxels(newest)
        answer = self._answer(own, evidence, newest)
        mask, box = self._keep_promises(answer, evidence)
        objects = self._resolve_overlaps(name, mask, box, answer, evidence)
        before = own.prediction.packed.box if own.prediction else Box((0, 0, 0), (0, 0, 0))
        packed = PackedMask.pack(box, mask)
        changed = volume.from_canonical_box(before.union(packed.box))
        prediction = Prediction(
            volume, canonical, name, answer.patch, answer.logits, packed, changed, answer.quality,
            self._model.arms, self._opinion_of(answer),
        )  # fmt: skip
        numbered = (*own.prompts, (self._next_number(), prompt))
        objects[name] = ObjectState(numbered, answer, prediction)
        self._push(SessionState(objects, name))
        return prediction

    def undo(self) -> Prediction | None:
        """Take back the last change, of whatever object; SessionStateError where there is none."""
        if self._now == 0:
            message = "there is nothing to undo in this session."
            raise SessionStateError(message)
        self._now -= 1
        return self.prediction

    def redo(self) -> Prediction | None:
        """Bring back what `undo` took; SessionStateError where there is nothing."""
        if self._now == len(self._history) - 1:
            message = "there is nothing to redo in this session."
            raise SessionStateError(message)
        self._now += 1
        return self.prediction

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
        if self._object(self.selected).locked:
            message = f"object {self.selected!r} is locked. Unlock it before its reset."
            raise SessionStateError(message)
        self._push(self._with_object(self.selected, ObjectState()))

    # -- saving ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All prompts of all objects in the order they were given, in RAS mm; no image content and no file name."""
        volume, _ = self._require_volume()
        numbered = [
            (number, {"object": name, "prompt": prompt.to_json()})
            for name, state in self._state.objects.items()
            for number, prompt in state.prompts
        ]
        return {
            "format": FORMAT,
            "bundle": self.bundle.identity,
            "grid": {"shape_kji": list(volume.shape_kji), "ijk_to_ras": volume.ijk_to_ras.tolist()},
            "objects": [{"name": name, "locked": state.locked} for name, state in self._state.objects.items()],
            "selected": self.selected,
            "prompts": [entry for _, entry in sorted(numbered, key=lambda pair: pair[0])],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompts as JSON; the file appears whole or not at all."""
        target = Path(path)
        scratch = target.with_name(f".{target.name}.partial")
        try:
            scratch.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def replay(
        cls, path: str | os.PathLike[str], volume: Volume, bundle: Bundle | None = None, device: str = "auto"
    ) -> Session:
        """A new session with the prompts of a file, given again in their order.

        Prompts are in patient space, so the volume may be another one than they were drawn on; mask prompts need its
        grid. With the same volume and bundle the masks come out the same.

        Raises:
            PromptError: a file that is no prompts file, or prompts that do not fit the volume.
        """
        session = cls(bundle, device)
        session.set_volume(volume)
        session.give(_read_prompts(Path(path)))
        return session

    def give(self, saved: dict[str, Any]) -> None:
        """Add the prompts of `to_json`; all or, where one is refused, none."""
        entries = [(str(entry["object"]), prompt_from_json(entry["prompt"])) for entry in saved["prompts"]]
        history, now = list(self._history), self._now
        try:
            for entry in saved["objects"]:
                self.select(str(entry["name"]))
            for name, prompt in entries:
                self.select(name)
                self.add(prompt)
            for entry in saved["objects"]:
                if entry["locked"]:
                    self.lock(str(entry["name"]))
            self.select(str(saved["selected"]))
        except Exception:
            self._history, self._now = history, now
            raise

    # -- from prompts to an answer -----------------------------------------------------------------------------------

    def _answer(self, own: ObjectState, evidence: Evidence, newest: Evidence) -> Answer:
        """Choose patches and decode until the object fits its patch."""
        plans = self.bundle.plans
        if own.answer is not None and newest.box is None and newest.start is None and _fits(own.answer.patch, newest):
            answer = self._decode(own.answer.patch, evidence, own.answer, newest)
        elif evidence.box is None and evidence.start is None and evidence.extent() is not None and own.answer is None:
            answer = self._first_click(evidence, newest)
        else:
            answer = self._decode(self._patch_around(evidence, own.answer), evidence, own.answer, newest)
        bounded = evidence.box is not None and evidence.flat is None
        for _ in range(3):
            patch = None if bounded else _regrown(answer, self._require_volume()[1], plans.margin)
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
            found = _mask_faces(before)
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
        sides = [max(side, least, 8 * min(canonical.spacing)) for side in plans.zooms_mm]
        answers = [
            self._decode(Patch.cube(centre, side, canonical.spacing, plans.patch_size), evidence, None, newest)
            for side in dict.fromkeys(sides)
        ]
        return max(answers, key=_trust)

    def _decode(self, patch: Patch, evidence: Evidence, before: Answer | None, newest: Evidence) -> Answer:
        """One pass of prompt encoder and mask decoder; features come from the store where it has them."""
        same = before is not None and before.patch == patch
        previous: FloatImage | None = None
        if newest.start is not None:
            previous = mask_on_patch(newest.start, patch)
        elif before is not None and same:
            previous = 1 / (1 + np.exp(-before.logits))
        elif evidence.start is not None:
            previous = mask_on_patch(evidence.start, patch)
        others = [
            state.prediction.packed
            for name, state in self._state.objects.items()
            if name != self.selected and state.prediction is not None
        ]
        prompts = patch_prompts(evidence, patch, previous, others)
        with torch.inference_mode():
            decoded = self._model.decode(self._features_of(patch), _to(prompts, self.device))
        logits: FloatImage = decoded.logits[0].cpu().numpy()
        if before is not None and same and newest.box is None and newest.start is None:
            logits = keep_change_local(logits, before.logits, _samples(newest, patch))
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

    def _keep_promises(self, answer: Answer, evidence: Evidence) -> tuple[BoolArray, Box]:
        """The mask at the volume's own resolution, with the clicks honoured; on which voxels."""
        _, canonical = self._require_volume()
        whole = answer.patch.box(canonical.shape_kji)
        box = _mask_voxels(answer).intersect(whole)
        for ijk, sign in evidence.clicks:
            if sign > 0:
                box = box.union(click_reach(answer.patch, ijk).intersect(canonical.box))
        if box.size == 0:
            return np.zeros(box.shape_kji, dtype=bool), box
        logits = upsample(answer.logits, answer.patch, box)
        return honour(logits, box, answer.patch, evidence.clicks), box

    def _refuse_locked_voxels(self, newest: Evidence) -> None:
        for name, state in self._state.objects.items():
            if not state.locked or state.prediction is None:
                continue
            for ijk, sign in newest.clicks:
                if sign > 0 and state.prediction.packed.on(Box(ijk, (ijk[0] + 1, ijk[1] + 1, ijk[2] + 1))).any():
                    message = (
                        f"a positive click must lie outside locked objects; the click lies in {name!r}. "
                        f"Unlock {name!r}, or click beside it."
                    )
                    raise PromptError(message)

    def _resolve_overlaps(
        self, own: str, mask: BoolArray, box: Box, answer: Answer, evidence: Evidence
    ) -> dict[str, ObjectState]:
        """Give each voxel that two objects claim to the more probable one; `mask` is changed in place.

        Locked objects keep theirs, and so does every positive click.
        """
        objects = dict(self._state.objects)
        for name, state in objects.items():
            other = state.prediction
            if name == own or other is None or other.packed.box.intersect(box).size == 0:
                continue
            common = other.packed.box.intersect(box)
            mine = mask[common.shift(_minus(box.start)).slices]  # a view
            theirs = other.packed.on(common)
            both = mine & theirs
            if not both.any():
                continue
            keep = np.zeros_like(both)
            if not state.locked:
                keep = upsample(answer.logits, answer.patch, common) > upsample(other.logits, other.patch, common)
                _, canonical = self._require_volume()
                for clicks, winner in ((_positive(Evidence.of(self.prompts(name), canonical)), False), (_positive(evidence), True)):  # fmt: skip
                    for ijk in clicks:
                        if common.contains(ijk):
                            keep[common.shift(_minus(common.start)).slices][tuple(x - a for x, a in zip(ijk[::-1], common.start[::-1], strict=True))] = winner  # fmt: skip
            mine &= ~(both & ~keep)
            lost = both & keep
            if lost.any():
                rest = other.packed.unpack()
                rest[common.shift(_minus(other.packed.box.start)).slices] &= ~lost
                objects[name] = replace(
                    state, prediction=replace(other, packed=PackedMask.pack(other.packed.box, rest))
                )
        return objects

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> SessionState:
        return self._history[self._now]

    def _push(self, state: SessionState) -> None:
        self._history = [*self._history[: self._now + 1], state][-HISTORY:]
        self._now = len(self._history) - 1

    def _with_object(self, name: str, own: ObjectState) -> SessionState:
        return SessionState({**self._state.objects, name: own}, self.selected)

    def _object(self, name: str) -> ObjectState:
        if name not in self._state.objects:
            message = f"there is no object {name!r}; there are {list(self.objects)}. Use `select` to make one."
            raise SessionStateError(message)
        return self._state.objects[name]

    def _next_number(self) -> int:
        return 1 + max((n for state in self._state.objects.values() for n, _ in state.prompts), default=0)

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
    if name != "cpu" and not name.startswith("cuda"):
        message = f"device must be 'auto', 'cpu' or 'cuda', got {name!r}."
        raise DeviceError(message)
    if name.startswith("cuda") and not available:
        message = f"device {name!r} was asked for, and torch {torch.__version__} finds no CUDA here. Use 'cpu' or 'auto'."
        raise DeviceError(message)
    return torch.device(name)


def _empty_state() -> SessionState:
    return SessionState({FIRST_OBJECT: ObjectState()}, FIRST_OBJECT)


def _fits(patch: Patch, newest: Evidence) -> bool:
    """Whether the newest prompt lies well inside a patch (a negative one may lie anywhere)."""
    if newest.regions:
        return all(patch.contains(box.start) and patch.contains(box.stop) for box, _, sign in newest.regions if sign > 0)
    return all(sign < 0 or patch.contains(ijk, inset=0.04) for ijk, sign in newest.clicks)


def _trust(answer: Answer) -> float:
    """How much an answer to a first click is worth: expected Dice, less where the object is a dot or is cut off."""
    mask = answer.logits > 0
    extent = Box.around(mask)
    if extent is None:
        return -1.0
    k, j, i = extent.shape_kji
    share = max(k, j, i) / mask.shape[0]
    small = min(1.0, share / 0.2)
    cut = sum(float(face.mean()) for face in _faces(mask))
    return answer.quality * small - 0.3 * min(1.0, cut)


def _regrown(answer: Answer, volume: Volume, margin: float) -> Patch | None:
    """A better patch where the mask reaches its border or leaves most of it empty; None where it fits."""
    mask = answer.logits > 0
    found = _mask_faces(answer)
    if found is None:
        return None
    start, stop = found
    first, last = answer.patch.faces
    extent = last - first
    size = np.array(volume.shape_ijk, dtype=float)
    faces = [float(face.mean()) for face in _faces(mask)]  # K, K, J, J, I, I
    low = np.array([faces[4], faces[2], faces[0]]) > 0.004
    high = np.array([faces[5], faces[3], faces[1]]) > 0.004
    low &= first > 0.5
    high &= last < size - 0.5
    if low.any() or high.any():
        start = np.maximum(np.where(low, first - 0.4 * extent, start), 0)
        stop = np.minimum(np.where(high, last + 0.4 * extent, stop), size)
        return Patch.fit(start, stop, volume.spacing, answer.patch.size, 0.1)
    if ((stop - start) / extent).max() < 0.4 and (np.array(answer.patch.step) > 0.5).any():
        return Patch.fit(start, stop, volume.spacing, answer.patch.size, margin)
    return None


def _faces(mask: BoolArray) -> list[BoolArray]:
    return [mask[0], mask[-1], mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]]


def _mask_faces(answer: Answer) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Outer corners of the mask in continuous voxel index of the canonical volume (IJK)."""
    extent = Box.around(answer.logits > 0)
    if extent is None:
        return None
    origin, step = np.array(answer.patch.origin), np.array(answer.patch.step)
    return origin + (np.array(extent.start) - 0.5) * step + 0.5, origin + (np.array(extent.stop) - 0.5) * step + 0.5


def _mask_voxels(answer: Answer) -> Box:
    """Voxels that can lie in the mask: between the positive samples and their neighbours."""
    extent = Box.around(answer.logits > 0)
    if extent is None:
        return Box((0, 0, 0), (0, 0, 0))
    origin, step = np.array(answer.patch.origin), np.array(answer.patch.step)
    start = np.floor(origin + (np.array(extent.start) - 1) * step).astype(int).tolist()
    stop = (np.ceil(origin + np.array(extent.stop) * step).astype(int) + 1).tolist()
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


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


def _positive(evidence: Evidence) -> Sequence[Ijk]:
    return [ijk for ijk, sign in evidence.clicks if sign > 0]


def _to(prompts: PatchPrompts, device: torch.device) -> PatchPrompts:
    tensors = {name: getattr(prompts, name).to(device) for name in PatchPrompts.__slots__}
    return PatchPrompts(**tensors)


def _minus(ijk: Ijk) -> Ijk:
    return -ijk[0], -ijk[1], -ijk[2]


def _read_prompts(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        known = saved["format"] == FORMAT and all({"object", "prompt"} <= entry.keys() for entry in saved["prompts"])
        known = known and all({"name", "locked"} <= entry.keys() for entry in saved["objects"]) and saved["selected"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path.name!r} must be a prompts file that Session.save wrote: {error!r}."
        raise PromptError(message) from error
    if not known:
        message = f"{path.name!r} must be a prompts file of format {FORMAT}, got {saved.get('format')!r}."
        raise PromptError(message)
    result: dict[str, Any] = saved
    return result
