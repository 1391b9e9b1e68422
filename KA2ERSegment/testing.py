"""Test doubles as public API: the smallest plans and bundle that the real code runs with, untrained.

Importing this module loads no torch; `tiny_bundle` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from KA2ERSegment.plans import ExpertPlans, FoundationPlans, Plans

if TYPE_CHECKING:
    from KA2ERSegment.bundle import Bundle

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def tiny_plans(experts: tuple[str, ...] = ("tiny_trunk", "tiny_brain"), margin: float = 1 / 3) -> Plans:
    """Plans of a patch of 32^3 samples; the first expert is a plain nnU-Net, the others have residual encoders.

    Args:
        experts: their names; none is fine too.
        margin: of the patch around an object.
    """
    return Plans(
        patch_size=32,
        margin=margin,
        zooms_mm=(16.0, 48.0),
        foundation=FoundationPlans(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 2, 2), window=2),
        experts=tuple(_tiny_expert(name, residual=n > 0) for n, name in enumerate(experts)),
        width=36,
        attention_heads=2,
        decoder_channels=(8, 8, 4),
        stem_channels=4,
    )


def tiny_bundle(folder: Path, plans: Plans | None = None, seed: int = 0) -> Bundle:
    """A whole bundle on disk, its weights drawn at random from a seed.

    Args:
        folder: to write; an older bundle there is replaced.
        plans: of the model; `tiny_plans()` by default.
        seed: of the weights. The state of torch's own generator is left as it was.
    """
    import torch

    from KA2ERSegment.build import build_model, tensors_by_name
    from KA2ERSegment.bundle import save_bundle

    plans = tiny_plans() if plans is None else plans
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = tensors_by_name(build_model(plans))
    card = "# Model card\n\nUntrained: random weights for tests.\n"
    return save_bundle(folder, plans, tensors, card, {"LICENSE": "Apache-2.0. Random numbers.\n"})


def _tiny_expert(name: str, residual: bool) -> ExpertPlans:
    """Five stages, strides 1 to 16, in nnU-Net's own words."""
    blocks: dict[str, Any] = {"n_blocks_per_stage": [1] * 5} if residual else {"n_conv_per_stage": [1] * 5}
    return ExpertPlans(
        name=name,
        task=f"nothing: {name} is a test double",
        network_class_name=RESIDUAL if residual else PLAIN,
        arch_kwargs={
            "n_stages": 5,
            "features_per_stage": [4, 4, 8, 8, 12],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 5,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
            **blocks,
            "n_conv_per_stage_decoder": [1] * 4,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        classes=("bright", "dark"),
    )
