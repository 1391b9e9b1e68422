"""Standard terminology, colour and status of a segment, in Slicer's own words."""

from __future__ import annotations

from typing import Any

import slicer

from KA2ERSegment.errors import SessionStateError
from SlicerKA2ERLib.Protocols import STATUSES


def apply(segment: Any, entry: str, applicationLogic: Any) -> None:
    """Give a segment a structure: its code (SNOMED CT), name and recommended colour.

    Args:
        entry: as Slicer serialises it: "context~category~type~modifier~region...".

    Raises:
        SessionStateError: no terminology entry.
    """
    parts = entry.split("~")
    if len(parts) < 3 or len(parts[2].split("^")) < 3:
        message = f"a terminology entry must look like 'context~category~type~...', got {entry[:80]!r}."
        raise SessionStateError(message)
    segment.SetTag(segment.GetTerminologyEntryTagName(), entry)
    name, color = _look(entry, applicationLogic) or (parts[2].split("^")[2], None)
    segment.SetName(name)
    if color is not None:
        segment.SetColor(*color)


def status(segment: Any) -> str:
    """One of STATUSES."""
    number = slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatus(segment)
    return STATUSES[number] if 0 <= number < len(STATUSES) else STATUSES[0]


def setStatus(segment: Any, text: str) -> None:
    slicer.vtkSlicerSegmentationsModuleLogic.SetSegmentStatus(segment, STATUSES.index(text))


def _look(entry: str, applicationLogic: Any) -> tuple[str, tuple[float, float, float] | None] | None:
    """Name and colour that Slicer's terminologies recommend; None where they do not know the entry."""
    logic = applicationLogic.GetModuleLogic("Terminologies")
    if logic is None:
        return None
    parsed = slicer.vtkSlicerTerminologyEntry()
    if not logic.DeserializeTerminologyEntry(entry, parsed):
        return None
    logic.UpdateEntryFromLoadedTerminologies(parsed, [], [])  # an entry as text has codes alone, no colour
    kind, modifier = parsed.GetTypeObject(), parsed.GetTypeModifierObject()
    if kind is None or not kind.GetCodeMeaning():
        return None
    best = modifier if modifier is not None and modifier.GetCodeValue() else kind
    name = best.GetSlicerLabel() or kind.GetSlicerLabel() or _meaning(kind, modifier)
    rgb = [component / 255 for component in best.GetRecommendedDisplayRGBValue()]
    unset = all(abs(component - 127 / 255) < 1e-6 for component in rgb) or not any(rgb)
    return name, None if unset else (rgb[0], rgb[1], rgb[2])


def _meaning(kind: Any, modifier: Any) -> str:
    meaning = kind.GetCodeMeaning()
    return f"{meaning}, {modifier.GetCodeMeaning()}" if modifier is not None and modifier.GetCodeValue() else meaning
