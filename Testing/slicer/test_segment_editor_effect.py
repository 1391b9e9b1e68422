"""The Segment Editor effect, on the stand-in desktop: the editor's nodes, the module's logic."""

# ruff: noqa: N801 (Slicer's style)

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("PySide6", reason="needs PySide6")
slicer = pytest.importorskip("slicer", reason="needs slicer-core")

from harness.fixtures import *  # noqa: E402, F403
from harness.fixtures import MODULES  # noqa: E402

MODULE = MODULES / "SegmentEditorKA2ER"


class ScriptedEffect:
    """Slicer's adaptor of an effect in the editor."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self.options: list[Any] = []
        self.saved = 0

    def parameterSetNode(self) -> Any:
        return self._node

    def addOptionsWidget(self, widget: Any) -> None:
        self.options.append(widget)

    def saveStateForUndo(self) -> None:
        self.saved += 1


@pytest.fixture
def an_editor_node(a_scene, add_volume):
    """The editor shows a volume and a segmentation with two segments, the first one selected."""
    node = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    segmentation = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    for name in ("liver", "spleen"):
        segmentation.GetSegmentation().AddEmptySegment(name, name)
    node.SetAndObserveSourceVolumeNode(add_volume())
    node.SetAndObserveSegmentationNode(segmentation)
    node.SetSelectedSegmentID("liver")
    return node


@pytest.fixture
def an_effect(a_panel, a_logic, an_editor_node, monkeypatch):
    """Set up in the editor, not active yet."""

    class AbstractScriptedSegmentEditorEffect:
        def __init__(self, scriptedEffect):
            self.scriptedEffect = scriptedEffect

    effects = types.SimpleNamespace(AbstractScriptedSegmentEditorEffect=AbstractScriptedSegmentEditorEffect)
    monkeypatch.setitem(sys.modules, "SegmentEditorEffects", effects)
    monkeypatch.syspath_prepend(str(MODULE))
    monkeypatch.setattr(
        slicer.util, "getModuleWidget", lambda name: {"SlicerKA2ER": types.SimpleNamespace(panel=a_panel)}[name]
    )
    for name in ("liver", "spleen"):
        a_logic.haveSegment(name)
    a_logic.selectedSegment = ""
    from SegmentEditorKA2ERLib.SegmentEditorEffect import SegmentEditorEffect

    effect = SegmentEditorEffect(ScriptedEffect(an_editor_node))
    effect.setupOptionsFrame()
    yield effect
    effect.cleanup()


def test_the_effect_registers_itself_after_startup(a_desktop, monkeypatch) -> None:
    registered = []

    class qSlicerSegmentEditorScriptedEffect:
        def __init__(self, parent):
            assert parent is None

        def setPythonSource(self, path):
            self.path = path

        def self(self):
            return types.SimpleNamespace(register=lambda: registered.append(self.path))

    made = types.SimpleNamespace(qSlicerSegmentEditorScriptedEffect=qSlicerSegmentEditorScriptedEffect)
    monkeypatch.setitem(sys.modules, "qSlicerSegmentationsEditorEffectsPythonQt", made)
    about = types.SimpleNamespace()
    a_desktop.loadModule(MODULE / "SegmentEditorKA2ER.py").SegmentEditorKA2ER(about)
    assert about.hidden is True
    assert registered == []

    a_desktop.app.startupCompleted.emit()

    assert [Path(path) for path in registered] == [MODULE / "SegmentEditorKA2ERLib" / "SegmentEditorEffect.py"]
    assert "\\" not in registered[0]


def test_the_panel_is_made_when_the_effect_is_first_chosen(an_effect) -> None:
    assert an_effect.panel is None

    an_effect.activate()
    panel = an_effect.panel
    an_effect.deactivate()
    an_effect.activate()

    assert an_effect.panel is panel
    assert an_effect.scriptedEffect.options == [panel.widget]


def test_module_and_effect_share_one_engine(an_effect, a_panel, a_logic) -> None:
    assert len(a_logic.called("connectEngine")) == 1

    an_effect.activate()

    assert len(a_logic.called("connectEngine")) == 1


def test_an_active_effect_works_on_the_editors_nodes(an_effect, an_editor_node, a_logic) -> None:
    assert an_effect.scriptedEffect.name == "KA2ER"
    an_effect.activate()

    assert a_logic.volumeNode is an_editor_node.GetSourceVolumeNode()
    assert a_logic.segmentationNode is an_editor_node.GetSegmentationNode()
    assert a_logic.segmentEditorNode is an_editor_node  # its masking and overwrite mode count
    assert a_logic.selectedSegment == "liver"
    assert a_logic.tool == "point"
    a_logic.saveStateForUndo()
    assert an_effect.scriptedEffect.saved == 1


def test_another_segment_chosen_in_the_editor_is_the_one_for_the_next_prompt(
    an_effect, an_editor_node, a_logic
) -> None:
    an_effect.activate()

    an_editor_node.SetSelectedSegmentID("spleen")

    assert a_logic.selectedSegment == "spleen"


def test_a_segment_begun_by_the_effect_is_selected_in_the_editor(an_effect, an_editor_node, a_logic) -> None:
    an_effect.activate()
    an_editor_node.GetSegmentationNode().GetSegmentation().AddEmptySegment("Segment_3", "Segment_3")

    an_effect.panel.ui.nextSegmentButton.click()

    assert an_editor_node.GetSelectedSegmentID() == "Segment_3"


def test_another_effect_puts_the_tools_away_and_gives_the_nodes_back(an_effect, an_editor_node, a_logic) -> None:
    an_effect.activate()

    an_effect.deactivate()
    an_editor_node.SetSelectedSegmentID("spleen")

    assert a_logic.tool == "none"
    assert a_logic.segmentEditorNode is None
    assert a_logic.saveStateForUndo is None
    assert a_logic.selectedSegment == "liver"  # nobody listens any more
    assert not an_effect.panel.timer.active
    assert an_effect.panel.shortcuts.active == []


def test_the_options_show_the_tools_but_not_what_the_editor_has(an_effect, a_logic) -> None:
    an_effect.activate()
    ui = an_effect.panel.ui

    assert an_effect.scriptedEffect.options == [an_effect.panel.widget]
    hidden = (ui.volumeSelector, ui.segmentationSelector, ui.sampleFrame, ui.segmentsSection, ui.editSection)
    assert all(widget.isHidden() for widget in hidden)
    assert not ui.pointButton.isHidden()
    assert not ui.undoButton.isHidden()


def test_keys_of_the_editor_stay_the_editors(an_effect) -> None:
    """Qt runs neither of two shortcuts with one key: Ctrl+Z, Ctrl+Y and Esc would do nothing at all."""
    an_effect.activate()

    keys = {shortcut.key.toString() for shortcut in an_effect.panel.shortcuts.active}

    assert {"P", "X", "S"} <= keys
    assert not keys & {"Ctrl+Z", "Ctrl+Y", "Esc"}
    assert an_effect.panel.ui.undoButton.toolTip == "Undo the latest prompt"


def test_removing_the_effect_leaves_logic_and_engine_to_the_module(an_effect, a_panel, a_logic) -> None:
    an_effect.activate()

    an_effect.cleanup()

    assert a_logic.called("close") == []
    assert a_logic.observers == [a_panel.onLogicEvent]


def test_the_effect_is_not_offered_inside_the_modules_own_panel(a_panel, add_volume, a_logic, an_editor_node) -> None:
    a_panel.enter()
    a_panel.ui.editSection.collapsed = False

    assert "KA2ER" not in a_panel.editor.calls["effects"]
    assert a_panel.editor.unorderedEffectsVisible is False
