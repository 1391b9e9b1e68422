"""Embedding and prompts to a mask at the patch's full resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.attention import Attention, sine_position
from KA2ERSegment.cancellation import checkpoint
from KA2ERSegment.convolution import quick_layout
from KA2ERSegment.prompt_encoder import MAPS, PRIOR

Skips: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""At strides 4, 2 and 1."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder returns.

    Args:
        logits: (B, S, S, S) float32.
        quality: (B,) float32 in 0..1, the Dice that the mask is expected to have.
        voxels: (B, C, S, S, S), the decoder's last features.
        token: (B, width), its mask token after the last block.
        gate: (B, K+1) float32, weights of the general decoder and of each specialist; None without a gate.
        heard: (B,) int64, the specialist that was heard (1..K), 0 for the general decoder alone; None without a gate.
        votes: (B, E, n, n, n) float32, mean weight of each expert of the voting head in each cell; None without a head.
    """

    logits: Tensor
    quality: Tensor
    voxels: Tensor
    token: Tensor
    gate: Tensor | None = None
    heard: Tensor | None = None
    votes: Tensor | None = None


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, the image attends back (SAM's two-way transformer block)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.to_image, self.norm2 = Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm3 = nn.LayerNorm(width)
        self.to_tokens, self.norm4 = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, position: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) tokens and (B, M, C) image, both updated; `ignore` (B, N) marks padding tokens."""
        tokens = self.norm1(tokens + self.self_attention(tokens, tokens, tokens, ignore))
        tokens = self.norm2(tokens + self.to_image(tokens, image + position, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.to_tokens(image + position, tokens, tokens, ignore))
        return tokens, image


class Fusion(nn.ModuleList):
    """Two convolutions over what was decoded so far, the image's features and the prompt maps, on one grid.

    The first is a sum over all three; `read` is its part for the features, which stays the same from click to click.
    It is never called as a layer, so its checkpoints are here (`cancellation.watch_layers`).

    Args:
        own: channels of what was decoded so far, and of the answer.
        skip: channels of the image's features.
    """

    def __init__(self, own: int, skip: int) -> None:
        layers = (
            nn.Conv3d(own + skip + MAPS, own, 3, padding=1),
            nn.GroupNorm(4, own),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(own, own, 3, padding=1),
            nn.GroupNorm(4, own),
            nn.LeakyReLU(0.01, inplace=True),
        )
        super().__init__(layers)
        self.own, self.skip = own, skip

    def read(self, skip: Tensor) -> Tensor:
        """(B, skip, ...) features to their part of the first convolution's answer, (B, own, ...)."""
        checkpoint()
        weight = self._weight[:, self.own : self.own + self.skip]
        return F.conv3d(quick_layout(skip), weight, cast("Tensor", self[0].bias), 1, 1)

    def forward(self, x: Tensor, read: Tensor, maps: Tensor) -> Tensor:
        """(B, own, ...) of `x` (B, own, ...), what `read` gave, and the prompt maps (B, MAPS, ...)."""
        checkpoint()
        weight = torch.cat([self._weight[:, : self.own], self._weight[:, self.own + self.skip :]], dim=1)
        x = F.conv3d(torch.cat([x, maps], dim=1), weight, None, 1, 1) + read
        for layer in list(self.children())[1:]:
            x = layer(x)
        return x

    @property
    def _weight(self) -> Tensor:
        return cast("Tensor", self[0].weight)


class MaskDecoder(nn.Module):
    """Two-way transformer at stride 8, then up to stride 1 with skips from the foundation and the prompt maps.

    The logits start from the geodesic prior: at initialisation the answer is that of Grow from seeds, and training
    moves it from there.

    Args:
        width: of the embedding.
        heads: of its attention.
        skips: channels of the foundation's features at strides 4 and 2, and of the stem.
        channels: of the decoder at strides 4, 2 and 1.
    """

    def __init__(self, width: int, heads: int, skips: tuple[int, int, int], channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.own_tokens = nn.Parameter(torch.randn(2, width) * 0.02)  # mask, quality
        self.embed_maps = nn.Conv3d(MAPS, width, 1)
        self.blocks = nn.ModuleList(TwoWayBlock(width, heads) for _ in range(2))
        before = (width, *channels[:2])
        self.narrow = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in zip(before, channels, strict=True))
        self.fuse = nn.ModuleList(Fusion(own, skip) for own, skip in zip(channels, skips, strict=True))
        self.token_to_filter = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, channels[2]))
        self.bias = nn.Linear(width, 1)
        self.quality = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.prior_gain = nn.Parameter(torch.tensor(5.0))

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Scale what was learnt against the geodesic prior, for good.

        A decoder that was trained for minutes may answer better with less of itself; `training/shrinking.py` measures
        which share does. That of the first shipped bundles, 0.5, was chosen on part of `val`.
        """
        last = self.token_to_filter[-1]
        for parameter in (*last.parameters(), *self.bias.parameters()):
            parameter.mul_(share)

    def read_skips(self, skips: Skips) -> Skips:
        """What `forward` makes of the skips whatever the prompts are: whoever gives many can keep it."""
        quarter, half, full = (fuse.read(skip) for fuse, skip in zip(self._fusions, skips, strict=True))
        return quarter, half, full

    @property
    def _fusions(self) -> list[Fusion]:
        return [cast("Fusion", fuse) for fuse in self.fuse]

    def forward(
        self,
        embedding: Tensor,
        skips: Skips,
        tokens: Tensor,
        ignore: Tensor,
        maps: Tensor,
        read: Skips | None = None,
    ) -> Decoded:
        """Decode one object per case.

        Args:
            embedding: (B, width, S/8, ...).
            skips: foundation features at strides 4 and 2 and stem features at stride 1.
            tokens: (B, N, width) from the prompt encoder.
            ignore: (B, N) bool, padding among them.
            maps: (B, MAPS, S, S, S).
            read: of `read_skips`, where that was kept.
        """
        pyramid = {1: maps}
        for stride in (2, 4, 8):
            pyramid[stride] = _pool(pyramid[stride // 2])
        pyramid = {stride: quick_layout(level) for stride, level in pyramid.items()}
        grid = embedding.shape[2:]
        image = (embedding + self.embed_maps(pyramid[8])).flatten(2).transpose(1, 2)  # (B, M, C)
        position = sine_position(grid, embedding.shape[1], embedding.device)
        own = self.own_tokens.expand(len(tokens), -1, -1)
        tokens = torch.cat([own, tokens], dim=1)
        ignore = torch.cat([ignore.new_zeros(len(ignore), 2), ignore], dim=1)
        for block in self.blocks:
            tokens, image = block(tokens, image, position, ignore)
        x = quick_layout(image.transpose(1, 2).unflatten(2, grid))
        read = self.read_skips(skips) if read is None else read
        for stride, narrow, fuse, skip in zip((4, 2, 1), self.narrow, self._fusions, read, strict=True):
            x = F.interpolate(narrow(x), scale_factor=2, mode="trilinear", align_corners=False)
            x = fuse(x, skip, pyramid[stride].to(x.dtype))
        mask_token = tokens[:, 0]
        logits = torch.einsum("bc,bckji->bkji", self.token_to_filter(mask_token), x) / x.shape[1] ** 0.5
        logits = logits + self.bias(mask_token)[:, :, None, None] + self.prior_gain * maps[:, PRIOR]
        return Decoded(logits.float(), self.quality(tokens[:, 1])[:, 0].float().sigmoid(), x, mask_token)


def _pool(maps: Tensor) -> Tensor:
    """Half the resolution: seeds and boxes keep their largest value, the other maps their mean."""
    largest = F.max_pool3d(maps[:, :3], 2)
    return torch.cat([largest, F.avg_pool3d(maps[:, 3:], 2)], dim=1)
