"""The module KA2ER Experts as Slicer sees it: who it is, its widget's life, its test in Slicer.

What happens is in `SlicerKA2ERExpertsLib/ExpertsLogic.py`, the panel in `SlicerKA2ERExpertsLib/ExpertsWidget.py`.
"""

import importlib.util
import sys
from pathlib import Path

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)

HERE = Path(__file__).resolve().parent
if importlib.util.find_spec("KA2ERSegment") is None and (HERE.parents[1] / "KA2ERSegment").is_dir():
    sys.path.append(str(HERE.parents[1]))  # run from a checkout; once installed, the package lies beside this file


class SlicerKA2ERExperts(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("KA2ER Experts")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["SlicerKA2ER"]
        parent.contributors = ["KA2ERSegment contributors"]
        parent.helpText = _("""
See which experts a bundle of KA2ER Segment has, what they were trained for and under which licence. Switch them on and
off, verify the files, and add the encoder of an nnU-Net that you trained yourself.
See the <a href="{url}">documentation</a>.
""").format(url="https://github.com/KA2ERSegment/SlicerKA2ERSegment/blob/main/docs/experts.md")
        parent.acknowledgementText = _("""
Experts are encoders of nnU-Net (Isensee et al., Nature Methods 2021). Please cite it, and the authors of the experts.
""")


class SlicerKA2ERExpertsWidget(ScriptedLoadableModuleWidget):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        self.logic = None
        self.panel = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        from SlicerKA2ERExpertsLib.ExpertsWidget import ExpertsWidget
        from SlicerKA2ERExpertsLib.Services import Dialogs

        self.logic = SlicerKA2ERExpertsLogic()
        self.panel = ExpertsWidget(self.logic.experts, Dialogs(), HERE / "Resources")
        self.layout.addWidget(self.panel.widget)

    def cleanup(self):
        if self.panel is not None:
            self.panel.cleanup()
            self.panel = None

    def enter(self):
        self.panel.enter()

    def onReload(self):
        """Reload the helpers too: Slicer itself reloads this file only."""
        for name in [name for name in sys.modules if name.split(".")[0] == "SlicerKA2ERExpertsLib"]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)


class SlicerKA2ERExpertsLogic(ScriptedLoadableModuleLogic):
    """For scripts: `slicer.util.getModuleLogic("SlicerKA2ERExperts").experts` is the ExpertsLogic."""

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        from SlicerKA2ERExpertsLib.ExpertsLogic import ExpertsLogic
        from SlicerKA2ERExpertsLib.Services import ApplicationSettings, makeRunner

        settings = ApplicationSettings()
        self.experts = ExpertsLogic(settings, makeRunner(settings))


class SlicerKA2ERExpertsTest(ScriptedLoadableModuleTest):
    """What only a running Slicer can show; the rest is in Testing/, for pytest. Needs no torch and no network."""

    def runTest(self):
        self.test_shipped_experts_are_listed_and_verified()

    def test_shipped_experts_are_listed_and_verified(self):
        widget = slicer.modules.slicerka2erexperts.createNewWidgetRepresentation()
        panel = widget.self().panel
        try:
            from KA2ERSegment.bundle import default_bundle_folder

            panel.logic.load(default_bundle_folder())
            assert len(panel.logic.rows()) == panel.ui.expertsTable.rowCount
            panel.logic.verify()
            while panel.logic.busy:
                panel.logic.poll()
            assert panel.ui.statusLabel.text == panel.logic.message
        finally:
            widget.deleteLater()
        self.delayDisplay("Test passed")
