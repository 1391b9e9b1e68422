"""Which experts are shown, and how; asks the engine for what is shown and for nothing else."""

from __future__ import annotations

import colorsys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from KA2ERSegment.errors import SessionStateError
from SlicerKA2ERLib.Conversation import Conversation
from SlicerKA2ERLib.Overlays import Overlays
from SlicerKA2ERLib.Protocols import MODES, Color, ExpertRow

FOUNDATION = "foundation"
DISAGREEMENT = "disagreement"
KINDS = ("probability", "share")
KIND_WORDS = {"decoder": "decoder", "head": "voter"}
MODALITIES = ("ct", "mr", "mri", "pet", "us")


@dataclass(frozen=True)
class Look:
    """How one expert is shown."""

    shown: bool = False
    kind: str = "probability"
    opacity: float = 0.5


class Confidence:
    """Overlays of the experts of one segment.

    Args:
        scene: the MRML scene.
        applicationLogic: Slicer's.
        engine: to ask.
        legends: of the overlays, in slice views.
    """

    def __init__(self, scene: Any, applicationLogic: Any, engine: Conversation, legends: bool = True) -> None:
        self._overlays = Overlays(scene, applicationLogic, legends)
        self._engine = engine
        self._looks: dict[str, Look] = {}
        self._segment: tuple[Any, str] | None = None
        self._began = 0.0

    # -- what there is -----------------------------------------------------------------------------------------------

    def modes(self) -> dict[str, list[str]]:
        """Names as the engine has them, in each mode the general one first; none before an engine answered."""
        told = self._engine.link.info.get("experts", {})
        return {mode: [str(name) for name in told[mode]] for mode in MODES if mode in told}

    def names(self) -> list[str]:
        return [name for names in self.modes().values() for name in names]

    def experts(self) -> list[str]:
        """Those that can be left out."""
        return [name for name in self.modes().get(MODES[0], ()) if name != FOUNDATION]

    def rows(self, shares: Mapping[str, float], taking: frozenset[str] | None) -> list[ExpertRow]:
        tasks = {
            str(expert.get("name")): expert for expert in self._engine.link.info.get("bundle", {}).get("experts", ())
        }
        left = {*self.experts()} - {*(self.experts() if taking is None else taking)}
        return [
            ExpertRow(
                name,
                _title(name, tasks.get(name)),
                colorOf(n, len(names), mode),
                shares.get(name) if shares else None,
                self._look(name).shown,
                self._look(name).kind,
                self._look(name).opacity,
                name not in left,
                mode,
            )
            for mode, names in self.modes().items()
            for n, name in enumerate(names)
        ]

    @property
    def disagreementShown(self) -> bool:
        return self._look(DISAGREEMENT).shown

    def setDisagreementShown(self, shown: bool) -> None:
        self._looks[DISAGREEMENT] = replace(self._look(DISAGREEMENT), shown=bool(shown))

    def setShown(self, name: str, shown: bool) -> None:
        self._looks[self._known(name)] = replace(self._look(name), shown=bool(shown))

    def setKind(self, name: str, kind: str) -> None:
        if kind not in KINDS:
            message = f"an overlay must show one of {', '.join(KINDS)}, got {kind!r}."
            raise SessionStateError(message)
        self._looks[self._known(name)] = replace(self._look(name), kind=kind)

    def setOpacity(self, name: str, opacity: float) -> None:
        opacity = min(1.0, max(0.0, float(opacity)))
        self._looks[self._known(name)] = replace(self._look(name), opacity=opacity)
        self._overlays.setOpacity(name, opacity)

    def _known(self, name: str) -> str:
        if name not in self.names() and name != DISAGREEMENT:
            message = f"expert must be one of {', '.join(self.names())}, got {name!r}."
            raise SessionStateError(message)
        return name

    def _look(self, name: str) -> Look:
        return self._looks.get(name, Look())

    # -- showing -----------------------------------------------------------------------------------------------------

    def show(self, volumeNode: Any, segmentationNode: Any, segment: str, answered: Collection[str]) -> None:
        """Bring the overlays up to date with a segment. Off costs nothing: only what is shown is asked for.

        Args:
            answered: experts that the engine has an opinion of for that segment; none before its first prediction.
        """
        if self._segment != (segmentationNode, segment):
            self._overlays.clear()
            self._segment = (segmentationNode, segment)
        known = {*answered, DISAGREEMENT} if answered and volumeNode else set()
        wanted = [name for name, look in self._looks.items() if look.shown and name in known]
        for name in self._overlays.names:
            if name not in wanted:
                self._overlays.remove(name)
        self._began = time.perf_counter()
        for name in wanted:
            self._ask(name, segment)

    def clear(self) -> None:
        self._overlays.clear()
        self._segment = None

    def _ask(self, name: str, segment: str) -> None:
        def question(session: Any) -> Any:
            return session.disagreement(segment) if name == DISAGREEMENT else session.opinion(segment, name)

        self._engine.ask(("overlay", name), question, lambda answer: self._put(name, segment, answer))

    def _put(self, name: str, segment: str, answer: Any) -> None:
        engine, look = self._engine, self._look(name)
        if not look.shown or self._segment != (engine.segmentationNode, segment):
            return  # switched off, or away, meanwhile
        shown = engine.segmentationNode.GetSegmentation().GetSegment(segment)
        if shown is None:
            return
        if name == DISAGREEMENT:
            (ijkToRas, values), title, color = answer, "Disagreement", (1.0, 0.9, 0.2)
        else:
            ijkToRas = answer.ijk_to_ras
            values = answer.probability if look.kind == "probability" else answer.weight
            title = f"{_title(name, None)} {look.kind}"
            colors = {row.name: row.color for row in self.rows({}, None)}
            color = colors.get(name, colorOf(0, 1))  # the experts may have changed since it was asked
        self._overlays.put(name, title, color, look.opacity, shown.GetName(), ijkToRas, values, engine.volumeNode)
        engine.time("overlays", time.perf_counter() - self._began)


def colorOf(n: int, count: int, mode: str = MODES[0]) -> Color:
    """Evenly around the colour circle, the foundation white-blue; decoders are paler, voters darker."""
    paler, darker = mode == "decoders", mode == "head"
    if n == 0:
        return (0.85, 0.92, 1.0) if paler else (0.42, 0.56, 0.7) if darker else (0.6, 0.8, 1.0)
    hue = (0.08 + 0.83 * (n - 1) / max(1, count - 1)) % 1.0
    return colorsys.hsv_to_rgb(hue, 0.45 if paler else 0.85, 0.7 if darker else 1.0)


def _title(name: str, expert: Mapping[str, Any] | None) -> str:
    """For people: the names of decoders and voters begin with a word that says so."""
    if name == FOUNDATION:
        return "Foundation"
    kind, _, own = name.partition(" ")
    if kind in KIND_WORDS and own:
        return f"{_title(own, None)} {KIND_WORDS[kind]}"
    task = str(expert.get("task", "")) if expert else ""
    words = " ".join(word.upper() if word in MODALITIES else word for word in name.replace("_", " ").split())
    return f"{words[:1].upper()}{words[1:]}" + (f": {task}" if task and len(task) < 60 else "")
