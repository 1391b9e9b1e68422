"""Modules `qt` and `ctk` as Slicer has them, made from PySide6: one flat namespace, properties as attributes.

PySide6's own `true_property` cannot be used: setters vanish and others crash the interpreter (PySide6 6.12). Instead
each class gets a descriptor for each property of its meta-object.
"""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

if sys.version_info < (3, 12):
    # PySide6 6.12 hands out None, True and False without counting them, as if they were immortal, which they are from
    # Python 3.12 on. Before, the interpreter dies when the count is used up. Can go with Python 3.11.
    for constant in (None, True, False):
        ctypes.c_ssize_t.from_address(id(constant)).value += 1 << 40


class Property:
    """A Qt property as PythonQt shows it: `label.text`, `label.text = "..."`. On the class it stays what it was."""

    def __init__(self, name: str, original: Any) -> None:
        self._name, self._original = name, original
        self._reading = False

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self._original
        if (
            self._reading
        ):  # PySide6 asks whether a virtual getter (QProgressBar.text) is overridden in Python: it is not
            return self._original.__get__(instance, owner)
        self._reading = True
        try:
            return instance.property(self._name)
        finally:
            self._reading = False

    def __set__(self, instance: Any, value: Any) -> None:
        if not instance.setProperty(self._name, value):
            msg = f"Property {self._name!r} of {type(instance).__name__} does not accept {value!r}."
            raise AttributeError(msg)


class StrictUiLoader(QtUiTools.QUiLoader):
    """Knows our stand-ins; an unknown class in a .ui is an error here, not an empty widget."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from . import widgets

        for stand in widgets.ALL:
            self.registerCustomWidget(stand)

    def createWidget(self, className: str, parent: Any = None, name: str = "") -> Any:
        widget = super().createWidget(className, parent, name)
        if widget is None or widget.metaObject().className() != className:
            msg = f"The .ui wants a {className}, which neither Qt nor the harness has."
            raise RuntimeError(msg)
        return widget


def addProperties(cls: type) -> None:
    """Descriptors for the properties that `cls` itself declares."""
    meta = cls.staticMetaObject  # type: ignore[attr-defined]
    for index in range(meta.propertyOffset(), meta.propertyCount()):
        name = meta.property(index).name()
        if not isinstance(cls.__dict__.get(name), Property):
            setattr(cls, name, Property(name, getattr(cls, name, None)))
    if meta.className() == "QObject":
        cls.name = Property("objectName", None)  # type: ignore[attr-defined]
        cls.className = lambda self: self.metaObject().className()  # type: ignore[attr-defined]


def makeQt() -> types.ModuleType:
    """The module `qt`."""
    qt = types.ModuleType("qt")
    for source in (QtCore, QtGui, QtWidgets, QtUiTools):
        for name in dir(source):
            if not name.startswith("_"):
                setattr(qt, name, getattr(source, name))
    for value in list(vars(qt).values()):
        if isinstance(value, type) and issubclass(value, QtCore.QObject):
            addProperties(value)
    qt.QUiLoader = StrictUiLoader  # type: ignore[attr-defined]
    qt.QDialog.exec_ = qt.QDialog.exec  # type: ignore[attr-defined]
    return qt


def makeCtk() -> types.ModuleType:
    """The module `ctk`."""
    from . import widgets

    ctk = types.ModuleType("ctk")
    for stand in widgets.ALL:
        if stand.__name__.startswith("ctk"):
            setattr(ctk, stand.__name__, stand)
    return ctk
