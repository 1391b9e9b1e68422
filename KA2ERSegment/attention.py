"""Multi-head attention and the sine code of positions, as the amalgamation and the mask decoder share them."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """Multi-head attention of `queries` (B, N, C) over `context` (B, M, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, ignore: Tensor | None = None) -> Tensor:
        """(B, N, C); `ignore` (B, M) bool marks context that must not be read."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, C/H)
            for layer, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        mask = None if ignore is None else ~ignore[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def sine_position(grid: torch.Size, width: int, device: torch.device) -> Tensor:
    """Sine position code of a 3D grid, (N, width); coordinates run from 0 to 1 along each axis."""
    axes = [torch.linspace(0, 1, n, device=device) for n in grid]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (N, 3)
    return sine_code(coordinates, width)


def sine_code(coordinates: Tensor, width: int) -> Tensor:
    """Sine code of points (..., 3) in 0..1, KJI order: (..., width); `width` is a multiple of 6."""
    frequencies = 2.0 ** torch.arange(width // 6, device=coordinates.device) / 2 ** (width // 6 - 6) * math.pi
    angles = coordinates[..., None] * frequencies  # (..., 3, width/6)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
