"""Are probabilities what they say? Temperatures that bring them nearer, and the numbers that measure it.

Temperature scaling is that of Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, arXiv 1706.04599): the
negative log-likelihood is minimised over log T alone. The expected calibration error is theirs too, over equal bins of
the probability of the object (theirs: of whichever class is the likelier).
No torch here: everything is numbers of voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize, stats

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import BoolArray, Box

BINS = 15
"""Equal bins of probability, as in the paper."""
NEAR_MM = 10.0
"""How far around an object voxels count: farther away everything is easily right."""
HOTTEST = 20.0
"""Temperatures are looked for between 1 / HOTTEST and HOTTEST."""

Numbers = npt.NDArray[np.floating]
"""Any number of values in one dimension."""


def fit_temperature(logits: Numbers, truth: BoolArray, weights: Numbers | None = None) -> float:
    """The temperature by which logits must be divided so that the truth is likeliest.

    The loss is convex in 1 / T, so there is one minimum.

    Args:
        logits: (N,) of voxels that the model was not trained on.
        truth: (N,) bool, whether each voxel lies in the object.
        weights: (N,) how much each counts; by default all the same.
    """
    logits = np.clip(np.asarray(logits, dtype=np.float64), -60, 60)
    truth = np.asarray(truth, dtype=bool)
    if not (truth.any() and (~truth).any()):
        message = f"a temperature needs voxels inside and outside objects, got {truth.size}, {int(truth.sum())} inside."
        raise KA2ERError(message)
    signed = np.where(truth, -logits, logits)

    def loss(log_t: float) -> float:
        return float(np.average(np.logaddexp(0, signed / np.exp(log_t)), weights=weights))

    bound = np.log(HOTTEST)
    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


@dataclass(frozen=True, slots=True)
class Reliability:
    """What a reliability diagram shows; two of them can be added, and one be scaled to count less.

    Args:
        weight: (BINS,) voxels in each bin, by their weight.
        promised: (BINS,) sum of their probabilities.
        true: (BINS,) how many of them lie in the object.
    """

    weight: Numbers
    promised: Numbers
    true: Numbers

    @classmethod
    def of(cls, probability: Numbers, truth: BoolArray, weights: Numbers | None = None) -> Reliability:
        """Count voxels.

        Args:
            probability: (N,) in 0..1, of lying in the object.
            truth: (N,) bool, whether they do.
            weights: (N,) how much each counts; by default 1.
        """
        probability = np.asarray(probability, dtype=np.float64)
        bins = np.clip((probability * BINS).astype(int), 0, BINS - 1)
        each = np.ones(len(bins)) if weights is None else weights
        counts = (np.bincount(bins, values, BINS) for values in (each, each * probability, each * truth))
        weight, promised, true = (np.asarray(count, dtype=np.float64) for count in counts)
        return cls(weight, promised, true)

    def __add__(self, other: Reliability) -> Reliability:
        """Both together."""
        return Reliability(self.weight + other.weight, self.promised + other.promised, self.true + other.true)

    def scaled(self, factor: float) -> Reliability:
        """Each voxel counting `factor` times."""
        return Reliability(self.weight * factor, self.promised * factor, self.true * factor)

    @property
    def error(self) -> float:
        """Expected calibration error, 0..1: mean distance between promise and truth of a bin, by its voxels."""
        total = float(self.weight.sum())
        return float(np.abs(self.promised - self.true).sum() / total) if total else 0.0

    @property
    def bins(self) -> list[tuple[float, float, float]]:
        """Of each bin with voxels: mean probability, share that lies in the object, share of all voxels."""
        used = self.weight > 0
        weight, total = self.weight[used], self.weight.sum()
        columns = (self.promised[used] / weight, self.true[used] / weight, weight / total)
        return [(float(a), float(b), float(c)) for a, b, c in zip(*columns, strict=True)]

    def to_json(self) -> dict[str, list[float]]:
        """Plain data."""
        return {"weight": self.weight.tolist(), "promised": self.promised.tolist(), "true": self.true.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Iterable[float]]) -> Reliability:
        """What `to_json` gave."""
        return cls(*(np.array(list(data[key]), dtype=np.float64) for key in ("weight", "promised", "true")))


def expected_calibration_error(probability: Numbers, truth: BoolArray) -> float:
    """Of voxels: probability (N,) in 0..1 of lying in the object, truth (N,) whether they do."""
    return Reliability.of(probability, truth).error


def area_under_roc(score: Numbers, positive: BoolArray) -> float | None:
    """Probability that a positive has a higher score than a negative, ties counting half; None without both.

    Args:
        score: (N,).
        positive: (N,) bool.
    """
    positive = np.asarray(positive, dtype=bool)
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        return None
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * few))


def spearman(a: Iterable[float], b: Iterable[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs, or where one side is all the same."""
    first, second = np.array(list(a), dtype=float), np.array(list(b), dtype=float)
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)


def near_object(truth: BoolArray, spacing: tuple[float, float, float], reach: float = NEAR_MM) -> tuple[Box, BoolArray]:
    """Voxels of an object and those within `reach` mm of it.

    Args:
        truth: (K, J, I) bool, with at least one voxel.
        spacing: mm along I, J and K.
        reach: mm.

    Returns:
        The box that holds them, and a (K, J, I) bool array of its shape.
    """
    tight = Box.around(truth)
    if tight is None:
        message = "an object must have at least one voxel to look around it, got an empty mask."
        raise KA2ERError(message)
    (i0, j0, k0), (i1, j1, k1) = (
        np.array(end) + sign * np.ceil(reach / np.array(spacing)).astype(int)
        for end, sign in ((tight.start, -1), (tight.stop, 1))
    )
    box = Box((int(i0), int(j0), int(k0)), (int(i1), int(j1), int(k1))).intersect(Box.of_shape(truth.shape))
    distance = ndimage.distance_transform_edt(~box.crop(truth), sampling=spacing[::-1])
    return box, np.asarray(distance <= reach)
