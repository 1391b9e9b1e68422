"""Fixtures on the stand-in desktop; a test file imports those that it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import Desktop
from .desktop import SliceWidget
from .fakes import FakeDialogs, FakeInstaller, FakeLogic

MODULES = Path(__file__).parents[3] / "scripted_modules"
RESOURCES = MODULES / "SlicerKA2ER" / "Resources"


@pytest.fixture
def a_desktop(a_scene: Any, tmp_path: Path) -> Iterator[Desktop]:
    """Slicer's desktop around `a_scene`, with a main window."""
    with Desktop(tmp_path) as desktop:
        yield desktop


@pytest.fixture
def a_logic(a_desktop: Desktop) -> FakeLogic:
    from SlicerKA2ERLib import Protocols

    return FakeLogic(Protocols)


@pytest.fixture
def an_installer(a_desktop: Desktop) -> FakeInstaller:
    """Everything is there."""
    from SlicerKA2ERLib import Protocols

    return FakeInstaller(Protocols)


@pytest.fixture
def dialogs() -> FakeDialogs:
    return FakeDialogs()


@pytest.fixture
def a_panel(a_desktop: Desktop, a_logic: FakeLogic, an_installer: FakeInstaller, dialogs: FakeDialogs) -> Iterator[Any]:
    """The real panel around the fake logic, not entered yet."""
    from SlicerKA2ERLib.PromptWidget import PromptWidget
    from SlicerKA2ERLib.Settings import EngineMaker, Settings

    settings = Settings()
    panel = PromptWidget(a_logic, an_installer, settings, dialogs, EngineMaker(settings), RESOURCES)
    yield panel
    panel.cleanup()


@pytest.fixture
def add_volume(a_scene: Any) -> Callable[..., Any]:
    """A small oblique volume in the scene."""

    def add(name: str = "CT") -> Any:
        matrix = np.array([[0.7, -0.3, 0.1, 5], [0.3, 0.8, -0.2, -9], [0, 0.2, 2.1, 40], [0, 0, 0, 1.0]])
        return a_scene.addVolume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), matrix, name)

    return add


@pytest.fixture
def two_views(a_desktop: Desktop, a_scene: Any) -> tuple[Any, Any]:
    """The layout shows an axial and a coronal slice view."""
    views = a_scene.addView("Red"), a_scene.addView("Green", "Coronal")
    a_desktop.app.layoutManager().views = {"Red": SliceWidget(views[0]), "Green": SliceWidget(views[1])}
    return views
