"""SAM-Med3D-MoE's gate over mask decoders: which finetuned specialist is heard beside the general decoder.

After Wang et al., "SAM-Med3D-MoE: Towards a Non-Forgetting Segment Anything Model via Mixture of Experts for 3D Medical
Image Segmentation" (arXiv 2407.04938). The paper gives the selection (softmax, threshold tau, the general decoder
always among those heard) and that nothing it chooses from is changed; layers, "general" as a class of its own, labels,
temperature and fusion are this project's design:

    q = [mean of the embedding; mean of it at the positive prompts; mean of the tokens; means of the prompt maps]
    w = softmax(MLP(q) / T)      over "general" and the K specialists
    k* = argmax w;  a specialist is heard only where it is k* and w_k* > tau
    p = w_k* sigma(m_k*) + (1 - w_k*) sigma(m_0)      where it is heard, else the general decoder's own answer
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.plans import GatePlans
from KA2ERSegment.prompt_encoder import MAPS, PatchPrompts, box_core

GENERAL = "general"
"""Name of class 0: the decoder that was trained on everything."""


class Gate(nn.Module):
    """Chooses among the general decoder and the specialists (arXiv 2407.04938).

    Args:
        width: of embedding and tokens.
        plans: names of the specialists, sizes, tau and temperature.
    """

    def __init__(self, width: int, plans: GatePlans) -> None:
        super().__init__()
        self.width, self.plans = width, plans
        self.body = nn.Sequential(nn.Linear(3 * width + MAPS, plans.hidden), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(plans.hidden, len(plans.specialists) + 1)

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the classes: the general decoder, then the specialists."""
        return (GENERAL, *self.plans.specialists)

    def forward(self, query: Tensor) -> Tensor:
        """Logits (B, K+1) of queries (B, 3 width + MAPS) from `gate_query`; class 0 is "general"."""
        parts = query[:, : 3 * self.width].reshape(-1, 3, self.width)
        alike = F.layer_norm(parts, (self.width,)).flatten(1)  # embedding and tokens differ in scale
        logits: Tensor = self.head(self.body(torch.cat([alike, query[:, 3 * self.width :]], dim=1)))
        return logits.float()

    def route(self, query: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and choice with the plans' temperature and tau; see `choose`."""
        return choose(self(query), allowed, self.plans.temperature, self.plans.threshold)


def gate_query(embedding: Tensor, tokens: Tensor, ignore: Tensor, maps: Tensor, prompts: PatchPrompts) -> Tensor:
    """What the gate reads, all of it from frozen parts.

    Args:
        embedding: (B, C, n, n, n).
        tokens: (B, N, C) from the prompt encoder.
        ignore: (B, N) bool, padding among them.
        maps: (B, MAPS, S, S, S) from `dense_maps`.
        prompts: of the same B cases.

    Returns:
        (B, 3 C + MAPS) float32: mean of the embedding; its mean at the positive samples (in the core of the box where
        there is none, zeros where there is neither); mean of the tokens that are no padding; means of the maps.
    """
    has_positive = prompts.positive.flatten(1).any(1)[:, None, None, None]
    there = torch.where(has_positive, prompts.positive, box_core(prompts.box))
    cells = F.adaptive_avg_pool3d(there[:, None].float(), embedding.shape[-1])  # share of each cell
    prompted = (embedding.float() * cells).flatten(2).sum(2) / cells.flatten(1).sum(1, keepdim=True).clamp_min(1e-9)
    known = (~ignore).float()[..., None]
    token = (tokens.float() * known).sum(1) / known.sum(1).clamp_min(1)
    parts = [embedding.float().flatten(2).mean(2), prompted, token, maps.float().flatten(2).mean(2)]
    return torch.cat(parts, dim=1)


def choose(logits: Tensor, allowed: Tensor, temperature: float, threshold: float) -> tuple[Tensor, Tensor]:
    """The selection of arXiv 2407.04938, Fig. 2, with "general" as a class of its own.

    Args:
        logits: (B, K+1) of the gate, class 0 "general".
        allowed: (B, K) bool, specialists that may be heard.
        temperature: that the logits are divided by.
        threshold: tau in 0..1.

    Returns:
        weights: (B, K+1) float32, summing to 1; 0 for what is not allowed.
        heard: (B,) int64, the specialist (1..K) whose weight is the largest of all and above tau; else 0, the general
            decoder alone.
    """
    possible = torch.cat([torch.ones_like(allowed[:, :1]), allowed], dim=1)
    weights = (logits.float() / temperature).masked_fill(~possible, float("-inf")).softmax(dim=1)
    best, at = weights.max(dim=1)  # of equals the first: "general" before any specialist
    return weights, torch.where(best > threshold, at, torch.zeros_like(at))


def fuse(general: Tensor, specialist: Tensor, weight: Tensor) -> Tensor:
    """Logits of the probability w sigma(specialist) + (1 - w) sigma(general); exact where probabilities would round.

    Args:
        general: (B, ...) logits.
        specialist: (B, ...) logits.
        weight: (B,) w of the specialist, 0..1.
    """
    weight = weight.float().view(-1, *[1] * (general.dim() - 1))
    own, other = weight.log(), torch.log1p(-weight)
    inside = torch.logaddexp(own + F.logsigmoid(specialist), other + F.logsigmoid(general))
    outside = torch.logaddexp(own + F.logsigmoid(-specialist), other + F.logsigmoid(-general))
    return inside - outside
