"""KA2ER's hierarchical amalgamation: foundation and expert features become one embedding.

After Gao et al., "KA2ER: Knowledge Adaptive Amalgamation of Experts for Medical Images Segmentation"
(arXiv 2410.21085). The paper's text gives the idea (joint projection, three hierarchical attentions); the
equations are this project's own design. At strides 8 and 16:

    joint projection   z = GN(W_F F) + pos + u_0,  e_k = GN(W_k E_k) + pos + u_k
    level 1            z' = z + self-attention(LN z)                 within the foundation
    level 2            c_k = attention(LN z' -> LN e_k)              foundation to each expert, weights shared
    level 3            a_k = softmax_k((A LN z').(B LN c_k)/sqrt(d) + b_k), c_0 = z'     across experts, per voxel
                       g = z' + W_o sum_k a_k c_k;  G = g + MLP(LN g)

`c_0`, the "no expert" arm, makes "trust none of them" representable. Attention at stride 8 is global: a 64^3
patch has 512 tokens there, so windows would save nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from KA2ERSegment.attention import Attention, sine_position

STRIDES = (8, 16)


class Amalgamation(nn.Module):
    """One level of the pyramid (one stride).

    Args:
        foundation_channels: of the foundation's features at this stride.
        expert_channels: of each expert's features at this stride.
        width: of the common space.
        heads: attention heads.
    """

    def __init__(self, foundation_channels: int, expert_channels: list[int], width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.project_foundation = _projection(foundation_channels, width)
        self.project_experts = nn.ModuleList(_projection(channels, width) for channels in expert_channels)
        self.codes = nn.Parameter(torch.randn(len(expert_channels) + 1, width) * 0.02)
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_query, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(expert_channels) + 1))
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, foundation: Tensor, experts: list[Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
        """The amalgamated embedding and each arm's share.

        Args:
            foundation: (B, C_F, n, n, n).
            experts: for each expert (B, C_k, n, n, n).
            present: (B, K+1) bool, which arms may be used; arm 0 is "no expert". At least one per case. What no case
                uses is not computed, and leaves no trace: the answer is that of a model without it.

        Returns:
            embedding: (B, width, n, n, n).
            weights: (B, K+1, n, n, n), summing to 1 over the arms.
        """
        grid = foundation.shape[2:]
        position = sine_position(grid, self.width, foundation.device)
        z = self.project_foundation(foundation).flatten(2).transpose(1, 2) + position + self.codes[0]  # (B, N, C)
        normed = self.norm_self(z)
        z = z + self.self_attention(normed, normed, normed)
        used = [arm for arm, any_case in enumerate(present.any(0).tolist()) if any_case or arm == 0]
        arms = [z]
        query = self.norm_query(z)
        for arm in used[1:]:
            features = self.project_experts[arm - 1](experts[arm - 1])
            context = self.norm_context(features.flatten(2).transpose(1, 2) + position + self.codes[arm])
            arms.append(self.cross_attention(query, context, context))
        candidates = torch.stack(arms, dim=1)  # (B, arms used, N, C)
        scores = (self.a(self.norm_a(z))[:, None] * self.b(self.norm_b(candidates))).sum(-1) / math.sqrt(self.width)
        scores = (scores + self.bias[used, None]).masked_fill(~present[:, used, None], float("-inf"))
        shares = scores.softmax(dim=1)  # (B, arms used, N)
        g = z + self.out((shares[..., None] * candidates).sum(1))
        g = g + self.mlp(self.norm_mlp(g))
        weights = shares.new_zeros(len(shares), present.shape[1], shares.shape[2])
        weights[:, used] = shares
        return g.transpose(1, 2).unflatten(2, grid), weights.unflatten(2, grid)


def _projection(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(channels, width, 1), nn.GroupNorm(1, width))
