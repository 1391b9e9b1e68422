"""A real MRML scene and real slice views without Slicer's desktop: no Qt, no display. Fixtures are named as things."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="needs slicer-core")
vtk = pytest.importorskip("vtk")
numpy_support = pytest.importorskip("vtk.util.numpy_support")
from vtkmodules import vtkRenderingOpenGL2  # noqa: E402

MODULE = Path(__file__).parents[2] / "scripted_modules" / "SlicerKA2ER"
if str(MODULE) not in sys.path:
    sys.path.append(str(MODULE))  # as Slicer does with every module's folder
if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))  # for the engine's double

MODULE_LOGICS = {
    "Colors": "vtkSlicerColorLogic",
    "Volumes": "vtkSlicerVolumesLogic",
    "Terminologies": "vtkSlicerTerminologiesModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Models": "vtkSlicerModelsLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Sequences": "vtkSlicerSequencesLogic",
}


class SlicerLikeScene:
    """What Slicer's application sets up around a scene: its logics, and where they find each other.

    Args:
        folder: for the cache and temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.scene = slicer.vtkMRMLScene()
        self.applicationLogic = slicer.vtkSlicerApplicationLogic()
        self.applicationLogic.SetMRMLScene(self.scene)
        self.applicationLogic.SetTemporaryPath(str(folder))
        self.applicationLogic.SetSliceLogics(vtk.vtkCollection())
        self._setUpFiles(folder)
        self._moduleLogics = [self._addLogic(name) for name in MODULE_LOGICS]
        self.views: list[OffscreenSliceView] = []
        self._before = getattr(slicer, "mrmlScene", None), getattr(slicer, "modules", None)
        slicer.mrmlScene = self.scene
        slicer.modules = SimpleNamespace(
            **{
                name.lower(): SimpleNamespace(logic=lambda logic=logic: logic)
                for name, logic in zip(MODULE_LOGICS, self._moduleLogics, strict=True)
            }
        )

    def _setUpFiles(self, folder: Path) -> None:
        """Without cache and data manager no .mrb is written or read."""
        cache = slicer.vtkCacheManager()
        cache.SetRemoteCacheDirectory(str(folder))
        cache.SetMRMLScene(self.scene)
        self._remoteIO = slicer.vtkMRMLRemoteIOLogic()
        self._remoteIO.SetMRMLScene(self.scene)
        self._dataIO = slicer.vtkDataIOManagerLogic()
        self._dataIO.SetMRMLApplicationLogic(self.applicationLogic)
        self.applicationLogic.SetMRMLSceneDataIO(self.scene, self._remoteIO, self._dataIO)
        self.scene.GetCacheManager().SetRemoteCacheDirectory(str(folder))

    def _addLogic(self, name: str) -> Any:
        logic = getattr(slicer, MODULE_LOGICS[name])()
        logic.SetMRMLApplicationLogic(self.applicationLogic)
        self.applicationLogic.SetModuleLogic(name, logic)
        logic.SetMRMLScene(self.scene)
        return logic

    def addVolume(self, arrayKji: np.ndarray, ijkToRas: np.ndarray, name: str = "Volume") -> Any:
        node = self.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
        matrix = slicer.util.vtkMatrixFromArray(ijkToRas)
        node.SetIJKToRASMatrix(matrix)
        slicer.util.updateVolumeFromArray(node, arrayKji)
        node.CreateDefaultDisplayNodes()
        return node

    def addView(self, name: str = "Red", orientation: str = "Axial", size: tuple[int, int] = (400, 300)) -> Any:
        view = OffscreenSliceView(self, name, orientation, size)
        self.views.append(view)
        return view

    def close(self) -> None:
        for view in self.views:
            view.close()
        self.scene.Clear(1)
        slicer.mrmlScene, slicer.modules = self._before


class OffscreenSliceView:
    """One slice view: logic, displayable managers and interactor, drawn offscreen."""

    def __init__(self, around: SlicerLikeScene, name: str, orientation: str, size: tuple[int, int]) -> None:
        scene, applicationLogic = around.scene, around.applicationLogic
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(applicationLogic)
        self.logic.SetMRMLScene(scene)
        self.node = self.logic.AddSliceNode(name)
        self.node.SetLayoutName(name)
        self.node.SetOrientationToAxial() if orientation == "Axial" else self.node.SetOrientation(orientation)
        applicationLogic.GetSliceLogics().AddItem(self.logic)
        self.composite = self.logic.GetSliceCompositeNode()

        self.window = getattr(vtkRenderingOpenGL2, "vtkEGLRenderWindow", vtk.vtkRenderWindow)()  # no X server needed
        self.window.SetOffScreenRendering(True)
        self.window.SetSize(*size)
        self.window.SetMultiSamples(0)
        self.renderer = vtk.vtkRenderer()
        self.window.AddRenderer(self.renderer)
        self.interactor = vtk.vtkGenericRenderWindowInteractor()
        self.interactor.SetRenderWindow(self.window)
        self.interactor.SetSize(*size)
        self.interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())
        self.interactor.Initialize()

        self._factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory()
        self._factory.SetMRMLApplicationLogic(applicationLogic)
        for manager in ("vtkMRMLVolumeGlyphSliceDisplayableManager", "vtkMRMLModelSliceDisplayableManager",
                        "vtkMRMLSegmentationsDisplayableManager2D", "vtkMRMLMarkupsDisplayableManager",
                        "vtkMRMLColorLegendDisplayableManager"):  # fmt: skip
            self._factory.RegisterDisplayableManager(manager)
        self.style = slicer.vtkMRMLSliceViewInteractorStyle()
        self.style.SetInteractor(self.interactor)
        self.group = self._factory.InstantiateDisplayableManagers(self.renderer)
        self.group.SetMRMLDisplayableNode(self.node)
        self.group.GetInteractor()
        self.style.SetSliceLogic(self.logic)
        self.style.SetDisplayableManagers(self.group)
        self.logic.SetDisplayableManagerGroup(self.group) if hasattr(self.logic, "SetDisplayableManagerGroup") else None

        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        self._actor = vtk.vtkActor2D()
        self._actor.SetMapper(self._mapper)
        self._actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(self._actor)
        self.logic.ResizeSliceNode(*size)

    def show(self, volumeNode: Any) -> None:
        """Background, fitted."""
        self.composite.SetBackgroundVolumeID(volumeNode.GetID())
        self.logic.FitSliceToAll()
        self.logic.UpdatePipeline()

    def jumpTo(self, ras: Any) -> None:
        self.node.JumpSliceByCentering(*(float(x) for x in ras))

    def pixel(self, ras: Any) -> tuple[int, int]:
        """Where a world point is on this view."""
        inverse = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(self.node.GetXYToRAS(), inverse)
        x, y, _, _ = inverse.MultiplyPoint((*(float(v) for v in ras), 1))
        return round(x), round(y)

    def ras(self, x: int, y: int) -> tuple[float, float, float]:
        return self.node.GetXYToRAS().MultiplyPoint((x, y, 0, 1))[:3]

    def render(self) -> np.ndarray:
        """(Y, X, 3) uint8, the first row at the bottom."""
        self.logic.UpdatePipeline()
        self._mapper.SetInputConnection(self.logic.GetImageDataConnection())  # another one per number of layers
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        image = grab.GetOutput()
        columns, rows, _ = image.GetDimensions()
        return numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(rows, columns, -1).copy()

    def event(self, name: str, x: int, y: int, *, alt: bool = False, shift: bool = False, control: bool = False,
              key: str = "") -> None:  # fmt: skip
        self.interactor.SetEventInformation(x, y, int(control), int(shift), key[:1] or "\0", 0, key or None)
        self.interactor.SetAltKey(int(alt))
        self.interactor.InvokeEvent(name)

    def click(self, x: int, y: int, **modifiers: bool) -> None:
        self.event("MouseMoveEvent", x, y, **modifiers)
        self.event("LeftButtonPressEvent", x, y, **modifiers)
        self.event("LeftButtonReleaseEvent", x, y, **modifiers)

    def drag(self, path: list[tuple[int, int]], **modifiers: bool) -> None:
        self.event("MouseMoveEvent", *path[0], **modifiers)
        self.event("LeftButtonPressEvent", *path[0], **modifiers)
        for x, y in path[1:]:
            self.event("MouseMoveEvent", x, y, **modifiers)
        self.event("LeftButtonReleaseEvent", *path[-1], **modifiers)

    def close(self) -> None:
        self.group.SetMRMLDisplayableNode(None)
        self.style.SetInteractor(None)
        self.window.Finalize()


@pytest.fixture
def a_scene(tmp_path: Path) -> Iterator[SlicerLikeScene]:
    """A scene as in Slicer, closed afterwards."""
    scene = SlicerLikeScene(tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def a_slice_view(a_scene: SlicerLikeScene) -> OffscreenSliceView:
    """An axial slice view of `a_scene`, 400 x 300 pixels."""
    return a_scene.addView()


@pytest.fixture
def an_engine() -> Any:
    """Stands in for the engine's process."""
    from engine_double import EngineDouble

    return EngineDouble()


@pytest.fixture
def a_volume_node(a_scene: SlicerLikeScene, an_array: np.ndarray, an_oblique_affine: np.ndarray) -> Any:
    """Anisotropic, non-cubic, no voxel axis along R, A or S."""
    return a_scene.addVolume(an_array, an_oblique_affine, "A volume")


@pytest.fixture
def a_logic(a_scene: SlicerLikeScene, a_volume_node: Any, an_engine: Any) -> Iterator[Any]:
    """On `a_volume_node`, with `an_engine`; no segmentation yet."""
    from SlicerKA2ERLib.PromptLogic import PromptLogic

    logic = PromptLogic(a_scene.scene, a_scene.applicationLogic)
    logic.connectEngine(lambda: an_engine)
    logic.setVolumeNode(a_volume_node)
    yield logic
    an_engine.release()
    logic.close()


@pytest.fixture
def wait() -> Callable[..., None]:
    """Poll a logic as its timer would until a condition holds: by default, until nothing is under way."""
    return wait_until


def wait_until(logic: Any, condition: Callable[[], bool] | None = None, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while True:
        logic.poll()
        if condition() if condition else logic.isIdle:
            return
        assert time.monotonic() < end, f"still busy: {logic.busy!r}; last error: {logic.lastError!r}"
        time.sleep(0.002)


@pytest.fixture
def value_at() -> Callable[[Any, np.ndarray], np.ndarray]:
    """What Slicer shows of a volume node at world points (n, 3): linear between its voxels; NaN beyond them."""

    def read(node: Any, world: np.ndarray) -> np.ndarray:
        toIjk, parent = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
        node.GetRASToIJKMatrix(toIjk)
        slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(None, node.GetParentTransformNode(), parent)
        vtk.vtkMatrix4x4.Multiply4x4(toIjk, parent, toIjk)
        grid = vtk.vtkPoints()
        for point in world:
            grid.InsertNextPoint(toIjk.MultiplyPoint((*point, 1.0))[:3])
        probe = vtk.vtkProbeFilter()
        probe.SetInputData(vtk.vtkPolyData())
        probe.GetInput().SetPoints(grid)
        probe.SetSourceData(node.GetImageData())
        probe.Update()
        data = probe.GetOutput().GetPointData()
        values = numpy_support.vtk_to_numpy(data.GetScalars()).astype(float)
        return np.where(numpy_support.vtk_to_numpy(data.GetArray("vtkValidPointMask")) > 0, values, np.nan)

    return read


@pytest.fixture
def segment_array() -> Callable[..., np.ndarray]:
    """A segment as (K, J, I) bool on the volume's grid, read by Slicer's own means."""

    def read(logic: Any, segmentId: str | None = None, volumeNode: Any = None) -> np.ndarray:
        volume = volumeNode or logic.volumeNode
        segment = segmentId or logic.selectedSegment
        return slicer.util.arrayFromSegmentBinaryLabelmap(logic.segmentationNode, segment, volume) > 0

    return read
