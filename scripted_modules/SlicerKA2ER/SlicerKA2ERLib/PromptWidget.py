"""The module's panel. It connects the .ui to the logic and decides nothing else: read `PromptLogic` for what happens.

What the user does calls the logic, which tells its observers; `refresh` then reads everything from the logic.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import qt
import slicer
import vtk
from slicer.i18n import tr as _

from .ExpertsTable import ExpertsTable
from .Installer import isIntelMac
from .Protocols import DialogsProtocol, InstallerProtocol, PromptLogicProtocol
from .Samples import loadSample
from .Settings import EngineMaker, Settings
from .Shortcuts import Shortcuts
from .Structures import structures

BUSY_INTERVAL, IDLE_INTERVAL = 15, 150
"""ms between two looks at the logic."""
BUSY_SHOWN_AFTER = 0.3
"""Seconds: what is quicker shows no progress, so that nothing flickers at every click."""
EMPTY_QUALITY = 0.005
"""Expected Dice of an empty mask, with room for rounding."""
STATUS_LINES = 3
"""Lines of text that the status, the progress and an error share: the panel below them never moves."""
LEAST_ROWS, MOST_ROWS = 3, 8
"""Of the table of segments; more are scrolled."""
ROW_MARGIN = 12
"""Pixels that a row of the table is higher than its text."""
TOOL_BUTTONS = {
    "point": "pointButton",
    "box": "boxButton",
    "roi": "roiButton",
    "scribble": "scribbleButton",
    "lasso": "lassoButton",
}
SAMPLE_BUTTONS = {
    "sampleMRHeadButton": "MRHead",
    "sampleCTChestButton": "CTChest",
    "sampleCTACardioButton": "CTACardio",
}


class PromptWidget:
    """The panel around a logic.

    Args:
        logic: what the panel shows and drives.
        installer: says what is missing, and installs it once the user agreed.
        settings: of the application; the shortcuts come from there.
        dialogs: asks where the user must decide.
        makeEngine: how the logic gets an engine; keeps the latest engine's log.
        resources: folder with UI/ and Icons/.
    """

    def __init__(
        self,
        logic: PromptLogicProtocol,
        installer: InstallerProtocol,
        settings: Settings,
        dialogs: DialogsProtocol,
        makeEngine: EngineMaker,
        resources: Path,
    ) -> None:
        self.logic = logic
        self.installer, self.settings, self.dialogs, self.makeEngine = installer, settings, dialogs, makeEngine
        self.resources = Path(resources)
        self.active = False  # between enter and exit
        self.editor: Any = None  # made when its section is first opened
        self._editorNode: Any = None
        self._editorTag = 0
        self._ready = False
        self._errorText = self._errorDetails = ""
        self._latestTool = "point"
        self._structures: dict[str, str] = {}  # name -> terminology entry
        self._refreshing = self._volumeCame = False
        self._told: set[str] | None = None  # what the logic told during a poll

        self.widget = slicer.util.loadUI(str(self.resources / "UI" / "SlicerKA2ER.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.widget.setMRMLScene(slicer.mrmlScene)
        self.experts = ExpertsTable(self.ui.expertsTable, logic, self._try, self.onExpertEnabled)
        self.shortcuts = Shortcuts(self._actions(), self.keysOf, self._keyWidgets)
        self._setUpLook()
        self._connect()
        self.timer = qt.QTimer()
        self.timer.setInterval(IDLE_INTERVAL)
        self.timer.timeout.connect(self.tick)
        logic.observers.append(self.onLogicEvent)
        self.checkInstallation()
        self.refresh()

    # -- coming and going --------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """The module is opened: with a volume in the views, the next click in them places a point."""
        self.active = True
        self.checkInstallation()
        self.connectViews()
        self.shortcuts.install()
        self._showKeys()
        self._fillStructures()
        self._followSwitches()
        self.chooseVolume()
        self.timer.start()
        self.refresh()

    def exit(self) -> None:
        """Another module is opened: no tool, no shortcut and no view of ours is left. Work under way goes on."""
        self.active = False
        self._try(self.logic.setTool, "none")
        self.shortcuts.remove()
        self._try(self.logic.removeSliceViews)
        if self.editor is not None:
            self.editor.setActiveEffect(None)

    def cleanup(self, closeLogic: bool = True) -> None:
        """The application closes, or the module is reloaded."""
        self.exit()
        self.timer.stop()
        if self._editorNode is not None:
            self._editorNode.RemoveObserver(self._editorTag)
            self._editorNode = None
        if self.onLogicEvent in self.logic.observers:
            self.logic.observers.remove(self.onLogicEvent)
        if closeLogic:
            self.logic.close()

    def sceneClosing(self) -> None:
        """The scene is about to be emptied."""
        self.dismissError()
        if self.editor is not None:
            self.editor.setSegmentationNode(None)
            self.editor.removeViewObservations()

    def sceneChanged(self) -> None:
        """A scene was closed or loaded, or a volume came."""
        if self.active:
            self.chooseVolume()
        self.refresh()

    def volumeAdded(self) -> None:
        """A volume node came; it is looked at once its loading is through, by the timer."""
        self._volumeCame = True

    def chooseVolume(self) -> None:
        """Where none is selected: the volume in the views, else the first one."""
        if self.logic.volumeNode is None:
            node = self._volumeInViews() or self._firstVolume()
            if node is not None:
                self._setVolume(node)
        self._begin()

    def _setVolume(self, node: Any) -> None:
        """A volume brings its own segmentation: segments of one volume do not fit another."""
        self._try(self.logic.setVolumeNode, node)
        if node is not None and not isMadeFor(self.logic.segmentationNode, node):
            own = [made for made in slicer.util.getNodesByClass("vtkMRMLSegmentationNode") if isMadeFor(made, node)]
            if own or self.logic.segmentationNode is not None:
                self._try(self.logic.setSegmentationNode, own[-1] if own else None)

    def _begin(self) -> None:
        """With a volume and an engine, the next click in a view places a prompt."""
        if self.active and self.isReady() and self.logic.volumeNode is not None:
            self._try(self.logic.warmUp)
            if self.logic.tool == "none" and not self._isEditing():
                self._try(self.logic.setTool, self._latestTool)

    def isReady(self) -> bool:
        """Whether an engine can be made: nothing has to be installed before."""
        return self._ready

    # -- what is missing ---------------------------------------------------------------------------------------------

    def checkInstallation(self) -> None:
        """Show the first-run panel, or connect the engine that the settings ask for."""
        plan = self.installer.plan()
        missing = bool(plan.packages)
        self._ready = not missing
        self.ui.installFrame.setVisible(missing)
        if missing:
            text = _(
                "The engine that makes the segments needs, in Slicer's Python:\n{packages}\nAbout {size} to download."
            )
            text = text.format(packages=", ".join(plan.packages), size=sizeText(plan.megabytes))
            if isIntelMac():
                text += " " + _("On this Mac another Python (arm64) is several times faster.")
            self.ui.installTextLabel.setText(text)
            self.ui.installErrorLabel.setText(plan.reason)
            self.ui.installErrorLabel.setVisible(bool(plan.reason))
            self.ui.installButton.setText(_("Try again") if plan.reason else _("Install"))
            self.ui.installProgressBar.setVisible(False)
            self.ui.installProgressLabel.setVisible(False)
        elif self.makeEngine.isStale():
            self._try(lambda: self.logic.connectEngine(self.makeEngine.factory()))
        self._enableByState()

    def onInstall(self, *_args: Any) -> None:
        self.settings.setValue("resumeInstall", False)
        for button in (self.ui.installButton, self.ui.otherPythonButton, self.ui.remoteEngineButton):
            button.setEnabled(False)
        self.ui.installErrorLabel.setVisible(False)
        self.ui.installProgressBar.setVisible(True)
        self.ui.installProgressLabel.setVisible(True)
        with contextlib.suppress(RuntimeError):  # the plan's reason says it, in the panel
            self.installer.install(self._onInstallProgress)
        for button in (self.ui.installButton, self.ui.otherPythonButton, self.ui.remoteEngineButton):
            button.setEnabled(True)
        self.checkInstallation()
        if self.active and self.isReady():
            self.enter()

    def _onInstallProgress(self, text: str, fraction: float | None) -> None:
        self.ui.installProgressLabel.setText(text)
        self.ui.installProgressBar.setMaximum(0 if fraction is None else 1000)  # 0: moves to and fro
        self.ui.installProgressBar.setValue(0 if fraction is None else round(1000 * fraction))
        slicer.app.processEvents()

    def onOpenSettings(self, *_args: Any) -> None:
        slicer.app.openSettingsDialog(_("KA2ER Segment"))
        self.onSettingsClosed()

    def onSettingsClosed(self, *_args: Any) -> None:
        """Settings may be others now: another engine, other keys."""
        self.checkInstallation()
        if self.active:
            self.enter()

    # -- what the user does ------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        ui = self.ui
        ui.installButton.clicked.connect(self.onInstall)
        ui.otherPythonButton.clicked.connect(self.onOpenSettings)
        ui.remoteEngineButton.clicked.connect(self.onOpenSettings)
        ui.volumeSelector.currentNodeIDChanged.connect(self.onVolumeSelected)
        ui.segmentationSelector.currentNodeIDChanged.connect(self.onSegmentationSelected)
        for name, sample in SAMPLE_BUTTONS.items():
            getattr(ui, name).clicked.connect(lambda *_args, sample=sample: self.onSample(sample))
        for tool, name in TOOL_BUTTONS.items():
            getattr(ui, name).clicked.connect(lambda *_args, tool=tool: self.onTool(tool))
        ui.positiveButton.clicked.connect(lambda *_args: self.onPolarity(True))
        ui.negativeButton.clicked.connect(lambda *_args: self.onPolarity(False))
        ui.brushRadiusSpinBox.valueChanged.connect(self.onBrushRadius)
        actions = self._actions()
        for name in ("undo", "redo", "reset", "suggest", "nextSegment", "cancel"):
            getattr(ui, name + "Button").clicked.connect(lambda *_args, do=actions[name]: do())
        ui.segmentFrameButton.clicked.connect(lambda *_args: self._try(self.logic.segmentThisFrame))
        ui.propagateButton.clicked.connect(lambda *_args: self._try(self.logic.propagate))
        ui.segmentsTable.selectionChanged.connect(self.onSegmentSelected)
        ui.structureComboBox.activated.connect(self.onStructure)
        ui.removeSegmentButton.clicked.connect(self.onRemoveSegment)
        ui.completedButton.clicked.connect(self.onCompleted)
        ui.lockButton.clicked.connect(self.onLocked)
        ui.smoothingSlider.valueChanged.connect(self.onFinish)
        ui.islandsCheckBox.toggled.connect(self.onFinish)
        ui.neighboursComboBox.currentIndexChanged.connect(self.onNeighbours)
        ui.disagreementCheckBox.toggled.connect(self.onDisagreement)
        ui.deletePromptButton.clicked.connect(self.onDeletePrompt)
        ui.promptsList.currentRowChanged.connect(lambda *_args: self._enableByState())
        ui.editSection.contentsCollapsed.connect(self.onEditSection)
        ui.errorDismissButton.clicked.connect(self.dismissError)
        ui.errorDetailsButton.clicked.connect(self.onErrorDetails)

    def _actions(self) -> dict[str, Callable[[], Any]]:
        """What a shortcut can do."""
        tools = {tool: lambda tool=tool: self.onTool(tool) for tool in TOOL_BUTTONS}
        return {
            **tools,
            "polarity": lambda: self.onPolarity(not self.logic.positive),
            "undo": lambda: self._try(self.logic.undo) if self.logic.canUndo else None,
            "redo": lambda: self._try(self.logic.redo) if self.logic.canRedo else None,
            "reset": lambda: self._try(self.logic.reset),
            "suggest": lambda: self._try(self.logic.suggest),
            "nextSegment": lambda: self._try(self.logic.nextSegment),
            "cancel": self.onCancel,
        }

    def onVolumeSelected(self, *_args: Any) -> None:
        if self._refreshing:
            return
        self._setVolume(self.ui.volumeSelector.currentNode())
        self._begin()
        self.refresh()

    def onSegmentationSelected(self, *_args: Any) -> None:
        if not self._refreshing:
            self._try(self.logic.setSegmentationNode, self.ui.segmentationSelector.currentNode())
            self.refresh()

    def onSample(self, name: str) -> None:
        self.dismissError()
        self._enable(self.ui.sampleFrame, False)
        try:
            with self._waitCursor():
                self._try(loadSample, name, self._onSampleMessage, self.settings.value("offline"))
        finally:
            self._enable(self.ui.sampleFrame, True)
        self.chooseVolume()
        self.refresh()

    def _onSampleMessage(self, text: str) -> None:
        self.ui.statusLabel.setText(text)
        slicer.app.processEvents()

    def onTool(self, tool: str) -> None:
        """Choose a tool; the chosen one is put away."""
        chosen = "none" if self.logic.tool == tool else tool
        if chosen != "none" and self.editor is not None:
            self.editor.setActiveEffect(None)
        self._try(self.logic.setTool, chosen)
        self.refresh()

    def onPolarity(self, positive: bool) -> None:
        self._try(self.logic.setPolarity, positive)
        self.refresh()

    def onBrushRadius(self, *_args: Any) -> None:
        if not self._refreshing:
            self._try(self.logic.setBrushRadius, float(self.ui.brushRadiusSpinBox.value))

    def onCancel(self) -> None:
        """Stop what is under way; where nothing is, put the tool or the effect away."""
        if self.logic.busy:
            self._try(self.logic.cancel)
        elif self._isEditing():
            self.editor.setActiveEffect(None)
        else:
            self._try(self.logic.setTool, "none")
        self.refresh()

    def onSegmentSelected(self, *_args: Any) -> None:
        ids = list(self.ui.segmentsTable.selectedSegmentIDs())
        if not self._refreshing and ids and ids[0] != self.logic.selectedSegment:
            self._try(self.logic.selectSegment, ids[0])
            self.refresh()

    def onStructure(self, *_args: Any) -> None:
        """The segment gets the code, name and colour of the chosen structure."""
        row, name = self._selectedRow(), str(self.ui.structureComboBox.currentText)
        if row is not None and name in self._structures:
            self._try(self.logic.setTerminology, row.id, self._structures[name])
        self.ui.structureComboBox.setEditText("")
        qt.QTimer.singleShot(0, lambda: self.ui.structureComboBox.setEditText(""))  # the completer writes it once more
        self.refresh()

    def onRemoveSegment(self, *_args: Any) -> None:
        row = self._selectedRow()
        if row is not None and self.dialogs.confirm(
            _("Remove the segment '{name}' and its prompts?").format(name=row.name)
        ):
            self._try(self.logic.removeSegment, row.id)
            self.refresh()

    def onCompleted(self, *_args: Any) -> None:
        row = self._selectedRow()
        if row is not None:
            self._try(self.logic.setStatus, row.id, "in progress" if row.status == "completed" else "completed")
            self.refresh()

    def onLocked(self, *_args: Any) -> None:
        row = self._selectedRow()
        if row is not None:
            self._try(self.logic.setLocked, row.id, not row.locked)
            self.refresh()

    def onFinish(self, *_args: Any) -> None:
        if not self._refreshing:
            islands = bool(self.ui.islandsCheckBox.checked)
            self._try(self.logic.setFinish, float(self.ui.smoothingSlider.value), islands)

    def onNeighbours(self, *_args: Any) -> None:
        if not self._refreshing:
            chosen = list(neighbourTexts())[self.ui.neighboursComboBox.currentIndex]
            self._try(self.logic.setNeighbours, chosen)
            self.refresh()

    def onDisagreement(self, *_args: Any) -> None:
        if not self._refreshing:
            self._try(self.logic.setDisagreementShown, bool(self.ui.disagreementCheckBox.checked))

    def onExpertEnabled(self, name: str, enabled: bool) -> None:
        """Kept for the bundle: KA2ER Experts shows the same switches."""
        identity = self.logic.bundleIdentity
        off = set(self.settings.expertsOff(identity))
        self.settings.setExpertsOff(identity, off - {name} if enabled else off | {name})
        self._followSwitches()

    def _followSwitches(self) -> None:
        """Let the experts take part that the bundle's switches say."""
        off = self.settings.expertsOff(self.logic.bundleIdentity) if self.logic.bundleIdentity else ()
        for expert in self.logic.experts():
            if expert.canBeLeftOut and expert.enabled == (expert.name in off):
                self._try(self.logic.setExpertEnabled, expert.name, expert.name not in off)

    def onDeletePrompt(self, *_args: Any) -> None:
        rows, index = self.logic.prompts(), self.ui.promptsList.currentRow
        if 0 <= index < len(rows):
            self._try(self.logic.deletePrompt, rows[index].nodeId)
            self.refresh()

    # -- editing by hand ---------------------------------------------------------------------------------------------

    def onEditSection(self, collapsed: bool) -> None:
        """Slicer's own editor is made when it is first wanted: it costs time and memory."""
        if collapsed:
            if self.editor is not None:
                self.editor.setActiveEffect(None)
            return
        if self.editor is None:
            self._makeEditor()
        self._showInEditor()

    def _makeEditor(self) -> None:
        editor = slicer.qMRMLSegmentEditorWidget()
        self._editorNode = self.logic.segmentEditorNode
        if self._editorNode is None:
            self._editorNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
            self.logic.segmentEditorNode = self._editorNode
        editor.setMRMLSegmentEditorNode(self._editorNode)  # before the scene, or the editor selects nodes by itself
        editor.setMRMLScene(slicer.mrmlScene)
        editor.setSegmentationNodeSelectorVisible(False)
        editor.setSourceVolumeNodeSelectorVisible(False)
        editor.setAddRemoveSegmentButtonsVisible(False)
        editor.setShow3DButtonVisible(False)
        editor.setSwitchToSegmentationsButtonVisible(False)
        editor.setMaximumNumberOfUndoStates(10)
        editor.setEffectNameOrder([name for name in editor.availableEffectNames() if name != "KA2ER"])
        editor.unorderedEffectsVisible = False  # our own effect inside our own panel would be two hands on one mouse
        with contextlib.suppress(RuntimeError):  # the panel has a table of its own
            slicer.util.findChild(editor, "SegmentsTableResizableFrame").setVisible(False)
        editor.currentSegmentIDChanged.connect(self.onEditorSegment)
        self.ui.editSection.layout().addWidget(editor)
        self.logic.saveStateForUndo = editor.saveStateForUndo  # the editor's Undo takes back predictions too
        self._editorTag = self._editorNode.AddObserver(vtk.vtkCommand.ModifiedEvent, self.onEditorNodeModified)
        self.editor = editor

    def _showInEditor(self) -> None:
        """Same segmentation, volume and segment as in the panel."""
        if self.editor is None or self.ui.editSection.collapsed:
            return
        with self._withoutSignals():  # given a segmentation, the editor selects its first segment by itself
            for current, wanted, show in (
                (self.editor.segmentationNode(), self.logic.segmentationNode, self.editor.setSegmentationNode),
                (self.editor.sourceVolumeNode(), self.logic.volumeNode, self.editor.setSourceVolumeNode),
            ):
                if current is not wanted:
                    show(wanted)
            if self.logic.selectedSegment and self.editor.currentSegmentID() != self.logic.selectedSegment:
                self.editor.setCurrentSegmentID(self.logic.selectedSegment)

    def _isEditing(self) -> bool:
        """Whether an effect of the embedded editor has the mouse."""
        return self._editorNode is not None and bool(self._editorNode.GetActiveEffectName())

    def onEditorSegment(self, *_args: Any) -> None:
        segment = str(self.editor.currentSegmentID() or "")
        if not self._refreshing and segment and segment != self.logic.selectedSegment:
            self._try(self.logic.selectSegment, segment)
            self.refresh()

    def onEditorNodeModified(self, *_args: Any) -> None:
        """One hand at a time: an effect of the editor puts our tool away."""
        if self._isEditing() and self.logic.tool != "none":
            self._try(self.logic.setTool, "none")
            self.refresh()

    # -- what the logic tells ----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called by the timer."""
        if self._volumeCame and self.active:
            self._volumeCame = False
            self.sceneChanged()
        self._told = set()  # one poll may tell the same thing several times: it is shown once
        self._try(self.logic.poll)
        told, self._told = self._told, None
        self._follow(told)
        self._showActivity()
        busy = bool(self.logic.busy) or self.logic.engineState == "starting"
        interval = BUSY_INTERVAL if busy else IDLE_INTERVAL
        if self.timer.interval != interval:
            self.timer.setInterval(interval)

    def onLogicEvent(self, event: str) -> None:
        if self._told is None:
            self._follow({event})
        else:
            self._told.add(event)

    def _follow(self, events: set[str]) -> None:
        if "result" in events:
            self.dismissError()
        if "error" in events:
            self.showError(self.logic.lastError, self.makeEngine.log())
        if not self.active:
            return  # nobody looks; `enter` reads everything
        if events & {"state", "result"}:
            self.refresh()
            return
        if "busy" in events:
            self._showActivity()
            if self.logic.busy and self.active:
                self.timer.setInterval(BUSY_INTERVAL)
        if "prompts" in events:
            self._refreshPrompts()
        if "experts" in events:
            self._followSwitches()
            self.experts.refresh()
        if events:
            self._enableByState()

    def refresh(self) -> None:
        """Everything that the logic says, into the panel."""
        logic, ui = self.logic, self.ui
        with self._withoutSignals():
            if logic.tool not in ("none", "roi"):  # a 3D box is placed once
                self._latestTool = logic.tool
            ui.volumeSelector.setCurrentNode(logic.volumeNode)
            ui.segmentationSelector.setCurrentNode(logic.segmentationNode)
            ui.sampleFrame.setVisible(logic.volumeNode is None)
            for tool, name in TOOL_BUTTONS.items():
                getattr(ui, name).setChecked(logic.tool == tool)
            ui.positiveButton.setChecked(bool(logic.positive))
            ui.negativeButton.setChecked(not logic.positive)
            ui.brushRadiusSpinBox.setValue(float(logic.brushRadius))
            ui.sequenceFrame.setVisible(bool(logic.hasFrames))
            ui.smoothingSlider.setValue(float(logic.smoothingMm))
            ui.islandsCheckBox.setChecked(bool(logic.islands))
            ui.neighboursComboBox.setCurrentIndex(list(neighbourTexts()).index(logic.neighbours))
            ui.disagreementCheckBox.setChecked(bool(logic.disagreementShown))
            self._refreshSegments()
            self._refreshPrompts()
            self.experts.refresh()
            self._showInEditor()
        self._enableByState()
        self._showActivity()

    def _refreshSegments(self) -> None:
        ui, logic = self.ui, self.logic
        rows = min(max(len(logic.segments()), LEAST_ROWS), MOST_ROWS)
        ui.segmentsTable.setFixedHeight((rows + 1) * (ui.statusLabel.fontMetrics().lineSpacing() + ROW_MARGIN))
        if ui.segmentsTable.segmentationNode() is not logic.segmentationNode:
            ui.segmentsTable.setSegmentationNode(logic.segmentationNode)
            ui.show3DButton.setSegmentationNode(logic.segmentationNode)
        wanted = [logic.selectedSegment] if logic.selectedSegment else []
        if list(ui.segmentsTable.selectedSegmentIDs()) != wanted:
            ui.segmentsTable.setSelectedSegmentIDs(wanted)
        row = self._selectedRow()
        ui.completedButton.setChecked(row is not None and row.status == "completed")
        ui.lockButton.setChecked(row is not None and row.locked)
        quality = row.quality if row is not None else None
        ui.qualityLabel.setText("" if quality is None else _("Expected Dice: {value:.2f}").format(value=quality))

    def _refreshPrompts(self) -> None:
        texts = [
            (_("{number}. {kind}, inside") if row.positive else _("{number}. {kind}, outside")).format(
                number=number, kind=toolTitles()[row.kind]
            )
            for number, row in enumerate(self.logic.prompts(), start=1)
        ]
        promptsList = self.ui.promptsList
        if [promptsList.item(index).text() for index in range(promptsList.count)] != texts:
            current = promptsList.currentRow
            promptsList.clear()
            promptsList.addItems(texts)
            promptsList.setCurrentRow(min(current, len(texts) - 1))

    def _enableByState(self) -> None:
        ui, logic = self.ui, self.logic
        usable = logic.volumeNode is not None and self.isReady()
        row = self._selectedRow()
        for name in (*TOOL_BUTTONS.values(), "positiveButton", "negativeButton", "nextSegmentButton"):
            self._enable(getattr(ui, name), usable)
        self._enable(ui.brushRadiusSpinBox, usable and logic.tool == "scribble")
        self._enable(ui.undoButton, bool(logic.canUndo))
        self._enable(ui.redoButton, bool(logic.canRedo))
        self._enable(ui.resetButton, usable and row is not None)
        self._enable(ui.suggestButton, usable and row is not None and row.hasPrompts)
        for widget in (ui.structureComboBox, ui.lockButton):
            self._enable(widget, row is not None)
        self._enable(ui.removeSegmentButton, row is not None and not row.locked)
        self._enable(ui.completedButton, row is not None)
        self._enable(ui.resultSection, usable)
        self._enable(ui.disagreementCheckBox, bool(logic.experts()))
        self._enable(ui.deletePromptButton, 0 <= ui.promptsList.currentRow < ui.promptsList.count)
        for button in (ui.segmentFrameButton, ui.propagateButton):
            self._enable(button, usable and not logic.busy)

    def _showActivity(self) -> None:
        """Progress while something takes long, else the latest error, else what can be done now: all in one place."""
        ui, logic = self.ui, self.logic
        if logic.busy and logic.elapsedSeconds >= BUSY_SHOWN_AFTER:
            text, fraction = logic.progress
            ui.busyLabel.setText(text or logic.busy)
            ui.busyProgressBar.setMaximum(0 if fraction is None else 1000)
            ui.busyProgressBar.setValue(0 if fraction is None else round(1000 * fraction))
            ui.elapsedLabel.setText(_("{seconds:.0f} s").format(seconds=logic.elapsedSeconds))
            page = ui.busyPage
        elif self._errorText:
            page = ui.errorPage
        else:
            ui.statusLabel.setText(self.statusText())
            page = ui.statusPage
        if ui.stateStack.currentIndex != ui.stateStack.indexOf(page):
            ui.stateStack.setCurrentIndex(ui.stateStack.indexOf(page))

    def statusText(self) -> str:
        """What the user can do now."""
        logic = self.logic
        if not self.isReady():
            return _("Install what is missing first, or use another engine.")
        if logic.volumeNode is None:
            return _("Load a volume, or try a sample.")
        if logic.engineState == "starting":
            return _("The engine starts. You can click already.") + "\n" + toolHints()[logic.tool]
        if logic.engineState == "dead":
            return _("The engine has ended. It starts again with the next prompt; nothing is lost.")
        if logic.suggestion is not None:
            return (
                _("The views show where the next click helps most. Inside? Click there. Outside? Alt+click.")
                + "\n"
                + (_("Expected: inside.") if logic.suggestion[1] else _("Expected: outside."))
            )
        row = self._selectedRow()
        if row is not None and row.quality is not None and row.quality < EMPTY_QUALITY:
            return _("Nothing was found here that other segments leave free. Mark another place, or let them give way.")
        return toolHints()[logic.tool]

    # -- errors ------------------------------------------------------------------------------------------------------

    def showError(self, text: str, details: str = "") -> None:
        """One line in the panel, until it is dismissed or something works again."""
        self._errorText, self._errorDetails = text, details
        self.ui.errorLabel.setText(text)
        self.ui.errorLabel.setToolTip(text)
        self.ui.errorDetailsButton.setVisible(bool(details))
        self._showActivity()

    def dismissError(self, *_args: Any) -> None:
        self._errorText = self._errorDetails = ""
        self._showActivity()

    def onErrorDetails(self, *_args: Any) -> None:
        self.dialogs.error(self._errorText, self._errorDetails)

    def _try(self, do: Callable[..., Any], *args: Any) -> Any:
        """Call the logic; what it raises becomes a line in the panel."""
        try:
            return do(*args)
        except Exception as error:
            from KA2ERSegment.errors import KA2ERError

            if not isinstance(error, KA2ERError):
                logging.getLogger("KA2ERSegment").exception("In the panel")
            self.showError(str(error) or type(error).__name__, traceback.format_exc())
            return None

    # -- views and keys ----------------------------------------------------------------------------------------------

    def connectViews(self, *_args: Any) -> None:
        """Let the tools work in every slice view of the present layout."""
        layoutManager = slicer.app.layoutManager()
        if not self.active or layoutManager is None:
            return
        self._try(self.logic.removeSliceViews)
        for name in layoutManager.sliceViewNames():
            sliceWidget = layoutManager.sliceWidget(name)
            if sliceWidget is not None:
                interactor = sliceWidget.interactorStyle().GetInteractor()
                self._try(self.logic.addSliceView, interactor, sliceWidget.mrmlSliceNode())

    def onLayoutChanged(self, *_args: Any) -> None:
        if self.active:
            self.connectViews()
            self.shortcuts.install()

    def keysOf(self, action: str) -> str:
        """Its shortcut; empty for none."""
        return str(self.settings.value("shortcut/" + action))

    def _keyWidgets(self) -> list[Any]:
        layoutManager = slicer.app.layoutManager()
        panel = self._home()
        if layoutManager is None:
            return [panel]
        return [panel, *(layoutManager.viewport(name) for name in layoutManager.viewportNames)]

    def _home(self) -> Any:
        """What scrolls our panel: a click on one of our buttons gives the keyboard to it."""
        widget = self.widget
        while widget is not None and not widget.inherits("QScrollArea"):
            widget = widget.parentWidget()
        return self.widget if widget is None else widget

    def _volumeInViews(self) -> Any:
        layoutManager = slicer.app.layoutManager()
        for name in layoutManager.sliceViewNames() if layoutManager is not None else ():
            sliceWidget = layoutManager.sliceWidget(name)
            volumeId = sliceWidget.mrmlSliceCompositeNode().GetBackgroundVolumeID() if sliceWidget is not None else None
            node = slicer.mrmlScene.GetNodeByID(volumeId) if volumeId else None
            if node is not None and node.GetClassName() == "vtkMRMLScalarVolumeNode":
                return node
        return None

    def _firstVolume(self) -> Any:
        nodes = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
        plain = [node for node in nodes if node.GetClassName() == "vtkMRMLScalarVolumeNode" and node.GetImageData()]
        return next((node for node in plain if not node.GetHideFromEditors()), None)

    # -- looks -------------------------------------------------------------------------------------------------------

    def _setUpLook(self) -> None:
        ui = self.ui
        for name in ("Point", "Box", "Roi", "Scribble", "Lasso", "Positive", "Negative", "Undo", "Redo", "Reset",
                     "Suggest", "NextSegment"):  # fmt: skip
            getattr(ui, name[0].lower() + name[1:] + "Button").setIcon(self._icon(name))
        ui.propagateButton.setIcon(self._icon("NextFrame"))
        for text in neighbourTexts().values():
            ui.neighboursComboBox.addItem(text)
        ui.segmentsTable.setSelectionMode(1)  # QAbstractItemView::SingleSelection, which Slicer takes as a number
        height = STATUS_LINES * ui.statusLabel.fontMetrics().lineSpacing() + 4
        ui.stateStack.setFixedHeight(height)
        self._showKeys()

    def _fillStructures(self) -> None:
        """Once, when the module is first opened: Slicer has read its terminologies by then."""
        terminologies = slicer.app.applicationLogic().GetModuleLogic("Terminologies")
        if self._structures or terminologies is None:
            return
        combo = self.ui.structureComboBox
        self._structures = dict(structures(terminologies))
        combo.addItems(list(self._structures))
        combo.completer().setFilterMode(qt.Qt.MatchContains)
        combo.completer().setCompletionMode(qt.QCompleter.PopupCompletion)
        combo.lineEdit().setPlaceholderText(_("Type a name, for example liver"))
        combo.setCurrentIndex(-1)
        combo.setEditText("")

    def _icon(self, name: str) -> Any:
        return qt.QIcon(str(self.resources / "Icons" / f"{name}.svg"))

    def _showKeys(self) -> None:
        """The tooltips, with the keys of the settings."""
        for action, text in actionTexts().items():
            keys = self.keysOf(action)
            name = {"polarity": "negativeButton"}.get(action, action + "Button")
            getattr(self.ui, name).setToolTip(_("{text} ({keys})").format(text=text, keys=keys) if keys else text)
        self.ui.positiveButton.setToolTip(
            _("What you mark belongs to the structure. Alt marks the opposite for one prompt.")
        )

    def _selectedRow(self) -> Any:
        return next((row for row in self.logic.segments() if row.id == self.logic.selectedSegment), None)

    @staticmethod
    def _enable(widget: Any, enabled: bool) -> None:
        if bool(widget.enabled) != enabled:
            widget.setEnabled(enabled)

    @contextlib.contextmanager
    def _withoutSignals(self) -> Iterator[None]:
        """What the panel sets itself is not what the user does."""
        before, self._refreshing = self._refreshing, True
        try:
            yield
        finally:
            self._refreshing = before

    @contextlib.contextmanager
    def _waitCursor(self) -> Iterator[None]:
        qt.QApplication.setOverrideCursor(qt.QCursor(qt.Qt.WaitCursor))
        try:
            yield
        finally:
            qt.QApplication.restoreOverrideCursor()


def isMadeFor(segmentation: Any, volume: Any) -> bool:
    """Whether a segmentation refers to that volume."""
    role = slicer.vtkMRMLSegmentationNode.GetReferenceImageGeometryReferenceRole()
    return segmentation is not None and segmentation.GetNodeReference(role) is volume


def sizeText(megabytes: int) -> str:
    if megabytes < 1000:
        return _("{size} MB").format(size=round(megabytes, -1))
    return _("{size:.1f} GB").format(size=megabytes / 1000)


def toolTitles() -> dict[str, str]:
    return {
        "point": _("Point"),
        "box": _("Box"),
        "roi": _("3D box"),
        "scribble": _("Scribble"),
        "lasso": _("Lasso"),
    }


def toolHints() -> dict[str, str]:
    """What the mouse does with each tool."""
    return {
        "none": _("Choose a tool to mark a structure."),
        "point": _(
            "Click on the structure; Alt+click, or Outside, on what does not belong to it. Points can be moved."
        ),
        "box": _("Drag a box around the structure on a slice."),
        "roi": _("Click at a corner of the structure, then at the opposite one; drag the handles to fit."),
        "scribble": _("Draw along the structure. With Alt: along what does not belong to it."),
        "lasso": _("Draw around the structure on a slice. With Alt: around what does not belong to it."),
    }


def actionTexts() -> dict[str, str]:
    """What each action does, for the tooltips and the settings."""
    return {
        "point": _("Place points"),
        "box": _("Draw a box on a slice"),
        "roi": _("Place a box in 3D"),
        "scribble": _("Draw scribbles"),
        "lasso": _("Draw around something"),
        "polarity": _("Mark what is outside, or what is inside"),
        "undo": _("Undo the latest prompt"),
        "redo": _("Redo what was undone"),
        "reset": _("Empty the segment; undo brings it back"),
        "suggest": _("Show where the next click helps most"),
        "nextSegment": _("Begin a new segment"),
        "cancel": _("Cancel what is under way, or put the tool away"),
    }


def neighbourTexts() -> dict[str, str]:
    """Value of `logic.neighbours` -> what it means."""
    return {
        "keep": _("Stay as they are"),
        "compete": _("The more probable one wins"),
        "overlap": _("May overlap"),
    }
