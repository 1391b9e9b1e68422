"""Somebody's nnU-Net v2 (Isensee et al., 2021): a whole network that says its own classes, or an expert for a bundle.

Supported: 3D configurations, plain and residual encoders of any number of stages, isotropic or not, classes or regions,
several input channels (each sees the one image of a volume). nnU-Net itself need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from scipy import ndimage
from torch import Tensor

from KA2ERSegment.encoders.expert import Expert, build_network, features_on_patch, stage_strides
from KA2ERSegment.encoders.nnunet_results import Results
from KA2ERSegment.encoders.reading import network_input, normalised, on_patch
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.geometry import Box
from KA2ERSegment.plans import ExpertPlans
from KA2ERSegment.preprocessing import RawPatch, image_statistics

NEEDED = (8, 16)
"""Strides whose features a bundle reads; stages beyond the last are left out of an expert."""
MAX_SPACING_RATIO = 20.0
"""Between a volume's spacing and that of the plans: beyond it one of the two is a mistake."""
_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
_ANISOTROPIC = 3.0
"""nnU-Net resamples slices one by one where they are more than this many times thicker than their pixels."""


@dataclass(frozen=True, slots=True)
class FoundExpert:
    """The encoder of somebody's nnU-Net.

    Args:
        plans: as the bundle keeps them.
        tensors: of the encoder, by name, float32.
    """

    plans: ExpertPlans
    tensors: dict[str, Tensor]

    def stored_along(self, axes: tuple[int, int, int]) -> FoundExpert:
        """The same for images that were stored in another order, sagittal slices for instance.

        Args:
            axes: canonical axis, 0 (K, superior) to 2 (I, right), that the files' K, J and I lie along.
        """
        plans = self.plans
        spacing = tuple(plans.spacing_kji[axes.index(axis)] for axis in range(3))
        order = tuple(axes[axis] for axis in plans.axes or (0, 1, 2))
        return replace(self, plans=replace(plans, spacing_kji=spacing, axes=() if order == (0, 1, 2) else order))


def read_results(
    folder: Path, name: str = "", fold: str = "", task: str = "", licence: str = "not stated"
) -> FoundExpert:
    """The encoder in a results folder, up to stride 16; arguments and errors are those of `Results.read`."""
    results = Results.read(folder, name, fold, task, licence)
    plans = replace(results.plans, arch_kwargs=_cut(results.plans.arch_kwargs))
    return FoundExpert(plans, _tensors(Expert(plans).encoder, results, "encoder."))


class NnUNet(nn.Module):
    """A whole nnU-Net with its own preprocessing, frozen: a teacher, and what its lab would see.

    Built by nnU-Net's library (`dynamic_network_architectures`) from its own plans.

    Args:
        results: of its training.
    """

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.plans, self.outputs, self.regions = results.plans, results.outputs, results.regions
        self.patch_size = results.patch_size
        self.strides = stage_strides(results.plans.arch_kwargs)
        self.network = build_network(results.plans, deep_supervision=False, outputs=len(results.outputs))
        own = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        with torch.no_grad():
            for name, tensor in _tensors(self.network, results).items():
                own[name].copy_(tensor)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, fold: str = "") -> NnUNet:
        """From a results folder, on the CPU (`.to(device)` moves it).

        Args:
            folder: TRAINER__PLANS__CONFIGURATION, with `plans.json`, `dataset.json` and folds.
            fold: "0" to "4", or "all"; by default "all" where it is there, else the lowest.

        Raises:
            BundleError: the folder is none of nnU-Net v2, or its network does not fit; the message says what to do.
        """
        return cls(Results.read(folder, fold=fold))

    @torch.no_grad()
    def features(self, raw: RawPatch, strides: Sequence[int] = NEEDED) -> dict[int, Tensor]:
        """Features of its encoder on patches, normalised and resampled as its plans say.

        Args:
            raw: (B, S, S, S) grey values, on the network's device.
            strides: of the patch; where the encoder has no stage of one, the last that is not coarser stands for it.

        Returns:
            {stride: (B, C, S/stride, ...)} float32 on the patch's own grid, KJI.
        """
        encoder: Any = self.network.encoder
        return features_on_patch(encoder, self.strides, self.plans, raw, strides)

    @torch.no_grad()
    def patch_probabilities(self, raw: RawPatch) -> Tensor:
        """What it says of patches, in one pass each, for knowledge distillation.

        Args:
            raw: (B, S, S, S) grey values, on the network's device. Each patch is read at the spacing of the plans, to
                the nearest number of samples that the network can halve, and at most 96 along an axis.

        Returns:
            (B, len(outputs), S, S, S) float32 on the patch's own grid, KJI: softmax over `outputs`, a sigmoid for each
            where they are regions.
        """
        cases = []
        for case in range(len(raw.values)):
            logits = self.network(network_input(self.plans, raw.case(case), self.strides[-1]))
            cases.append(self._activated(on_patch(logits, self.plans, raw.values.shape[-1])))
        return torch.cat(cases)

    @torch.no_grad()
    def probabilities(self, image_kji: npt.ArrayLike, spacing_kji: Sequence[float]) -> npt.NDArray[np.float32]:
        """What it says of a whole volume, or of any part of one, as nnU-Net's own inference does without mirroring.

        Cropped to what is not 0, normalised, resampled to the plans' spacing, seen through sliding windows of the
        plans' patch size that overlap by half, resampled back.

        Args:
            image_kji: (K, J, I) grey values in the unit it was trained on; axes S, A, R where it was trained so.
            spacing_kji: mm along K, J and I (`Volume.spacing` is I, J, K).

        Returns:
            (len(outputs), K, J, I) float32: softmax over `outputs`, a sigmoid for each where they are regions.

        Raises:
            VolumeError: no 3D image, nothing but 0, or a spacing twenty times that of the plans or less than a 20th.
        """
        image = np.asarray(image_kji, dtype=np.float32)
        self._check(image, spacing_kji)
        axes = self.plans.axes or (0, 1, 2)
        image = image.transpose(axes)
        spacing, wanted = ([mm[axis] for axis in axes] for mm in (spacing_kji, self.plans.spacing_kji))
        around = Box.around(ndimage.binary_fill_holes(image != 0))
        assert around is not None, "checked"
        crop = image[around.slices]
        device = next(self.network.parameters()).device
        whole = RawPatch(
            values=torch.from_numpy(crop.copy())[None],
            inside=torch.ones(1, *crop.shape, dtype=torch.bool),
            step=torch.tensor([spacing]),
            statistics=image_statistics(crop)[None],
            has_unit=torch.ones(1, dtype=torch.bool),
        )
        channels = np.stack([normalised(whole, channel)[0].numpy() for channel in self.plans.normalisation])
        shape = [max(1, round(n * a / b)) for n, a, b in zip(crop.shape, spacing, wanted, strict=True)]
        low, high = (limit(axis=(1, 2, 3), keepdims=True) for limit in (channels.min, channels.max))
        data = np.clip(_zoomed(channels, shape, spacing, wanted, 3), low, high)  # splines overshoot
        logits = self._through_windows(torch.from_numpy(data)[None].to(device))[0].cpu().numpy()
        found = self._activated(torch.from_numpy(_zoomed(logits, crop.shape, wanted, spacing, 1))[None])[0].numpy()
        probabilities = np.zeros((len(self.outputs), *image.shape), dtype=np.float32)
        if not self.regions:
            probabilities[0] = 1
        probabilities[(slice(None), *around.slices)] = found
        return probabilities.transpose(0, *(axes.index(axis) + 1 for axis in range(3)))

    def _check(self, image: npt.NDArray[np.float32], spacing: Sequence[float]) -> None:
        """What a volume must be to be seen by this network."""
        if image.ndim != 3 or not np.isfinite(image).all() or not image.any():
            message = f"nnU-Net {self.plans.name!r} needs a 3D image (K, J, I) of numbers that are not all 0."
            raise VolumeError(message)
        ratios = [mm / own for mm, own in zip(spacing, self.plans.spacing_kji, strict=True)]
        if not all(1 / MAX_SPACING_RATIO < ratio < MAX_SPACING_RATIO for ratio in ratios):
            own, given = (" x ".join(f"{mm:g}" for mm in three) for three in (self.plans.spacing_kji, spacing))
            message = (
                f"a volume for nnU-Net {self.plans.name!r} must have about the spacing that it was planned for, "
                f"{own} mm (K, J, I), got {given} mm. Resample it, or look into its header."
            )
            raise VolumeError(message)

    def _through_windows(self, data: Tensor) -> Tensor:
        from monai.inferers.utils import sliding_window_inference

        logits: Any = sliding_window_inference(
            data, self.patch_size, 1, self.network, overlap=0.5, mode="gaussian", sigma_scale=1 / 8
        )
        found: Tensor = logits
        return found

    def _activated(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.regions else logits.softmax(dim=1)


def _zoomed(
    channels: npt.NDArray[np.float32], shape: Sequence[int], before: Sequence[float], after: Sequence[float], order: int
) -> npt.NDArray[np.float32]:
    """Channels (C, ...) on a grid of another shape as nnU-Net resamples: thick slices one by one, the nearest slice."""
    thick = None
    for spacing in (before, after):
        longest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
        if thick is None and max(spacing) / min(spacing) > _ANISOTROPIC and len(longest) == 1:
            thick = longest[0]
    factors = [new / old for new, old in zip(shape, channels.shape[1:], strict=True)]
    within = [1.0 if axis == thick else factor for axis, factor in enumerate(factors)]
    across = [factor if axis == thick else 1.0 for axis, factor in enumerate(factors)]
    zoomed = channels
    for factor, degree in ((within, order), (across, 0)):
        if factor != [1.0, 1.0, 1.0]:
            zoomed = np.stack([ndimage.zoom(c, factor, order=degree, mode="nearest", grid_mode=True) for c in zoomed])
    return zoomed


def _cut(kwargs: Any) -> dict[str, Any]:
    """The arguments of the same encoder without the stages beyond stride 16."""
    total, keep = [1, 1, 1], 0
    for stage, stride in enumerate(kwargs["strides"]):
        steps = stride if isinstance(stride, list) else [stride] * 3
        if len(steps) != 3 or not all(isinstance(step, int) for step in steps):
            return dict(kwargs)  # the network's own builder says what is wrong
        total = [a * b for a, b in zip(total, steps, strict=True)]
        if max(total) <= NEEDED[-1]:
            keep = stage + 1
    cut = dict(kwargs)
    for key in _PER_STAGE:
        if isinstance(cut.get(key), list):
            cut[key] = cut[key][:keep]
    if isinstance(cut.get("n_conv_per_stage_decoder"), list):
        cut["n_conv_per_stage_decoder"] = cut["n_conv_per_stage_decoder"][: max(0, keep - 1)]
    return {**cut, "n_stages": keep}


def _tensors(module: nn.Module, results: Results, prefix: str = "") -> dict[str, Tensor]:
    """A module's tensors from the checkpoint, float32, by the module's own names; `prefix`: where it lies there."""
    floating = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    tensors = {}
    for name, expected in {**dict(module.named_parameters()), **floating}.items():
        found = results.weights.get(f"{prefix}{name}")
        if found is None or found.shape != expected.shape:
            got = "none" if found is None else tuple(found.shape)
            message = (
                f"{str(results.file)!r} must hold the network of plans.json: {prefix}{name} must have shape "
                f"{tuple(expected.shape)}, got {got}. Plans and checkpoint are of two trainings."
            )
            raise BundleError(message)
        if not bool(found.isfinite().all()):
            message = f"{str(results.file)!r}: {prefix}{name} must be finite. The training failed; name another fold."
            raise BundleError(message)
        tensors[name] = found.detach().float()
    return tensors
