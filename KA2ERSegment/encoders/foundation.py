"""The foundation: MONAI's SwinUNETR encoder, the task-agnostic member of the amalgamation."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor

from KA2ERSegment.plans import FoundationPlans


class Foundation(nn.Module):
    """SwinUNETR's Swin transformer (Hatamizadeh et al., 2022; MONAI `SwinUNETR.swinViT`), without its decoder.

    Args:
        plans: sizes.
    """

    def __init__(self, plans: FoundationPlans) -> None:
        super().__init__()
        self.channels = {2 * 2**stage: plans.feature_size * 2**stage for stage in range(4)}
        self.swin = SwinTransformer(
            in_chans=1,
            embed_dim=plans.feature_size,
            window_size=(plans.window,) * 3,
            patch_size=(2, 2, 2),
            depths=plans.depths,
            num_heads=plans.heads,
            mlp_ratio=4.0,
            qkv_bias=True,
            drop_rate=0.0,
            attn_drop_rate=0.0,
            drop_path_rate=0.0,
            norm_layer=nn.LayerNorm,
            use_checkpoint=False,
            spatial_dims=3,
        )
        last: Any = self.swin.layers4[0]
        last.downsample = None  # stride 32 is not used: the last stage stays at stride 16

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Features by stride.

        Args:
            image: (B, 1, S, S, S) float32, z-score.

        Returns:
            {stride: (B, C, S/stride, ...)} for strides 2, 4, 8 and 16; layer-normalised as in SwinUNETR.
        """
        hidden = self.swin(image, normalize=True)
        return {2: hidden[0], 4: hidden[1], 8: hidden[2], 16: hidden[4]}
