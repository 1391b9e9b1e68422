"""One forward pass of nnInteractive's network, rebuilt: what that peer pays for every click on this machine.

Started by `benchmark_first_mask.py`; prints one line of JSON. `sys.argv`: size of the cube, threads.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from our_process import peak_memory
from torch import nn

SIZE = 192
PARAMETERS = 102.4e6
"""Stated for the peer's released checkpoint."""


def network() -> nn.Module:
    """nnU-Net's residual encoder U-Net "L", random weights; 8 channels: the image, 7 of prompts and mask so far."""
    torch.manual_seed(0)
    unet: nn.Module = ResidualEncoderUNet(
        input_channels=8,
        n_stages=6,
        features_per_stage=[32, 64, 128, 256, 320, 320],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2, 2, 2],
        n_blocks_per_stage=[1, 3, 4, 6, 6, 6],
        num_classes=2,
        n_conv_per_stage_decoder=[1, 1, 1, 1, 1],
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )
    found = sum(parameter.numel() for parameter in unet.parameters())
    if abs(found - PARAMETERS) > 0.001 * PARAMETERS:
        message = f"the rebuilt network must have {PARAMETERS:.4g} parameters, it has {found}: it is not the peer's."
        raise SystemExit(message)
    return unet.eval()


def main(size: int, threads: int) -> dict[str, Any]:
    """One pass on a cube of that size after a small one, so that one-time costs are not counted."""
    torch.set_num_threads(threads)
    unet = network()
    with torch.inference_mode():
        unet(torch.zeros(1, 8, 64, 64, 64))  # 32 would leave one sample in the deepest stage
        image = torch.randn(1, 8, size, size, size)
        wall, cpu = time.perf_counter(), time.process_time()
        unet(image)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    scale = (SIZE / size) ** 3
    return {
        "size": size,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "measured": {"wall": round(wall, 3), "cpu": round(cpu, 3)},
        "at_192": {"wall": round(wall * scale, 3), "cpu": round(cpu * scale, 3)},
        "extrapolated": size != SIZE,
        "peak": peak_memory(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
