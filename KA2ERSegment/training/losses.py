"""Losses of the training stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of the probability, (B,); 1 is perfect."""
    probability, truth = logits.float().sigmoid().flatten(1), target.float().flatten(1)
    overlap = (probability * truth).sum(1)
    return (2 * overlap + 1) / (probability.sum(1) + truth.sum(1) + 1)


def dice(mask: Tensor, target: Tensor) -> Tensor:
    """Dice of masks (B, S, S, S) bool, (B,); 0 where both are empty."""
    mask, truth = mask.flatten(1), target.flatten(1)
    return 2 * (mask & truth).sum(1) / (mask.sum(1) + truth.sum(1)).clamp_min(1)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice and cross-entropy, (B,), for masks (B, S, S, S); as nnU-Net weighs them, one to one.

    Cross-entropy counts object and background alike, whatever their share of the patch.
    """
    truth = target.float()
    entropy = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none").flatten(1)
    inside = truth.flatten(1)
    balanced = 0.5 * (entropy * inside).sum(1) / inside.sum(1).clamp_min(1)
    balanced = balanced + 0.5 * (entropy * (1 - inside)).sum(1) / (1 - inside).sum(1).clamp_min(1)
    return 1 - soft_dice(logits, target) + 0.5 * entropy.mean(1) + 0.5 * balanced


def quality_loss(quality: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """How far the expected Dice (B,) is from the mask's Dice; (B,)."""
    return (quality.float() - dice(logits > 0, target)).abs()


def multi_class_loss(logits: Tensor, classes: Tensor, ignore: int) -> Tensor:
    """Cross-entropy plus soft Dice over the classes that occur; logits (B, C, S, S, S), classes (B, S, S, S)."""
    known = (classes != ignore)[:, None]
    if not bool(known.any()):  # cross-entropy over nothing is NaN
        return logits.float().sum() * 0
    entropy = F.cross_entropy(logits.float(), classes, ignore_index=ignore)
    probability = logits.float().softmax(1) * known
    truth = F.one_hot(classes.clamp_max(logits.shape[1] - 1), logits.shape[1]).movedim(-1, 1) * known
    overlap = (probability * truth).sum((0, 2, 3, 4))
    total = (probability + truth).sum((0, 2, 3, 4))
    occurs = truth.sum((0, 2, 3, 4)) > 0
    occurs[0] = False
    of_class = ((2 * overlap + 1) / (total + 1))[occurs]
    return entropy + (1 - of_class.mean() if len(of_class) else torch.zeros((), device=logits.device))


def routing_loss(weights: Tensor, task: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy between the arms' mean share and the case's own expert, a mean over the cases that have one.

    Without `target` the mean over the whole patch is all that is asked for, and what is learnt from it may be the
    opposite inside the object: experts then tell object from background by which of them is heard.

    Args:
        weights: (B, K+1, ...), shares of the arms, summing to 1.
        task: (B,) int64, arm of the case's own expert; 0: none known, no loss.
        target: (B, S, S, S) bool; the mean share inside these objects is asked for just as much.
    """
    known = task > 0
    means = [weights.float().flatten(2).mean(2)]
    if target is not None:
        means.append(shares_inside(weights, target))
    logs = [mean.clamp_min(1e-6).log() for mean in means]
    if not bool(known.any()):
        return logs[0].sum() * 0
    return torch.stack([F.nll_loss(log[known], task[known]) for log in logs]).mean()


def shares_inside(weights: Tensor, target: Tensor) -> Tensor:
    """Mean share of each arm inside objects.

    Args:
        weights: (B, K+1, n, n, n) of the amalgamation, summing to 1 over the arms.
        target: (B, S, S, S) bool on the same patches (KJI); S is a multiple of n.

    Returns:
        (B, K+1) float32, summing to 1; over the whole patch where there is no object.
    """
    inside = F.avg_pool3d(target[:, None].float(), target.shape[-1] // weights.shape[-1])
    inside = torch.where(inside.flatten(1).sum(1)[:, None, None, None, None] > 0, inside, 1.0)
    return (weights.float() * inside).sum((2, 3, 4)) / inside.sum((2, 3, 4))


def vote_loss(weights: Tensor, opinions: Tensor, truth: Tensor) -> Tensor:
    """How wrong each expert's own opinion is, by its weight, and a little how far they differ; (B,).

    After IC-MoE (arXiv 2510.17684), whose experts are to be consistent with the labels: mean over the voxels of
    sum_i w_i BCE(p_i, y) + 0.1 Var^w(p_i).

    Args:
        weights: (B, H, V), summing to 1 over the experts.
        opinions: (B, H, V), logits.
        truth: (B, V) in 0..1.
    """
    entropy = F.binary_cross_entropy_with_logits(opinions, truth[:, None].expand_as(opinions), reduction="none")
    probability = opinions.sigmoid()
    mean = (weights * probability).sum(1, keepdim=True)
    return (weights * (entropy + 0.1 * (probability - mean).square())).sum(1).mean(1)


def balance_loss(weights: Tensor) -> Tensor:
    """E sum_i fraction_i x mean weight_i: 1 where E experts are heard alike, more where some win most voxels.

    As Fedus et al. balance language models (arXiv 2101.03961).

    Args:
        weights: (B, E, V), summing to 1 over the experts.
    """
    experts = weights.shape[1]
    winners = F.one_hot(weights.argmax(1), experts).float().mean((0, 1))
    return experts * (winners * weights.mean((0, 2))).sum()


def feature_loss(learnt: Tensor, taught: Tensor) -> Tensor:
    """Mean absolute difference of features (B, N, C), (B,); no gradient reaches `taught`."""
    return (learnt.float() - taught.float().detach()).abs().flatten(1).mean(1)


def prediction_loss(logits: Tensor, taught: Tensor, where: Tensor, temperature: float = 2.0) -> Tensor:
    """KL divergence of tempered probabilities from a teacher's, (B,); 0 where there is nothing to be learnt.

    Args:
        logits: (B, S, S, S).
        taught: (B, S, S, S), the teacher's logits; no gradient reaches them.
        where: (B, S, S, S) bool, samples that count.
        temperature: by which both are divided.
    """
    own, theirs = logits.float() / temperature, taught.float().detach() / temperature
    probability = theirs.sigmoid()
    cross = F.binary_cross_entropy_with_logits(own, probability, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(theirs, probability, reduction="none")
    counted = where.float().flatten(1)
    return ((cross - entropy).flatten(1) * counted).sum(1) / counted.sum(1).clamp_min(1)
