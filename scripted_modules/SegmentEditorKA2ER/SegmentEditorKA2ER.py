"""Hidden module: registers the effect "KA2ER" with the Segment Editor."""

from pathlib import Path

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import ScriptedLoadableModule, ScriptedLoadableModuleTest


class SegmentEditorKA2ER(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("Segment Editor KA2ER effect")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["Segmentations", "SlicerKA2ER"]
        parent.contributors = ["KA2ERSegment contributors"]
        parent.hidden = True
        parent.helpText = _("This hidden module registers the KA2ER effect of the Segment Editor.")
        parent.acknowledgementText = _("See the module KA2ER Segment. For research only.")
        slicer.app.startupCompleted.connect(registerEffect)


def registerEffect():
    from qSlicerSegmentationsEditorEffectsPythonQt import qSlicerSegmentEditorScriptedEffect

    effect = qSlicerSegmentEditorScriptedEffect(None)
    path = Path(__file__).resolve().parent / "SegmentEditorKA2ERLib" / "SegmentEditorEffect.py"
    effect.setPythonSource(path.as_posix())
    effect.self().register()


class SegmentEditorKA2ERTest(ScriptedLoadableModuleTest):
    """What only a running Slicer can show. Needs no torch and no network."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_effect_is_registered()

    def test_effect_is_registered(self):
        names = list(slicer.qMRMLSegmentEditorWidget().availableEffectNames())
        assert names.count("KA2ER") == 1, names
        self.delayDisplay("Test passed")
