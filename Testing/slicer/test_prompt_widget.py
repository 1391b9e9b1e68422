"""The real panel, on the stand-in desktop, around a logic that writes down what it was asked."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("PySide6", reason="needs PySide6")
slicer = pytest.importorskip("slicer", reason="needs slicer-core")

from harness.fixtures import *  # noqa: E402, F403

from KA2ERSegment.errors import PromptError  # noqa: E402


@pytest.fixture
def an_open_panel(a_panel, add_volume):
    """Entered, with a volume."""
    add_volume()
    a_panel.enter()
    return a_panel


@pytest.fixture
def two_experts(a_logic):
    from SlicerKA2ERLib.Protocols import ExpertRow

    a_logic.expertRows = [
        ExpertRow("foundation", "Foundation", (0.2, 0.5, 0.9), 0.75, False, "probability", 0.5, True),
        ExpertRow("liver", "Liver and its tumours", (0.9, 0.3, 0.2), 0.25, False, "probability", 0.5, True),
    ]
    return a_logic.expertRows


def page(panel: Any) -> str:
    return panel.ui.stateStack.currentWidget().name


# -- the double -------------------------------------------------------------------------------------------------------


def test_fake_logic_has_every_verb_of_the_protocol_with_the_same_arguments(a_logic) -> None:
    from SlicerKA2ERLib.Protocols import PromptLogicProtocol

    wanted = {name: value for name, value in vars(PromptLogicProtocol).items() if inspect.isfunction(value)}
    verbs = {name for name in wanted if not name.startswith("_")}
    assert len(verbs) > 30
    for name in verbs:
        theirs = list(inspect.signature(wanted[name]).parameters)[1:]
        assert list(inspect.signature(getattr(a_logic, name)).parameters) == theirs, name
    for name in PromptLogicProtocol.__annotations__:
        assert hasattr(a_logic, name), name


# -- opening the module -----------------------------------------------------------------------------------------------


def test_opening_the_module_makes_the_next_click_in_a_view_a_point(a_panel, a_logic, add_volume, two_views) -> None:
    volume = add_volume()

    a_panel.enter()

    assert a_logic.volumeNode is volume
    assert a_logic.tool == "point"
    assert a_logic.called("addSliceView") == [(view.interactor, view.node) for view in two_views]
    assert a_logic.called("warmUp")
    assert a_panel.ui.pointButton.checked
    assert a_panel.ui.volumeSelector.currentNode() is volume


def test_the_volume_in_the_views_is_preferred_to_the_first_one(a_panel, a_logic, add_volume, two_views) -> None:
    add_volume("first")
    shown = add_volume("shown")
    two_views[1].show(shown)

    a_panel.enter()

    assert a_logic.volumeNode is shown


def test_opening_again_keeps_volume_and_tool(an_open_panel, a_logic, add_volume) -> None:
    volume = a_logic.volumeNode
    an_open_panel.ui.lassoButton.click()
    an_open_panel.exit()
    add_volume("another")

    an_open_panel.enter()

    assert a_logic.volumeNode is volume
    assert a_logic.tool == "lasso"


def test_without_a_volume_the_panel_offers_samples_and_no_tool(a_panel, a_logic) -> None:
    a_panel.enter()

    assert a_logic.tool == "none"
    assert not a_panel.ui.sampleFrame.isHidden()
    assert not a_panel.ui.pointButton.enabled
    assert a_panel.statusText() == "Load a volume, or try a sample."


def test_a_volume_loaded_while_the_module_is_open_is_taken(a_panel, a_logic, add_volume) -> None:
    a_panel.enter()
    volume = add_volume()
    a_panel.volumeAdded()

    a_panel.tick()

    assert a_logic.volumeNode is volume
    assert a_logic.tool == "point"
    assert a_panel.ui.sampleFrame.isHidden()


def test_a_volume_loaded_while_another_module_is_open_is_left_alone(a_panel, a_logic, add_volume) -> None:
    add_volume()
    a_panel.volumeAdded()

    a_panel.tick()

    assert a_logic.volumeNode is None


def test_leaving_the_module_leaves_no_tool_no_view_and_no_shortcut(an_open_panel, a_logic, two_views) -> None:
    shortcuts = list(an_open_panel.shortcuts.active)
    assert shortcuts

    an_open_panel.exit()

    assert a_logic.tool == "none"
    assert a_logic.sliceViews == []
    assert not any(shortcut.enabled for shortcut in shortcuts)
    assert an_open_panel.shortcuts.active == []


def test_a_changed_layout_brings_its_views_to_the_tools(an_open_panel, a_logic, a_desktop, two_views) -> None:
    an_open_panel.connectViews()
    layout = a_desktop.app.layoutManager()
    layout.views = {"Green": layout.views["Green"]}

    an_open_panel.onLayoutChanged(2)

    assert a_logic.sliceViews == [two_views[1].node]


def test_closing_the_application_closes_the_logic(an_open_panel, a_logic) -> None:
    an_open_panel.cleanup()

    assert a_logic.called("close") == [()]
    assert a_logic.observers == []
    assert not an_open_panel.timer.active


def test_the_timer_looks_at_the_logic_more_often_while_something_is_under_way(an_open_panel, a_logic) -> None:
    a_logic.engineState = "ready"
    an_open_panel.tick()
    idle = an_open_panel.timer.interval
    a_logic.busy = "Segmenting"
    a_logic.tell("busy")

    assert an_open_panel.timer.interval <= 30 < idle
    assert an_open_panel.timer.active


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["point", "box", "roi", "scribble", "lasso"])
def test_a_tool_button_chooses_its_tool_and_a_second_click_puts_it_away(an_open_panel, a_logic, tool) -> None:
    a_logic.setTool("none")
    button = getattr(an_open_panel.ui, tool + "Button")

    button.click()
    assert a_logic.tool == tool
    checked = [
        name
        for name in ("point", "box", "roi", "scribble", "lasso")
        if getattr(an_open_panel.ui, name + "Button").checked
    ]
    assert checked == [tool]

    button.click()
    assert a_logic.tool == "none"
    assert not button.checked


def test_polarity_buttons_show_and_set_what_is_marked(an_open_panel, a_logic) -> None:
    ui = an_open_panel.ui
    assert (ui.positiveButton.checked, ui.negativeButton.checked) == (True, False)

    ui.negativeButton.click()
    assert a_logic.positive is False
    assert (ui.positiveButton.checked, ui.negativeButton.checked) == (False, True)

    ui.negativeButton.click()  # pressing what is pressed changes nothing
    assert (ui.positiveButton.checked, ui.negativeButton.checked) == (False, True)

    ui.positiveButton.click()
    assert a_logic.positive is True


def test_brush_radius_can_be_changed_with_the_scribble_only(an_open_panel, a_logic) -> None:
    brush = an_open_panel.ui.brushRadiusSpinBox
    assert not brush.enabled

    an_open_panel.ui.scribbleButton.click()
    brush.setValue(4.5)

    assert brush.enabled
    assert a_logic.called("setBrushRadius") == [(4.5,)]


@pytest.mark.parametrize("verb", ["undo", "redo", "reset", "suggest", "nextSegment"])
def test_action_buttons_call_their_verb(an_open_panel, a_logic, verb) -> None:
    a_logic.canUndo = a_logic.canRedo = True
    a_logic.haveSegment("Liver")
    a_logic.tell("state")

    getattr(an_open_panel.ui, verb + "Button").click()

    assert a_logic.called(verb) == [()]


def test_undo_and_redo_are_enabled_when_there_is_something_to_undo_or_redo(an_open_panel, a_logic) -> None:
    ui = an_open_panel.ui
    for undo, redo in ((True, False), (False, True), (False, False)):
        a_logic.canUndo, a_logic.canRedo = undo, redo
        a_logic.tell("state")
        assert (ui.undoButton.enabled, ui.redoButton.enabled) == (undo, redo)


def test_suggest_needs_a_segment_with_prompts(an_open_panel, a_logic) -> None:
    assert not an_open_panel.ui.suggestButton.enabled
    a_logic.haveSegment("Liver", hasPrompts=False)
    a_logic.tell("state")
    assert not an_open_panel.ui.suggestButton.enabled
    a_logic.change(a_logic.segmentRows, 0, hasPrompts=True)
    a_logic.tell("result")
    assert an_open_panel.ui.suggestButton.enabled


def test_a_suggestion_is_explained_in_the_status(an_open_panel, a_logic) -> None:
    a_logic.engineState = "ready"
    a_logic.suggestion = ((1.0, 2.0, 3.0), False)
    a_logic.tell("state")

    assert "next click" in an_open_panel.ui.statusLabel.text
    assert "outside" in an_open_panel.ui.statusLabel.text


# -- nodes and segments -----------------------------------------------------------------------------------------------


def test_selecting_a_volume_hands_it_to_the_logic_once(an_open_panel, a_logic, add_volume) -> None:
    other = add_volume("other")
    a_logic.calls.clear()

    an_open_panel.ui.volumeSelector.choose(other)

    assert a_logic.called("setVolumeNode") == [(other,)]
    assert a_logic.called("warmUp") == [()]


def test_a_volume_brings_its_own_segmentation(a_panel, a_logic, a_scene, add_volume) -> None:
    first, second = add_volume("first"), add_volume("second")
    made = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    made.SetReferenceImageGeometryParameterFromVolumeNode(first)

    a_panel.enter()
    assert (a_logic.volumeNode, a_logic.segmentationNode) == (first, made)  # as after loading a scene

    a_panel.ui.volumeSelector.choose(second)
    assert (a_logic.volumeNode, a_logic.segmentationNode) == (second, None)

    a_panel.ui.volumeSelector.choose(first)
    assert (a_logic.volumeNode, a_logic.segmentationNode) == (first, made)


def test_selecting_a_segmentation_shows_it_in_the_table(an_open_panel, a_logic, a_scene) -> None:
    node = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")

    an_open_panel.ui.segmentationSelector.choose(node)

    assert a_logic.called("setSegmentationNode") == [(node,)]
    assert an_open_panel.ui.segmentsTable.segmentationNode() is node
    assert an_open_panel.ui.show3DButton.segmentation is node


def test_segment_selection_goes_both_ways_without_an_echo(an_open_panel, a_logic) -> None:
    a_logic.haveSegment("Liver")
    a_logic.haveSegment("Spleen")
    a_logic.tell("state")
    assert list(an_open_panel.ui.segmentsTable.selectedSegmentIDs()) == ["Spleen"]
    assert a_logic.called("selectSegment") == []

    an_open_panel.ui.segmentsTable.setSelectedSegmentIDs(["Liver"])

    assert a_logic.called("selectSegment") == [("Liver",)]


def test_expected_dice_of_the_selected_segment_is_beside_the_table(an_open_panel, a_logic) -> None:
    a_logic.haveSegment("Liver", quality=0.914)
    a_logic.tell("result")
    assert an_open_panel.ui.qualityLabel.text == "Expected Dice: 0.91"

    a_logic.change(a_logic.segmentRows, 0, quality=None)
    a_logic.tell("state")
    assert an_open_panel.ui.qualityLabel.text == ""


def test_completed_goes_to_and_fro(an_open_panel, a_logic) -> None:
    a_logic.haveSegment("Liver")
    a_logic.tell("state")

    an_open_panel.ui.completedButton.click()
    assert a_logic.segmentRows[0].status == "completed"
    assert an_open_panel.ui.completedButton.checked

    an_open_panel.ui.completedButton.click()
    assert a_logic.segmentRows[0].status == "in progress"
    assert not an_open_panel.ui.completedButton.checked


def test_lock_goes_to_and_fro_and_a_locked_segment_is_not_removed(an_open_panel, a_logic) -> None:
    a_logic.haveSegment("Liver")
    a_logic.tell("state")

    an_open_panel.ui.lockButton.click()
    assert a_logic.segmentRows[0].locked
    assert an_open_panel.ui.lockButton.checked
    assert not an_open_panel.ui.removeSegmentButton.enabled

    an_open_panel.ui.lockButton.click()
    assert not a_logic.segmentRows[0].locked
    assert an_open_panel.ui.removeSegmentButton.enabled


TERMINOLOGY = {
    "SegmentationCategoryTypeContextName": "A short list",
    "@schema": "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/segment-context-schema.json#",
    "SegmentationCodes": {
        "Category": [
            {
                "CodeMeaning": "Anatomical Structure",
                "CodeValue": "123037004",
                "CodingSchemeDesignator": "SCT",
                "showAnatomy": False,
                "Type": [
                    {"CodeMeaning": "Liver", "CodeValue": "10200004", "CodingSchemeDesignator": "SCT",
                     "recommendedDisplayRGBValue": [221, 130, 101], "3dSlicerLabel": "liver"},
                    {"CodeMeaning": "Kidney", "CodeValue": "64033007", "CodingSchemeDesignator": "SCT",
                     "recommendedDisplayRGBValue": [185, 102, 83],
                     "Modifier": [
                         {"CodeMeaning": "Left", "CodeValue": "7771000", "CodingSchemeDesignator": "SCT",
                          "recommendedDisplayRGBValue": [185, 102, 83], "3dSlicerLabel": "left kidney"},
                         {"CodeMeaning": "Right", "CodeValue": "24028007", "CodingSchemeDesignator": "SCT",
                          "recommendedDisplayRGBValue": [185, 102, 83]},
                     ]},
                ],
            }
        ]
    },
}  # fmt: skip


@pytest.fixture
def structures(a_desktop, a_scene, tmp_path):
    """Slicer's terminology logic knows liver and kidney."""
    path = tmp_path / "short.term.json"
    path.write_text(json.dumps(TERMINOLOGY))
    logic = a_scene.applicationLogic.GetModuleLogic("Terminologies")
    assert logic.LoadTerminologyFromFile(str(path))
    a_desktop.app.logics["Terminologies"] = logic


def test_structures_of_the_terminologies_can_be_chosen_by_name(structures, a_panel, a_logic, add_volume) -> None:
    add_volume()
    a_panel.enter()
    combo = a_panel.ui.structureComboBox
    names = [combo.itemText(index) for index in range(combo.count)]
    assert names == ["Kidney", "kidney, right", "left kidney", "liver"]
    assert not combo.enabled
    a_logic.haveSegment("Segment_1")
    a_logic.tell("state")

    combo.setCurrentIndex(2)
    combo.activated.emit(2)

    ((segment, entry),) = a_logic.called("setTerminology")
    assert segment == "Segment_1"
    context, category, kind, modifier, *_region = entry.split("~")
    assert context == "A short list"
    assert (category.split("^")[1], kind.split("^")[1], modifier.split("^")[1]) == ("123037004", "64033007", "7771000")
    assert combo.currentText == ""


def test_a_name_that_is_no_structure_changes_nothing(structures, a_panel, a_logic, add_volume) -> None:
    add_volume()
    a_panel.enter()
    a_logic.haveSegment("Segment_1")
    a_logic.tell("state")
    a_panel.ui.structureComboBox.setEditText("spaceship")

    a_panel.onStructure()

    assert a_logic.called("setTerminology") == []


@pytest.mark.parametrize("agrees", [True, False])
def test_a_segment_is_removed_only_when_the_user_agrees(an_open_panel, a_logic, dialogs, agrees) -> None:
    a_logic.haveSegment("Liver")
    a_logic.tell("state")
    dialogs.answer = agrees

    an_open_panel.ui.removeSegmentButton.click()

    assert "'Liver'" in dialogs.asked[0]
    assert a_logic.called("removeSegment") == ([("Liver",)] if agrees else [])


def test_finishing_reaches_the_logic_and_an_undo_reaches_the_panel(an_open_panel, a_logic) -> None:
    ui = an_open_panel.ui
    ui.smoothingSlider.setValue(1.5)
    ui.islandsCheckBox.click()
    assert a_logic.called("setFinish") == [(1.5, True), (1.5, False)]

    a_logic.smoothingMm, a_logic.islands = 0.0, True
    a_logic.tell("state")

    assert (ui.smoothingSlider.value, ui.islandsCheckBox.checked) == (0.0, True)
    assert len(a_logic.called("setFinish")) == 2  # what the panel shows is not what the user does


def test_what_happens_to_other_segments_is_chosen_in_words(an_open_panel, a_logic) -> None:
    combo = an_open_panel.ui.neighboursComboBox
    assert [combo.itemText(index) for index in range(combo.count)] == [
        "Stay as they are",
        "The more probable one wins",
        "May overlap",
    ]
    assert combo.currentIndex == 1

    for index, value in ((0, "keep"), (2, "overlap"), (1, "compete")):
        combo.setCurrentIndex(index)
        assert a_logic.neighbours == value


def test_prompts_are_listed_and_can_be_deleted(an_open_panel, a_logic) -> None:
    from SlicerKA2ERLib.Protocols import PromptRow

    segment = a_logic.haveSegment("Liver")
    a_logic.promptRows[segment] = [PromptRow("n1", "point", True, 1), PromptRow("n2", "lasso", False, 2)]
    a_logic.tell("prompts")
    ui = an_open_panel.ui
    assert [ui.promptsList.item(row).text() for row in range(2)] == ["1. Point, inside", "2. Lasso, outside"]
    assert not ui.deletePromptButton.enabled

    ui.promptsList.setCurrentRow(1)
    ui.deletePromptButton.click()

    assert a_logic.called("deletePrompt") == [("n2",)]
    assert ui.promptsList.count == 1


def test_sequence_row_is_there_for_sequences_only(an_open_panel, a_logic) -> None:
    ui = an_open_panel.ui
    assert ui.sequenceFrame.isHidden()

    a_logic.hasFrames = True
    a_logic.tell("state")
    ui.segmentFrameButton.click()
    ui.propagateButton.click()

    assert not ui.sequenceFrame.isHidden()
    assert [call[0] for call in a_logic.calls[-2:]] == ["segmentThisFrame", "propagate"]


# -- experts ----------------------------------------------------------------------------------------------------------


def test_experts_are_rows_with_colour_share_and_title(an_open_panel, a_logic, two_experts) -> None:
    a_logic.tell("experts")
    table, rows = an_open_panel.ui.expertsTable, an_open_panel.experts.rows

    assert [table.item(row, 0).text() for row in range(table.rowCount)] == ["Foundation", "Liver and its tumours"]
    assert [row.share.value for row in rows.values()] == [75, 25]
    color = rows["liver"].item.icon().pixmap(14, 14).toImage().pixelColor(5, 5)
    assert color.getRgbF()[:3] == pytest.approx((0.9, 0.3, 0.2), abs=0.01)
    assert not rows["foundation"].enabled.enabled  # it always takes part
    assert rows["liver"].enabled.enabled
    assert all(table.horizontalHeaderItem(column).toolTip().endswith(".") for column in range(table.columnCount))


def test_experts_of_several_modes_are_under_headings(an_open_panel, a_logic, two_experts) -> None:
    from SlicerKA2ERLib.Protocols import ExpertRow

    a_logic.expertRows += [
        ExpertRow("decoder general", "General decoder", (1, 1, 1), 1.0, False, "share", 0.5, True, "decoders"),
        ExpertRow("head basic", "Basic voter", (0.1, 0.2, 0.3), 0.4, False, "share", 0.5, True, "head"),
        ExpertRow("head adaptive 1", "Adaptive 1 voter", (0.3, 0.2, 0.3), 0.6, False, "share", 0.5, True, "head"),
    ]
    a_logic.tell("experts")
    table, rows = an_open_panel.ui.expertsTable, an_open_panel.experts.rows

    assert [table.item(row, 0).text() for row in range(table.rowCount)] == [
        "Merged encoders", "Foundation", "Liver and its tumours", "Mask decoders", "General decoder", "Voters",
        "Basic voter", "Adaptive 1 voter",
    ]  # fmt: skip
    headings = [row for row in range(table.rowCount) if table.columnSpan(row, 0) == table.columnCount]
    assert headings == [0, 3, 5]
    assert all(table.item(row, 0).toolTip().endswith(".") for row in headings)
    assert table.cellWidget(7, 1) is rows["head adaptive 1"].share
    assert [name for name, row in rows.items() if row.enabled.enabled] == ["liver"]
    rows["head adaptive 1"].shown.click()
    assert a_logic.called("setExpertShown") == [("head adaptive 1", True)]

    del a_logic.expertRows[2:]
    a_logic.tell("experts")
    assert [table.item(row, 0).text() for row in range(table.rowCount)] == ["Foundation", "Liver and its tumours"]
    assert [table.columnSpan(row, 0) for row in range(2)] == [1, 1]


def test_a_new_result_changes_the_shares_but_makes_no_new_rows(an_open_panel, a_logic, two_experts) -> None:
    a_logic.tell("experts")
    bar = an_open_panel.experts.rows["liver"].share

    a_logic.change(a_logic.expertRows, 1, share=0.6)
    a_logic.tell("result")

    assert an_open_panel.experts.rows["liver"].share is bar
    assert bar.value == 60


def test_before_the_first_prediction_an_expert_has_no_share(an_open_panel, a_logic, two_experts) -> None:
    a_logic.change(a_logic.expertRows, 1, share=None)
    a_logic.tell("experts")

    assert an_open_panel.experts.rows["liver"].share.format == ""


def test_an_expert_is_shown_and_changed_by_its_own_row(an_open_panel, a_logic, two_experts) -> None:
    a_logic.tell("experts")
    row = an_open_panel.experts.rows["liver"]
    assert not row.opacity.enabled

    row.shown.click()
    row.kind.setCurrentIndex(1)
    row.opacity.setValue(80)
    row.enabled.click()

    changes = [call for call in a_logic.calls if call[0].startswith("setExpert")]
    assert changes == [
        ("setExpertShown", "liver", True),
        ("setExpertKind", "liver", "share"),
        ("setExpertOpacity", "liver", 0.8),
        ("setExpertEnabled", "liver", False),
    ]
    assert row.opacity.enabled


def test_experts_switched_off_for_the_bundle_take_no_part(a_panel, a_logic, add_volume, two_experts) -> None:
    """The module KA2ER Experts writes the same setting."""
    a_panel.settings.setExpertsOff(a_logic.bundleIdentity, ["liver"])
    add_volume()
    a_panel.enter()

    assert not a_panel.experts.rows["liver"].enabled.checked
    a_panel.experts.rows["liver"].enabled.setChecked(True)
    assert a_panel.settings.expertsOff(a_logic.bundleIdentity) == ()
    assert a_logic.called("setExpertEnabled") == [("liver", False), ("liver", True)]


def test_disagreement_has_a_switch(an_open_panel, a_logic, two_experts) -> None:
    box = an_open_panel.ui.disagreementCheckBox
    assert not box.enabled
    a_logic.tell("state")
    assert box.enabled

    box.click()

    assert a_logic.called("setDisagreementShown") == [(True,)]


# -- long work and errors ---------------------------------------------------------------------------------------------


def test_progress_appears_only_when_it_takes_long_and_moves_nothing(an_open_panel, a_logic) -> None:
    a_logic.engineState = "ready"
    an_open_panel.tick()
    height = an_open_panel.ui.stateStack.height
    a_logic.busy, a_logic.elapsedSeconds, a_logic.progress = "Segmenting", 0.1, ("", None)
    a_logic.tell("busy")
    assert page(an_open_panel) == "statusPage"

    a_logic.elapsedSeconds, a_logic.progress = 2.4, ("Looking at the neighbourhood", 0.5)
    an_open_panel.tick()
    ui = an_open_panel.ui
    assert page(an_open_panel) == "busyPage"
    assert (ui.busyLabel.text, ui.elapsedLabel.text) == ("Looking at the neighbourhood", "2 s")
    assert (ui.busyProgressBar.value, ui.busyProgressBar.maximum) == (500, 1000)

    a_logic.progress = ("", None)
    an_open_panel.tick()
    assert ui.busyLabel.text == "Segmenting"
    assert ui.busyProgressBar.maximum == 0  # moves to and fro

    a_logic.busy = ""
    a_logic.tell("busy")
    assert page(an_open_panel) == "statusPage"
    assert ui.stateStack.minimumHeight == ui.stateStack.maximumHeight == height


def test_cancel_stops_what_is_under_way(an_open_panel, a_logic) -> None:
    a_logic.busy, a_logic.elapsedSeconds = "Segmenting", 1.0
    an_open_panel.tick()

    an_open_panel.ui.cancelButton.click()

    assert a_logic.called("cancel") == [()]
    assert a_logic.tool == "point"  # the tool stays


def test_an_error_is_one_line_that_can_be_opened_and_dismissed(an_open_panel, a_logic, dialogs) -> None:
    a_logic.engineState = "ready"
    an_open_panel.makeEngine._latest = type("Engine", (), {"log": ["line one", "line two"]})()
    a_logic.lastError = "The engine ran out of memory. Close other volumes."
    a_logic.tell("error")
    ui = an_open_panel.ui
    assert page(an_open_panel) == "errorPage"
    assert ui.errorLabel.text == a_logic.lastError

    ui.errorDetailsButton.click()
    assert dialogs.errors == [(a_logic.lastError, "line one\nline two")]

    ui.errorDismissButton.click()
    assert page(an_open_panel) == "statusPage"


def test_an_error_goes_away_when_something_works_again(an_open_panel, a_logic) -> None:
    a_logic.lastError = "Nothing found there."
    a_logic.tell("error")
    a_logic.tell("state")
    assert page(an_open_panel) == "errorPage"

    a_logic.tell("result")

    assert page(an_open_panel) == "statusPage"


def test_what_the_logic_refuses_is_said_in_the_panel_and_not_raised(an_open_panel, a_logic) -> None:
    a_logic.raises["setTool"] = PromptError("The volume has a nonlinear transform. Harden it first.")

    an_open_panel.ui.boxButton.click()

    assert an_open_panel.ui.errorLabel.text == "The volume has a nonlinear transform. Harden it first."
    assert not an_open_panel.ui.boxButton.checked


def test_a_bug_is_logged_with_its_traceback(an_open_panel, a_logic, dialogs, caplog) -> None:
    a_logic.canUndo = True
    a_logic.raises["undo"] = ZeroDivisionError("division by zero")
    a_logic.tell("state")

    an_open_panel.ui.undoButton.click()
    an_open_panel.ui.errorDetailsButton.click()

    assert "ZeroDivisionError" in caplog.text
    assert "Traceback" in dialogs.errors[0][1]


def test_an_empty_prediction_is_explained(an_open_panel, a_logic) -> None:
    a_logic.engineState = "ready"
    a_logic.haveSegment("Liver", quality=0.0)
    a_logic.tell("result")
    assert "other segments leave free" in an_open_panel.ui.statusLabel.text

    a_logic.change(a_logic.segmentRows, 0, quality=0.8)
    a_logic.tell("result")
    assert an_open_panel.ui.statusLabel.text.startswith("Click on the structure")


def test_a_dead_engine_is_said_without_alarm(an_open_panel, a_logic) -> None:
    a_logic.engineState = "dead"
    an_open_panel.tick()

    assert "starts again with the next prompt" in an_open_panel.ui.statusLabel.text
    assert an_open_panel.ui.pointButton.enabled


# -- first run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def an_empty_python(an_installer):
    an_installer.missing = ["PyTorch", "monai"]
    return an_installer


def test_first_run_says_what_is_installed_and_how_large_and_makes_no_engine(
    an_empty_python,
    a_panel,
    a_logic,
    add_volume,
) -> None:
    add_volume()
    a_panel.enter()
    ui = a_panel.ui

    assert not ui.installFrame.isHidden()
    assert "PyTorch, monai" in ui.installTextLabel.text
    assert "250 MB" in ui.installTextLabel.text
    assert ui.installButton.text == "Install"
    assert a_logic.called("connectEngine") == a_logic.called("warmUp") == []
    assert a_logic.tool == "none"
    assert not ui.pointButton.enabled
    assert an_empty_python.installs == 0


def test_after_the_installation_the_next_click_is_a_point(an_empty_python, a_panel, a_logic, add_volume) -> None:
    add_volume()
    a_panel.enter()
    seen = []
    an_empty_python.duringInstall = lambda: seen.append(
        (
            a_panel.ui.installButton.enabled,
            a_panel.ui.installProgressBar.isHidden(),
            a_panel.ui.installProgressLabel.text,
        )
    )

    a_panel.ui.installButton.click()

    assert seen == [(False, False, "Downloading")]
    assert a_panel.ui.installFrame.isHidden()
    assert len(a_logic.called("connectEngine")) == 1
    assert a_logic.tool == "point"


def test_a_failed_installation_says_why_and_can_be_tried_again(an_empty_python, a_panel, a_logic) -> None:
    an_empty_python.fails = ["The disk is full."]
    a_panel.enter()

    a_panel.ui.installButton.click()
    assert a_panel.ui.installErrorLabel.text == "The disk is full."
    assert not a_panel.ui.installErrorLabel.isHidden()
    assert a_panel.ui.installButton.text == "Try again"
    assert a_panel.ui.installButton.enabled

    a_panel.ui.installButton.click()
    assert an_empty_python.installs == 2
    assert a_panel.ui.installFrame.isHidden()


@pytest.mark.parametrize("button", ["otherPythonButton", "remoteEngineButton"])
def test_instead_of_installing_the_settings_can_be_opened(an_empty_python, a_panel, a_logic, a_desktop, button) -> None:
    def choose() -> None:
        a_panel.settings.setValue("engine", "remote")
        an_empty_python.missing = []

    a_desktop.app.onOpenSettings = choose
    a_panel.enter()

    getattr(a_panel.ui, button).click()

    assert a_desktop.app.opened == ["KA2ER Segment"]
    assert a_panel.ui.installFrame.isHidden()
    assert len(a_logic.called("connectEngine")) == 1


def test_other_engine_settings_connect_another_engine_and_the_same_ones_do_not(an_open_panel, a_logic) -> None:
    assert len(a_logic.called("connectEngine")) == 1
    an_open_panel.onSettingsClosed()
    assert len(a_logic.called("connectEngine")) == 1

    an_open_panel.settings.setValue("device", "cpu")
    an_open_panel.onSettingsClosed()

    assert len(a_logic.called("connectEngine")) == 2


# -- shortcuts --------------------------------------------------------------------------------------------------------


def press(widget: Any, keys: str) -> None:
    """What Qt does when these keys are pressed in `widget`."""
    import qt

    for shortcut in widget.findChildren(qt.QShortcut):
        if shortcut.enabled and shortcut.key.toString() == keys:
            shortcut.activated.emit()


@pytest.mark.parametrize(
    ("keys", "tool"), [("P", "point"), ("X", "box"), ("C", "roi"), ("S", "scribble"), ("L", "lasso")]
)
def test_shortcuts_work_in_the_views_and_in_the_panel(an_open_panel, a_logic, a_desktop, keys, tool) -> None:
    for widget in (a_desktop.app.layoutManager().viewport(), an_open_panel.widget):
        a_logic.setTool("none")
        press(widget, keys)
        assert a_logic.tool == tool


def test_shortcuts_belong_to_views_and_panel_not_to_the_main_window(an_open_panel, a_desktop) -> None:
    import qt

    homes = {shortcut.parent() for shortcut in an_open_panel.shortcuts.active}
    contexts = {shortcut.context for shortcut in an_open_panel.shortcuts.active}

    assert homes == {an_open_panel.widget, a_desktop.app.layoutManager().viewport()}
    assert contexts == {qt.Qt.ShortcutContext.WidgetWithChildrenShortcut}


def test_shortcuts_work_where_a_click_on_a_button_leaves_the_keyboard(an_open_panel, a_logic) -> None:
    """Slicer's module panel is a scroll area, which takes the keyboard when a tool button is clicked."""
    from PySide6 import QtWidgets

    an_open_panel.exit()
    area = QtWidgets.QScrollArea()
    area.setWidget(an_open_panel.widget)
    an_open_panel.enter()

    press(area, "X")

    assert a_logic.tool == "box"
    an_open_panel.exit()
    area.takeWidget().setParent(None)


def test_opening_again_after_a_3d_box_does_not_begin_another(an_open_panel, a_logic) -> None:
    an_open_panel.ui.roiButton.click()
    an_open_panel.exit()
    an_open_panel.enter()
    assert a_logic.tool == "point"


def test_entering_twice_installs_each_shortcut_once(an_open_panel, a_logic) -> None:
    count = len(an_open_panel.shortcuts.active)
    an_open_panel.exit()
    an_open_panel.enter()
    assert len(an_open_panel.shortcuts.active) == count

    press(an_open_panel.widget, "N")

    assert a_logic.called("setPolarity") == [(False,)]


def test_escape_cancels_first_and_then_puts_the_tool_away(an_open_panel, a_logic) -> None:
    a_logic.busy = "Segmenting"
    press(an_open_panel.widget, "Esc")
    assert a_logic.called("cancel") == [()]
    assert a_logic.tool == "point"

    press(an_open_panel.widget, "Esc")
    assert a_logic.tool == "none"


def test_undo_key_with_nothing_to_undo_asks_nothing_of_the_logic(an_open_panel, a_logic) -> None:
    press(an_open_panel.widget, "Ctrl+Z")
    assert a_logic.called("undo") == []

    a_logic.canUndo = True
    press(an_open_panel.widget, "Ctrl+Z")
    assert a_logic.called("undo") == [()]


def test_tooltips_name_the_keys_of_the_settings(an_open_panel) -> None:
    assert an_open_panel.ui.boxButton.toolTip == "Draw a box on a slice (X)"

    an_open_panel.settings.setValue("shortcut/box", "Shift+B")
    an_open_panel.settings.setValue("shortcut/lasso", "")
    an_open_panel.onSettingsClosed()

    assert an_open_panel.ui.boxButton.toolTip == "Draw a box on a slice (Shift+B)"
    assert an_open_panel.ui.lassoButton.toolTip == "Draw around something"


def test_default_keys_do_nothing_else_in_slicer_and_each_does_one_thing(a_desktop) -> None:
    from SlicerKA2ERLib.Shortcuts import DEFAULT_KEYS, conflicts

    assert conflicts(DEFAULT_KEYS) == []
    assert conflicts({"point": "g", "box": "X", "lasso": "x"}) == [("point", "g", "slice views"), ("lasso", "x", "box")]


# -- editing by hand --------------------------------------------------------------------------------------------------


@pytest.fixture
def an_editor(an_open_panel, a_logic, a_scene):
    """The section "Edit by hand" was opened."""
    a_logic.segmentEditorNode = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    a_logic.segmentationNode = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    a_logic.haveSegment("Liver")
    a_logic.tell("state")
    assert an_open_panel.editor is None  # costs nothing before
    an_open_panel.ui.editSection.collapsed = False
    return an_open_panel.editor


def test_the_editor_works_on_the_same_nodes_and_segment(an_editor, a_logic) -> None:
    assert an_editor.mrmlSegmentEditorNode() is a_logic.segmentEditorNode
    assert an_editor.segmentationNode() is a_logic.segmentationNode
    assert an_editor.sourceVolumeNode() is a_logic.volumeNode
    assert an_editor.currentSegmentID() == "Liver"


def test_opening_the_editor_keeps_the_selected_segment(an_open_panel, a_logic, a_scene) -> None:
    a_logic.segmentEditorNode = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    a_logic.segmentationNode = a_scene.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    for name in ("Liver", "Spleen"):
        a_logic.segmentationNode.GetSegmentation().AddEmptySegment(name, name)
        a_logic.haveSegment(name)
    a_logic.selectedSegment = "Spleen"

    an_open_panel.ui.editSection.collapsed = False

    assert a_logic.selectedSegment == "Spleen"
    assert an_open_panel.editor.currentSegmentID() == "Spleen"


def test_selecting_a_segment_in_the_editor_selects_it_in_the_panel(an_editor, a_logic) -> None:
    a_logic.haveSegment("Spleen")
    a_logic.tell("state")
    assert an_editor.currentSegmentID() == "Spleen"
    assert a_logic.called("selectSegment") == []

    an_editor.setCurrentSegmentID("Liver")

    assert a_logic.called("selectSegment") == [("Liver",)]


def test_one_hand_at_a_time(an_editor, an_open_panel, a_logic) -> None:
    an_editor.setActiveEffectByName("Paint")
    assert a_logic.tool == "none"

    an_open_panel.ui.pointButton.click()
    assert a_logic.segmentEditorNode.GetActiveEffectName() in ("", None)
    assert a_logic.tool == "point"

    an_editor.setActiveEffectByName("Erase")
    press(an_open_panel.widget, "Esc")
    assert a_logic.segmentEditorNode.GetActiveEffectName() in ("", None)

    an_editor.setActiveEffectByName("Erase")
    an_open_panel.ui.editSection.collapsed = True
    assert a_logic.segmentEditorNode.GetActiveEffectName() in ("", None)


# -- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_one_click_away_from_the_first_prompt(a_panel, a_logic, add_volume, monkeypatch) -> None:
    loaded = []

    def load(name, report, offline):
        report("Downloading")
        assert not a_panel.ui.sampleFrame.enabled
        loaded.append((name, add_volume(name)))

    monkeypatch.setattr(sys.modules["SlicerKA2ERLib.PromptWidget"], "loadSample", load)
    a_panel.enter()

    a_panel.ui.sampleCTChestButton.click()

    assert [name for name, _node in loaded] == ["CTChest"]
    assert a_logic.volumeNode is loaded[0][1]
    assert a_logic.tool == "point"
    assert a_panel.ui.sampleFrame.enabled


def test_a_sample_that_cannot_be_loaded_is_an_error_in_the_panel(a_panel, monkeypatch) -> None:
    def load(name, report, offline):
        msg = "Failed to download"
        raise ValueError(msg)

    monkeypatch.setattr(sys.modules["SlicerKA2ERLib.PromptWidget"], "loadSample", load)
    a_panel.enter()

    a_panel.ui.sampleMRHeadButton.click()

    assert a_panel.ui.errorLabel.text == "Failed to download"
    assert a_panel.ui.sampleFrame.enabled
