"""3D convolutions on a CPU: quicker than PyTorch's own choice for patches as small as ours, right where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_OPTIONS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
"""Of `torch.conv3d` after image and weight, in its order."""
_SAME = (1, 1, 1), (1, 1, 1), (1, 1, 1)
"""Stride, padding and dilation of a 3^3 convolution that keeps the grid."""
_REGISTER = {"AVX512": 16, "AVX2": 8}
"""Numbers of float32 that a CPU works on at once."""


class QuickConvolution(TorchFunctionMode):
    """Within it, 3D convolutions of float32 on a CPU go to oneDNN, whatever the size of the image.

    PyTorch asks oneDNN only where batch x channels x depth x height is above 20480 (`ConvParams::use_mkldnn` in
    aten/src/ATen/native/Convolution.cpp); below it takes a routine for any machine, which needs 57 ms instead of 4.5
    for 16 channels on 32^3, one thread. The results agree to float32 rounding. A mode and not a layer of our own:
    the experts' layers are made by nnU-Net's library. To be deleted once PyTorch drops that rule.

    Inert on other devices, on builds without oneDNN and where gradients are recorded.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by PyTorch in the place of each of its functions."""
        kwargs = kwargs or {}
        if func is torch.conv3d and not kwargs and len(args) >= 2 and _fits_onednn(args[0], args[1]):
            option: dict[str, Any] = {**_OPTIONS, **dict(zip(_OPTIONS, args[2:], strict=False))}
            stride, padding, dilation = (option[key] for key in ("stride", "padding", "dilation"))
            if not isinstance(padding, str):
                image, weight = args[:2]
                padding, stride, dilation = _triple(padding), _triple(stride), _triple(dilation)
                if _is_channels_last(image):  # else oneDNN would answer with channels first, and slowly
                    weight = weight.contiguous(memory_format=torch.channels_last_3d)
                    if _fills_half_a_register(image, weight) and (stride, padding, dilation) == _SAME:
                        return _in_pairs(image, weight, option["bias"])
                return torch.mkldnn_convolution(
                    image, weight, option["bias"], padding, stride, dilation, option["groups"]
                )
        return func(*args, **kwargs)


class SoundConvolution(TorchFunctionMode):
    """Within it, 3D convolutions of images narrower than their kernel are not computed in bfloat16 on a CPU.

    oneDNN's weight gradients are wrong there, and NaN where the memory that it reads beyond the image happens to hold
    NaN: with bfloat16 and a 3^3 kernel on 2^3 samples, as in the last stage of an nnU-Net on a patch of 32^3
    (`jit_bf16:avx512_core_bf16`, seen in PyTorch 2.13). To be deleted once a release of PyTorch passes its test
    without it. Inert on other devices and outside of autocast.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by PyTorch in the place of each of its functions."""
        if func is torch.conv3d and len(args) >= 2 and torch.is_autocast_enabled("cpu") and _is_narrow(*args[:2]):
            with torch.autocast("cpu", enabled=False):
                args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def quick_layout(image: torch.Tensor) -> torch.Tensor:
    """Channels last in memory where `QuickConvolution` works; the same values everywhere.

    Convolutions of few channels and what upsamples them take much less time so.
    """
    if image.device.type != "cpu" or torch.is_grad_enabled():
        return image
    laid = image.contiguous(memory_format=torch.channels_last_3d)
    if laid.stride(0) == laid[0].numel():
        return laid
    # A batch of one counts as contiguous whatever its stride is, but where that is odd oneDNN answers channels first.
    return laid.clone(memory_format=torch.channels_last_3d)


def _fills_half_a_register(image: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a 3^3 convolution has so few output channels that those of two voxels are worked on in one go."""
    register = _REGISTER.get(torch.backends.cpu.get_cpu_capability(), 0)
    whole = weight.shape[1] == image.shape[1] and weight.shape[2:] == (3, 3, 3)  # no groups
    return whole and 2 * len(weight) <= register and image.shape[-1] % 2 == 0


def _in_pairs(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 3^3 convolution that computes two neighbours along I as one voxel of twice the channels; the same numbers.

    Each pair reads four voxels along I: the first of the two all but the last, the second one all but the first. A
    quarter of the products is with zero, where half of every register was empty.
    """
    channels = len(weight)
    both = weight.new_zeros(2 * channels, *weight.shape[1:4], 4)
    both[:channels, ..., :3] = weight
    both[channels:, ..., 1:] = weight
    both = both.contiguous(memory_format=torch.channels_last_3d)
    twice = None if bias is None else torch.cat([bias, bias])
    pairs = torch.mkldnn_convolution(image, both, twice, (1, 1, 1), (1, 1, 2), (1, 1, 1), 1)
    voxels = pairs.permute(0, 2, 3, 4, 1).reshape(*(image.shape[0], *image.shape[2:]), channels)  # the same memory
    return voxels.permute(0, 4, 1, 2, 3)


def _is_channels_last(image: torch.Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last_3d) and not image.is_contiguous()


def _is_narrow(image: torch.Tensor, weight: torch.Tensor) -> bool:
    """Along some axis the kernel is longer than the image."""
    return image.device.type == "cpu" and any(n < k for n, k in zip(image.shape[-3:], weight.shape[-3:], strict=True))


def _fits_onednn(image: torch.Tensor, weight: torch.Tensor) -> bool:
    onednn: Any = torch.backends.mkldnn  # no types
    return bool(
        image.device.type == "cpu"
        and image.dtype == weight.dtype == torch.float32
        and image.ndim == 5
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled()
        and onednn.is_available()
        and onednn.enabled
    )


def _triple(value: Any) -> tuple[int, int, int]:
    i, j, k = value if isinstance(value, (tuple, list)) else (value,) * 3
    return int(i), int(j), int(k)
