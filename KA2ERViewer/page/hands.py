"""Brush and eraser: trame-slicer's own effects, on Slicer's Segment Editor logic.

What a hand changed is told to the engine before the next prompt, by `PromptLogic`, as in Slicer.
"""

from __future__ import annotations

from typing import Any

from trame_slicer.segmentation import SegmentationEffectErase, SegmentationEffectPaint
from trame_slicer.segmentation.paint_effect_parameters import BrushDiameterMode
from trame_slicer.utils import vtk_image_to_np
from undo_stack import UndoStack

from KA2ERSegment.geometry import Box


class Brush(SegmentationEffectPaint):  # type: ignore[misc]  # trame-slicer has no types where mypy runs
    """trame-slicer's brush, which leaves to other segments what is theirs."""

    logic: Any = None
    """`PromptLogic`, which knows what that is."""

    def paint_glyph_at_world_coordinates(self, polydata: Any, points: Any) -> None:
        """One stroke."""
        modifier = self.modifier
        if not points.GetNumberOfPoints() or not modifier.active_segment_id:
            return
        stroke = modifier.create_modifier_labelmap()
        extent = modifier.paint_glyph_in_labelmap(polydata, points, stroke)
        voxels = vtk_image_to_np(stroke)
        i0, i1, j0, j1, k0, k1 = (int(n) for n in extent)
        box = Box((i0, j0, k0), (i1 + 1, j1 + 1, k1 + 1)).intersect(Box.of_shape(voxels.shape))
        taken = self.logic.isTaken(modifier.active_segment_id, box) if box.size else None
        if taken is not None:
            box.crop(voxels)[taken] = 0
        overlap = self.logic.neighbours == "overlap"
        self.editor_node.SetOverwriteMode(
            self.editor_node.OverwriteNone if overlap else self.editor_node.OverwriteAllSegments
        )
        modifier.apply_labelmap(stroke, modifier_extent=extent)


EFFECTS = {"brush": Brush, "eraser": SegmentationEffectErase}


class HandEdits:
    """The brush of one page. Undo takes strokes back while the brush is in the hand, and prompts otherwise.

    Args:
        editor: trame-slicer's segmentation editor.
        logic: `PromptLogic`.
    """

    def __init__(self, editor: Any, logic: Any) -> None:
        self._editor, self._logic = editor, logic
        self._strokes = UndoStack()
        editor.set_undo_stack(self._strokes)
        self.tool = ""
        """One of EFFECTS, or "" where none is chosen."""

    def choose(self, tool: str) -> None:
        """Take the brush or the eraser; a segment is made where there is none."""
        logic = self._logic
        if logic.selectedSegment:
            logic.requireUnlocked(logic.selectedSegment)
        logic.setTool("none")
        if not logic.selectedSegment:
            logic.addSegment()
        self.tool = tool
        if self._editor.active_segmentation_node is not logic.segmentationNode:
            self._editor.set_active_segmentation(logic.segmentationNode, logic.volumeNode)
        self._editor.set_active_segment_id(logic.selectedSegment)
        effect = self._editor.set_active_effect_type(EFFECTS[tool])
        if isinstance(effect, Brush):
            effect.logic = logic
        self._resize()

    def put_away(self) -> None:
        """No brush any more; strokes stay."""
        if self.tool:
            self.tool = ""
            self._editor.deactivate_effect()
            self._strokes.clear()

    def forget(self) -> None:
        """Strokes so far are not to be taken back: that would change what must stay as it is now."""
        self._strokes.clear()

    def follow(self) -> None:
        """The selected segment or the pen's size may be others now."""
        if not self.tool:
            return
        selected = self._logic.selectedSegment
        locked = any(row.locked and row.id == selected for row in self._logic.segments())
        elsewhere = self._editor.active_segmentation_node is not self._logic.segmentationNode
        if not selected or locked or elsewhere:
            self.put_away()
        elif self._editor.active_segment_id != self._logic.selectedSegment:
            self._editor.set_active_segment_id(self._logic.selectedSegment)
        else:
            self._resize()

    def _resize(self) -> None:
        self._editor.active_effect.set_brush_diameter(2 * self._logic.brushRadius, BrushDiameterMode.Absolute)

    # -- undo --------------------------------------------------------------------------------------------------------

    @property
    def can_undo(self) -> bool:
        """Whether there is a stroke to take back."""
        return bool(self._strokes.can_undo())

    @property
    def can_redo(self) -> bool:
        """Whether there is a stroke to bring back."""
        return bool(self._strokes.can_redo())

    def undo(self) -> None:
        """Take the last stroke back."""
        self._strokes.undo()

    def redo(self) -> None:
        """Bring it back."""
        self._strokes.redo()
