"""`QuickConvolution` changes who computes a convolution, not what comes out; `SoundConvolution` what is wrong of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from KA2ERSegment.convolution import QuickConvolution, SoundConvolution, quick_layout


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "shape"), [((24, 8), (5, 6, 8)), ((3, 4), (2, 1, 2)), ((8, 1), (4, 4, 6))])
def test_convolutions_to_few_channels_come_out_the_same_to_the_last_bit(
    channels: tuple[int, int], shape: tuple[int, int, int], bias: bool
) -> None:
    """Two voxels of them are computed at once where the CPU has room for both."""
    torch.manual_seed(0)
    layer, image = nn.Conv3d(*channels, 3, padding=1, bias=bias), torch.randn(2, channels[0], *shape)
    odd = torch.cat([image, image.new_zeros(2, channels[0], *shape[:2], 1)], dim=-1)  # no pairs there
    with torch.inference_mode(), QuickConvolution():
        found = layer(image.contiguous(memory_format=torch.channels_last_3d))
        expected = layer(odd.contiguous(memory_format=torch.channels_last_3d))[..., :-1]
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_image_keeps_its_layout_whatever_stride_its_batch_has() -> None:
    """With a batch stride that no batch of more could have oneDNN would answer channels first, and slowly."""
    torch.manual_seed(0)
    layer, image = nn.Conv3d(6, 4, 1), torch.randn(1, 4 * 4 * 4, 6).transpose(1, 2).unflatten(2, (4, 4, 4))
    odd = image.as_strided(image.shape, (6, *image.stride()[1:]))
    with torch.inference_mode(), QuickConvolution():
        found = layer(quick_layout(odd))
        expected = layer(image.contiguous())
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, expected)


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


@pytest.mark.parametrize("image", [(1, 1, 1), (2, 2, 2), (2, 4, 1), (4, 4, 2), (8, 8, 8)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_weight_gradients_in_bfloat16_are_right_however_small_the_image(
    image: tuple[int, int, int], kernel: int, stride: int
) -> None:
    """Without the mode those of 3^3 on 2^3 are wrong by as much as they are large, or NaN, on a CPU with AVX-512."""
    torch.manual_seed(0)
    layer = nn.Conv3d(12, 12, kernel, stride, padding=kernel // 2)
    layer = layer.to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 12, *image)
    y = layer(x)
    ahead = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, layer.weight, ahead)
    with SoundConvolution(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    (found,) = torch.autograd.grad(y, layer.weight, ahead.to(y.dtype))

    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
