"""Stand-ins for the widgets of CTK and Slicer that our panels use: their properties, signals and verbs."""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtWidgets

Signal = QtCore.Signal


def declared(kind: Any, name: str, changed: str = "") -> QtCore.Property:
    """A plain property that remembers its value."""

    def read(self: Any) -> Any:
        return getattr(self, "_" + name, kind())

    def write(self: Any, value: Any) -> None:
        differs = read(self) != value
        setattr(self, "_" + name, value)
        if differs and changed:
            getattr(self, changed).emit(value)

    return QtCore.Property(kind, read, write)


class ctkCollapsibleButton(QtWidgets.QWidget):  # noqa: N801
    contentsCollapsed = Signal(bool)
    text = declared(str, "text")
    collapsed = declared(bool, "collapsed", "contentsCollapsed")


class ctkSliderWidget(QtWidgets.QWidget):  # noqa: N801
    valueChanged = Signal(float)
    minimum = declared(float, "minimum")
    maximum = declared(float, "maximum")
    singleStep = declared(float, "singleStep")
    decimals = declared(int, "decimals")
    suffix = declared(str, "suffix")
    value = declared(float, "value", "valueChanged")

    def setValue(self, value: float) -> None:
        self.setProperty("value", min(max(value, self.property("minimum")), self.property("maximum")))


class ctkPathLineEdit(QtWidgets.QWidget):  # noqa: N801
    currentPathChanged = Signal(str)
    currentPath = declared(str, "currentPath", "currentPathChanged")


class ctkComboBox(QtWidgets.QComboBox):  # noqa: N801
    def _userData(self) -> str:
        return str(self.itemData(self.currentIndex) or "")  # both as in PythonQt: the index is a property

    def _setUserData(self, data: str) -> None:
        self.setCurrentIndex(self.findData(data))

    currentUserDataAsString = QtCore.Property(str, _userData, _setUserData)


class ctkSettingsPanel(QtWidgets.QWidget):  # noqa: N801
    """Like CTK's: what is registered goes to the settings when it is applied, and comes from them when it is reset."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.registered: dict[str, tuple[Any, str, str]] = {}
        self.store: Any = None

    def registerProperty(self, key: str, widget: Any, name: str, signal: str, *_more: Any) -> None:
        meta = widget.metaObject()
        assert meta.indexOfProperty(name) >= 0, f"{meta.className()} has no property {name!r}"
        assert signal.startswith("2"), f"{signal!r} is not what qt.SIGNAL makes"
        assert meta.indexOfSignal(signal[1:]) >= 0, f"{meta.className()} has no signal {signal[1:]!r}"
        self.registered[key] = (widget, name, signal)

    def applySettings(self) -> None:
        for key, (widget, name, _signal) in self.registered.items():
            self.store.setValue(key, widget.property(name))

    def resetSettings(self) -> None:
        for key, (widget, name, _signal) in self.registered.items():
            if self.store.contains(key):
                widget.setProperty(name, type(widget.property(name))(self.store.value(key)))


class qMRMLWidget(QtWidgets.QWidget):  # noqa: N801
    mrmlSceneChanged = Signal(object)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._scene: Any = None

    def setMRMLScene(self, scene: Any) -> None:
        """To the children too: PySide6 cannot resolve the .ui's connections, whose types are VTK's."""
        self._scene = scene
        for child in self.findChildren(QtWidgets.QWidget):
            if hasattr(child, "setMRMLScene"):
                child.setMRMLScene(scene)

    def mrmlScene(self) -> Any:
        return self._scene


class qMRMLNodeComboBox(QtWidgets.QWidget):  # noqa: N801
    """The node is set by `setCurrentNode`, as the panel does, or by `choose`, as a user does."""

    currentNodeChanged = Signal(object)
    currentNodeIDChanged = Signal(str)
    nodeTypes = declared(list, "nodeTypes")
    noneDisplay = declared(str, "noneDisplay")
    noneEnabled = declared(bool, "noneEnabled")
    addEnabled = declared(bool, "addEnabled")
    removeEnabled = declared(bool, "removeEnabled")
    renameEnabled = declared(bool, "renameEnabled")
    showChildNodeTypes = declared(bool, "showChildNodeTypes")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._node: Any = None

    def setMRMLScene(self, scene: Any) -> None:
        self._scene = scene

    def currentNode(self) -> Any:
        return self._node

    def setCurrentNode(self, node: Any) -> None:
        if node is not self._node:
            self._node = node
            self.currentNodeChanged.emit(node)
            self.currentNodeIDChanged.emit(node.GetID() if node is not None else "")

    choose = setCurrentNode


class qMRMLSegmentsTableView(qMRMLWidget):  # noqa: N801
    selectionChanged = Signal(object, object)
    selectionMode = declared(int, "selectionMode")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._segmentation: Any = None
        self._selected: tuple[str, ...] = ()

    def segmentationNode(self) -> Any:
        return self._segmentation

    def setSegmentationNode(self, node: Any) -> None:
        if node is not self._segmentation:
            self._segmentation = node
            self.setSelectedSegmentIDs(())

    def selectedSegmentIDs(self) -> tuple[str, ...]:
        return self._selected

    def setSelectedSegmentIDs(self, ids: Any) -> None:
        if tuple(ids) != self._selected:
            self._selected = tuple(ids)
            self.selectionChanged.emit(None, None)

    def setSelectionMode(self, mode: int) -> None:
        self.setProperty("selectionMode", mode)


class qMRMLSegmentationShow3DButton(QtWidgets.QPushButton):  # noqa: N801
    segmentation: Any = None

    def setSegmentationNode(self, node: Any) -> None:
        self.segmentation = node


class qMRMLSegmentEditorWidget(qMRMLWidget):  # noqa: N801
    """Keeps in step with its node like Slicer's, and writes down in `calls` what it was told about its looks."""

    currentSegmentIDChanged = Signal(str)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: dict[str, Any] = {}
        self.unorderedEffectsVisible = True
        self._node: Any = None
        self._segmentation: Any = None
        self._volume: Any = None
        self._segment = ""
        frame = QtWidgets.QWidget(self)
        frame.setObjectName("SegmentsTableResizableFrame")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("set") and name.endswith(("Visible", "States")):
            return lambda value: self.calls.update({name: value})
        raise AttributeError(name)

    def setMRMLSegmentEditorNode(self, node: Any) -> None:
        self._node = node

    def mrmlSegmentEditorNode(self) -> Any:
        return self._node

    def segmentationNode(self) -> Any:
        return self._segmentation

    def setSegmentationNode(self, node: Any) -> None:
        self._segmentation = node
        self._node.SetAndObserveSegmentationNode(node)
        if node is not None and node.GetSegmentation().GetNumberOfSegments():
            self.setCurrentSegmentID(node.GetSegmentation().GetNthSegmentID(0))  # Slicer's selects the first one

    def sourceVolumeNode(self) -> Any:
        return self._volume

    def setSourceVolumeNode(self, node: Any) -> None:
        self._volume = node
        self._node.SetAndObserveSourceVolumeNode(node)

    def currentSegmentID(self) -> str:
        return self._segment

    def setCurrentSegmentID(self, segment: str) -> None:
        if segment != self._segment:
            self._segment = segment
            self.currentSegmentIDChanged.emit(segment)

    def setActiveEffectByName(self, name: str) -> None:
        self._node.SetActiveEffectName(name)

    def setActiveEffect(self, effect: Any) -> None:
        assert effect is None, "the panel only ever puts effects away"
        self._node.SetActiveEffectName("")

    def availableEffectNames(self) -> tuple[str, ...]:
        return ("Paint", "Erase", "KA2ER")

    def setEffectNameOrder(self, names: Any) -> None:
        self.calls["effects"] = list(names)

    def saveStateForUndo(self) -> None:
        self.calls["saveStateForUndo"] = True

    def removeViewObservations(self) -> None:
        self.calls["removeViewObservations"] = True


ALL = (
    ctkCollapsibleButton,
    ctkSliderWidget,
    ctkPathLineEdit,
    ctkComboBox,
    ctkSettingsPanel,
    qMRMLWidget,
    qMRMLNodeComboBox,
    qMRMLSegmentsTableView,
    qMRMLSegmentationShow3DButton,
    qMRMLSegmentEditorWidget,
)
