"""The module KA2ER Segment as Slicer sees it: who it is, its widget's life, its logic for scripts, its test in Slicer.

What happens at a click is in `SlicerKA2ERLib/PromptLogic.py`, the panel in `SlicerKA2ERLib/PromptWidget.py`.
"""

import importlib.util
import sys
from pathlib import Path

import slicer
import vtk
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

HERE = Path(__file__).resolve().parent
if importlib.util.find_spec("KA2ERSegment") is None and (HERE.parents[1] / "KA2ERSegment").is_dir():
    sys.path.append(str(HERE.parents[1]))  # run from a checkout; once installed, the package lies beside this file


class SlicerKA2ER(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("KA2ER Segment")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["Segmentations", "Markups", "Volumes", "SubjectHierarchy", "Terminologies"]
        parent.contributors = ["KA2ERSegment contributors"]
        parent.helpText = _("""
Segment a structure in a CT or MR volume: open the module, click on the structure, and correct with further points,
boxes, scribbles and lassos. The table of experts shows which specialist carried the answer, and where they disagree.
See the <a href="{url}">documentation</a>. For research only: not a medical device, not for diagnosis or treatment.
""").format(url="https://github.com/KA2ERSegment/SlicerKA2ERSegment")
        parent.acknowledgementText = _("""
The method follows KA2ER (<a href="https://arxiv.org/abs/2410.21085">arXiv 2410.21085</a>), SAM-Med3D-MoE and IC-MoE,
which blend a foundation model with specialist experts. Please cite them, 3D Slicer, and the bundle that you use.
""")
        slicer.app.startupCompleted.connect(onStartupCompleted)


def onStartupCompleted():
    """Sample data, the settings page, and an installation that a restart interrupted."""
    from SlicerKA2ERLib.Samples import registerSamples

    registerSamples()
    if slicer.util.mainWindow() is None:
        return
    from SlicerKA2ERLib.Settings import Settings
    from SlicerKA2ERLib.SettingsPanel import SettingsPanel

    slicer.app.settingsDialog().addPanel(_("KA2ER Segment"), SettingsPanel(HERE / "Resources"))
    if Settings().value("resumeInstall"):
        slicer.util.selectModule("SlicerKA2ER")


class SlicerKA2ERWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self.panel = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        from SlicerKA2ERLib.Dialogs import Dialogs
        from SlicerKA2ERLib.Installer import Installer
        from SlicerKA2ERLib.PromptWidget import PromptWidget
        from SlicerKA2ERLib.Settings import EngineMaker, Settings

        self.logic = SlicerKA2ERLogic()
        settings, dialogs, resources = Settings(), Dialogs(), HERE / "Resources"
        installer = Installer(resources / "requirements.txt", settings, dialogs)
        self.panel = PromptWidget(self.logic.prompts, installer, settings, dialogs, EngineMaker(settings), resources)
        self.layout.addWidget(self.panel.widget)

        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneChanged)
        self.addObserver(scene, scene.EndImportEvent, self.onSceneChanged)
        self.addObserver(scene, scene.NodeAddedEvent, self.onNodeAdded)
        if slicer.app.layoutManager() is not None:
            slicer.app.layoutManager().layoutChanged.connect(self.panel.onLayoutChanged)
            slicer.app.settingsDialog().finished.connect(self.panel.onSettingsClosed)

    def cleanup(self):
        self.removeObservers()
        if self.panel is not None:
            if slicer.app.layoutManager() is not None:
                slicer.app.layoutManager().layoutChanged.disconnect(self.panel.onLayoutChanged)
                slicer.app.settingsDialog().finished.disconnect(self.panel.onSettingsClosed)
            self.panel.cleanup()
            self.panel = None

    def enter(self):
        self.panel.enter()

    def exit(self):
        self.panel.exit()

    def onReload(self):
        """Reload the helpers too: Slicer itself reloads this file only."""
        for name in [name for name in sys.modules if name.split(".")[0] == "SlicerKA2ERLib"]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)
        if slicer.util.selectedModule() == "SlicerKA2ER":
            slicer.util.getModuleWidget("SlicerKA2ER").enter()  # Slicer calls it where the user opens a module only

    def onSceneStartClose(self, *_args):
        self.panel.sceneClosing()

    def onSceneChanged(self, *_args):
        self.panel.sceneChanged()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAdded(self, _caller, _event, node):
        if (
            node is not None
            and node.GetClassName() == "vtkMRMLScalarVolumeNode"
            and not slicer.mrmlScene.IsBatchProcessing()
        ):
            self.panel.volumeAdded()


class SlicerKA2ERLogic(ScriptedLoadableModuleLogic):
    """For scripts: `slicer.util.getModuleLogic("SlicerKA2ER").prompts` is the PromptLogic of the open module."""

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        from SlicerKA2ERLib.PromptLogic import PromptLogic

        self.prompts = PromptLogic(slicer.mrmlScene, slicer.app.applicationLogic())


class SlicerKA2ERTest(ScriptedLoadableModuleTest):
    """What only a running Slicer can show; the rest is in Testing/, for pytest. Needs no torch and no network."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_panel_follows_the_scene()

    def test_panel_follows_the_scene(self):
        import numpy as np

        widget = slicer.modules.slicerka2er.createNewWidgetRepresentation()
        panel = widget.self().panel
        try:
            assert panel.logic.volumeNode is None
            volume = slicer.util.addVolumeFromArray(np.zeros((8, 9, 10), np.int16))
            panel.enter()
            assert panel.logic.volumeNode.GetID() == volume.GetID()
            assert panel.logic.tool == ("point" if panel.isReady() else "none")
            panel.exit()
            assert panel.logic.tool == "none"
            assert not panel.shortcuts.active
            slicer.mrmlScene.Clear()
            assert panel.logic.volumeNode is None
        finally:
            widget.deleteLater()
        self.delayDisplay("Test passed")
