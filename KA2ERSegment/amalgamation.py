"""KA2ER's hierarchical amalgamation: foundation and expert features become one embedding.

After Gao et al., "KA2ER: Knowledge Adaptive Amalgamation of Experts for Medical Images Segmentation"
(arXiv 2410.21085). The paper's text gives the idea (joint projection, three hierarchical attentions); the
equations are this project's own design. At strides 8 and 16:

    joint projection   z = GN(W_F F) + pos + u_0,  e_k = GN(W_k E_k) + pos + u_k
    level 1            z' = z + self-attention(LN z)                 within the foundation
    level 2            c_k = attention(LN z' -> LN e_k)              foundation to each expert, weights shared
    level 3            a_k = softmax_k((A LN z').(B LN c_k)/sqrt(d) + b_k + log pi_k), c_0 = z'   across experts
                       g = z' + W_o sum_k a_k c_k;  G = g + MLP(LN g)

`c_0`, the "no expert" arm, makes "trust none of them" representable. `pi` says how likely the volume is one of each
expert's (`domain.py`); without it all are alike. Attention at stride 8 is global: a 64^3
patch has 512 tokens there, so windows would save nothing.

That is the kind "hierarchical" of `AmalgamationPlans`. The others answer what each part of it brings; level 1 and the
MLP are the same in all of them, only what is added to z' differs:

    cross_attention    W_o mean_k c_k          levels 1 and 2: the arms in use count alike
    concatenation      W (z', e_1, ..., e_K)   plain: no attention to experts, zeros for those that are not in use
    foundation         W_o z'                  no experts
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.attention import Attention, sine_position
from KA2ERSegment.plans import AmalgamationPlans

STRIDES = (8, 16)


class Amalgamation(nn.Module):
    """One level of the pyramid (one stride).

    Args:
        foundation_channels: of the foundation's features at this stride.
        expert_channels: of each expert's features at this stride.
        width: of the common space.
        heads: attention heads.
        plans: how experts' features meet the foundation's; KA2ER's three levels by default.
    """

    def __init__(
        self,
        foundation_channels: int,
        expert_channels: list[int],
        width: int,
        heads: int,
        plans: AmalgamationPlans | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.plans = AmalgamationPlans() if plans is None else plans
        kind, attends = self.plans.kind, self.plans.kind in ("hierarchical", "cross_attention")
        experts = [] if kind == "foundation" else expert_channels
        self.project_foundation = _projection(foundation_channels, width)
        self.project_experts = nn.ModuleList(_projection(channels, width) for channels in experts)
        self.codes = nn.Parameter(torch.randn(len(experts) + 1 if attends else 1, width) * 0.02)
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        if attends:
            self.norm_query, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads)
        if kind == "hierarchical":
            self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
            self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
            self.bias = nn.Parameter(torch.zeros(len(experts) + 1))
        self.out = nn.Linear(width * (len(experts) + 1) if kind == "concatenation" else width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    @property
    def asks_experts(self) -> bool:
        """Whether experts' features are read at all."""
        return self.plans.enabled and self.plans.kind != "foundation"

    def forward(
        self, foundation: Tensor, experts: list[Tensor], present: Tensor, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The amalgamated embedding and each arm's share.

        Args:
            foundation: (B, C_F, n, n, n).
            experts: for each expert (B, C_k, n, n, n); not read where experts are not asked.
            present: (B, K+1) bool, which arms may be used; arm 0 is "no expert". At least one per case. What no case
                uses is not computed, and leaves no trace: the answer is that of a model without it.
            prior: (B, K+1), log pi of level 3; the other kinds do not read it.

        Returns:
            embedding: (B, width, n, n, n).
            weights: (B, K+1, n, n, n), summing to 1 over the arms: the softmax of level 3; equal among the arms in
                use without level 3; of a concatenation each arm's part of the sum that is added to z', by its norm; 1
                for the foundation where experts are not asked.
        """
        grid = foundation.shape[2:]
        position = sine_position(grid, self.width, foundation.device)
        z = self.project_foundation(foundation).flatten(2).transpose(1, 2) + position + self.codes[0]  # (B, N, C)
        normed = self.norm_self(z)
        z = z + self.self_attention(normed, normed, normed)
        heard = self._heard(present)
        used = [arm for arm, any_case in enumerate(heard.any(0).tolist()) if any_case or arm == 0]
        projected = {arm: self._tokens(experts[arm - 1], arm) for arm in used[1:]}  # (B, N, C) each
        if self.plans.kind == "concatenation":
            added, shares = self._concatenated(z, projected, heard)
        else:
            added, shares = self._attended(z, projected, position, heard, prior)
        g = z + added
        g = g + self.mlp(self.norm_mlp(g))
        weights = shares.new_zeros(len(shares), present.shape[1], shares.shape[2])
        weights[:, used] = shares
        return g.transpose(1, 2).unflatten(2, grid), torch.unflatten(weights, 2, grid)

    def _heard(self, present: Tensor) -> Tensor:
        """The arms that count, (B, K+1) bool, at least one per case."""
        foundation = torch.zeros_like(present)
        foundation[:, 0] = True
        if not self.asks_experts:
            return foundation
        if self.plans.no_expert:
            return present
        experts = present & ~foundation
        return torch.where(experts.any(1, keepdim=True), experts, foundation)

    def _tokens(self, features: Tensor, arm: int) -> Tensor:
        """An expert's features in the common space, (B, N, C)."""
        tokens: Tensor = self.project_experts[arm - 1](features).flatten(2).transpose(1, 2)
        return tokens

    def _attended(
        self, z: Tensor, projected: dict[int, Tensor], position: Tensor, heard: Tensor, prior: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Levels 2 and 3: what is added to z', (B, N, C), and the shares of the arms in use, (B, arms, N)."""
        used, arms = [0, *projected], [z]
        if projected:
            query = self.norm_query(z)
        for arm, tokens in projected.items():
            context = self.norm_context(tokens + position + self.codes[arm])
            arms.append(self.cross_attention(query, context, context))
        candidates = torch.stack(arms, dim=1)  # (B, arms, N, C)
        if self.plans.kind == "hierarchical":
            scores = (self.a(self.norm_a(z))[:, None] * self.b(self.norm_b(candidates))).sum(-1) / math.sqrt(self.width)
            scores = scores + self.bias[used, None]
            if prior is not None:
                scores = scores + prior[:, used, None]
            scores = scores.masked_fill(~heard[:, used, None], float("-inf"))
            shares = scores.softmax(dim=1)
        else:
            alike = heard[:, used].float()
            shares = (alike / alike.sum(1, keepdim=True))[..., None].expand(candidates.shape[:3])
        return self.out((shares[..., None] * candidates).sum(1)), shares

    def _concatenated(self, z: Tensor, projected: dict[int, Tensor], heard: Tensor) -> tuple[Tensor, Tensor]:
        """One linear map of all arms beside each other, as `_attended` answers."""
        columns = torch.split(self.out.weight, self.width, dim=1)  # those of arms that are not in use meet zeros
        parts = [
            F.linear(tokens, columns[arm]) * heard[:, arm, None, None] for arm, tokens in ({0: z} | projected).items()
        ]
        added = torch.stack(parts, dim=1)  # (B, arms, N, C)
        size = added.detach().float().norm(dim=-1) + 1e-6 * heard[:, [0, *projected], None]
        return added.sum(1) + self.out.bias, size / size.sum(1, keepdim=True)


def _projection(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(channels, width, 1), nn.GroupNorm(1, width))
