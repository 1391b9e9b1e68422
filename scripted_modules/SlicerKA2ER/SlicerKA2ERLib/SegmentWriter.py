"""Segments <-> crops on the volume's voxel grid: only the changed box is read or written.

Writing goes through Slicer's own `vtkSlicerSegmentEditorLogic`, so that undo states, layers and status are Slicer's.
The editable area of the Segment Editor is looked up in the crop alone: over a whole CT Slicer takes a second for it.
Which neighbours lose voxels is the engine's decision: here no segment is changed but the one that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import slicer
import vtk
import vtk.util.numpy_support

from KA2ERSegment.errors import SessionStateError
from KA2ERSegment.geometry import BoolArray, Box, FloatArray
from SlicerKA2ERLib.VolumeIO import VolumeData, ijkToRas, matrixBetween, toNumpy, toVtk

LABELMAP = "Binary labelmap"
LOCKED = "KA2ER.Locked"
"""Tag of segments that must stay as they are; saved with them. Slicer itself knows no such lock."""
NOTHING = Box((0, 0, 0), (0, 0, 0))
LARGE = 500_000
"""Voxels of a box from which on Slicer's own way of writing takes more than the blink of 20 ms."""


@dataclass(frozen=True, eq=False)
class Written:
    """What became of a crop.

    Args:
        equal: whether the segment is now in the box what was asked for; masking may have kept it from that.
        changed: (K, J, I) bool in the box: voxels that are different now.
    """

    equal: bool
    changed: BoolArray = field(repr=False)


class SegmentWriter:
    """Crops of segments, on the voxel grid of one volume.

    Args:
        scene: the MRML scene.
        applicationLogic: Slicer's.
    """

    def __init__(self, scene: Any, applicationLogic: Any) -> None:
        self._scene = scene
        self._editor = slicer.vtkSlicerSegmentEditorLogic()
        self._editor.SetMRMLApplicationLogic(applicationLogic)
        self._editor.SetMRMLScene(scene)
        # Not in the scene: the user's own editor node is read, never written.
        self._parameters = slicer.vtkMRMLSegmentEditorNode()
        self._parameters.SetOverwriteMode(self._parameters.OverwriteNone)
        self.saveStateForUndo: Callable[[], Any] | None = None
        """Of the Segment Editor on the screen, so that its Undo knows our writes: its widget's `saveStateForUndo`."""

    # -- reading -----------------------------------------------------------------------------------------------------

    def mtime(self, node: Any, segmentId: str) -> int:
        """Another one whenever the segment's voxels may have changed; 0 where it has none."""
        labelmap = _labelmap(node, segmentId)
        if labelmap is None:
            return 0
        scalars = labelmap.GetPointData().GetScalars()
        return max(labelmap.GetMTime(), scalars.GetMTime() if scalars else 0)

    def labels(
        self, node: Any, segmentId: str, volumeNode: Any, data: VolumeData, layers: dict[Any, tuple[Box, np.ndarray]]
    ) -> tuple[Box, np.ndarray, int]:
        """A copy of the label values around a segment, and which value is the segment's.

        Args:
            layers: copies made so far by layer: a hundred segments of one layer are one copy.
        """
        labelmap = _labelmap(node, segmentId)
        value = node.GetSegmentation().GetSegment(segmentId).GetLabelValue()
        if labelmap not in layers:
            box, values, _ = self._values(node, segmentId, volumeNode, data)
            layers[labelmap] = box, values.copy()
        return (*layers[labelmap], value)

    def part(self, node: Any, segmentId: str, box: Box, volumeNode: Any, data: VolumeData) -> BoolArray:
        """What of the segment lies in a box of the volume: (K, J, I) bool."""
        whole, values, value = self._values(node, segmentId, volumeNode, data)
        result = np.zeros(box.shape_kji, dtype=bool)
        common = whole.intersect(box)
        if common.size:
            np.equal(common.within(whole).crop(values), value, out=result[common.within(box).slices])
        return result

    def _values(self, node: Any, segmentId: str, volumeNode: Any, data: VolumeData) -> tuple[Box, np.ndarray, int]:
        """Box in the volume, label values in it (a view where the grids agree), and the value of the segment."""
        nothing = NOTHING, np.zeros((0, 0, 0), dtype=np.uint8), 1
        labelmap = _labelmap(node, segmentId)
        if labelmap is None or labelmap.GetPointData().GetScalars() is None:
            return nothing
        value = node.GetSegmentation().GetSegment(segmentId).GetLabelValue()
        offset = _offset(labelmap, gridInSegmentation(node, volumeNode, data))
        if offset is None:
            labelmap = _resampled(labelmap, gridInSegmentation(node, volumeNode, data), data.grid.box)
            offset = (0, 0, 0)
        i0, i1, j0, j1, k0, k1 = labelmap.GetExtent()
        box = Box((i0, j0, k0), (i1 + 1, j1 + 1, k1 + 1))
        scalars = labelmap.GetPointData().GetScalars()
        if box.size == 0 or scalars is None:
            return nothing
        values = vtk.util.numpy_support.vtk_to_numpy(scalars).reshape(box.shape_kji)
        box = box.shift(offset)
        inside = box.intersect(data.grid.box)
        return inside, inside.within(box).crop(values), value

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(
        self,
        node: Any,
        segmentId: str,
        box: Box,
        mask: BoolArray,
        volumeNode: Any,
        data: VolumeData,
        editorNode: Any,
        keptOff: Iterable[str] = (),
    ) -> Written:
        """Make a segment be `mask` in a box, as far as the Segment Editor's masking allows.

        Args:
            box: of the volume.
            mask: (K, J, I) bool in it.
            editorNode: vtkMRMLSegmentEditorNode whose editable area and intensity range count; None for no limits.
            keptOff: segments from which it takes nothing; a locked one stays as it is whatever is asked for.
        """
        before = self.part(node, segmentId, box, volumeNode, data)
        changed = before ^ mask
        if not changed.any():
            return Written(True, changed)
        if isLocked(node, segmentId):
            return Written(False, np.zeros_like(changed))
        editable = self._editable(node, segmentId, box, volumeNode, data, editorNode)
        equal = True
        taken = self.covered(node, [other for other in keptOff if other != segmentId], box, volumeNode, data)
        if taken is not None:
            allowed = before | ~taken  # what it already shares with them, it may lose
            editable = allowed if editable is None else editable & allowed
        if editable is not None:
            equal = not (changed & ~editable).any()
            changed &= editable
            if not changed.any():
                return Written(equal, changed)
        if _sharesLayer(node, segmentId):
            node.GetSegmentation().SeparateSegmentLabelmap(segmentId)
        if box.size > LARGE and self._replace(node, segmentId, box, mask & changed, changed, volumeNode, data):
            return Written(equal, changed)
        self._parameters.SetAndObserveSegmentationNode(node)
        self._parameters.SetSelectedSegmentID(segmentId)
        self._editor.SetSegmentEditorNode(self._parameters)
        grid = gridInSegmentation(node, volumeNode, data)
        for voxels, mode in (
            (changed & ~before, self._editor.ModificationModeAdd),
            (changed & before, self._editor.ModificationModeRemove),
        ):
            tight = Box.around(voxels)
            if tight is not None:
                image = orientedImage(tight.crop(voxels), tight.shift(box.start), grid)
                self._editor.ModifySegmentByLabelmap(node, segmentId, image, mode, True, True)
        return Written(equal, changed)

    def _replace(
        self,
        node: Any,
        segmentId: str,
        box: Box,
        added: BoolArray,
        changed: BoolArray,
        volumeNode: Any,
        data: VolumeData,
    ) -> bool:
        """Write a large box with one pass over the voxels, where Slicer's filters take five and a noticeable moment.

        Returns:
            False where only Slicer's own way will do: other representations to update, or another grid.
        """
        segment = node.GetSegmentation().GetSegment(segmentId)
        labelmap, grid = _labelmap(node, segmentId), gridInSegmentation(node, volumeNode, data)
        whole, values, value = self._values(node, segmentId, volumeNode, data)
        if labelmap is None or _hasSurfaces(node) or (whole.size and _offset(labelmap, grid) is None):
            return False  # a labelmap that is exchanged makes Slicer drop the surfaces of all segments
        reach = whole.union(box)
        labels = np.zeros(reach.shape_kji, dtype=np.uint8)
        if whole.size:
            whole.within(reach).paste(values == value, labels)
        inside = labels[box.within(reach).slices]
        inside[changed] = added[changed]
        logic, segmentation = slicer.vtkSlicerSegmentationsModuleLogic, node.GetSegmentation()
        segment.SetLabelValue(1)
        labelmap.ShallowCopy(orientedImage(labels, reach, grid))  # tells the segmentation by itself
        if logic.GetSegmentStatus(segment) == logic.NotStarted:
            logic.SetSegmentStatus(segment, logic.InProgress)
        segmentation.InvokeEvent(segmentation.RepresentationModified, segmentId)
        return True

    def release(self) -> None:
        """Hold no node any more."""
        self._editor.SetSegmentEditorNode(None)
        self._parameters.SetAndObserveSegmentationNode(None)

    def _editable(
        self, node: Any, segmentId: str, box: Box, volumeNode: Any, data: VolumeData, editorNode: Any
    ) -> BoolArray | None:
        """Where the Segment Editor lets a segment change, in a box; None for everywhere."""
        if editorNode is None:
            return None
        editable = self._editableArea(node, segmentId, box, volumeNode, data, editorNode)
        if editorNode.GetSourceVolumeIntensityMask():
            low, high = editorNode.GetSourceVolumeIntensityMaskRange()
            voxels = box.crop(data.array)
            inRange = (voxels >= low) & (voxels <= high)
            editable = inRange if editable is None else editable & inRange
        return editable

    def _editableArea(
        self, node: Any, segmentId: str, box: Box, volumeNode: Any, data: VolumeData, editorNode: Any
    ) -> BoolArray | None:
        mode = editorNode.GetMaskMode()
        segments = segmentIds(node)
        if mode in (node.EditAllowedInsideVisibleSegments, node.EditAllowedOutsideVisibleSegments):
            display = node.GetDisplayNode()
            segments = [s for s in segments if display is None or display.GetSegmentVisibility(s)]
        if mode == node.EditAllowedInsideSingleSegment:
            segments = [s for s in segments if s == editorNode.GetMaskSegmentID()]
        inside = mode in (
            node.EditAllowedInsideAllSegments,
            node.EditAllowedInsideVisibleSegments,
            node.EditAllowedInsideSingleSegment,
        )
        if not inside:
            segments = [s for s in segments if s != segmentId]
            if mode == node.EditAllowedEverywhere or not segments:
                return None
        covered = self.covered(node, segments, box, volumeNode, data)
        if covered is None:
            covered = np.zeros(box.shape_kji, dtype=bool)
        return covered if inside else ~covered

    def covered(
        self, node: Any, segments: Iterable[str], box: Box, volumeNode: Any, data: VolumeData
    ) -> BoolArray | None:
        """Where in a box any of some segments is: (K, J, I) bool; None for no segments."""
        result: BoolArray | None = None
        for segmentId in segments:
            part = self.part(node, segmentId, box, volumeNode, data)
            result = part if result is None else result | part
        return result


def segmentIds(node: Any) -> list[str]:
    """Of a segmentation node, in its order."""
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegmentID(n) for n in range(segmentation.GetNumberOfSegments())]


def isLocked(node: Any, segmentId: str) -> bool:
    """Whether a segment must stay as it is."""
    segment = node.GetSegmentation().GetSegment(segmentId)
    return segment is not None and bool(segment.HasTag(LOCKED))


def newSegment(node: Any, name: str = "", segmentId: str = "", color: Any = None) -> str:
    """An empty segment in a layer of its own: Slicer would put it into another one's, on whatever grid that has."""
    segmentation = node.GetSegmentation()
    made = (
        segmentation.AddEmptySegment(segmentId, name, color) if color else segmentation.AddEmptySegment(segmentId, name)
    )
    if _sharesLayer(node, made):
        segment = segmentation.GetSegment(made)
        segment.RemoveRepresentation(LABELMAP)
        segment.SetLabelValue(1)
        segment.AddRepresentation(LABELMAP, slicer.vtkOrientedImageData())
    return made


def newSegmentation(scene: Any, volumeNode: Any, name: str) -> Any:
    """A segmentation on the volume's grid, under its transform, that DICOM export finds its source of."""
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    node.CreateDefaultDisplayNodes()
    bindToVolume(node, volumeNode)
    return node


def bindToVolume(node: Any, volumeNode: Any) -> None:
    """Give a segmentation the volume's grid, its parent transform and its place in the subject hierarchy.

    With different parent transforms Slicer's own import of label arrays applies the transform twice.
    """
    node.SetReferenceImageGeometryParameterFromVolumeNode(volumeNode)
    parent = volumeNode.GetParentTransformNode()
    node.SetAndObserveTransformNodeID(parent.GetID() if parent else None)
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    if hierarchy is not None:
        own, volumes = hierarchy.GetItemByDataNode(node), hierarchy.GetItemByDataNode(volumeNode)
        if own and volumes:
            hierarchy.SetItemParent(own, hierarchy.GetItemParent(volumes))


def requireLabelmaps(node: Any) -> None:
    """Raises SessionStateError where the segmentation's voxels are not its source (it came as surfaces)."""
    segmentation = node.GetSegmentation()
    if segmentation.GetNumberOfSegments() and segmentation.GetSourceRepresentationName() != LABELMAP:
        message = (
            f"the segmentation must be made of voxels, its source is {segmentation.GetSourceRepresentationName()!r}. "
            "Make the binary labelmap its source (module Segmentations), or choose another segmentation."
        )
        raise SessionStateError(message)


def orientedImage(mask: BoolArray, box: Box, gridMatrix: FloatArray) -> Any:
    """A crop as Slicer's oriented image: extent of the box, geometry of the whole grid."""
    image = slicer.vtkOrientedImageData()
    image.SetGeometryFromImageToWorldMatrix(toVtk(gridMatrix))
    (i0, j0, k0), (i1, j1, k1) = box.start, box.stop
    image.SetExtent(i0, i1 - 1, j0, j1 - 1, k0, k1 - 1)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
    voxels = vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())
    voxels.reshape(mask.shape)[...] = mask
    return image


def _labelmap(node: Any, segmentId: str) -> Any:
    segment = node.GetSegmentation().GetSegment(segmentId)
    return segment.GetRepresentation(LABELMAP) if segment is not None else None


def _sharesLayer(node: Any, segmentId: str) -> bool:
    labelmap = _labelmap(node, segmentId)
    others = (other for other in segmentIds(node) if other != segmentId)
    return labelmap is not None and any(_labelmap(node, other) is labelmap for other in others)


def _hasSurfaces(node: Any) -> bool:
    """Whether any segment is shown in 3D, or has anything else that is made from its voxels."""
    for segmentId in segmentIds(node):
        names: list[str] = []
        node.GetSegmentation().GetSegment(segmentId).GetContainedRepresentationNames(names)
        if len(names) > 1:
            return True
    return False


def gridInSegmentation(node: Any, volumeNode: Any, data: VolumeData) -> FloatArray:
    """4x4 from the volume's voxels to the segmentation's local RAS."""
    if node.GetParentTransformNode() is volumeNode.GetParentTransformNode():
        return data.grid.ijk_to_ras
    return matrixBetween(volumeNode, node) @ ijkToRas(volumeNode)


def _offset(labelmap: Any, grid: FloatArray) -> tuple[int, int, int] | None:
    """Voxels from the labelmap's index to the volume's; None where the grids are not the same."""
    matrix = vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(matrix)
    between = np.linalg.inv(grid) @ toNumpy(matrix)
    extent = np.abs(np.array(labelmap.GetExtent())).max() + 1
    shift = np.rint(between[:3, 3])
    if np.abs(between[:3, :3] - np.eye(3)).max() * extent > 0.01 or np.abs(between[:3, 3] - shift).max() > 0.01:
        return None
    i, j, k = shift.astype(int).tolist()
    return i, j, k


def _resampled(labelmap: Any, grid: FloatArray, whole: Box) -> Any:
    """The labelmap on the volume's grid, nearest voxel, around its own extent only."""
    matrix = vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(matrix)
    i0, i1, j0, j1, k0, k1 = labelmap.GetExtent()
    corners = np.array([(i, j, k, 1) for i in (i0 - 1, i1 + 1) for j in (j0 - 1, j1 + 1) for k in (k0 - 1, k1 + 1)])
    index = (corners @ (np.linalg.inv(grid) @ toNumpy(matrix)).T)[:, :3]
    (a, b, c), (d, e, f) = np.floor(index.min(axis=0)).astype(int), np.ceil(index.max(axis=0)).astype(int) + 1
    box = Box((int(a), int(b), int(c)), (int(d), int(e), int(f))).intersect(whole)
    empty = slicer.vtkOrientedImageData()
    if box.size == 0:
        return empty
    reference = orientedImage(np.zeros(box.shape_kji, dtype=bool), box, grid)
    slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage(labelmap, reference, empty, False)
    return empty
