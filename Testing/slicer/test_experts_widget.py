"""The real panel of KA2ER Experts on the stand-in desktop, around the real logic and real bundles."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("PySide6", reason="needs PySide6")
slicer = pytest.importorskip("slicer", reason="needs slicer-core")

from harness.fakes import FakeDialogs  # noqa: E402
from harness.fixtures import *  # noqa: E402, F403

from KA2ERSegment.testing import tiny_bundle, tiny_plans  # noqa: E402

MODULE = Path(__file__).parents[2] / "scripted_modules" / "SlicerKA2ERExperts"


class Runner:
    """RunnerProtocol: waits until a test lets it end."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.lines: list[str] = []
        self.code: int | None = None
        self.text = ""

    def start(self, arguments: Sequence[str]) -> None:
        self.started.append(list(arguments))
        self.code = None

    def poll(self) -> tuple[list[str], int | None]:
        lines, self.lines = self.lines, []
        return lines, self.code

    def output(self) -> str:
        return self.text

    def cancel(self) -> None:
        self.code = -9


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def a_bundle_folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundles" / "tiny").folder


@pytest.fixture
def settings(a_desktop: Any, a_bundle_folder: Path) -> Any:
    """The application's."""
    store = a_desktop.app.settings()
    store.setValue("KA2ERSegment/bundle", str(a_bundle_folder))
    return store


@pytest.fixture
def an_experts_panel(
    settings: Any, dialogs: FakeDialogs, runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The panel, its library imported anew: it binds this desktop's qt."""
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "data"))
    forget()
    monkeypatch.syspath_prepend(str(MODULE))
    from SlicerKA2ERExpertsLib.ExpertsLogic import ExpertsLogic
    from SlicerKA2ERExpertsLib.ExpertsWidget import ExpertsWidget
    from SlicerKA2ERExpertsLib.Services import ApplicationSettings

    panel = ExpertsWidget(ExpertsLogic(ApplicationSettings(), runner), dialogs, MODULE / "Resources")
    yield panel
    panel.cleanup()
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith("SlicerKA2ERExperts")]:
        del sys.modules[name]


def texts(panel: Any) -> list[list[str]]:
    """The table's cells but the switches."""
    table = panel.ui.expertsTable
    return [[table.item(row, column).text() for column in (1, 2, 3)] for row in range(table.rowCount)]


def until_idle(panel: Any) -> None:
    """The timer's ticks, by hand."""
    end = time.monotonic() + 20
    while panel.logic.busy and time.monotonic() < end:
        panel.logic.poll()
    assert not panel.logic.busy


def test_the_bundle_and_its_experts_are_shown(an_experts_panel: Any) -> None:
    ui = an_experts_panel.ui

    assert [row[0] for row in texts(an_experts_panel)] == ["tiny_trunk", "tiny_brain"]
    assert all(row[2] == "the bundle's" for row in texts(an_experts_panel))
    assert an_experts_panel.logic.identity() in ui.bundleLabel.text
    assert "In use." in ui.bundleLabel.text
    assert not ui.useButton.enabled
    assert ui.verifyButton.enabled
    assert ui.addButton.enabled
    assert not ui.removeButton.enabled
    assert ui.progressBar.isHidden()
    assert ui.cancelButton.isHidden()


def test_a_switch_goes_to_the_settings_and_comes_back(an_experts_panel: Any, settings: Any) -> None:
    an_experts_panel.switches["tiny_brain"].checked = False

    assert settings.value(f"KA2ERSegment/experts/{an_experts_panel.logic.identity()}") == "tiny_brain"
    an_experts_panel.enter()
    assert not an_experts_panel.switches["tiny_brain"].checked
    assert an_experts_panel.switches["tiny_trunk"].checked


def test_a_selected_expert_says_what_it_is_and_can_be_removed(an_experts_panel: Any, runner: Runner) -> None:
    ui = an_experts_panel.ui
    ui.expertsTable.selectRow(1)

    assert ui.expertLabel.text.startswith("tiny_brain: bright, dark")
    assert ui.removeButton.enabled
    ui.removeButton.click()
    assert runner.started[0][:3] == ["expert", "remove", "tiny_brain"]


def test_nothing_is_removed_without_a_yes(an_experts_panel: Any, runner: Runner, dialogs: FakeDialogs) -> None:
    dialogs.answer = False
    an_experts_panel.ui.expertsTable.selectRow(0)
    an_experts_panel.ui.removeButton.click()

    assert len(dialogs.asked) == 1
    assert runner.started == []


def test_the_selection_survives_a_refresh(an_experts_panel: Any) -> None:
    an_experts_panel.ui.expertsTable.selectRow(1)
    an_experts_panel.refresh()

    assert an_experts_panel.ui.expertLabel.text.startswith("tiny_brain")


def test_the_card_and_each_licence_can_be_read(an_experts_panel: Any) -> None:
    ui = an_experts_panel.ui
    names = [ui.documentComboBox.itemText(n) for n in range(ui.documentComboBox.count)]

    assert names == ["model_card.md", "LICENSE"]
    assert "Untrained" in ui.documentBrowser.toPlainText()
    ui.documentComboBox.setCurrentIndex(1)
    assert "Apache-2.0" in ui.documentBrowser.toPlainText()


def test_verifying_shows_how_far_it_is_and_what_it_found(an_experts_panel: Any) -> None:
    ui = an_experts_panel.ui
    ui.verifyButton.click()

    assert not ui.cancelButton.isHidden()
    assert not ui.verifyButton.enabled
    assert an_experts_panel.timer.isActive()
    until_idle(an_experts_panel)
    assert "SHA-256" in ui.statusLabel.text
    assert ui.cancelButton.isHidden()
    assert not an_experts_panel.timer.isActive()


def test_the_form_becomes_the_command_and_its_progress_is_shown(an_experts_panel: Any, runner: Runner) -> None:
    ui = an_experts_panel.ui
    ui.resultsPathLineEdit.currentPath = "/nn/T__P__3d_fullres"
    ui.licenceLineEdit.text = "CC0"
    ui.imagesPathLineEdit.currentPath = "/nn/raw"
    ui.minutesSpinBox.value = 3
    ui.nameLineEdit.text = " beads "
    ui.addButton.click()

    arguments = runner.started[0]
    assert arguments[:3] == ["expert", "add", "/nn/T__P__3d_fullres"]
    for option, value in (("--license", "CC0"), ("--images", "/nn/raw"), ("--minutes", "3"), ("--name", "beads")):
        assert arguments[arguments.index(option) + 1] == value
    assert "--fold" not in arguments
    assert ui.progressBar.maximum == 0
    runner.lines = ["progress 0.25 reading image 2 of 9"]
    an_experts_panel.logic.poll()
    assert ui.statusLabel.text == "reading image 2 of 9"
    assert (ui.progressBar.value, ui.progressBar.maximum) == (250, 1000)
    ui.cancelButton.click()
    assert not an_experts_panel.logic.busy
    assert "Nothing was changed" in ui.statusLabel.text


@pytest.mark.parametrize("answer", [True, False])
def test_a_new_bundle_is_shown_and_used_where_the_user_says_so(
    an_experts_panel: Any, runner: Runner, dialogs: FakeDialogs, settings: Any, tmp_path: Path, answer: bool
) -> None:
    before = settings.value("KA2ERSegment/bundle")
    dialogs.answer = answer
    an_experts_panel.ui.resultsPathLineEdit.currentPath = "/nn/T__P__3d_fullres"
    an_experts_panel.ui.licenceLineEdit.text = "CC0"
    an_experts_panel.ui.addButton.click()
    written = Path(runner.started[0][runner.started[0].index("--output") + 1])
    tiny_bundle(written, tiny_plans(("tiny_trunk", "beads")))
    runner.code, runner.text = 0, json.dumps({"output": str(written), "trained": False, "megabytes": 1.0})
    an_experts_panel.logic.poll()

    assert len(dialogs.asked) == 1
    assert "does not count" in dialogs.asked[0]
    assert [row[0] for row in texts(an_experts_panel)] == ["tiny_trunk", "beads"]
    assert settings.value("KA2ERSegment/bundle") == (str(written) if answer else before)
    assert an_experts_panel.ui.useButton.enabled is not answer


def test_an_error_is_said_once(an_experts_panel: Any, dialogs: FakeDialogs) -> None:
    an_experts_panel.ui.addButton.click()

    assert [text for text, _details in dialogs.errors] == ["Choose the results folder of an nnU-Net first."]


def test_another_bundle_can_be_chosen_and_used(an_experts_panel: Any, settings: Any) -> None:
    ui = an_experts_panel.ui
    ui.bundleComboBox.setCurrentIndex(0)
    ui.bundleComboBox.activated.emit(0)

    assert an_experts_panel.logic.isShipped()
    assert "Not in use." in ui.bundleLabel.text
    ui.useButton.click()
    assert "In use." in ui.bundleLabel.text
    assert settings.value("KA2ERSegment/bundle") == ""


def test_the_module_file_makes_the_panel(
    a_desktop: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MODULE))
    forget()
    module = a_desktop.loadModule(MODULE / "SlicerKA2ERExperts.py")
    widget = module.SlicerKA2ERExpertsWidget()
    widget.setup()
    widget.enter()

    assert [row[0] for row in texts(widget.panel)] == ["tiny_trunk", "tiny_brain"]
    widget.cleanup()
    assert widget.panel is None
    forget()
