"""Which markers in the scene the engine was told of, and as what.

    pending   placed, and waiting for the engine or being worked on
    foreign   came with a scene; the engine is told when their segment is prompted next
    accepted  in the engine's journal

Comparing the ledger with the scene finds what the user moved, deleted or placed by other tools (`differences`).
Comparing it with the journal finds which markers undo, redo, a refusal or a cancel take away or bring back
(`reconcile`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, PointPrompt, Prompt, ScribblePrompt, prompt_from_json
from SlicerKA2ERLib.EngineMirror import Steps
from SlicerKA2ERLib.PromptNodes import Marker, PromptNodes, same

ENDS = ("reset", "remove")
"""Steps after which no earlier prompt of the segment counts."""


@dataclass
class Differences:
    """What the scene says that the engine does not know.

    Args:
        moved: prompt that the engine knows, and what became of it; None where it went. By segment.
        new: markers that nobody gave.
        withdrawn: keys of pending markers that went.
    """

    moved: dict[str, list[tuple[Prompt, Prompt | None]]] = field(default_factory=dict)
    new: list[Marker] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)


class PromptLedger:
    """Keys of markers, and the prompts that the engine has or will have of them."""

    def __init__(self, nodes: PromptNodes) -> None:
        self._nodes = nodes
        self.pending: dict[str, tuple[str, Prompt]] = {}
        self.foreign: dict[str, tuple[str, Prompt]] = {}
        self.accepted: dict[str, tuple[str, Prompt]] = {}
        self._looks: dict[tuple[str, Prompt], tuple[str, int]] = {}  # kind and number, for a marker that comes back
        self._changedMeanwhile: set[str] = set()  # pending ones that were moved or deleted before they were accepted

    def clear(self) -> None:
        self._looks.clear()
        self._changedMeanwhile.clear()
        self.pending.clear()
        self.foreign.clear()
        self.accepted.clear()

    def forgetTold(self) -> None:
        """The engine lost what it knew: accepted markers are as if they had come with the scene."""
        self.foreign = {**self.accepted, **self.foreign}
        self.accepted = {}

    def adopt(self) -> None:
        """All markers that are not known came with the scene."""
        for marker in self._nodes.markers():
            if not self._knows(marker.key):
                self.foreign[marker.key] = marker.segmentId, marker.prompt

    def untold(self, segment: str) -> tuple[Prompt, ...]:
        """Prompts of a segment that came with the scene, oldest first."""
        return tuple(prompt for owner, prompt in self.foreign.values() if owner == segment)

    def accept(self, keys: Collection[str]) -> None:
        """The engine has the prompts of these pending markers."""
        for key in keys:
            if key in self.pending:
                self._accepted(key, *self.pending.pop(key))
        if not self._changedMeanwhile.isdisjoint(keys):
            self._nodes.lookAgain()

    def acceptForeign(self, segment: str) -> None:
        """The engine was told the prompts that came with the scene."""
        for key, (owner, prompt) in list(self.foreign.items()):
            if owner == segment:
                del self.foreign[key]
                self._accepted(key, owner, prompt)

    def withdraw(self, keys: Iterable[str]) -> None:
        """The engine will not have these prompts: their markers go."""
        for key in keys:
            if self.pending.pop(key, None) is not None:
                self._nodes.remove(key)

    def forgetSegment(self, segment: str) -> None:
        for entries in (self.pending, self.foreign, self.accepted):
            for key in [key for key, (owner, _) in entries.items() if owner == segment]:
                del entries[key]

    def differences(self) -> Differences:
        """What the scene says that the ledger does not."""
        found = Differences()
        markers = {marker.key: marker for marker in self._nodes.markers()}
        for key, (segment, prompt) in (*self.accepted.items(), *self.foreign.items()):
            marker = markers.get(key)
            if marker is None:
                found.moved.setdefault(segment, []).append((prompt, None))
            elif not same(marker.prompt, prompt):
                found.moved.setdefault(segment, []).append((prompt, marker.prompt))
        found.new = [marker for key, marker in markers.items() if not self._knows(key)]
        found.withdrawn = [key for key in self.pending if key not in markers]
        self._changedMeanwhile = {
            key
            for key, (_, prompt) in self.pending.items()
            if key not in markers or not same(markers[key].prompt, prompt)
        }
        return found

    def noteRevised(self, segment: str, changes: Iterable[tuple[Prompt, Prompt | None]]) -> None:
        """The engine has taken these changes over."""
        for before, after in changes:
            for key, (owner, prompt) in list(self.accepted.items()):
                if owner == segment and prompt == before:
                    if after is None:
                        del self.accepted[key]
                    else:
                        self._accepted(key, owner, after)
                    break

    def reconcile(self, steps: Steps, segments: Iterable[str], restore: bool) -> None:
        """Let the markers of accepted prompts be those of the journal.

        Args:
            steps: the journal.
            segments: that there are; the journal may have some that were deleted since.
            restore: put back markers that were moved or deleted as well: the engine refused that.
        """
        journal = journalled(steps)
        known = {segment for segment, _ in self.accepted.values()}
        for segment in (known | set(journal)) & set(segments):
            if segment in {owner for owner, _ in self.foreign.values()}:
                continue  # its prompts were never told
            self._reconcileSegment(segment, journal.get(segment, []))
        if restore:
            self._restore()

    def _reconcileSegment(self, segment: str, wanted: list[Prompt]) -> None:
        spare = {key: prompt for key, (owner, prompt) in self.accepted.items() if owner == segment}
        missing = []
        for prompt in wanted:
            key = next((key for key, other in spare.items() if other == prompt), None)
            if key is None:
                missing.append(prompt)
            else:
                del spare[key]
        for prompt in missing:
            alike = (key for key, other in spare.items() if _alike(other, prompt))
            if (key := next(alike, None)) is not None:  # a move was undone
                del spare[key]
                self._nodes.move(key, prompt)
            else:
                key = self._place(segment, prompt)
            self.accepted[key] = segment, prompt
        for key in spare:
            del self.accepted[key]
            self._nodes.remove(key)

    def _restore(self) -> None:
        markers = {marker.key: marker for marker in self._nodes.markers()}
        for entries in (self.accepted, self.foreign):
            for key, (segment, prompt) in list(entries.items()):
                if key not in markers:
                    del entries[key]
                    key = self._place(segment, prompt)
                    entries[key] = segment, prompt
                elif not same(markers[key].prompt, prompt):
                    self._nodes.move(key, prompt)

    def _accepted(self, key: str, segment: str, prompt: Prompt) -> None:
        self.accepted[key] = segment, prompt
        look = self._nodes.lookOf(key)
        if look is not None:
            self._looks[segment, prompt] = look

    def _place(self, segment: str, prompt: Prompt) -> str:
        """Put a marker back as it was: a 3D box keeps its handles, and the order stays."""
        kind, number = self._looks.get((segment, prompt)) or (kindOf(prompt), self._nodes.nextNumber())
        return self._nodes.place(segment, prompt, kind, number)

    def _knows(self, key: str) -> bool:
        return key in self.accepted or key in self.pending or key in self.foreign


def journalled(steps: Steps) -> dict[str, list[Prompt]]:
    """The prompts that count, by segment, oldest first."""
    found: dict[str, list[Prompt]] = {}
    for step in steps:
        if "prompt" in step:
            if step["prompt"].get("type") != "mask":
                found.setdefault(step["object"], []).append(prompt_from_json(step["prompt"]))
        elif step.get("do") in ENDS:
            found[step["object"]] = []
    return found


def revised(steps: Steps, segment: str, changes: Iterable[tuple[Prompt, Prompt | None]]) -> list[dict[str, Any]]:
    """The journal with some prompts of a segment moved or taken out.

    Edits that only hold what masking, or a scene's own mask, made of an earlier answer go with it; edits by hand stay.
    """
    result: list[dict[str, Any] | None] = list(steps)
    ends = (n for n, step in enumerate(steps) if step["object"] == segment and step.get("do") in ENDS)
    counting = range(max(ends, default=-1) + 1, len(steps))  # the same prompt may have been given before a reset too
    for before, after in changes:
        old = before.to_json()
        places = (n for n in counting if (one := result[n]) and one["object"] == segment and one.get("prompt") == old)
        if (place := next(places, None)) is None:
            continue
        step = result[place]
        assert step is not None, "found above"
        result[place] = None if after is None else {**step, "prompt": after.to_json()}
        for n in range(place + 1, len(result)):
            later = result[n]
            if later is not None and later["object"] == segment and later.get("amend"):
                result[n] = None
    return [step for step in result if step is not None]


def kindOf(prompt: Prompt) -> str:
    kinds: dict[type, str] = {PointPrompt: "point", BoxPrompt: "box", ScribblePrompt: "scribble", LassoPrompt: "lasso"}
    return kinds[type(prompt)]


def _alike(a: Prompt, b: Prompt) -> bool:
    return type(a) is type(b) and a.polarity is b.polarity
