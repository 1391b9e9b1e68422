"""Brush and eraser: trame-slicer's own effects, on Slicer's Segment Editor logic.

What a hand changed is told to the engine before the next prompt, by `PromptLogic`, as in Slicer.
"""

from __future__ import annotations

from typing import Any

from trame_slicer.segmentation import SegmentationEffectErase, SegmentationEffectPaint
from trame_slicer.segmentation.paint_effect_parameters import BrushDiameterMode
from undo_stack import UndoStack

EFFECTS = {"brush": SegmentationEffectPaint, "eraser": SegmentationEffectErase}


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
        logic.setTool("none")
        if not logic.selectedSegment:
            logic.addSegment()
        self.tool = tool
        if self._editor.active_segmentation_node is not logic.segmentationNode:
            self._editor.set_active_segmentation(logic.segmentationNode, logic.volumeNode)
        self._editor.set_active_segment_id(logic.selectedSegment)
        self._editor.set_active_effect_type(EFFECTS[tool])
        self._resize()

    def put_away(self) -> None:
        """No brush any more; strokes stay."""
        if self.tool:
            self.tool = ""
            self._editor.deactivate_effect()
            self._strokes.clear()

    def follow(self) -> None:
        """The selected segment or the pen's size may be others now."""
        if not self.tool:
            return
        if not self._logic.selectedSegment or self._editor.active_segmentation_node is not self._logic.segmentationNode:
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
