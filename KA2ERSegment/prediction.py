"""`Prediction`: what one prompt gave, on the volume's own grid, computed only as far as somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.preprocessing import Patch, upsample
from KA2ERSegment.volume import Volume

FloatImage = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class PackedMask:
    """A mask as bits, cropped to its box: histories of large organs stay small.

    Args:
        box: of the crop, on a canonical volume.
        bits: of `numpy.packbits`.
    """

    box: Box
    bits: npt.NDArray[np.uint8] = field(repr=False)

    @classmethod
    def pack(cls, box: Box, mask: BoolArray) -> PackedMask:
        """Crop to the true voxels and pack; `mask` has the box's shape."""
        tight = Box.around(mask)
        if tight is None:
            return cls(Box(box.start, box.start), np.zeros(0, dtype=np.uint8))
        return cls(tight.shift(box.start), np.packbits(tight.crop(mask)))

    def unpack(self) -> BoolArray:
        """(K, J, I) bool of the box's shape."""
        bits = np.unpackbits(self.bits, count=self.box.size)
        return bits.view(np.bool_).reshape(self.box.shape_kji)

    def contains(self, ijk: Ijk) -> bool:
        """Whether a voxel lies in the mask; looks at one bit."""
        if not self.box.contains(ijk):
            return False
        i, j, k = (x - a for x, a in zip(ijk, self.box.start, strict=True))
        _, rows, columns = self.box.shape_kji
        at = (k * rows + j) * columns + i
        return bool(self.bits[at >> 3] >> (7 - (at & 7)) & 1)

    def on(self, box: Box) -> BoolArray:
        """The mask on another box of the same volume."""
        out = np.zeros(box.shape_kji, dtype=bool)
        common = self.box.intersect(box)
        if common.size:
            own = common.within(self.box).crop(self.unpack())
            common.within(box).paste(own, out)
        return out


@dataclass(frozen=True, slots=True)
class ExpertOpinion:
    """One arm of the amalgamation on one prediction.

    Args:
        probability: (K, J, I) float32, what the model answers with this arm alone; 0 outside the patch.
        weight: (K, J, I) float32, its share in the decision at each voxel; 0 outside the patch.
        mean_weight: its mean share inside the mask (inside the patch where the mask is empty).
    """

    probability: FloatImage = field(repr=False)
    weight: FloatImage = field(repr=False)
    mean_weight: float


class ExpertOpinions(Mapping[str, ExpertOpinion]):
    """Opinions by name, each computed when it is first asked for.

    Args:
        names: of the arms; the first is the foundation alone ("no expert").
        compute: the arm's logits and weight on the patch, (S, S, S) float32 each, by its index.
        prediction: they belong to.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        compute: Callable[[int], tuple[FloatImage, FloatImage]],
        prediction: Prediction,
    ) -> None:
        self._names, self._compute, self._prediction = names, compute, prediction
        self._known: dict[str, ExpertOpinion] = {}

    def __getitem__(self, name: str) -> ExpertOpinion:
        if name not in self._known:
            if name not in self._names:
                raise KeyError(name)
            self._known[name] = self._opinion(self._names.index(name))
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would compute the opinion to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _opinion(self, arm: int) -> ExpertOpinion:
        prediction = self._prediction
        logits, weight = self._compute(arm)
        box = prediction.patch.box(prediction.canonical.shape_kji)
        share = upsample(weight, prediction.patch, box)
        inside = prediction.packed.on(box)
        mean = float(share[inside].mean() if inside.any() else share.mean())
        probability = _sigmoid(upsample(logits, prediction.patch, box))
        return ExpertOpinion(prediction.on_volume(box, probability), prediction.on_volume(box, share), mean)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask of one object after one prompt.

    Args:
        volume: it belongs to.
        canonical: the same volume in canonical axes.
        name: of the object.
        patch: that the network saw.
        logits: (S, S, S) float32 on the patch.
        packed: the final mask, prompts honoured and overlaps resolved, on the canonical volume.
        changed: half-open box on the volume's own grid: outside it every object's mask is what it was before.
        quality: Dice that the model expects of this mask, 0..1.
        arms: names of the arms of the amalgamation.
        opinion: computes one arm's logits and weight on the patch.
    """

    volume: Volume = field(repr=False)
    canonical: Volume = field(repr=False)
    name: str
    patch: Patch = field(repr=False)
    logits: FloatImage = field(repr=False)
    packed: PackedMask = field(repr=False)
    changed: Box
    quality: float
    arms: tuple[str, ...] = field(repr=False)
    opinion: Callable[[int], tuple[FloatImage, FloatImage]] = field(repr=False)

    @property
    def mask(self) -> BoolArray:
        """(K, J, I) bool on the volume's own grid; a new array at each call."""
        return self.on_volume(self.packed.box, self.packed.unpack())

    @property
    def box(self) -> Box:
        """Smallest box around the mask on the volume's own grid; of size 0 where the mask is empty."""
        return self.volume.from_canonical_box(self.packed.box)

    @property
    def probability(self) -> FloatImage:
        """(K, J, I) float32 in 0..1; 0 outside the patch; above one half exactly where the mask is true."""
        box = self.patch.box(self.canonical.shape_kji)
        probability = _sigmoid(upsample(self.logits, self.patch, box))
        mask = self.packed.on(box)
        half = np.float32(0.5)
        np.copyto(probability, np.maximum(probability, np.nextafter(half, np.float32(1))), where=mask)
        np.copyto(probability, np.minimum(probability, half), where=~mask)
        return self.on_volume(box, probability)

    @cached_property
    def experts(self) -> Mapping[str, ExpertOpinion]:
        """Each expert's opinion by name, "foundation" (no expert) first; computed when asked for."""
        return ExpertOpinions(self.arms, self.opinion, self)

    def on_volume(self, box: Box, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """An array on the volume's own grid, zero but for `values` in a box of the canonical volume."""
        out = np.zeros(self.volume.shape_kji, dtype=values.dtype)
        if box.size:
            box.paste(values, self.volume.to_canonical(out))
        return out


def _sigmoid(logits: FloatImage) -> FloatImage:
    np.clip(logits, -30, 30, out=logits)
    np.negative(logits, out=logits)
    np.exp(logits, out=logits)
    logits += 1
    np.reciprocal(logits, out=logits)
    return logits
