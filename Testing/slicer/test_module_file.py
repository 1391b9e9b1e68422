"""The module files as Slicer loads them, with and without a main window, and the rules that hold for their code."""

from __future__ import annotations

import ast
import re
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("PySide6", reason="needs PySide6")
slicer = pytest.importorskip("slicer", reason="needs slicer-core")

from harness import Desktop  # noqa: E402
from harness.fakes import FakeLogic  # noqa: E402
from harness.fixtures import *  # noqa: E402, F403
from harness.fixtures import MODULES  # noqa: E402

FILES = sorted(MODULES.rglob("*.py"))
AT_FILE_SCOPE = {"slicer", "vtk", "qt", "ctk", "numpy", "KA2ERSegment"}
"""Besides the standard library and the modules' own helpers; of KA2ERSegment the parts that need no torch."""
QT_FREE = {"Settings.py", "Shortcuts.py", "Installer.py", "Dialogs.py", "Samples.py", "Protocols.py"}


def relative(path: Path) -> str:
    return path.relative_to(MODULES).as_posix()


@pytest.fixture
def samples(monkeypatch):
    """Slicer's module SampleData; what was registered."""
    registered = []

    class SampleDataLogic:
        @staticmethod
        def registerCustomSampleDataCategory(category, title):
            registered.append((category, title))

        @staticmethod
        def registerCustomSampleDataSource(**source):
            registered.append(source)

    monkeypatch.setitem(sys.modules, "SampleData", types.SimpleNamespace(SampleDataLogic=SampleDataLogic))
    return registered


@pytest.fixture
def fake_logic(monkeypatch):
    """The real module file around the fake logic: no engine, no display."""

    def use() -> None:
        from SlicerKA2ERLib import Protocols

        made = types.ModuleType("SlicerKA2ERLib.PromptLogic")
        made.PromptLogic = lambda scene, applicationLogic: FakeLogic(Protocols)
        monkeypatch.setitem(sys.modules, "SlicerKA2ERLib.PromptLogic", made)

    return use


def parent() -> types.SimpleNamespace:
    return types.SimpleNamespace(path="")


# -- as Slicer loads it -----------------------------------------------------------------------------------------------


def test_module_says_who_it_is(a_desktop) -> None:
    module = a_desktop.loadModule(MODULES / "SlicerKA2ER" / "SlicerKA2ER.py")
    about = parent()

    module.SlicerKA2ER(about)

    assert about.title == "KA2ER Segment"
    assert about.categories == ["Segmentation"]
    assert "research only" in about.helpText
    for paper in ("arxiv.org/abs/2410.21085", "SAM-Med3D-MoE", "IC-MoE"):
        assert paper in about.acknowledgementText


def test_loading_the_module_file_imports_nothing_heavy_and_no_panel(a_desktop) -> None:
    a_desktop.loadModule(MODULES / "SlicerKA2ER" / "SlicerKA2ER.py").SlicerKA2ER(parent())

    assert not any(name.startswith("SlicerKA2ERLib.") for name in sys.modules)


def test_after_startup_samples_and_settings_page_are_there(a_desktop, samples) -> None:
    a_desktop.loadModule(MODULES / "SlicerKA2ER" / "SlicerKA2ER.py").SlicerKA2ER(parent())

    a_desktop.app.startupCompleted.emit()

    assert samples[0] == ("KA2ER Segment", "KA2ER Segment")
    assert [source["sampleName"] for source in samples[1:]] == ["MRHead", "CTChest", "CTACardio"]
    for source in samples[1:]:
        assert source["uris"].endswith("/SHA256/" + source["checksums"].removeprefix("SHA256:"))
    assert list(a_desktop.app.settingsDialog().panels) == ["KA2ER Segment"]
    assert a_desktop.selected == []


def test_an_installation_that_a_restart_interrupted_is_shown_again(a_desktop, samples) -> None:
    a_desktop.loadModule(MODULES / "SlicerKA2ER" / "SlicerKA2ER.py").SlicerKA2ER(parent())
    from SlicerKA2ERLib.Settings import Settings

    Settings().setValue("resumeInstall", True)

    a_desktop.app.startupCompleted.emit()

    assert a_desktop.selected == ["SlicerKA2ER"]


def test_module_lives_without_a_main_window(a_scene, tmp_path, samples, fake_logic) -> None:
    with Desktop(tmp_path, withWindow=False) as desktop:
        module = desktop.loadModule(MODULES / "SlicerKA2ER" / "SlicerKA2ER.py")
        fake_logic()
        module.SlicerKA2ER(parent())
        desktop.app.startupCompleted.emit()
        widget = module.SlicerKA2ERWidget()
        widget.setup()
        widget.enter()
        widget.exit()

        assert desktop.app.settingsDialog().panels == {}
        widget.cleanup()


def test_widget_hands_the_scene_and_its_life_to_the_panel(a_desktop, a_scene, fake_logic, add_volume) -> None:
    module = a_desktop.loadModule(MODULES / "SlicerKA2ER" / "SlicerKA2ER.py")
    fake_logic()
    widget = module.SlicerKA2ERWidget()
    widget.setup()
    widget.panel.installer.plan = lambda: types.SimpleNamespace(packages=(), megabytes=0, reason="")
    widget.enter()
    logic = widget.panel.logic

    volume = add_volume()
    widget.panel.tick()
    assert logic.volumeNode is volume

    widget.panel.settings.setValue("device", "cpu")
    a_desktop.app.settingsDialog().finished.emit(1)
    assert len(logic.called("connectEngine")) == 2

    closed = []
    widget.panel.sceneClosing = lambda: closed.append("closing")
    widget.panel.sceneChanged = lambda: closed.append("closed")
    a_scene.scene.Clear()
    assert closed == ["closing", "closed"]

    widget.cleanup()
    assert logic.called("close") == [()]
    add_volume()  # nobody listens any more


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_signals_are_connected_by_attribute_and_never_defined_in_python(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert not re.search(r"\bqt\.(Signal|Slot)\b", text), "Qt signals defined in Python crash Slicer"
    assert not re.search(r"\.(dis)?connect\(\s*[\"']", text), "string connects differ between Qt 5, Qt 6 and PySide6"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_heavy_is_imported_at_file_scope(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
    own = {name for name in names if name.endswith(("Lib", "Effects"))}

    foreign = names - set(sys.stdlib_module_names) - AT_FILE_SCOPE - own
    assert not foreign, f"import {sorted(foreign)} where it is used"
    if path.parent in MODULES.iterdir():
        assert "KA2ERSegment" not in names, "the module file is read before the package can be found"


@pytest.mark.parametrize("name", sorted(QT_FREE))
def test_what_needs_no_window_needs_no_qt(name: str) -> None:
    tree = ast.parse((MODULES / "SlicerKA2ER" / "SlicerKA2ERLib" / name).read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}

    assert not top & {"qt", "ctk"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_texts_are_translated_whole(path: Path) -> None:
    """`_()` gets one literal: an f-string or a sum is not found by lupdate, and a name is not a text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), f"line {node.lineno}"
            assert isinstance(argument.value, str), f"line {node.lineno}"


TEXT_SETTERS = {
    "setText",
    "setToolTip",
    "setWindowTitle",
    "setLabelText",
    "setTitle",
    "setPlaceholderText",
    "addAction",
}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_texts_for_users_go_through_the_translation(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TEXT_SETTERS:
            for argument in node.args:
                bare = isinstance(argument, ast.Constant) and isinstance(argument.value, str) and argument.value
                assert not bare, f"line {node.lineno}: use _()"
                assert not isinstance(argument, ast.JoinedStr), f"line {node.lineno}: use _() and .format()"


def qtObjectAssignments(tree: ast.AST) -> list[tuple[int, str]]:
    """Attributes assigned on `...ui.<widget>`: only properties may be."""
    found = []
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Attribute) and ast.unparse(target.value).startswith(("self.ui.", "ui.")):
                found.append((node.lineno, target.attr))
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_attribute_is_invented_on_a_qt_object(path: Path) -> None:
    properties = {"text", "enabled", "checked", "collapsed", "value", "toolTip", "currentIndex"}
    for line, name in qtObjectAssignments(ast.parse(path.read_text(encoding="utf-8"))):
        assert name in properties, f"line {line}: {name}"


@pytest.mark.parametrize("path", sorted(MODULES.rglob("*.ui")), ids=relative)
def test_ui_files_have_unique_names_and_the_scene_reaches_every_mrml_widget(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    widgets = [(widget.get("class"), widget.get("name")) for widget in root.iter("widget")]
    names = [name for _cls, name in widgets]
    assert len(names) == len(set(names))

    wanting = {
        name
        for cls, name in widgets
        if cls.startswith("qMRML") and cls not in ("qMRMLWidget", "qMRMLSegmentationShow3DButton")
    }
    reached = {
        connection.findtext("receiver")
        for connection in root.iter("connection")
        if connection.findtext("signal") == "mrmlSceneChanged(vtkMRMLScene*)"
    }
    assert reached == wanting


@pytest.mark.parametrize("path", sorted(MODULES.glob("SlicerKA2ER/Resources/UI/*.ui")), ids=relative)
def test_every_button_and_selector_says_what_it_does(path: Path) -> None:
    """By a tooltip in the .ui, or by one that the panel writes with its key."""
    panel = (MODULES / "SlicerKA2ER" / "SlicerKA2ERLib" / "PromptWidget.py").read_text(encoding="utf-8")
    said_by_label = {"cancelButton", "errorDismissButton", "show3DButton", "installButton"}
    for widget in ElementTree.parse(path).getroot().iter("widget"):
        name = widget.get("name")
        if not widget.get("class").endswith(("Button", "ComboBox", "CheckBox", "LineEdit", "SpinBox")):
            continue
        if widget.get("class").startswith("ctkCollapsible") or name in said_by_label:
            continue
        tip = [item for item in widget.findall("property") if item.get("name") == "toolTip"]
        action = name.removesuffix("Button")
        assert tip or f'"{action}": _(' in panel or name in ("positiveButton", "negativeButton"), name
