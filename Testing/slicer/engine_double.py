"""An engine without a network and without a process: what it answers can be worked out by hand.

A positive prompt adds what it covers, grown to a ball of `REACH` mm; a negative one takes that away. Verbs, journal,
history and refusals are those of `RemoteSession`. A test can hold a prediction (`hold`), let the engine die in one
(`dieAt`), and count what was asked (`asked`).
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np

from KA2ERSegment.engine.wire import Change, EngineGoneError, ObjectChange, Opinion
from KA2ERSegment.errors import CancelledError, PromptError, SessionStateError
from KA2ERSegment.geometry import Box, apply_affine
from KA2ERSegment.prompts import BoxPrompt, MaskPrompt, PointPrompt, Polarity, Suggestion, prompt_from_json
from KA2ERSegment.steps import Edit, Finish, Neighbours, Step

REACH = 5.0
"""mm around a click."""
ARMS = ("foundation", "tiny_trunk", "tiny_brain")
NOTHING = Box((0, 0, 0), (0, 0, 0))


class EngineDouble:
    """`EngineProtocol`. Every session that was ever opened is in `sessions`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.sessions: list[SessionDouble] = []
        self.asked: Counter[str] = Counter()
        self.experts = {"amalgamation": dict(zip(ARMS, (0.5, 0.3, 0.2), strict=True))}
        """Of each mode, with their shares in every answer."""
        self.opened = threading.Event()
        self.threads: set[int] = set()
        self.starts = 0
        self.dieAt: str | None = None
        self.stubborn = False
        self.entered = threading.Event()
        self._go = threading.Event()
        self._go.set()
        self._client: ClientDouble | None = None

    # what tests do

    def hold(self) -> None:
        """The next prediction waits, until `release`; `entered` says that it began."""
        self.entered.clear()
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    # EngineProtocol

    def start(self) -> None:
        if self._client is None:
            self.starts += 1
            self._client = ClientDouble(self)

    def poll(self) -> str:
        return "dead" if self._client is None else "ready"

    def client(self) -> ClientDouble:
        assert self._client is not None, "started"
        return self._client

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        if self._client is not None:
            self._client.dead = True
        self._client = None
        self._go.set()

    def die(self) -> None:
        self.stop()


class ClientDouble:
    def __init__(self, engine: EngineDouble) -> None:
        self.engine = engine
        self.dead = False

    def info(self) -> dict[str, Any]:
        experts = [{"name": name, "task": "", "classes": ["bright"]} for name in ARMS[1:]]
        names = {mode: list(shares) for mode, shares in self.engine.experts.items()}
        return {"experts": names, "bundle": {"identity": "double", "experts": experts}}

    def open(self, array_kji: Any, ijk_to_ras: Any, name: str = "volume") -> SessionDouble:
        self.check()
        self.engine.asked["open"] += 1
        session = SessionDouble(self, np.array(array_kji), np.array(ijk_to_ras, dtype=float))
        self.engine.sessions.append(session)
        return session

    def check(self) -> None:
        self.engine.threads.add(threading.get_ident())
        if self.dead:
            message = "the engine does not answer."
            raise EngineGoneError(message)


class SessionDouble:
    """`RemoteSession`."""

    def __init__(self, client: ClientDouble, array: np.ndarray, ijk_to_ras: np.ndarray) -> None:
        self.client, self.array, self.ijk_to_ras = client, array, ijk_to_ras
        self.shape_kji = array.shape
        self.name = "the volume"
        self.selected = ""
        self._names: tuple[str, ...] = ()
        self._history: list[tuple[Step, ...]] = [()]
        self._now = 0
        self._shown: dict[str, np.ndarray] = {}
        self._experts: list[str] | None = None
        self._cancelled = threading.Event()
        self.closed = False

    @property
    def ras_to_ijk(self) -> np.ndarray:
        return np.linalg.inv(self.ijk_to_ras)

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        return tuple(step.to_json() for step in self._history[self._now])

    def to_json(self) -> dict[str, Any]:
        return {"objects": list(self._names), "selected": self.selected, "steps": list(self.steps)}

    # verbs

    def select(self, name: str) -> Change:
        self._begin("select")
        self._select(name)
        return self._change()

    def _select(self, name: str) -> None:
        if name not in self._names:
            self._names = (*self._names, name)
        self.selected = name

    def add(self, prompt: Any, neighbours: Neighbours = Neighbours.COMPETE) -> Change:
        self._begin("add")
        prompt_from_json(prompt.to_json()).region(self)  # as it travels; PromptError outside
        self._predict()
        if neighbours is Neighbours.KEEP and isinstance(prompt, PointPrompt) and prompt.polarity is Polarity.POSITIVE:
            i, j, k = prompt.ijk(self)
            for name, mask in self._masks().items():
                if name != self.selected and mask[k, j, i]:
                    message = f"the click belongs to {name!r} and neighbours keep their voxels. Click beside it."
                    raise PromptError(message)
        return self._push(
            Step(self.selected, prompt, neighbours, None if self._experts is None else tuple(self._experts))
        )

    def edit(self, mask: MaskPrompt, amend: bool = False) -> Change:
        self._begin("edit")
        mask = prompt_from_json(mask.to_json())
        return self._push(Step(self.selected, Edit.of(mask), Neighbours.OVERLAP, amend=amend), amend)

    def finish(self, smoothing_mm: float = 0.0, islands: bool = True) -> Change:
        self._begin("finish")
        step, steps = Step(self.selected, Finish(smoothing_mm, islands)), self._history[self._now]
        if steps and isinstance(steps[-1].done, Finish) and steps[-1].name == self.selected:
            self._history[self._now :] = [(*steps[:-1], step)]
            return self._change()
        return self._push(step)

    def revise(self, steps: Any) -> Change:
        self._begin("revise")
        self._predict()
        new = tuple(Step.from_json(dict(step)) for step in steps)
        for step in new:
            if not isinstance(step.done, (str, Edit, Finish)):
                step.done.region(self)
        self._history[self._now + 1 :] = [new]
        self._now += 1
        return self._change()

    def undo(self) -> Change:
        self._begin("undo")
        if self._now == 0:
            message = "there is nothing to undo in this session."
            raise SessionStateError(message)
        self._now -= 1
        return self._change()

    def redo(self) -> Change:
        self._begin("redo")
        if self._now + 1 >= len(self._history):
            message = "there is nothing to redo in this session."
            raise SessionStateError(message)
        self._now += 1
        return self._change()

    def reset(self) -> Change:
        self._begin("reset")
        return (
            self._push(Step(self.selected, "reset")) if self._masks().get(self.selected) is not None else self._change()
        )

    def remove(self, name: str) -> Change:
        self._begin("remove")
        return self._push(Step(name, "remove"))

    def use_experts(self, names: list[str] | None) -> Change:
        self._begin("use_experts")
        self._experts = names
        return self._change()

    def give(self, saved: dict[str, Any]) -> Change:
        self._begin("give")
        for name in saved["objects"]:
            self._select(name)
        for step in saved["steps"]:
            self._push(Step.from_json(step), bool(step.get("amend")))
        self._select(saved["selected"])
        return self._change()

    # questions

    def opinion(self, name: str, expert: str) -> Opinion:
        self._begin("opinion")
        matrix, samples = self._patch(name)
        names = [name for shares in self.client.engine.experts.values() for name in shares]
        if expert not in names:
            message = f"there is no expert {expert!r} in this prediction."
            raise SessionStateError(message)
        at = names.index(expert)
        values = np.full(samples, 85 * (1 + at) if at < len(ARMS) else 10 * at, dtype=np.uint8)
        return Opinion(expert, matrix, values, values // 3)

    def disagreement(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        self._begin("disagreement")
        matrix, samples = self._patch(name)
        return matrix, np.full(samples, 128, dtype=np.uint8)

    def suggest(self, name: str) -> Suggestion | None:
        self._begin("suggest")
        start = self._extent(name).start
        return Suggestion(tuple(apply_affine(self.ijk_to_ras, start).tolist()), Polarity.NEGATIVE, 0.1)

    def mask(self, name: str) -> tuple[Box, np.ndarray]:
        self._begin("mask")
        box = self._extent(name)
        return box, self._masks().get(name, np.zeros(self.shape_kji, bool))[box.slices] if box.size else np.zeros(
            (0, 0, 0), bool
        )

    def cancel(self) -> None:
        if not self.client.engine.stubborn:
            self._cancelled.set()
            self.client.engine.release()

    def progress(self) -> tuple[str, float | None]:
        return "thinking", 0.5

    def close(self) -> None:
        self.closed = True

    # how

    def _begin(self, verb: str) -> None:
        self.client.check()
        self._cancelled.clear()  # as in the real engine: a cancel is for the request under way, never for the next one
        engine = self.client.engine
        engine.asked[verb] += 1
        if engine.dieAt == verb:
            engine.dieAt = None
            engine.die()
            self.client.check()

    def _predict(self) -> None:
        engine = self.client.engine
        engine.entered.set()
        assert engine._go.wait(20), "the test forgot to release the engine"
        self.client.check()
        if self._cancelled.is_set():
            message = "the prediction was cancelled."
            raise CancelledError(message)

    def _push(self, step: Step, amend: bool = False) -> Change:
        steps = (*self._history[self._now], step)
        if amend:
            self._history[self._now :] = [steps]
        else:
            self._history[self._now + 1 :] = [steps]
            self._now += 1
        return self._change()

    def _masks(self) -> dict[str, np.ndarray]:
        masks: dict[str, np.ndarray] = {}
        for step in self._history[self._now]:
            own = masks.setdefault(step.name, np.zeros(self.shape_kji, dtype=bool))
            if step.done in ("reset", "remove"):
                del masks[step.name]
            elif isinstance(step.done, Edit):
                own[:] = False
                box, crop = step.done.mask.region(self)
                if box.size:
                    own[box.slices] = crop
            elif not isinstance(step.done, (Finish, str)):
                covered = self._covered(step.done)
                if step.done.polarity is Polarity.NEGATIVE:
                    own &= ~covered
                    continue
                others = [mask for name, mask in masks.items() if name != step.name]
                for other in others:
                    if step.neighbours is Neighbours.KEEP:
                        covered = covered & ~other
                    elif step.neighbours is Neighbours.COMPETE:
                        other &= ~covered
                own |= covered
        return masks

    def _covered(self, prompt: Any) -> np.ndarray:
        box, crop = prompt.region(self)
        covered = np.zeros(self.shape_kji, dtype=bool)
        covered[box.slices] = crop
        if isinstance(prompt, (BoxPrompt, MaskPrompt)):
            return covered
        points = [prompt.ras] if isinstance(prompt, PointPrompt) else prompt.points
        kji = np.moveaxis(np.indices(self.shape_kji), 0, -1)
        ras = apply_affine(self.ijk_to_ras, kji[..., ::-1])
        for point in points:
            covered |= ((ras - np.array(point)) ** 2).sum(axis=-1) <= REACH**2
        return covered

    def _extent(self, name: str) -> Box:
        mask = self._masks().get(name)
        return NOTHING if mask is None else Box.around(mask) or NOTHING

    def _patch(self, name: str) -> tuple[np.ndarray, tuple[int, int, int]]:
        """4x4 and shape of every second voxel of an object and around it."""
        box = self._extent(name)
        matrix = self.ijk_to_ras @ np.diag([2.0, 2.0, 2.0, 1.0])
        matrix[:3, 3] = apply_affine(self.ijk_to_ras, np.subtract(box.start, 2))
        k, j, i = (n // 2 + 3 if n else 0 for n in box.shape_kji)
        return matrix, (k, j, i)

    def _change(self) -> Change:
        masks = self._masks()
        changes = []
        for name in {*masks, *self._shown}:
            empty = np.zeros(self.shape_kji, dtype=bool)
            before, after = self._shown.get(name, empty), masks.get(name, empty)
            box = Box.around(before ^ after)
            if box is None and (name in masks) == (name in self._shown):
                continue
            box = box or NOTHING
            crop = after[box.slices].copy() if box.size else np.zeros((0, 0, 0), bool)
            shares = {name: share for each in self.client.engine.experts.values() for name, share in each.items()}
            extent = Box.around(after) or NOTHING
            changes.append(
                ObjectChange(
                    name=name, box=box, mask=crop, extent=extent, voxels=int(after.sum()), quality=0.9, shares=shares,
                    exists=name in masks,
                )
            )  # fmt: skip
        self._shown = {name: mask.copy() for name, mask in masks.items()}
        box = NOTHING
        for change in changes:
            box = box.union(change.box)
        can_undo, can_redo = self._now > 0, self._now + 1 < len(self._history)
        return Change(tuple(changes), box, self.selected, self._names, can_undo, can_redo, 0.01, 0.005)
