"""`QuickConvolution` changes who computes a convolution, not what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from KA2ERSegment.convolution import QuickConvolution


@pytest.mark.parametrize(
    ("arguments", "channels"),
    [
        ({"kernel_size": 3, "padding": 1}, (16, 8)),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (1, 16)),
        ({"kernel_size": 1, "bias": False}, (5, 4)),
        ({"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": (1, 2, 2)}, (4, 6)),
        ({"kernel_size": 3, "padding": "same", "dilation": 2}, (3, 3)),
        ({"kernel_size": 3, "groups": 2}, (4, 4)),
    ],
)
def test_convolutions_come_out_the_same(arguments: dict[str, Any], channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, image = nn.Conv3d(*channels, **arguments), torch.randn(2, channels[0], 7, 8, 9)
    with torch.inference_mode():
        expected = layer(image)
        with QuickConvolution():
            found = layer(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_small_convolutions_go_to_onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    layer, image = nn.Conv3d(4, 4, 3), torch.randn(1, 4, 6, 6, 6)
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with recorder as profile, torch.no_grad(), QuickConvolution():
        layer(image)
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert "aten::slow_conv3d_forward" not in names


def test_gradients_flow_as_without_it() -> None:
    layer, image = nn.Conv3d(2, 2, 3), torch.randn(1, 2, 5, 5, 5, requires_grad=True)
    with QuickConvolution():
        layer(image).sum().backward()
    assert image.grad is not None
    assert layer.weight.grad is not None


def test_other_types_pass_through() -> None:
    layer, image = nn.Conv3d(2, 2, 3).double(), torch.randn(1, 2, 5, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(image)
        with QuickConvolution():
            torch.testing.assert_close(layer(image), expected)
