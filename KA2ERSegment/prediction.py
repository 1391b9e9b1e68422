"""`Prediction`: what one prompt gave, on the volume's own grid, computed only as far as somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from KA2ERSegment.geometry import BoolArray, Box, FloatArray, Ijk
from KA2ERSegment.preprocessing import Patch, sample_nearest, upsample
from KA2ERSegment.refinement import Detail
from KA2ERSegment.volume import Volume

FloatImage = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)

AMALGAMATION, DECODERS, HEAD = "amalgamation", "decoders", "head"
"""The modes in which experts take part: their features are merged, one of them decodes, or they vote on the answer."""
_DECODER, _VOTER = "decoder ", "head "
"""What the names of mask decoders and of experts of the voting head begin with: names in plans are words, so these
cannot be names of arms."""


def experts_by_mode(arms: Sequence[str], decoders: Sequence[str], voters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of all experts as `Prediction.experts` has them, for each mode that has any.

    Args:
        arms: of the amalgamation; they keep their names.
        decoders: that the gate chooses among, as the gate names them.
        voters: experts of the voting head, as the head names them.
    """
    names = {
        AMALGAMATION: tuple(arms),
        DECODERS: tuple(f"{_DECODER}{name}" for name in decoders),
        HEAD: tuple(f"{_VOTER}{name}" for name in voters),
    }
    return {mode: members for mode, members in names.items() if members}


@dataclass(frozen=True, slots=True, eq=False)
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
    """One arm of the amalgamation, one mask decoder or one expert of the voting head, on one prediction.

    Args:
        probability: (K, J, I) float32, what the model answers with this expert alone; 0 outside the patch.
        weight: (K, J, I) float32, its share in the decision at each voxel; 0 outside the patch.
        mean_weight: its mean share inside the mask (inside the patch where the mask is empty), as in
            `Prediction.shares`.
    """

    probability: FloatImage = field(repr=False)
    weight: FloatImage = field(repr=False)
    mean_weight: float


class ExpertOpinions(Mapping[str, ExpertOpinion]):
    """Opinions by name, each computed anew whenever it is asked for: all of them would fill gigabytes.

    Args:
        names: of those who have one.
        look: computes the opinion of one of them.
    """

    def __init__(self, names: tuple[str, ...], look: Callable[[str], ExpertOpinion]) -> None:
        self._names, self._look = names, look

    def __getitem__(self, name: str) -> ExpertOpinion:
        if name not in self._names:
            raise KeyError(name)
        return self._look(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would compute the opinion to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class Ballots:
    """What the experts of the voting head said and counted on one patch.

    Args:
        weights: (E, S, S, S) float32, summing to 1 over the experts.
        opinions: (E, S, S, S) float32, the logits of each alone.
    """

    weights: FloatImage = field(repr=False)
    opinions: FloatImage = field(repr=False)


def _nobody() -> Ballots:
    message = "nobody voted on this prediction."
    raise LookupError(message)


def _no_decoder(name: str) -> FloatImage:
    message = f"no gate chose among decoders for this prediction, {name!r} neither."
    raise LookupError(message)


_NO_VOTES: FloatImage = np.zeros((0, 1, 1, 1), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask of one object after one prompt.

    Whole images are on the volume's own grid, and as large. A crop comes with its box on that grid: outside it the
    image is 0.

    Args:
        volume: it belongs to.
        canonical: the same volume in canonical axes.
        name: of the object.
        patch: that the network saw.
        logits: (S, S, S) float32 on the patch.
        packed: the final mask, prompts honoured and overlaps resolved, on the canonical volume.
        changed: half-open box on the volume's own grid: outside it every object's mask is what it was before.
        arms: names of the arms of the amalgamation that took part.
        weights: (arms, n, n, n) float32, their shares in the decision, summing to 1, on a coarser grid of the patch.
        detail: computes the logits between the patch's samples, where the image says more; None where it does not.
        opinion: computes the logits (S, S, S) of one arm alone, by its index in `arms`.
        gate: weight that the gate gives to each mask decoder, by name, "general" first; empty without a gate.
        decoders: the mask decoders that were heard, with their shares in the mask, "general" first. A specialist is
            heard where its weight is above the gate's threshold (SAM-Med3D-MoE, arXiv 2407.04938).
        calibration: temperature by which logits are divided before they are probabilities, of each of `experts` by its
            name and of the whole model as "mask"; 1 where nothing is said. The mask does not depend on it.
        decoder: computes the logits (S, S, S) of one mask decoder alone, by its name in `gate`.
        voters: names of the experts of the voting head; none where there is no such head, or a hand drew a mask
            that no prompt had been given. After a hand changed an answer they are those that voted on it.
        votes: (voters, n, n, n) float32, their shares in the vote as `weights` has those of the arms.
        ballots: computes what each of them said and counted, sample by sample.
    """

    volume: Volume = field(repr=False)
    canonical: Volume = field(repr=False)
    name: str
    patch: Patch = field(repr=False)
    logits: FloatImage = field(repr=False)
    packed: PackedMask = field(repr=False)
    changed: Box
    arms: tuple[str, ...] = field(repr=False)
    weights: FloatImage = field(repr=False)
    opinion: Callable[[int], FloatImage] = field(repr=False)
    gate: Mapping[str, float] = field(default_factory=dict, repr=False)
    decoders: Mapping[str, float] = field(default_factory=lambda: {"general": 1.0}, repr=False)
    calibration: Mapping[str, float] = field(default_factory=dict, repr=False)
    decoder: Callable[[str], FloatImage] = field(default=_no_decoder, repr=False)
    voters: tuple[str, ...] = field(default=(), repr=False)
    votes: FloatImage = field(default_factory=_NO_VOTES.copy, repr=False)
    ballots: Callable[[], Ballots] = field(default=_nobody, repr=False)
    detail: Callable[[], Detail] | None = field(default=None, repr=False)

    @property
    def mask(self) -> BoolArray:
        """(K, J, I) bool on the volume's own grid; a new array at each call."""
        return _filled(self.volume, self.box, self.mask_crop()[1])

    def mask_crop(self) -> tuple[Box, BoolArray]:
        """The mask in its own `box`."""
        return self._crop(self.packed.box, self.packed.unpack())

    @property
    def box(self) -> Box:
        """Smallest box around the mask on the volume's own grid; of size 0 where the mask is empty."""
        return self.volume.from_canonical_box(self.packed.box)

    @property
    def probability(self) -> FloatImage:
        """(K, J, I) float32 in 0..1; above one half exactly where the mask is true.

        0 outside the patch, but for what a hand drew there.
        """
        return _filled(self.volume, *self.probability_crop())

    def probability_crop(self) -> tuple[Box, FloatImage]:
        """The probability around patch and mask."""
        seen = self.patch.box(self.canonical.shape_kji)
        box = seen.union(self.packed.box)
        probability = np.zeros(box.shape_kji, dtype=np.float32)
        if seen.size:
            seen.within(box).paste(self._probable(self._detail.at_voxels(seen)), probability)
        mask = self.packed.on(box)
        half = np.float32(0.5)
        np.copyto(probability, np.maximum(probability, np.nextafter(half, np.float32(1))), where=mask)
        np.copyto(probability, np.minimum(probability, half), where=~mask)
        return self._crop(box, probability)

    @cached_property
    def quality(self) -> float:
        """Dice to expect of the mask if the probabilities are right, 0..1; 0 for an empty mask.

        E[Dice] is about 2 sum(p m) / (sum(p) + sum(m)) for a mask m. Where the mask differs from what the network
        says, a click or a hand has decided, and is taken to be right.
        """
        mask, probability = self.on_patch()
        return expected_dice(probability, mask)

    def on_patch(self) -> tuple[BoolArray, FloatImage]:
        """The final mask (S, S, S) on the samples of the patch, and the probability there, 0 or 1 where they differ."""
        mask, logits = self._mask_on_patch, self._detail.on(self.patch)
        return mask, np.where(mask == (logits > 0), self._probable(logits), mask).astype(np.float32)

    def at_voxels(self, box: Box) -> FloatImage:
        """(K, J, I) float32, the network's logits on the voxels of a box of the canonical volume."""
        return self._detail.at_voxels(box)

    @property
    def _detail(self) -> Detail:
        return Detail(self.patch, self.logits) if self.detail is None else self.detail()

    @cached_property
    def _mask_on_patch(self) -> BoolArray:
        origin = np.array(self.patch.origin) - self.packed.box.start
        patch = Patch((float(origin[0]), float(origin[1]), float(origin[2])), self.patch.step, self.patch.size)
        if self.packed.box.size == 0:
            return np.zeros((self.patch.size,) * 3, dtype=bool)
        mask: BoolArray = sample_nearest(self.packed.unpack(), patch, outside=False)
        return mask

    # -- experts -----------------------------------------------------------------------------------------------------

    @cached_property
    def modes(self) -> dict[str, tuple[str, ...]]:
        """Names of the experts in `experts` by mode: "amalgamation", "decoders" and "head", those that took part."""
        return experts_by_mode(self.arms, tuple(self.gate), self.voters)

    @cached_property
    def experts(self) -> Mapping[str, ExpertOpinion]:
        """The opinion of each expert of every mode by its name, as whole images; computed whenever asked for, not kept.

        First the arms of the amalgamation, "foundation" (no expert) before the others; "decoder general" and the
        specialists that the gate chooses among; "head basic" and the other experts of the voting head. In each of the
        `modes` the weights sum to 1.
        """
        return ExpertOpinions(tuple(name for names in self.modes.values() for name in names), self._expert)

    def _expert(self, name: str) -> ExpertOpinion:
        box, probability, weight = self.opinion_crop(name)
        return ExpertOpinion(
            _filled(self.volume, box, probability), _filled(self.volume, box, weight), self.shares[name]
        )

    @cached_property
    def shares(self) -> dict[str, float]:
        """Each expert's mean share in the decision of its mode, inside the mask (the patch where it is empty). Cheap.

        A decoder has the same share everywhere: 0 where it was not heard.
        """
        values = {
            AMALGAMATION: self._means_inside(self.weights),
            DECODERS: [float(self.decoders.get(name, 0.0)) for name in self.gate],
            HEAD: self._means_inside(self.votes),
        }
        return {n: s for mode, names in self.modes.items() for n, s in zip(names, values[mode], strict=True)}

    def _means_inside(self, weights: FloatImage) -> list[float]:
        """Means of (n, cells, cells, cells) over the cells of the mask, each as far as it is inside."""
        size = weights.shape[-1]
        step = self.patch.size // size
        cells = self._mask_on_patch.reshape(size, step, size, step, size, step).mean(axis=(1, 3, 5))
        if not cells.any():
            cells[:] = 1
        means: list[float] = ((weights * cells).sum(axis=(1, 2, 3)) / cells.sum()).tolist()
        return means

    @cached_property
    def patch_to_ras(self) -> FloatArray:
        """4x4 from sample index (I, J, K) of the patch to RAS mm."""
        return np.asarray(self.canonical.ijk_to_ras @ self.patch.to_ijk, dtype=np.float64)

    def opinion_on_patch(self, name: str) -> tuple[FloatImage, FloatImage]:
        """Probability and weight of one of `experts`, both (S, S, S) on the samples of the patch; KeyError for others.

        0 where no voxel of the volume is within a step of the sample. `opinion_crop` is linear between them.
        """
        probability = self._probable(self.logits_of(name), name)
        if name in self.arms:
            weight = self._weight_on_patch(self.arms.index(name))
        elif name in self.modes.get(DECODERS, ()):
            weight = np.full(probability.shape, self.shares[name], dtype=np.float32)
        else:
            weight = self.ballots().weights[self.voters.index(name.removeprefix(_VOTER))]
        read = self.patch.read_by(self.canonical.shape_kji)
        return probability * read, weight * read

    def logits_of(self, name: str) -> FloatImage:
        """What one of `experts` alone answers, logits (S, S, S) without its temperature; KeyError for others."""
        if name not in self.experts:
            raise KeyError(name)
        if name in self.arms:
            return self.opinion(self.arms.index(name))
        if name in self.modes.get(DECODERS, ()):
            return self.decoder(name.removeprefix(_DECODER))
        logits: FloatImage = self.ballots().opinions[self.voters.index(name.removeprefix(_VOTER))]
        return logits

    def opinion_crop(self, name: str) -> tuple[Box, FloatImage, FloatImage]:
        """Probability and weight of one of `experts` within the patch; KeyError for others."""
        probability, weight = self.opinion_on_patch(name)
        box, crop = self._upsampled(probability)
        return box, crop, self._upsampled(weight)[1]

    @property
    def disagreement(self) -> FloatImage:
        """(K, J, I) float32 in 0..1, how far the arms differ: twice the standard deviation of their probabilities.

        Each counts by its weight. 0 where all that have a say agree, 1 where one half is sure of the opposite of the
        other; 0 outside the patch.
        """
        return _filled(self.volume, *self.disagreement_crop())

    def disagreement_on_patch(self) -> FloatImage:
        """The disagreement (S, S, S) on the samples of the patch; `disagreement_crop` is linear between them."""
        opinions = [self.opinion_on_patch(arm) for arm in self.arms]
        mean = np.zeros((self.patch.size,) * 3, dtype=np.float32)
        for probability, weight in opinions:
            mean += weight * probability
        variance = np.zeros_like(mean)
        for probability, weight in opinions:  # the mean of squares less the square of the mean would be rounding noise
            variance += weight * (probability - mean) ** 2
        return np.asarray(np.minimum(2 * np.sqrt(variance), 1), dtype=np.float32)

    def disagreement_crop(self) -> tuple[Box, FloatImage]:
        """The disagreement within the patch."""
        return self._upsampled(self.disagreement_on_patch())

    def division_on_patch(self) -> FloatImage:
        """(S, S, S) in 0..1, how evenly the arms share the decision: 0 where one has all of it. Needs no opinion."""
        arms = len(self.arms)
        if arms < 2:
            return np.zeros((self.patch.size,) * 3, dtype=np.float32)
        shares = [self._weight_on_patch(at) for at in range(arms)]
        squares = np.sum([share**2 for share in shares], axis=0)
        return np.asarray((1 - squares) * (arms / (arms - 1)), dtype=np.float32)

    def _probable(self, logits: FloatImage, whose: str = "mask") -> FloatImage:
        """Probabilities of logits, which stay as they are."""
        return sigmoid(logits / np.float32(self.calibration.get(whose, 1.0)))

    def _weight_on_patch(self, at: int) -> FloatImage:
        """(S, S, S): the centre of a coarse cell lies in the middle of its samples."""
        cells = self.weights.shape[-1]
        step = self.patch.size / cells
        samples = Box((0, 0, 0), (self.patch.size,) * 3)
        return upsample(self.weights[at], Patch(((step - 1) / 2,) * 3, (step,) * 3, cells), samples)

    def _upsampled(self, samples: FloatImage) -> tuple[Box, FloatImage]:
        """Values on the samples of the patch, as a crop of the volume."""
        seen = self.patch.box(self.canonical.shape_kji)
        return self._crop(seen, upsample(samples, self.patch, seen))

    def _crop(self, box: Box, values: npt.NDArray[Scalar]) -> tuple[Box, npt.NDArray[Scalar]]:
        """A crop of the canonical volume on the volume's own axes."""
        own = self.volume.from_canonical_box(box)
        out = np.empty(own.shape_kji, dtype=values.dtype)
        self.volume.to_canonical(out)[...] = values
        return own, out


def expected_dice(probability: FloatImage, mask: BoolArray) -> float:
    """Dice to expect of a mask if the probabilities are right; 0 where it is empty."""
    sure = float(probability[mask].sum())
    return 2 * sure / (float(probability.sum()) + int(mask.sum())) if sure else 0.0


def sigmoid(logits: FloatImage) -> FloatImage:
    """Probabilities, written over the logits."""
    np.clip(logits, -30, 30, out=logits)
    np.negative(logits, out=logits)
    np.exp(logits, out=logits)
    logits += 1
    np.reciprocal(logits, out=logits)
    return logits


def _filled(volume: Volume, box: Box, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """An array on the volume's own grid, zero but for `values` in a box."""
    out = np.zeros(volume.shape_kji, dtype=values.dtype)
    if box.size:
        box.paste(values, out)
    return out
