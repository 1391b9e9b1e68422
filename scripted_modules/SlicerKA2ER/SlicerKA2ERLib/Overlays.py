"""Confidence as volumes in the scene: one small scalar volume per expert, in layers of the slice views of its own.

A volume has the network's own samples, and Slicer draws what lies between them. It is in the layers behind Slicer's
background, foreground and label (from the fourth on), so that the user's own layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import slicer
import vtk
import vtk.util.numpy_support

from KA2ERSegment.geometry import FloatArray
from SlicerKA2ERLib.Protocols import Color
from SlicerKA2ERLib.VolumeIO import toVtk

FIRST_LAYER = 3
"""After background, foreground and label."""
LAST_LAYER = 30
TOP, LEGENDS = 0.88, 3
"""Where the first legend is in a slice view, and how many fit below it as large as they are; more are closer."""
TITLE_SIZE, LABEL_SIZE = 12, 10
LOWEST = 0.05
"""Below it an overlay shows nothing."""
FAINTEST = 0.4
"""Of the colour's brightness, at 0."""
FOLDER = "KA2ER confidence: {segment}"


class Overlays:
    """Volumes by name, for one segment at a time.

    Args:
        scene: the MRML scene.
        applicationLogic: Slicer's.
        legends: in slice views.
    """

    def __init__(self, scene: Any, applicationLogic: Any, legends: bool = True) -> None:
        self._scene, self._applicationLogic, self._withLegends = scene, applicationLogic, legends
        self._nodes: dict[str, Any] = {}
        self._tables: dict[str, Any] = {}
        self._legends: dict[str, Any] = {}
        self._folder = 0

    def put(
        self,
        name: str,
        title: str,
        color: Color,
        opacity: float,
        segmentName: str,
        ijkToRas: FloatArray,
        values: np.ndarray,
        volumeNode: Any,
    ) -> None:
        """Show values on a grid of their own, or show them anew.

        Args:
            ijkToRas: 4x4, index of a value to the local RAS of the volume.
            values: (K, J, I) uint8, 255 is 1; or float, 0..1.
            volumeNode: the volume that they belong to.
        """
        if values.size == 0:
            self.remove(name)
            return
        node = self._nodes.get(name)
        if node is None or node.GetScene() is not self._scene:
            node = self._nodes[name] = self._newNode(name, title, color)
        parent = volumeNode.GetParentTransformNode()
        node.SetAndObserveTransformNodeID(parent.GetID() if parent else None)
        node.SetIJKToRASMatrix(toVtk(ijkToRas))
        node.SetAndObserveImageData(_image(values))
        node.GetDisplayNode().SetThreshold(LOWEST, 1.0)
        self._intoFolder(node, segmentName)
        self._intoViews(node, opacity)
        if self._legends[name] is not None:
            self._legendIntoViews(self._legends[name])

    def remove(self, name: str) -> None:
        node = self._nodes.pop(name, None)
        table = self._tables.pop(name, None)
        for composite, layer in self._layersOf(node):
            _setLayer(composite, layer, None, 0.0)
        if node is not None and node.GetScene() is self._scene:
            self._outOfFolder(node)
        self._removeWithDisplays(node)
        self._removeWithDisplays(self._legends.pop(name, None))
        self._arrangeLegends()
        if table is not None and table.GetScene() is self._scene:
            self._scene.RemoveNode(table)
        if not self._nodes:
            self._removeFolder()

    def _removeWithDisplays(self, node: Any) -> None:
        """The node first: a slice layer would give a volume without display another one."""
        if node is None or node.GetScene() is not self._scene:
            return
        displays = [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]
        self._scene.RemoveNode(node)
        for display in displays:
            if display is not None and display.GetScene() is self._scene:
                self._scene.RemoveNode(display)

    def clear(self) -> None:
        for name in list(self._nodes):
            self.remove(name)
        self._removeFolder()

    def setOpacity(self, name: str, opacity: float) -> None:
        for composite, layer in self._layersOf(self._nodes.get(name)):
            _setLayer(composite, layer, self._nodes[name].GetID(), opacity)

    @property
    def names(self) -> list[str]:
        return list(self._nodes)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _newNode(self, name: str, title: str, color: Color) -> Any:
        table = self._tables[name] = self._newTable(title, color)
        node = self._scene.CreateNodeByClass("vtkMRMLScalarVolumeNode")
        node.UnRegister(None)
        node.SetName(title)
        node.SetSaveWithScene(False)  # computed anew at the next prompt; a saved one would say too much of a new mask
        self._scene.AddNode(node)
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetAndObserveColorNodeID(table.GetID())
        display.SetAutoWindowLevel(False)
        display.SetWindowLevelMinMax(0.0, 1.0)
        display.SetInterpolate(True)
        display.SetThreshold(LOWEST, 1.0)
        display.SetApplyThreshold(True)
        self._legends[name] = self._newLegend(title, table)
        self._arrangeLegends()
        return node

    def _newTable(self, title: str, color: Color) -> Any:
        """From the expert's colour, darkened, to itself: black would hide the image where little is to be said.

        A colour that grows out of nothing would be better; Slicer's slice views take any transparency for none.
        """
        table = self._scene.CreateNodeByClass("vtkMRMLColorTableNode")
        table.UnRegister(None)
        table.SetName(title)
        table.SetTypeToUser()
        table.SetHideFromEditors(True)
        table.SetSaveWithScene(False)
        table.SetNumberOfColors(256)
        table.GetLookupTable().SetTableRange(0, 255)
        for n in range(256):
            shade = FAINTEST + (1 - FAINTEST) * n / 255
            table.SetColor(n, str(n), *((0.15 + 0.85 * c) * shade for c in color), 1.0)
        self._scene.AddNode(table)
        return table

    def _newLegend(self, title: str, table: Any) -> Any:
        """A legend on a model without a surface: Slicer draws those of volumes for background and foreground only."""
        logic = getattr(slicer, "vtkSlicerColorLogic", None)
        if not self._withLegends or not hasattr(logic, "AddDefaultColorLegendDisplayNode"):
            return None
        carrier = self._scene.CreateNodeByClass("vtkMRMLModelNode")
        carrier.UnRegister(None)
        carrier.SetName(f"{title} legend")
        carrier.SetHideFromEditors(True)
        carrier.SetSaveWithScene(False)
        self._scene.AddNode(carrier)
        carrier.CreateDefaultDisplayNodes()
        display = carrier.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetAndObserveColorNodeID(table.GetID())
        display.SetScalarRangeFlag(display.UseManualScalarRange)
        display.SetScalarRange(0.0, 1.0)
        display.SetVisibility2D(True)
        legend = logic.AddDefaultColorLegendDisplayNode(carrier)
        legend.SetSaveWithScene(False)
        legend.SetTitleText(title)
        legend.SetLabelFormat("%.1f")
        legend.SetNumberOfLabels(3)
        legend.GetTitleTextProperty().SetFontSize(TITLE_SIZE)
        legend.GetLabelTextProperty().SetFontSize(LABEL_SIZE)
        return carrier

    def _arrangeLegends(self) -> None:
        """One below the other at the right edge of the views."""
        legends = [_legendOf(carrier) for carrier in self._legends.values() if carrier is not None]
        steps = max(LEGENDS, len(legends) - 1)
        for n, legend in enumerate(legends):
            legend.SetPosition(0.98, TOP * (1 - n / steps))
            legend.SetSize(0.1, 0.2 * LEGENDS / steps)

    def _legendIntoViews(self, carrier: Any) -> None:
        """Into the slice views, not into 3D."""
        legend = _legendOf(carrier)
        views = self._scene.GetNodesByClass("vtkMRMLSliceNode")
        views.UnRegister(None)
        legend.RemoveAllViewNodeIDs()
        for n in range(views.GetNumberOfItems()):
            legend.AddViewNodeID(views.GetItemAsObject(n).GetID())

    def _intoFolder(self, node: Any, segmentName: str) -> None:
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self._scene)
        if hierarchy is None:
            return
        if not self._folder or not hierarchy.GetItemName(self._folder):
            self._folder = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), FOLDER.format(segment=segmentName))
        if hierarchy.GetItemName(self._folder) != FOLDER.format(segment=segmentName):
            hierarchy.SetItemName(self._folder, FOLDER.format(segment=segmentName))
        item = hierarchy.GetItemByDataNode(node) or hierarchy.CreateItem(self._folder, node)
        if hierarchy.GetItemParent(item) != self._folder:
            hierarchy.SetItemParent(item, self._folder)

    def _outOfFolder(self, node: Any) -> None:
        """Slicer's window does that by itself; without it the item of a removed node would stay."""
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self._scene)
        item = hierarchy.GetItemByDataNode(node) if hierarchy is not None else 0
        if item and not self._scene.IsClosing():
            hierarchy.RemoveItem(item, False, False)

    def _removeFolder(self) -> None:
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self._scene)
        if self._folder and hierarchy is not None and not self._scene.IsClosing():
            hierarchy.RemoveItem(self._folder)
        self._folder = 0

    # -- views -------------------------------------------------------------------------------------------------------

    def _composites(self) -> Iterator[Any]:
        nodes = self._scene.GetNodesByClass("vtkMRMLSliceCompositeNode")
        nodes.UnRegister(None)
        for n in range(nodes.GetNumberOfItems()):
            yield nodes.GetItemAsObject(n)

    def _intoViews(self, node: Any, opacity: float) -> None:
        """Into all slice views, those that came since as well."""
        shown = dict(self._layersOf(node))
        for composite in self._composites():
            layer = shown.get(composite)
            if layer is None:
                layer = _freeLayer(composite)
            _setLayer(composite, layer, node.GetID(), opacity)

    def _layersOf(self, node: Any) -> Iterator[tuple[Any, int]]:
        if node is None:
            return
        for composite in self._composites():
            for layer in _layers(composite):
                if _layerVolume(composite, layer) == node.GetID():
                    yield composite, layer


def _legendOf(carrier: Any) -> Any:
    return slicer.vtkSlicerColorLogic.GetColorLegendDisplayNode(carrier)


def _layers(composite: Any) -> range:
    """Those that overlays use: Slicer before 5.10 has the foreground only."""
    if not hasattr(composite, "SetNthLayerVolumeID"):
        return range(1, 2)
    return range(FIRST_LAYER, FIRST_LAYER + min(composite.GetNumberOfAdditionalLayers(), LAST_LAYER) + 1)


def _layerVolume(composite: Any, layer: int) -> str | None:
    if layer == 1:
        return composite.GetForegroundVolumeID()
    return composite.GetNthLayerVolumeID(layer)


def _freeLayer(composite: Any) -> int:
    """The first one without a volume."""
    layers = _layers(composite)
    return next((layer for layer in layers if not _layerVolume(composite, layer)), layers[-1])


def _setLayer(composite: Any, layer: int, volumeId: str | None, opacity: float) -> None:
    if layer == 1:
        composite.SetForegroundVolumeID(volumeId)
        composite.SetForegroundOpacity(opacity)
        return
    if composite.GetNthLayerVolumeID(layer) != volumeId:
        composite.SetNthLayerVolumeID(layer, volumeId)
    composite.SetNthLayerOpacity(layer, opacity)


def _image(values: np.ndarray) -> Any:
    """float32, 0..1."""
    k, j, i = values.shape
    image = vtk.vtkImageData()
    image.SetDimensions(i, j, k)
    image.AllocateScalars(vtk.VTK_FLOAT, 1)
    voxels = vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(values.shape)
    np.multiply(values, np.float32(1 / 255) if values.dtype == np.uint8 else np.float32(1), out=voxels)
    return image
