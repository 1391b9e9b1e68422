"""Read a results folder of nnU-Net v2 (Isensee et al., 2021): its encoder becomes an expert.

A results folder is what nnU-Net's training writes, `nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION`, with
`plans.json`, `dataset.json` and a `fold_N` for each fold. Nothing of it is executed: checkpoints are read with
`weights_only`, and the network is built from the plans' words by nnU-Net's own library.

Supported: 3D configurations of one input channel, plain and residual encoders of any number of stages that reach
stride 16, isotropic or not. Stages beyond stride 16 are left out: nothing reads them.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from KA2ERSegment.bundle import read_json_object
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans

NEEDED = (8, 16)
"""Strides whose features a bundle reads; stages beyond the last are left out."""
SPACING_MM = (0.01, 50.0)
"""Spacings outside this range are mistakes, or no medical images."""
_LIBRARY = "dynamic_network_architectures.architectures.unet."
_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")


@dataclass(frozen=True, slots=True)
class FoundExpert:
    """The encoder of somebody's nnU-Net.

    Args:
        plans: as the bundle keeps them.
        tensors: of the encoder, by name, float32.
        spacing: that the nnU-Net was planned for, mm (K, J, I) in its own order of axes.
        normalisation: nnU-Net's word for it.
    """

    plans: ExpertPlans
    tensors: dict[str, Tensor]
    spacing: tuple[float, float, float]
    normalisation: str


def read_results(
    folder: Path, name: str = "", fold: str = "", task: str = "", licence: str = "not stated"
) -> FoundExpert:
    """The encoder in a results folder.

    Args:
        folder: with `plans.json`, `dataset.json` and folds.
        name: of the expert; made from the data set's name where it is left out.
        fold: "0" to "4", or "all"; by default "all" where it is there, else the lowest.
        task: what it was trained for, in words; the data set's name by default.
        licence: of the weights, in words.

    Raises:
        BundleError: the folder is none of nnU-Net v2, or its network does not fit; the message says what to do.
    """
    folder = Path(folder)
    plans, dataset = _documents(folder)
    checkpoint_file = _checkpoint_file(folder, fold)
    checkpoint = _checkpoint(checkpoint_file)
    configuration = _configuration_name(folder, checkpoint)
    settings = _settings(plans, configuration, folder)
    channels = dataset.get("channel_names", dataset.get("modality"))
    _check(
        isinstance(channels, Mapping) and len(channels) == 1,
        folder,
        "must be of a network with one input channel",
        f"{len(channels) if isinstance(channels, Mapping) else 'none named'} in dataset.json",
        "Train one on one of the channels.",
    )
    spacing = _spacing(settings, folder)
    classes, outputs = _classes(dataset, folder)
    dataset_name = str(plans.get("dataset_name", folder.parent.name))
    expert = ExpertPlans(
        name=name or _name_from(dataset_name),
        task=task or f"{_words(dataset_name)}: {', '.join(classes)}",
        classes=classes,
        licence=licence,
        origin=f"{dataset_name}, {folder.name}, {checkpoint_file.parent.name}, {checkpoint_file.name}",
        sha256=_sha256(checkpoint_file),
        **_architecture(settings, folder),
    )
    weights = _network_weights(checkpoint, checkpoint_file)
    _check_outputs(weights, outputs, checkpoint_file)
    schemes = settings.get("normalization_schemes") or [""]
    return FoundExpert(expert, _encoder_tensors(expert, weights, checkpoint_file), spacing, str(schemes[0]))


def _documents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`plans.json` and `dataset.json`; says what else the folder may be."""
    if not folder.is_dir():
        message = f"an nnU-Net results folder must be a folder, got {str(folder)!r}. Give the folder of one training."
        raise BundleError(message)
    if not (folder / "plans.json").is_file():
        if (folder / "plans.pkl").exists() or any(folder.glob("*/*.model.pkl")) or any(folder.glob("*.model.pkl")):
            message = (
                f"{str(folder)!r} must be of nnU-Net v2, got one of nnU-Net v1 (plans.pkl). "
                "Train it again with nnU-Net v2: checkpoints of v1 have another form."
            )
            raise BundleError(message)
        inner = sorted(path.parent.name for path in folder.glob("*/plans.json"))
        hint = f"Give one of {inner}." if inner else "Give the folder TRAINER__PLANS__CONFIGURATION in nnUNet_results."
        message = f"an nnU-Net results folder must have a plans.json, {str(folder)!r} has none. {hint}"
        raise BundleError(message)
    plans, dataset = (
        read_json_object(folder / name, f"nnU-Net's {str(folder / name)!r}") for name in ("plans.json", "dataset.json")
    )
    return plans, dataset


def _checkpoint_file(folder: Path, fold: str) -> Path:
    """The final checkpoint of a fold, the best one where training was cut short."""
    folds = sorted(path.name[5:] for path in folder.glob("fold_*") if path.is_dir())
    wanted = fold or ("all" if "all" in folds else folds[0] if folds else "0")
    if wanted not in folds:
        message = f"fold {wanted!r} must be in {str(folder)!r}, which has {folds or 'no folds'}. Name one of them."
        raise BundleError(message)
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        path = folder / f"fold_{wanted}" / name
        if path.is_file():
            return path
    message = (
        f"{str(folder / f'fold_{wanted}')!r} must hold checkpoint_final.pth or checkpoint_best.pth, it has neither. "
        "Finish its training, or name another fold."
    )
    raise BundleError(message)


def _checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content; a pickle that wants to run code is refused by torch."""
    try:
        with torch.serialization.safe_globals(cast("Any", _numpy_numbers())):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except AttributeError as error:  # before 2.6 torch could not be told what else is plain
        message = (
            f"reading a checkpoint of nnU-Net safely needs torch 2.6 or newer, got {torch.__version__}. Update it."
        )
        raise BundleError(message) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        message = (
            f"{str(path)!r} must be a checkpoint as nnU-Net v2 writes it, plain tensors and numbers. It is damaged or "
            f"holds something else ({type(error).__name__}: {reason[0] if reason else ''}). Nothing of it was run."
        )
        raise BundleError(message) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
        message = f"{str(path)!r} must be a checkpoint of nnU-Net v2 with 'network_weights', it has none."
        raise BundleError(message)
    return checkpoint


def _numpy_numbers() -> list[Any]:
    """What nnU-Net's log of losses is made of: numpy's numbers, under both names that numpy has given their maker."""
    make = np.float32(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in ("?", "i4", "i8", "u1", "f2", "f4", "f8")}
    return [(make, "numpy.core.multiarray.scalar"), (make, "numpy._core.multiarray.scalar"), np.dtype, *kinds]


def _configuration_name(folder: Path, checkpoint: dict[str, Any]) -> str:
    """As the checkpoint says; folders may have been renamed."""
    arguments = checkpoint.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    return str(name or folder.name.split("__")[-1])


def _settings(plans: dict[str, Any], configuration: str, folder: Path) -> dict[str, Any]:
    """A configuration with what it inherits; only 3D ones without a stage before them."""
    configurations = plans.get("configurations")
    _check(
        isinstance(configurations, dict),
        folder,
        "must have plans of nnU-Net v2 with 'configurations'",
        sorted(plans)[:5],
        "Plan and train again with nnU-Net v2.",
    )
    settings: dict[str, Any] = {}
    name: Any = configuration
    for _ in range(8):  # nnU-Net's own plans inherit once; a ring must end too
        one = cast("dict[str, Any]", configurations).get(name)
        if not isinstance(one, dict):
            known = sorted(cast("dict[str, Any]", configurations))
            message = f"plans.json in {str(folder)!r} must have configuration {name!r}, it has {known}."
            raise BundleError(message)
        settings = {**one, **settings}
        name = one.get("inherits_from")
        if name is None:
            break
    patch = settings.get("patch_size")
    _check(
        isinstance(patch, list) and len(patch) == 3,
        folder,
        "must be of a 3D configuration",
        f"{configuration!r} with patches of {patch}",
        "Train 3d_fullres or 3d_lowres.",
    )
    _check(
        settings.get("previous_stage") is None,
        folder,
        "must be of a network that sees the image alone",
        f"{configuration!r}, the second stage of a cascade",
        "Give its 3d_lowres, or train 3d_fullres.",
    )
    return settings


def _spacing(settings: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    spacing = settings.get("spacing")
    plain = isinstance(spacing, list) and len(spacing) == 3 and all(isinstance(mm, (int, float)) for mm in spacing)
    low, high = SPACING_MM
    _check(
        plain and all(math.isfinite(mm) and low <= mm <= high for mm in cast("list[float]", spacing)),
        folder,
        f"must have plans with a spacing of {low} to {high} mm along three axes",
        spacing,
        "Look into the headers of the images it was trained on.",
    )
    k, j, i = cast("list[float]", spacing)
    return float(k), float(j), float(i)


def _classes(dataset: dict[str, Any], folder: Path) -> tuple[tuple[str, ...], int]:
    """Names of the classes without background, and how many outputs nnU-Net gives the network for them."""
    labels = dataset.get("labels")
    _check(
        isinstance(labels, dict) and all(isinstance(name, str) for name in labels),
        folder,
        "must have a dataset.json with 'labels' from name to value",
        type(labels).__name__,
        "Repair it as nnU-Net v2 describes.",
    )
    named = {n: value for n, value in cast("dict[str, Any]", labels).items() if n not in ("background", "ignore")}
    regions = any(isinstance(value, list) and len(value) > 1 for value in named.values())
    _check(
        bool(named) and all(isinstance(value, (int, list)) for value in named.values()),
        folder,
        "must have a dataset.json that names at least one class, 'labels' from name to value",
        labels,
        "Repair it as nnU-Net v2 describes.",
    )
    return tuple(named), len(named) + (0 if regions else 1)


def _architecture(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Class and arguments of the network, cut off after stride 16."""
    architecture = settings.get("architecture")
    if architecture is None:
        architecture = _former_architecture(settings, folder)
    network, kwargs = architecture.get("network_class_name"), architecture.get("arch_kwargs")
    _check(
        isinstance(network, str) and isinstance(kwargs, dict) and isinstance(kwargs.get("strides"), list),
        folder,
        "must have plans whose architecture is a U-Net",
        network,
        "Networks of other trainers are not supported.",
    )
    return {"network_class_name": network, "arch_kwargs": _cut(cast("dict[str, Any]", kwargs))}


def _former_architecture(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As plans before nnU-Net 2.4 described it."""
    name = settings.get("UNet_class_name")
    _check(
        name in ("PlainConvUNet", "ResidualEncoderUNet"),
        folder,
        "must have plans whose architecture is PlainConvUNet or ResidualEncoderUNet",
        name,
        "Networks of other trainers are not supported.",
    )
    try:
        counts = list(settings["n_conv_per_stage_encoder"])
        base, most = int(settings["UNet_base_num_features"]), int(settings["unet_max_num_features"])
        kwargs = {
            "n_stages": len(counts),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(counts))],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": settings["conv_kernel_sizes"],
            "strides": settings["pool_op_kernel_sizes"],
            "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage": counts,
            "n_conv_per_stage_decoder": list(settings["n_conv_per_stage_decoder"]),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
    except (KeyError, TypeError, ValueError) as error:
        message = f"plans.json in {str(folder)!r} must describe its network, got no usable {error}. Plan it again."
        raise BundleError(message) from error
    return {"network_class_name": f"{_LIBRARY}{name}", "arch_kwargs": kwargs}


def _cut(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the same encoder without the stages beyond stride 16."""
    total, keep = [1, 1, 1], 0
    for stage, stride in enumerate(kwargs["strides"]):
        steps = stride if isinstance(stride, list) else [stride] * 3
        if len(steps) != 3 or not all(isinstance(step, int) for step in steps):
            return kwargs  # the network's own builder says what is wrong
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


def _network_weights(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """By name; prefixes of training on several GPUs and of compiled networks are taken off."""
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", n): t for n, t in checkpoint["network_weights"].items()}
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        message = f"{str(path)!r}: 'network_weights' must be tensors by name. Get the checkpoint again."
        raise BundleError(message)
    return weights


def _check_outputs(weights: dict[str, Tensor], outputs: int, path: Path) -> None:
    """Whether dataset.json is the one the network was trained with."""
    heads = {len(tensor) for name, tensor in weights.items() if re.fullmatch(r"decoder\.seg_layers\.\d+\.weight", name)}
    if heads != {outputs}:
        message = (
            f"{str(path)!r} must have as many outputs as dataset.json has classes, {outputs} with background, "
            f"got {sorted(heads) or 'none'}. Put the dataset.json of its training beside plans.json."
        )
        raise BundleError(message)


def _encoder_tensors(expert: ExpertPlans, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The encoder's tensors under the names that a bundle stores."""
    built = Expert(expert)
    if not built.channels.keys() >= set(NEEDED):
        message = (
            f"the network of {str(path)!r} must have stages of strides {NEEDED}, it has {list(built.channels)}. "
            "Train one with larger patches: nnU-Net then plans more stages."
        )
        raise BundleError(message)
    encoder = built.encoder
    floating = {name: b for name, b in encoder.named_buffers() if b.is_floating_point()}
    tensors = {}
    for name, expected in {**dict(encoder.named_parameters()), **floating}.items():
        found = weights.get(f"encoder.{name}")
        if found is None or found.shape != expected.shape:
            got = "none" if found is None else tuple(found.shape)
            message = (
                f"{str(path)!r} must hold the network of plans.json: encoder.{name} must have shape "
                f"{tuple(expected.shape)}, got {got}. Plans and checkpoint are of two trainings."
            )
            raise BundleError(message)
        if not bool(found.isfinite().all()):
            message = f"{str(path)!r}: encoder.{name} must be finite. The training failed; name another fold."
            raise BundleError(message)
        tensors[name] = found.detach().float()
    return tensors


def _name_from(dataset: str) -> str:
    """An expert's name from a data set's: Dataset017_BTCV_all becomes btcv_all."""
    words = re.sub(r"\W+", "_", re.sub(r"^(Dataset|Task)\d+_", "", dataset), flags=re.ASCII).strip("_").lower()
    return words if re.match("[a-z]", words) else f"expert_{words}".rstrip("_")


def _words(dataset: str) -> str:
    return re.sub(r"^(Dataset|Task)\d+_", "", dataset).replace("_", " ")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check(holds: bool, folder: Path, rule: str, given: object, advice: str) -> None:
    if not holds:
        message = f"nnU-Net results {str(folder)!r} {rule}, got {given}. {advice}"
        raise BundleError(message)
