"""Volumes that change over time: one segmentation per frame, and from one frame to the next.

Slicer shows a sequence through proxy nodes: the volume that the user sees is a proxy, and so the segmentation becomes
one, with a sequence of its own that keeps what was done to each frame. Prompts belong to the frame they were placed on.
"""

from __future__ import annotations

from typing import Any

from KA2ERSegment.errors import SessionStateError


class SequenceLogic:
    """Frames of the logic's volume.

    Args:
        scene: the MRML scene.
        logic: `PromptLogic`.
    """

    def __init__(self, scene: Any, logic: Any) -> None:
        self._scene, self._logic = scene, logic
        self._frame = ""

    @property
    def browser(self) -> Any:
        """The vtkMRMLSequenceBrowserNode that the volume is a proxy of; None where it is none."""
        volume = self._logic.volumeNode
        if volume is None:
            return None
        nodes = self._scene.GetNodesByClass("vtkMRMLSequenceBrowserNode")
        nodes.UnRegister(None)
        for n in range(nodes.GetNumberOfItems()):
            browser = nodes.GetItemAsObject(n)
            if browser.IsProxyNodeID(volume.GetID()):
                return browser
        return None

    @property
    def hasFrames(self) -> bool:
        browser = self.browser
        return browser is not None and browser.GetNumberOfItems() > 1

    @property
    def frame(self) -> str:
        """The index value of the frame on the screen; "" where there are no frames."""
        browser = self.browser
        if browser is None:
            return ""
        master = browser.GetMasterSequenceNode()
        item = browser.GetSelectedItemNumber()
        return str(master.GetNthIndexValue(item)) if master is not None and item >= 0 else ""

    def keepFrames(self) -> None:
        """From now on each frame has a segmentation of its own; the present one is this frame's."""
        browser, segmentation = self._requireBrowser(), self._logic.requireSegmentation()
        if browser.IsProxyNodeID(segmentation.GetID()):
            return
        master = browser.GetMasterSequenceNode()
        frames = self._scene.AddNewNodeByClass("vtkMRMLSequenceNode", f"{segmentation.GetName()} frames")
        frames.SetIndexName(master.GetIndexName())
        frames.SetIndexUnit(master.GetIndexUnit())
        frames.SetIndexType(master.GetIndexType())
        frames.SetDataNodeAtValue(segmentation, self.frame)
        browser.AddSynchronizedSequenceNode(frames)
        browser.AddProxyNode(segmentation, frames, False)
        browser.SetSaveChanges(frames, True)
        browser.SetOverwriteProxyName(frames, False)
        browser.SetMissingItemMode(frames, browser.MissingItemCreateFromPrevious)

    def propagate(self) -> None:
        """Segment the next frame from the masks of this one and their positive points.

        Raises:
            SessionStateError: no frames, or no next one.
        """
        browser = self._requireBrowser()
        if browser.GetSelectedItemNumber() + 1 >= browser.GetNumberOfItems():
            message = "there must be a next frame; this is the last one."
            raise SessionStateError(message)
        self.keepFrames()
        seeds = self._logic.seedsOfFrame()
        if not seeds:
            message = "there must be a segment with voxels to propagate. Segment this frame first."
            raise SessionStateError(message)
        browser.SelectNextItem(1)
        self.poll()
        for seed in seeds:
            self._logic.giveSeed(seed)

    def begin(self) -> str:
        """The logic has another volume: the frame of it that is on the screen."""
        self._frame = self.frame
        return self._frame

    def poll(self) -> None:
        """Another frame is another volume: the engine is told all anew, and other prompts count."""
        frame = self.frame
        if frame != self._frame:
            self._frame = frame
            self._logic.setFrame(frame)

    def _requireBrowser(self) -> Any:
        browser = self.browser
        if browser is None:
            message = (
                "the volume must be a frame of a sequence, it is a single one. Choose the sequence's proxy volume."
            )
            raise SessionStateError(message)
        return browser
