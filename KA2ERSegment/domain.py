"""Whose kind of volume is this? What level 3 of the amalgamation knows before it looks at a voxel.

nnU-Net plans from a fingerprint of its data set: spacings, shapes and intensities (Isensee et al., 2021). The same
fingerprint tells later which expert a volume suits. Each expert's plans keep the distribution of its training volumes'
fingerprints, and Bayes' rule makes of it the prior of KA2ER's weights over the experts (arXiv 2410.21085; the prior is
this project's own). It reads nothing that could name a patient, and takes no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from KA2ERSegment.plans import DomainPlans, Plans
from KA2ERSegment.volume import Volume

FEATURES = ("finest spacing, mm", "coarsest spacing / finest", "shortest extent, mm", "longest extent, mm")
"""Of a volume; their logarithms are taken as independent and normally distributed."""
AIR = -200.0
"""Only Hounsfield units go below: air has -1000, and noise alone takes most crops without air there."""
LEAST = -5.0
"""Log density below which no feature goes: a crop rules no expert out, and what is far from all says nothing."""
TRUST = 0.5
"""The features hang together: taken as independent they count twice (`training.domains` tells how well it fits)."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is known of a volume without looking at what is in it.

    Args:
        spacing: mm, of the three axes in any order.
        extent: mm, of the three axes in any order.
        hounsfield: whether grey values are Hounsfield units; None where that is not known (a label map).
    """

    spacing: tuple[float, ...]
    extent: tuple[float, ...]
    hounsfield: bool | None

    @classmethod
    def of(cls, volume: Volume) -> Fingerprint:
        """Of a volume; of its grey values at most about a million are read."""
        every = max(1, math.ceil((volume.array_kji.size / 1e6) ** (1 / 3)))
        lowest = float(volume.array_kji[::every, ::every, ::every].min())
        extent = tuple(n * mm for n, mm in zip(volume.shape_ijk, volume.spacing, strict=True))
        return cls(volume.spacing, extent, lowest < AIR)

    def features(self) -> npt.NDArray[np.float64]:
        """(4,) natural logarithms of `FEATURES`."""
        spacing, extent = sorted(self.spacing), sorted(self.extent)
        return np.log([spacing[0], spacing[2] / spacing[0], extent[0], extent[2]])


def log_likelihood(domain: DomainPlans, fingerprint: Fingerprint) -> float:
    """How well a fingerprint fits a domain; only differences between domains mean anything."""
    std = np.array(domain.std)
    away = (fingerprint.features() - domain.mean) / std
    found = float(np.maximum(-0.5 * away**2 - np.log(std), LEAST).sum())
    if fingerprint.hounsfield is not None:
        found += math.log(domain.hounsfield if fingerprint.hounsfield else 1 - domain.hounsfield)
    return found


def log_prior(plans: Plans, fingerprint: Fingerprint, trust: float = TRUST) -> npt.NDArray[np.float64] | None:
    """Log probability that a volume is nobody's, and that it is each expert's.

    All are alike beforehand. An expert whose domain is not known is as likely as none.

    Args:
        plans: of the bundle.
        fingerprint: of the volume.
        trust: power to which likelihoods are taken; 0: none is believed.

    Returns:
        (K+1,), arm 0 for "none of them"; None where the plans have no domain of volumes of any kind.
    """
    anything = plans.amalgamation.domain
    if anything is None:
        return None
    fits = np.array(
        [log_likelihood(d or anything, fingerprint) for d in (anything, *(e.domain for e in plans.experts))]
    )
    fits = trust * (fits - fits.max())
    prior: npt.NDArray[np.float64] = fits - np.log(np.exp(fits).sum())
    return prior
