"""What a segment is, in the codes of Slicer's terminologies."""

from __future__ import annotations

from typing import Any

import vtk

from KA2ERSegment.dicom_segmentation import TISSUE, Code, Structure


def structure_of_segment(segment: Any) -> Structure | None:
    """By its terminology; None where it was only given Slicer's own first one, tissue."""
    held = vtk.mutable("")
    if not segment.GetTag(segment.GetTerminologyEntryTagName(), held):
        return None
    parts = str(held).split("~")
    if len(parts) < 4:
        return None
    codes = []
    for part in parts[1:4]:
        scheme, value, meaning = (*part.split("^"), "", "", "")[:3]
        codes.append(Code(value, scheme, meaning) if scheme and value and meaning else None)
    category, kind, modifier = codes
    return None if category is None or kind is None or kind == TISSUE else Structure(category, kind, modifier)


def forget_structure(segment: Any) -> None:
    """It is called something else now, and must not keep the code."""
    if structure_of_segment(segment) is not None:
        segment.RemoveTag(segment.GetTerminologyEntryTagName())


def structure_text(segment: Any) -> str:
    """For people: "Kidney, Right (SCT 64033007)"; empty where it has no code."""
    structure = structure_of_segment(segment)
    if structure is None:
        return ""
    side = f", {structure.modifier.meaning}" if structure.modifier is not None else ""
    return f"{structure.kind.meaning}{side} ({structure.kind.scheme} {structure.kind.value})"
