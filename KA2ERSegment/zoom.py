"""Where the network looks: is a patch still right for an object, which of several answers is surest, what is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from KA2ERSegment.geometry import BoolArray, Box
from KA2ERSegment.prediction import FloatImage, expected_dice, sigmoid
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompt_encoder import PatchPrompts
from KA2ERSegment.rasterise import Evidence
from KA2ERSegment.volume import Volume


@dataclass(frozen=True, slots=True)
class Answer:
    """The network's answer for one object on one patch.

    Args:
        patch: that it saw.
        logits: (S, S, S) float32.
        prompts: as the network saw them; None where it was not asked, and a hand drew the mask.
        experts: that took part.
        weights: (arms, n, n, n) float32, the shares of the foundation alone and of each of them.
        gate: weight of each mask decoder by name, "general" first; empty without a gate.
        decoders: those that were heard, with their shares in the mask.
        votes: (voters, n, n, n) float32, the shares of the experts of the voting head; of none without one.
    """

    patch: Patch
    logits: FloatImage
    prompts: PatchPrompts | None
    experts: tuple[str, ...]
    weights: FloatImage
    gate: Mapping[str, float] = field(default_factory=dict)
    decoders: Mapping[str, float] = field(default_factory=lambda: {"general": 1.0})
    votes: FloatImage = field(default_factory=lambda: np.zeros((0, 1, 1, 1), dtype=np.float32))


def fits(patch: Patch, newest: Evidence) -> bool:
    """Whether the newest prompt lies well inside a patch (a negative one may lie anywhere)."""
    regions = [box for box, _, sign in newest.regions if sign > 0]
    clicks = [ijk for ijk, sign in newest.clicks if sign > 0]
    inside = all(patch.contains(box.start) and patch.contains(np.array(box.stop) - 1) for box in regions)
    return inside and all(patch.contains(ijk, inset=0.04) for ijk in clicks)


def trust(answer: Answer) -> float:
    """How much an answer to a first click is worth: the Dice to expect, less where the object is a dot or cut off."""
    mask = answer.logits > 0
    extent = Box.around(mask)
    if extent is None:
        return -1.0
    expected = expected_dice(sigmoid(answer.logits.copy()), mask)
    small = min(1.0, max(extent.shape_kji) / mask.shape[0] / 0.2)
    cut = sum(float(face.mean()) for face in _faces(mask))
    return float(expected * small - 0.3 * min(1.0, cut))


def regrown(answer: Answer, evidence: Evidence, former: Answer | None, volume: Volume, margin: float) -> Patch | None:
    """A better patch where the mask reaches its border or leaves most of it empty; None where it fits.

    All positive prompts stay inside. A patch that an earlier prompt settled on is given up for a smaller one only
    when most of it is empty: its features are there already.
    """
    found, extent = mask_faces(answer), evidence.extent()
    if found is None or extent is None:
        return None
    start = np.minimum(found[0], extent.start)
    stop = np.maximum(found[1], extent.stop)
    first, last = answer.patch.faces
    reach = last - first
    size = np.array(volume.shape_ijk, dtype=float)
    faces = [float(face.mean()) for face in _faces(answer.logits > 0)]  # K, K, J, J, I, I
    low = (np.array([faces[4], faces[2], faces[0]]) > 0.004) & (first > 0.5)
    high = (np.array([faces[5], faces[3], faces[1]]) > 0.004) & (last < size - 0.5)
    if low.any() or high.any():
        start = np.where(low, np.maximum(np.minimum(start, first - 0.4 * reach), 0), start)
        stop = np.where(high, np.minimum(np.maximum(stop, last + 0.4 * reach), size), stop)
        return Patch.fit(start, stop, volume.spacing, answer.patch.size, 0.1)
    settled = former is not None and former.patch == answer.patch
    if ((stop - start) / reach).max() < (0.2 if settled else 0.4) and (np.array(answer.patch.step) > 0.5).any():
        return Patch.fit(start, stop, volume.spacing, answer.patch.size, margin)
    return None


def _faces(mask: BoolArray) -> list[BoolArray]:
    return [mask[0], mask[-1], mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]]


def mask_faces(answer: Answer) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Outer corners of the mask in continuous voxel index of the canonical volume (IJK)."""
    extent = Box.around(answer.logits > 0)
    if extent is None:
        return None
    origin, step = np.array(answer.patch.origin), np.array(answer.patch.step)
    return origin + (np.array(extent.start) - 0.5) * step + 0.5, origin + (np.array(extent.stop) - 0.5) * step + 0.5


def mask_voxels(answer: Answer) -> Box:
    """Voxels that can lie in the mask: between the positive samples and their neighbours."""
    extent = Box.around(answer.logits > 0)
    if extent is None:
        return Box((0, 0, 0), (0, 0, 0))
    origin, step = np.array(answer.patch.origin), np.array(answer.patch.step)
    start = np.floor(origin + (np.array(extent.start) - 1) * step).astype(int).tolist()
    stop = (np.ceil(origin + np.array(extent.stop) * step).astype(int) + 1).tolist()
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
