"""Semantic-guided contrast: voxels of one class lie close together among the features that vote, others apart.

After IC-MoE (arXiv 2510.17684), whose abstract names "semantic-guided contrastive learning ... to address the issue of
weak supervision"; the form is this project's own. Prompts name one object, so the classes are the object's background
and its foreground, the latter one class for each group of anatomy and modality (`VotingPlans.semantic`) and one for
all else. What guides is each class's prototype: the running mean of voxels that are right and sure, and of no other.

    z = normalised projection of a voxel's features;  mu_c = prototype of class c
    L = - log( exp(z . mu_y / t) / sum_c exp(z . mu_c / t) )  +  the same among the anchors of one case
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

BACKGROUND = 0
"""Class of the object's background."""
ANCHORS = 256
"""Voxels of one case that are compared; half from the shell of the object, half from the errors."""
HEAT = 0.1
"""t, the temperature of the comparison."""
MOMENTUM = 0.99
"""Of a prototype, from one step to the next."""
SURE = 0.8
"""Confidence |2 p - 1| from which on a voxel counts as sure."""


class Contrast(nn.Module):
    """The loss, with its projection and prototypes; for training only, a bundle has none of it.

    Args:
        width: W, of the features.
        classes: C, background and foregrounds together.
    """

    prototypes: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width, bias=False)
        self.register_buffer("prototypes", torch.zeros(classes, width))

    @property
    def known(self) -> Tensor:
        """(C,) bool, classes that have a prototype."""
        return self.prototypes.any(1)

    def forward(self, features: Tensor, classes: Tensor, probability: Tensor, generator: torch.Generator) -> Tensor:
        """Remember what is right and sure, then compare.

        Args:
            features: (B, V, W), V voxels of a cube in KJI order.
            classes: (B, V) int64.
            probability: (B, V) in 0..1, of foreground, as voted.
            generator: of the device.

        Returns:
            The mean loss of all anchors, a scalar; finite also where no voxel is right and sure.
        """
        z = F.normalize(self.project(features).float(), dim=-1, eps=1e-6)
        foreground = classes != BACKGROUND
        self.remember(z.detach(), classes, probability.detach())
        at = choose_anchors(foreground, (probability > 0.5) != foreground, ANCHORS, generator)  # (B, A)
        anchors = z.gather(1, at[..., None].expand(-1, -1, z.shape[2]))
        own = classes.gather(1, at)
        return self._to_prototypes(anchors, own) + _to_each_other(anchors, own)

    @torch.no_grad()
    def remember(self, z: Tensor, classes: Tensor, probability: Tensor) -> None:
        """Move each class's prototype towards its voxels that are right and sure; without any it stays.

        Args:
            z: (B, V, W) float32, normalised.
            classes: (B, V) int64.
            probability: (B, V), of foreground.
        """
        right = (probability > 0.5) == (classes != BACKGROUND)
        clear = right & ((2 * probability - 1).abs() > SURE)
        sums = torch.zeros_like(self.prototypes)
        sums.index_add_(0, classes[clear], z[clear].to(sums.dtype))
        found = sums.any(1)
        means = F.normalize(sums, dim=1)
        moved = F.normalize(MOMENTUM * self.prototypes + (1 - MOMENTUM) * means, dim=1)
        fresh = torch.where(self.known[:, None], moved, means)
        self.prototypes.copy_(torch.where(found[:, None], fresh, self.prototypes))

    def _to_prototypes(self, anchors: Tensor, own: Tensor) -> Tensor:
        """Anchors of a class without a prototype do not count, and nothing is compared with such a class."""
        counts = self.known[own]
        if not bool(counts.any()):
            return anchors.sum() * 0
        prototypes = self.prototypes.clone()  # they move on before the gradient is taken
        scores = (anchors @ prototypes.T / HEAT).masked_fill(~self.known, float("-inf"))
        return F.cross_entropy(scores[counts], own[counts])


def _to_each_other(anchors: Tensor, own: Tensor) -> Tensor:
    """Supervised contrast (Khosla et al., arXiv 2004.11362) within each case; a case of one class has none."""
    itself = torch.eye(anchors.shape[1], dtype=torch.bool, device=anchors.device)
    alike = (own[:, :, None] == own[:, None]) & ~itself
    compared = alike.any(2) & (own[:, :, None] != own[:, None]).any(2)  # (B, A)
    if not bool(compared.any()):
        return anchors.sum() * 0
    scores = (anchors @ anchors.transpose(1, 2) / HEAT).masked_fill(itself, float("-inf"))
    shares = scores.log_softmax(2).masked_fill(~alike, 0.0)
    return -(shares.sum(2) / alike.sum(2).clamp_min(1))[compared].mean()


def choose_anchors(foreground: Tensor, wrong: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Which voxels to compare: half on both sides of the object's border, half where the answer is wrong.

    Where either are too few, voxels of the border, then any others take their place.

    Args:
        foreground: (B, V) bool, V voxels of a cube.
        wrong: (B, V) bool.
        count: A, of anchors; all voxels where there are fewer.
        generator: of the device.

    Returns:
        (B, A) int64, each voxel at most once.
    """
    batch, voxels = foreground.shape
    side, count = round(voxels ** (1 / 3)), min(count, voxels)
    cube = foreground.view(batch, 1, side, side, side).float()
    shell = F.max_pool3d(cube, 3, 1, 1) != -F.max_pool3d(-cube, 3, 1, 1)
    shell_score = shell.flatten(1).float()
    draw = torch.rand(batch, voxels, device=foreground.device, generator=generator)
    first = (draw + shell_score).topk(count // 2, dim=1).indices
    rest = (draw + shell_score + 2 * wrong.float()).scatter(1, first, -1.0)
    return torch.cat([first, rest.topk(count - count // 2, dim=1).indices], dim=1)
