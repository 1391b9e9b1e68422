"""Slicer's application around a scene: what `slicer.app`, `slicer.util` and the module system do for our modules."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import slicer
from PySide6 import QtCore, QtWidgets

from . import pythonqt, widgets

OURS = ("SlicerKA2ERLib", "SlicerKA2ER", "SegmentEditorKA2ER", "SegmentEditorKA2ERLib")
_MADE: dict[str, types.ModuleType] = {}


class Emitter(QtCore.QObject):
    """Signals of the application."""

    startupCompleted = QtCore.Signal()
    layoutChanged = QtCore.Signal(int)
    finished = QtCore.Signal(int)
    moduleAboutToBeUnloaded = QtCore.Signal(str)


class SliceWidget:
    """One slice view of the layout.

    Args:
        view: an offscreen slice view (see conftest.py), or anything with interactor, node and composite.
    """

    def __init__(self, view: Any) -> None:
        self._view = view

    def interactorStyle(self) -> Any:
        return types.SimpleNamespace(GetInteractor=lambda: self._view.interactor)

    def mrmlSliceNode(self) -> Any:
        return self._view.node

    def mrmlSliceCompositeNode(self) -> Any:
        return self._view.composite


class LayoutManager:
    """The layout: `views` can be exchanged, then `layoutChanged` tells."""

    def __init__(self, emitter: Emitter) -> None:
        self.views: dict[str, SliceWidget] = {}
        self.layoutChanged = emitter.layoutChanged
        self._viewport = QtWidgets.QWidget()

    @property
    def viewportNames(self) -> tuple[str, ...]:
        return ("",)

    def viewport(self, _name: str = "") -> Any:
        return self._viewport

    def sliceViewNames(self) -> tuple[str, ...]:
        return tuple(self.views)

    def sliceWidget(self, name: str) -> Any:
        return self.views[name]


class SettingsDialog:
    def __init__(self, emitter: Emitter) -> None:
        self.panels: dict[str, Any] = {}
        self.finished = emitter.finished

    def addPanel(self, label: str, panel: Any) -> None:
        self.panels[label] = panel


class Application:
    """`slicer.app`.

    Args:
        settingsFile: of the QSettings.
        withWindow: False for `--no-main-window`.
    """

    def __init__(self, settingsFile: Path, withWindow: bool) -> None:
        self._emitter = Emitter()
        self.startupCompleted = self._emitter.startupCompleted
        self.moduleAboutToBeUnloaded = self._emitter.moduleAboutToBeUnloaded
        self.withWindow = withWindow
        self._settings = QtCore.QSettings(str(settingsFile), QtCore.QSettings.Format.IniFormat)
        self._layout = LayoutManager(self._emitter) if withWindow else None
        self._dialog = SettingsDialog(self._emitter)
        self.opened: list[str] = []
        self.onOpenSettings: Callable[[], None] = lambda: None
        self.installed: set[str] = set()
        self.offered = {"PyTorch"}
        self.logics: dict[str, Any] = {}
        self.interactive = True

    def settings(self) -> Any:
        return self._settings

    userSettings = settings

    def layoutManager(self) -> Any:
        return self._layout

    def settingsDialog(self) -> SettingsDialog:
        return self._dialog

    def openSettingsDialog(self, panel: str = "") -> None:
        self.opened.append(panel)
        self.onOpenSettings()

    def moduleManager(self) -> Any:
        return self

    def applicationLogic(self) -> Any:
        return types.SimpleNamespace(GetModuleLogic=self.logics.get)

    def processEvents(self, *_args: Any) -> None:
        QtWidgets.QApplication.processEvents()

    def testingEnabled(self) -> bool:
        return True

    def translate(self, _context: str, text: str) -> str:
        return text

    def extensionsManagerModel(self) -> Any:
        return self

    def isExtensionInstalled(self, name: str) -> bool:
        return name in self.installed

    def installExtensionFromServer(self, name: str, restart: bool = True) -> bool:
        assert not restart, "a restart is the user's decision"
        self.installed |= {name} & self.offered
        return name in self.installed


class Desktop:
    """Slicer's desktop around a scene, from `with` to its end.

    Args:
        folder: for the settings file.
        withWindow: False for `--no-main-window`.
    """

    def __init__(self, folder: Path, withWindow: bool = True) -> None:
        self._folder, self._withWindow = folder, withWindow

    def __enter__(self) -> Desktop:
        self.application = QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
        if not _MADE:
            _MADE.update(qt=pythonqt.makeQt(), ctk=pythonqt.makeCtk())
        self._modules = {
            name: sys.modules.get(name) for name in ("qt", "ctk", "slicer.i18n", "slicer.ScriptedLoadableModule")
        }
        self._forgotten = self._takeOurs()
        self.app = Application(self._folder / "Slicer.ini", self._withWindow)
        self.restarts = 0
        self.selected: list[str] = []
        sys.modules.update(_MADE)
        sys.modules["slicer.i18n"] = i18n()
        sys.modules["slicer.ScriptedLoadableModule"] = scriptedLoadableModule()
        self._names = {
            "app": self.app,
            "i18n": sys.modules["slicer.i18n"],
            **{stand.__name__: stand for stand in widgets.ALL if stand.__name__.startswith("q")},
        }
        self._before = [(slicer, name, getattr(slicer, name, None)) for name in self._names]
        for name, value in self._names.items():
            setattr(slicer, name, value)
        self._replaceUtil()
        return self

    def __exit__(self, *_exc: Any) -> None:
        for owner, name, value in reversed(self._before):
            delattr(owner, name) if value is None else setattr(owner, name, value)
        for name, module in self._modules.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
        self._takeOurs()
        sys.modules.update(self._forgotten)

    def _takeOurs(self) -> dict[str, types.ModuleType]:
        """Our modules bind qt when they are imported: with and without the desktop they are imported anew."""
        names = [name for name in sys.modules if name.split(".")[0] in OURS]
        return {name: sys.modules.pop(name) for name in names}

    def _replaceUtil(self) -> None:
        util = slicer.util
        window = QtWidgets.QMainWindow() if self._withWindow else None

        def restart() -> None:
            self.restarts += 1

        replaced = {
            "mainWindow": lambda: window,
            "restart": restart,
            "selectModule": self.selected.append,
            "findChild": lambda widget, name: widget.findChild(QtWidgets.QWidget, name),
            "startupEnvironment": lambda: {"PATH": os.environ["PATH"]},
        }
        for name, value in replaced.items():
            self._before.append((util, name, getattr(util, name, None)))
            setattr(util, name, value)

    def loadModule(self, path: Path) -> types.ModuleType:
        """As Slicer does: the module file by its path, under its own name."""
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module


def i18n() -> types.ModuleType:
    """`slicer.i18n`, untranslated."""
    module = types.ModuleType("slicer.i18n")
    module.tr = lambda text: text  # type: ignore[attr-defined]
    module.translate = lambda _context, text: text  # type: ignore[attr-defined]
    return module


def scriptedLoadableModule() -> types.ModuleType:
    """The base classes of scripted modules, as far as ours rely on them."""
    module = types.ModuleType("slicer.ScriptedLoadableModule")

    class ScriptedLoadableModule:
        def __init__(self, parent: Any) -> None:
            self.parent = parent

    class ScriptedLoadableModuleWidget:
        def __init__(self, parent: Any = None) -> None:
            self.parent = parent or widgets.qMRMLWidget()
            if self.parent.layout() is None:
                QtWidgets.QVBoxLayout(self.parent)
            self.layout = self.parent.layout()

        def setup(self) -> None: ...

        def onReload(self) -> None: ...

    class ScriptedLoadableModuleLogic:
        def __init__(self, parent: Any = None) -> None: ...

    class ScriptedLoadableModuleTest:
        def delayDisplay(self, message: str) -> None: ...

    for cls in (
        ScriptedLoadableModule,
        ScriptedLoadableModuleWidget,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
    ):
        setattr(module, cls.__name__, cls)
    return module
