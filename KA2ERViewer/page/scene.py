"""A MRML scene as Slicer's application sets it up, with three slice views and a 3D view that a browser shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import slicer
import vtk
from trame_slicer.core import SlicerApp
from trame_slicer.rca_view import register_rca_factories
from trame_slicer.views import ViewLayoutDefinition

from KA2ERViewer.page.frames import Frames, use_frames

MODULES = {
    "Markups": None,
    "Models": "vtkSlicerModelsLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Sequences": "vtkSlicerSequencesLogic",
    "Colors": "vtkSlicerColorLogic",
    "Volumes": None,
    "Terminologies": None,
    "SubjectHierarchy": None,
    "Segmentations": None,
}
"""Slicer modules whose logic the shared code looks up; the class where trame-slicer does not
make it, or another one."""
SLICES = {"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}
"""Slicer's name of a view -> its orientation."""
COLORS = {"Red": "#e0574f", "Green": "#67b26f", "Yellow": "#e0c34f", "ThreeD": "#7f9cf5"}
BLACK = "#000000"
DEEP = ("#10141c", "#1b2230")
"""Background of the 3D view, bottom and top."""


class ViewerScene:
    """Slicer's logics, scene and views.

    Args:
        server: trame's.
        folder: for the scene's cache and temporary files.
        decorate: adds to the page what lies over a view; called with trame's server, the view's name and the view.
    """

    def __init__(self, server: Any, folder: Path, decorate: Callable[[Any, str, Any], None]) -> None:
        self.app = SlicerApp()
        self.scene, self.logic = self.app.scene, self.app.app_logic
        self.logic.SetTemporaryPath(str(folder))
        (folder / "share" / "ColorFiles").mkdir(parents=True)  # without it, empty as it is, Slicer complains
        self.logic.SetHomeDirectory(str(folder))
        self.logic.SetShareDirectory("share")
        self._tell_slicer()
        use_frames()
        register_rca_factories(
            self.app.view_manager,
            server,
            slice_view_ui_f=decorate,
            three_d_view_ui_f=decorate,
            interactive_quality=75,
            blur_fps=20.0,  # most pictures in a second of a view that the pointer is not in
        )
        manager = self.app.view_manager
        # slicer-core 5.11 observes an event of which VTK 9.6 warns that it goes, once for each view.
        vtk.vtkObject.GlobalWarningDisplayOff()
        self.slices = {
            name: manager.create_view(ViewLayoutDefinition.slice_view(orientation, label=name, color=COLORS[name]))
            for name, orientation in SLICES.items()
        }
        self.solid = manager.create_view(ViewLayoutDefinition.threed_view(background_color=DEEP))
        Frames.every[-1].gives_way = True  # its surfaces are made once an answer is in the slices
        self.views = {**self.slices, "ThreeD": self.solid}
        vtk.vtkObject.GlobalWarningDisplayOn()
        manager.set_current_view_ids([view.get_singleton_tag() for view in self.views.values()])
        self.solid.set_orientation_marker(slicer.vtkMRMLAbstractViewNode.OrientationMarkerTypeAxes, 2)
        for view in self.slices.values():
            view.set_background_color_from_string(BLACK)
            view.set_ruler(1)
        for view in self.views.values():
            # Without a graphics card smoother edges would be most of what a drawing takes.
            view.render_window().SetMultiSamples(0)
        self.solid.renderer().SetUseFXAA(True)  # a tenth of that, and lines of slices would lose their sharpness

    def _tell_slicer(self) -> None:
        """`slicer.mrmlScene` and `slicer.modules.<name>.logic()`, where the shared code expects them."""
        logics = {}
        for name, made_by_us in MODULES.items():
            if made_by_us is None:
                logic = self.logic.GetModuleLogic(name)
            else:
                logic = getattr(slicer, made_by_us)()
                logic.SetMRMLApplicationLogic(self.logic)
                self.logic.SetModuleLogic(name, logic)
                logic.SetMRMLScene(self.scene)
            logics[name.lower()] = SimpleNamespace(logic=lambda logic=logic: logic)
        slicer.mrmlScene, slicer.modules = self.scene, SimpleNamespace(**logics)
