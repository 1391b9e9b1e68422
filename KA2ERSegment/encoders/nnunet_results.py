"""Read a results folder of nnU-Net v2 (Isensee et al., 2021): plans, classes and weights, checked, nothing executed.

A results folder is what nnU-Net's training writes, `nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION`, with
`plans.json`, `dataset.json` and a `fold_N` for each fold. Checkpoints are read with `weights_only`, and classes that
the plans name come from torch and nnU-Net's own library alone.
"""

from __future__ import annotations

import itertools
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from KA2ERSegment.bundle import read_json_object, sha256_of
from KA2ERSegment.domain import Fingerprint
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import SCHEMES, DomainPlans, ExpertPlans, Normalisation

SPACING_MM = (0.01, 50.0)
"""Spacings outside this range are mistakes, or no medical images."""
SPREAD = 0.5
"""Standard deviation of the logarithms of spacing and extent in a data set of which only medians are known."""
_WINDOW = ("percentile_00_5", "percentile_99_5", "mean", "std")
"""What CTNormalization takes from the plans, for each channel."""
_LIBRARY = "dynamic_network_architectures.architectures.unet."


@dataclass(frozen=True, slots=True)
class Results:
    """Somebody's nnU-Net, as it lies on disk.

    Args:
        plans: the whole network, its normalisation, spacing (KJI) and order of axes.
        weights: of the network by name, as they were trained.
        outputs: names of the network's outputs, in their order; "background" first unless they are regions.
        regions: outputs may overlap: each has a sigmoid, and there is no background.
        patch_size: that it was trained on, samples along its own axes.
        file: the checkpoint.
    """

    plans: ExpertPlans
    weights: dict[str, Tensor]
    outputs: tuple[str, ...]
    regions: bool
    patch_size: tuple[int, int, int]
    file: Path

    @classmethod
    def read(cls, folder: Path, name: str = "", fold: str = "", task: str = "", licence: str = "not stated") -> Results:
        """Read one fold.

        Args:
            folder: with `plans.json`, `dataset.json` and folds.
            name: of the expert; made from the data set's name where it is left out.
            fold: "0" to "4", or "all"; by default "all" where it is there, else the lowest.
            task: what it was trained for, in words; the data set's name by default.
            licence: of the weights, in words.

        Raises:
            BundleError: the folder is none of nnU-Net v2, or its parts do not fit; the message says what to do.
        """
        folder = Path(folder)
        plans, dataset = _documents(folder)
        file = _checkpoint_file(folder, fold)
        checkpoint = _checkpoint(file)
        settings = _settings(plans, _configuration_name(folder, checkpoint), folder)
        axes = _axes(plans, folder)
        spacing = _spacing(settings, folder)
        classes, regions = _classes(dataset, folder)
        outputs = classes if regions else ("background", *classes)
        weights = _network_weights(checkpoint, file)
        _check_outputs(weights, len(outputs), file)
        dataset_name = str(plans.get("dataset_name", folder.parent.name))
        network_class, arch_kwargs = _architecture(settings, folder)
        expert = ExpertPlans(
            name=name or _name_from(dataset_name),
            task=task or f"{_words(dataset_name)}: {', '.join(classes)}",
            network_class_name=network_class,
            arch_kwargs=arch_kwargs,
            classes=classes,
            licence=licence,
            origin=f"{dataset_name}, {folder.name}, {file.parent.name}, {file.name}",
            sha256=sha256_of(file),
            spacing_kji=tuple(spacing[axes.index(axis)] for axis in range(3)),
            normalisation=_normalisation(plans, settings, dataset, folder),
            axes=() if axes == (0, 1, 2) else axes,
            domain=_domain(plans, dataset),
        )
        k, j, i = settings["patch_size"]
        return cls(expert, weights, outputs, regions, (k, j, i), file)


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
        message = (
            f"{str(path)!r} must be a checkpoint as nnU-Net v2 writes it, plain tensors and numbers. It is damaged or "
            f"holds something else ({why_not_plain(error)}). Nothing of it was run."
        )
        raise BundleError(message) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
        message = f"{str(path)!r} must be a checkpoint of nnU-Net v2 with 'network_weights', it has none."
        raise BundleError(message)
    return checkpoint


def why_not_plain(error: Exception) -> str:
    """Why torch refused to read a file with `weights_only`, without its advice to read it without."""
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks for {named[1]}, which is no plain data" if named else "a pickle of something that is no data"
    reason = str(error).strip().splitlines()
    return f"{type(error).__name__}: {reason[0] if reason else ''}"


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
        isinstance(patch, list) and len(patch) == 3 and all(isinstance(n, int) and n > 0 for n in patch),
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


def _axes(plans: dict[str, Any], folder: Path) -> tuple[int, int, int]:
    """Which axis of the image, 0 (K) to 2 (I), is the network's first, and so on."""
    order = plans.get("transpose_forward", [0, 1, 2])
    _check(
        order in [list(axes) for axes in itertools.permutations(range(3))],
        folder,
        "must have plans whose transpose_forward is 0, 1 and 2 in some order",
        order,
        "Plan and train it again with nnU-Net v2.",
    )
    first, second, third = order
    return first, second, third


def _normalisation(
    plans: dict[str, Any], settings: dict[str, Any], dataset: dict[str, Any], folder: Path
) -> tuple[Normalisation, ...]:
    """The scheme of each input channel, with its numbers."""
    channels = dataset.get("channel_names", dataset.get("modality"))
    schemes = settings.get("normalization_schemes")
    count = len(channels) if isinstance(channels, dict) else 0
    _check(
        isinstance(schemes, list) and len(schemes) == count > 0,
        folder,
        "must have a dataset.json with channel_names, and plans with one normalisation scheme for each input channel",
        f"channels {channels} and schemes {schemes}",
        "Put the dataset.json of its training beside plans.json.",
    )
    masks = settings.get("use_mask_for_norm") or [False] * count
    windows = plans.get(
        "foreground_intensity_properties_per_channel", plans.get("foreground_intensity_properties_by_modality", {})
    )
    found = []
    for n, scheme in enumerate(cast("list[Any]", schemes)):
        _check(
            scheme in SCHEMES,
            folder,
            f"must be of a network whose channels are normalised by one of {', '.join(SCHEMES)}",
            f"{scheme!r} for channel {n}",
            "Train it with one of them: a scheme of a lab's own is code, and code is not run.",
        )
        try:
            numbers = {key: float(windows[str(n)][key]) for key in _WINDOW} if scheme == "CTNormalization" else {}
            found.append(Normalisation(scheme, bool(masks[n]), **numbers))
        except (BundleError, IndexError, KeyError, TypeError, ValueError) as error:
            message = (
                f"plans.json in {str(folder)!r} must have {', '.join(_WINDOW)} in "
                f"foreground_intensity_properties_per_channel for channel {n}, {scheme}: {error}. Plan it again."
            )
            raise BundleError(message) from error
    return tuple(found)


def _spacing(settings: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """Along the network's own axes."""
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


def _domain(plans: dict[str, Any], dataset: dict[str, Any]) -> DomainPlans | None:
    """The volumes that it was planned on, as far as plans tell: by their medians. None where they do not."""
    given = [plans.get(f"original_median_{what}_after_transp") for what in ("spacing", "shape")]
    plain = all(isinstance(three, list) and len(three) == 3 and all(_is_length(n) for n in three) for three in given)
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not plain or not isinstance(channels, dict):
        return None
    spacing, shape = cast("list[list[float]]", given)
    extent = tuple(n * mm for n, mm in zip(shape, spacing, strict=True))
    mean = Fingerprint(tuple(spacing), extent, None).features()
    is_ct = any(str(name).lower() == "ct" for name in channels.values())  # by this nnU-Net itself tells CT apart
    return DomainPlans(tuple(round(float(value), 4) for value in mean), (SPREAD,) * 4, 0.98 if is_ct else 0.02)


def _is_length(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _classes(dataset: dict[str, Any], folder: Path) -> tuple[tuple[str, ...], bool]:
    """Names of the classes without background in the order of the network's outputs, and whether they are regions."""
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
        bool(named) and all(isinstance(value, int) or (isinstance(value, list) and value) for value in named.values()),
        folder,
        "must have a dataset.json that names at least one class, 'labels' from name to value",
        labels,
        "Repair it as nnU-Net v2 describes.",
    )
    if not regions:  # outputs are in the order of values, whatever the order of the names
        named = dict(sorted(named.items(), key=lambda item: item[1][0] if isinstance(item[1], list) else item[1]))
    return tuple(named), regions


def _architecture(settings: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """Class and arguments of the network."""
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
    return str(network), cast("dict[str, Any]", kwargs)


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


def _name_from(dataset: str) -> str:
    """An expert's name from a data set's: Dataset017_BTCV_all becomes btcv_all."""
    words = re.sub(r"\W+", "_", re.sub(r"^(Dataset|Task)\d+_", "", dataset), flags=re.ASCII).strip("_").lower()
    return words if re.match("[a-z]", words) else f"expert_{words}".rstrip("_")


def _words(dataset: str) -> str:
    return re.sub(r"^(Dataset|Task)\d+_", "", dataset).replace("_", " ")


def _check(holds: bool, folder: Path, rule: str, given: object, advice: str) -> None:
    if not holds:
        message = f"nnU-Net results {str(folder)!r} {rule}, got {given}. {advice}"
        raise BundleError(message)
