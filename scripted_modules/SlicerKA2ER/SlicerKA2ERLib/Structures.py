"""The structures that Slicer's terminologies know (SNOMED CT), as a flat list to search in. No Qt."""

from __future__ import annotations

from typing import Any

import slicer
import vtk

PREFERRED = "Segmentation category and type - 3D Slicer General Anatomy list"
"""Short and for people; the full DICOM list has thousands of entries that nobody segments."""


def structures(terminologies: Any) -> list[tuple[str, str]]:
    """(name for people, entry as Slicer serialises it), sorted by name; sides and the like are entries of their own.

    Args:
        terminologies: a vtkSlicerTerminologiesModuleLogic.
    """
    names = vtk.vtkStringArray()
    terminologies.GetLoadedTerminologyNames(names)
    loaded = [names.GetValue(index) for index in range(names.GetNumberOfValues())]
    context = PREFERRED if PREFERRED in loaded else next(iter(loaded), "")
    found: dict[str, str] = {}
    for category in _categories(terminologies, context):
        for kind in _types(terminologies, context, category):
            modifiers = _modifiers(terminologies, context, category, kind)
            for modifier in [None, *modifiers]:
                name = _name(kind, modifier)
                found.setdefault(name, _entry(terminologies, context, category, kind, modifier))
    return sorted(found.items(), key=lambda item: item[0].lower())


def _categories(logic: Any, context: str) -> list[Any]:
    made = [slicer.vtkSlicerTerminologyCategory() for _ in range(logic.GetNumberOfCategoriesInTerminology(context))]
    return [one for index, one in enumerate(made) if logic.GetNthCategoryInTerminology(context, index, one)]


def _types(logic: Any, context: str, category: Any) -> list[Any]:
    count = logic.GetNumberOfTypesInTerminologyCategory(context, category)
    made = [slicer.vtkSlicerTerminologyType() for _ in range(count)]
    return [
        one for index, one in enumerate(made) if logic.GetNthTypeInTerminologyCategory(context, category, index, one)
    ]


def _modifiers(logic: Any, context: str, category: Any, kind: Any) -> list[Any]:
    if not kind.GetHasModifiers():
        return []
    count = logic.GetNumberOfTypeModifiersInTerminologyType(context, category, kind)
    made = [slicer.vtkSlicerTerminologyType() for _ in range(count)]
    return [
        one
        for index, one in enumerate(made)
        if logic.GetNthTypeModifierInTerminologyType(context, category, kind, index, one)
    ]


def _name(kind: Any, modifier: Any) -> str:
    if modifier is None:
        return kind.GetSlicerLabel() or kind.GetCodeMeaning()
    return modifier.GetSlicerLabel() or f"{kind.GetCodeMeaning()}, {modifier.GetCodeMeaning()}".lower()


def _entry(logic: Any, context: str, category: Any, kind: Any, modifier: Any) -> str:
    entry = slicer.vtkSlicerTerminologyEntry()
    entry.SetTerminologyContextName(context)
    entry.GetCategoryObject().Copy(category)
    entry.GetTypeObject().Copy(kind)
    if modifier is not None:
        entry.GetTypeModifierObject().Copy(modifier)
    return logic.SerializeTerminologyEntry(entry)
