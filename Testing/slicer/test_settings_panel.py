"""The page in the application's settings, and the values that the module reads from there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("PySide6", reason="needs PySide6")
pytest.importorskip("slicer", reason="needs slicer-core")

from harness.fixtures import *  # noqa: F403
from harness.fixtures import RESOURCES


@pytest.fixture
def a_settings_page(a_desktop):
    from SlicerKA2ERLib.SettingsPanel import SettingsPanel

    page = SettingsPanel(RESOURCES)
    page.store = a_desktop.app.settings()
    return page


@pytest.fixture
def settings(a_desktop):
    from SlicerKA2ERLib.Settings import Settings

    return Settings()


def test_every_setting_but_the_marker_of_a_restart_is_on_the_page(a_settings_page) -> None:
    from SlicerKA2ERLib.Settings import DEFAULTS, PREFIX

    assert set(a_settings_page.registered) == {PREFIX + key for key in DEFAULTS} - {PREFIX + "resumeInstall"}


def test_the_page_shows_the_defaults_before_anything_was_set(a_settings_page) -> None:
    from SlicerKA2ERLib.Settings import DEFAULTS, PREFIX

    for key, (widget, name, _signal) in a_settings_page.registered.items():
        assert widget.property(name) == DEFAULTS[key.removeprefix(PREFIX)], key


def test_what_is_applied_on_the_page_is_what_the_module_reads(a_settings_page, settings) -> None:
    ui = a_settings_page.ui
    ui.engineComboBox.currentUserDataAsString = "remote"
    ui.deviceComboBox.currentUserDataAsString = "cpu"
    ui.urlLineEdit.text = "https://gpu.example"
    ui.apiKeyLineEdit.text = "a key"
    ui.pythonPathLineEdit.currentPath = "/opt/python"
    ui.bundlePathLineEdit.currentPath = "/data/bundle"
    ui.memorySpinBox.value = 2048
    ui.offlineCheckBox.checked = True
    a_settings_page.shortcutEdits["point"].text = "Shift+P"

    a_settings_page.applySettings()

    keys = ("engine", "device", "url", "apiKey", "python", "bundle", "memoryMb", "offline", "shortcut/point")
    assert [settings.value(key) for key in keys] == [
        "remote", "cpu", "https://gpu.example", "a key", "/opt/python", "/data/bundle", 2048, True, "Shift+P",
    ]  # fmt: skip


def test_the_page_shows_what_was_set_before(a_settings_page, settings) -> None:
    settings.setValue("engine", "python")
    settings.setValue("memoryMb", 1024)

    a_settings_page.resetSettings()

    assert a_settings_page.ui.engineComboBox.currentIndex == 1
    assert a_settings_page.ui.memorySpinBox.value == 1024
    assert a_settings_page.ui.pythonPathLineEdit.enabled


@pytest.mark.parametrize(
    ("engine", "python", "remote", "local"),
    [("local", False, False, True), ("python", True, False, True), ("remote", False, True, False)],
)
def test_only_what_the_chosen_engine_uses_can_be_changed(a_settings_page, engine, python, remote, local) -> None:
    ui = a_settings_page.ui
    ui.engineComboBox.currentUserDataAsString = engine

    assert ui.pythonPathLineEdit.enabled == python
    assert ui.urlLineEdit.enabled == ui.apiKeyLineEdit.enabled == remote
    assert ui.deviceComboBox.enabled == ui.bundlePathLineEdit.enabled == ui.memorySpinBox.enabled == local


def test_the_key_of_a_remote_engine_is_not_readable_on_the_screen(a_settings_page) -> None:
    import qt

    assert a_settings_page.ui.apiKeyLineEdit.echoMode == qt.QLineEdit.Password


def test_keys_that_do_something_else_are_named(a_settings_page) -> None:
    assert a_settings_page.ui.shortcutsNoteLabel.text == ""

    a_settings_page.shortcutEdits["box"].text = "G"
    a_settings_page.shortcutEdits["lasso"].text = "p"

    assert a_settings_page.ui.shortcutsNoteLabel.text.splitlines() == [
        "G (Draw a box on a slice) is also used by: slice views.",
        "p (Draw around something) is also used by: Place points.",
    ]


def test_values_keep_their_type_through_the_settings_file(settings, a_desktop) -> None:
    settings.setValue("offline", True)
    settings.setValue("memoryMb", 256)
    a_desktop.app.settings().sync()

    import qt

    from SlicerKA2ERLib.Settings import Settings

    reread = Settings(qt.QSettings(a_desktop.app.settings().fileName(), qt.QSettings.IniFormat))

    assert (reread.value("offline"), reread.value("memoryMb")) == (True, 256)


def test_a_damaged_value_counts_as_not_set(settings, a_desktop) -> None:
    a_desktop.app.settings().setValue("KA2ERSegment/memoryMb", "a lot")

    assert settings.value("memoryMb") == 512


def test_an_unknown_key_is_refused(settings) -> None:
    with pytest.raises(KeyError, match="'colour'"):
        settings.setValue("colour", "red")


def test_engine_is_made_as_the_settings_say(settings, monkeypatch) -> None:
    from SlicerKA2ERLib.Settings import EngineMaker

    monkeypatch.setattr("shutil.which", lambda name: f"/slicer/bin/{name}")
    make = EngineMaker(settings)
    local = make.factory()()
    assert (local.python, local.bundle, local.device) == (["/slicer/bin/PythonSlicer"], None, "auto")

    settings.setValue("engine", "python")
    settings.setValue("python", "/opt/torch/bin/python")
    settings.setValue("bundle", "/data/bundle")
    settings.setValue("device", "cuda")
    other = make.factory()()
    assert (other.python, other.bundle, other.device) == (["/opt/torch/bin/python"], "/data/bundle", "cuda")
    assert set(other.environment) == {"PATH", "KA2ERSEGMENT_FEATURE_MEMORY_MB"}  # from before Slicer set its own
    assert other.environment["KA2ERSEGMENT_FEATURE_MEMORY_MB"] == "512"


def test_the_log_is_that_of_the_latest_engine(settings) -> None:
    from SlicerKA2ERLib.Settings import EngineMaker

    make = EngineMaker(settings)
    assert make.log() == ""
    make.factory()().log.extend(["first", "second"])

    assert make.log() == "first\nsecond"


def test_an_engine_can_be_made_in_any_thread_because_qt_was_asked_before(settings, monkeypatch) -> None:
    from SlicerKA2ERLib.Settings import EngineMaker

    factory = EngineMaker(settings).factory()
    monkeypatch.setattr(settings, "value", None)  # asking now would fail
    monkeypatch.setattr("shutil.which", None)

    assert factory().device == "auto"


def test_another_choice_is_another_factory_and_leaves_the_old_one_as_it_was(settings) -> None:
    from SlicerKA2ERLib.Settings import EngineMaker

    make = EngineMaker(settings)
    before = make.factory()
    settings.setValue("device", "cpu")

    assert (before().device, make.factory()().device) == ("auto", "cpu")
