"""Images made from label maps, on the device that trains, B cases at once.

After Billot et al. 2023 (SynthSeg): each label gets a random intensity, then partial volume, bias field, blur,
noise and slice thickness are put on top. Here labels also get textures, and what is unlabelled gets structure.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LUT = 512
"""Labels are hashed into this many intensity classes."""


class Uniform(Protocol):
    """Draws (B, *shape) evenly between two numbers."""

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw."""
        ...


def make_image(labels: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Random images of label maps.

    Args:
        labels: (B, S, S, S) int64.
        target: (B, S, S, S) bool; its border is given some contrast, else nobody could segment it.
        generator: of the device.

    Returns:
        (B, S, S, S) float32, about 0..1.
    """
    batch, size = labels.shape[0], labels.shape[-1]
    device = labels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, device=device, generator=generator) * (high - low) + low

    fill = _smooth_noise(batch, size, 7, generator, device)
    fill = (fill * 2).round().clamp(-2, 2).long() + 2  # five classes of unlabelled tissue
    structured = uniform(0, 1, 1, 1, 1) < 0.5
    classes = torch.where((labels == 0) & structured, LUT - 5 + fill, labels.remainder(LUT - 6))
    means = uniform(0, 1, LUT)
    spreads = uniform(0, 0.08, LUT)
    textures = uniform(0, 0.12, LUT) * (uniform(0, 1, LUT) < 0.3)
    flat = classes.flatten(1)
    mean = means.gather(1, flat).view_as(classes)
    mean = _with_contrast(mean, target, uniform)
    image = mean + spreads.gather(1, flat).view_as(mean) * torch.randn(mean.shape, device=device, generator=generator)
    image = image + textures.gather(1, flat).view_as(mean) * _smooth_noise(batch, size, 22, generator, device)
    return _blur(image, uniform(0.3, 1.1, 1))


def disturb(image: Tensor, generator: torch.Generator) -> Tensor:
    """Scanner effects for made and real images alike: bias field, slice thickness, noise, gamma, inversion.

    Args:
        image: (B, S, S, S) float32, any unit.
        generator: of the device.
    """
    batch, size = image.shape[0], image.shape[-1]
    device = image.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, device=device, generator=generator) * (high - low) + low

    flat = image.flatten(1)
    low = flat.amin(1)[:, None, None, None]
    image = (image - low) / (flat.amax(1)[:, None, None, None] - low).clamp_min(1e-6)
    image = image.clamp(0, 1) ** torch.exp(uniform(-0.4, 0.4, 1, 1, 1))
    image = torch.where(uniform(0, 1, 1, 1, 1) < 0.1, 1 - image, image)
    field = _smooth_noise(batch, size, 3, generator, device)
    image = image * torch.exp(field * uniform(0, 0.3, 1, 1, 1))
    thick = int(torch.randint(0, 12, (1,), device=device, generator=generator))  # one thickness for the batch
    if thick in (2, 3, 4, 5, 6):
        axis = int(torch.randint(0, 3, (1,), device=device, generator=generator))
        kernel = [thick if a == axis else 1 for a in range(3)]
        coarse = F.avg_pool3d(image[:, None], kernel, ceil_mode=True)
        image = F.interpolate(coarse, size=image.shape[1:], mode="trilinear", align_corners=False)[:, 0]
    noise = uniform(0, 0.06, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.7)
    return image + noise * torch.randn(image.shape, device=device, generator=generator)


def _with_contrast(mean: Tensor, target: Tensor, uniform: Uniform) -> Tensor:
    """Shift the target where it is as bright as its surroundings; how much is random, never invisible."""
    inside = target.float()
    near = F.max_pool3d(inside[:, None], 5, stride=1, padding=2)[:, 0] - inside
    own = (mean * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1)
    around = (mean * near).flatten(1).sum(1) / near.flatten(1).sum(1).clamp_min(1)
    wanted = uniform(0.08, 0.4)
    gap = own - around
    shift = torch.where(gap.abs() < wanted, torch.where(gap >= 0, wanted, -wanted) - gap, torch.zeros_like(gap))
    return mean + inside * shift[:, None, None, None]


def _smooth_noise(batch: int, size: int, grid: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(B, S, S, S) of about unit variance, smooth over size/grid samples."""
    coarse = torch.randn(batch, 1, grid, grid, grid, device=device, generator=generator)
    return F.interpolate(coarse, size=(size, size, size), mode="trilinear", align_corners=True)[:, 0]


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, one sigma (B, 1) in samples per case; three 1D convolutions, grouped by case."""
    offsets = torch.arange(-3, 4, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))  # (B, 7)
    kernel = kernel / kernel.sum(1, keepdim=True)
    image = image[None]  # cases as channels
    for axis in range(3):
        shape = [-1, 1, 1, 1, 1]
        shape[axis + 2] = 7
        padding = [3 if a == axis else 0 for a in range(3)]
        image = F.conv3d(F.pad(image, _pad(padding), mode="replicate"), kernel.view(shape), groups=kernel.shape[0])
    return image[0]


def _pad(padding: list[int]) -> list[int]:
    k, j, i = padding
    return [i, i, j, j, k, k]
