"""The module's prompts as an effect of the Segment Editor: same logic, same engine, the panel's tools."""

from pathlib import Path

import qt
import slicer
import vtk
from SegmentEditorEffects import AbstractScriptedSegmentEditorEffect
from slicer.i18n import tr as _

from SlicerKA2ERLib.PromptWidget import PromptWidget

HERE = Path(__file__).resolve().parent
EDITORS = ("volumeSelector", "volumeSelectorLabel", "segmentationSelector", "segmentationSelectorLabel", "sampleFrame",
           "segmentsSection", "editSection")  # fmt: skip
"""Parts of the panel that the Segment Editor has itself."""
EDITOR_KEYS = ("ctrl+z", "ctrl+y", "esc")
"""The Segment Editor's own undo, redo and leaving of an effect: of two shortcuts with one key, Qt takes neither."""


class EffectPanel(PromptWidget):
    """The module's panel inside the editor's options. Volume, segmentation and segment are the editor's.

    Args:
        module: the module's own panel, whose partners this one shares.
        effect: Slicer's adaptor of the effect.
    """

    def __init__(self, module, effect):
        self._effect = effect
        self._adopting = False
        super().__init__(
            module.logic, module.installer, module.settings, module.dialogs, module.makeEngine, module.resources
        )
        for section in (self.ui.expertsSection, self.ui.resultSection):
            section.collapsed = True

    def chooseVolume(self):
        node, logic = self._effect.parameterSetNode(), self.logic
        if node is None:
            return
        logic.segmentEditorNode = node
        logic.saveStateForUndo = self._effect.saveStateForUndo
        segment = node.GetSelectedSegmentID()
        self._adopting = True
        try:
            self._try(logic.setVolumeNode, node.GetSourceVolumeNode())
            self._try(logic.setSegmentationNode, node.GetSegmentationNode())
            if segment and segment != logic.selectedSegment:
                self._try(logic.selectSegment, segment)
        finally:
            self._adopting = False
        self._begin()

    def keysOf(self, action):
        keys = super().keysOf(action)
        return "" if keys.lower() in EDITOR_KEYS else keys

    def refresh(self):
        super().refresh()
        for name in EDITORS:
            getattr(self.ui, name).setVisible(False)
        node = self._effect.parameterSetNode()
        if self.active and not self._adopting and node is not None and self.logic.selectedSegment:
            node.SetSelectedSegmentID(self.logic.selectedSegment)  # the logic may have begun a new one

    def exit(self):
        super().exit()
        self.timer.stop()
        self.logic.segmentEditorNode = self.logic.saveStateForUndo = None


class SegmentEditorEffect(AbstractScriptedSegmentEditorEffect):
    def __init__(self, scriptedEffect):
        scriptedEffect.name = "KA2ER"
        scriptedEffect.perSegment = True
        scriptedEffect.requireSegments = False  # the first prompt makes one
        AbstractScriptedSegmentEditorEffect.__init__(self, scriptedEffect)
        self.panel = None
        self._observed = None
        self._tag = 0

    def clone(self):
        from qSlicerSegmentationsEditorEffectsPythonQt import qSlicerSegmentEditorScriptedEffect

        cloned = qSlicerSegmentEditorScriptedEffect(None)
        cloned.setPythonSource(Path(__file__).resolve().as_posix())
        return cloned

    def icon(self):
        return qt.QIcon(str(HERE.parent / "Resources" / "Icons" / "SegmentEditorKA2ER.svg"))

    def helpText(self):
        return _(
            "Click on the structure, or draw on it, and correct with further prompts."
            " The module <i>KA2ER Segment</i> has the same tools with the experts' overlays beside them."
        )

    def setupOptionsFrame(self):
        """Nothing yet: who opens the Segment Editor for something else does not wait for our panel."""

    def activate(self):
        if self.panel is None:
            self.panel = EffectPanel(slicer.util.getModuleWidget("SlicerKA2ER").panel, self.scriptedEffect)
            self.scriptedEffect.addOptionsWidget(self.panel.widget)
        self.panel.enter()
        self._observed = self.scriptedEffect.parameterSetNode()
        self._tag = self._observed.AddObserver(vtk.vtkCommand.ModifiedEvent, self._onEditorChanged)

    def deactivate(self):
        if self._observed is not None:
            self._observed.RemoveObserver(self._tag)
            self._observed = None
            self.panel.exit()

    def cleanup(self):
        """Slicer deletes the effect; the module keeps logic and engine."""
        self.deactivate()
        if self.panel is not None:
            self.panel.cleanup(closeLogic=False)
            self.panel = None

    def createCursor(self, _widget):
        return qt.QCursor(qt.Qt.CrossCursor)

    def layoutChanged(self):
        if self.panel is not None:
            self.panel.onLayoutChanged()

    def interactionNodeModified(self, _interactionNode):
        """Placing a 3D box changes the mouse mode; the effect stays."""

    def setMRMLDefaults(self):
        pass

    def updateGUIFromMRML(self):
        pass

    def updateMRMLFromGUI(self):
        pass

    def _onEditorChanged(self, *_args):
        """Another volume, segmentation or segment was chosen in the editor."""
        node, logic = self._observed, self.panel.logic
        chosen = node.GetSourceVolumeNode(), node.GetSegmentationNode(), node.GetSelectedSegmentID() or ""
        if chosen != (logic.volumeNode, logic.segmentationNode, logic.selectedSegment):
            self.panel.sceneChanged()
