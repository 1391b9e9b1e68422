"""Encoders: nnU-Net's own words build nnU-Net's own network, and nothing else is ever built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from KA2ERSegment.encoders.expert import Expert, _locate, build_network
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans, FoundationPlans
from KA2ERSegment.testing import PLAIN, RESIDUAL, tiny_plans

FEATURES = [32, 64, 128, 256, 320, 320]
# Word for word what nnU-Net v2 plans for a 3d_fullres configuration with an isotropic patch: plain, and ResEncM.
PLANNED: dict[str, dict[str, Any]] = {
    PLAIN: {"n_conv_per_stage": [2, 2, 2, 2, 2, 2], "n_conv_per_stage_decoder": [2, 2, 2, 2, 2]},
    RESIDUAL: {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1, 1, 1, 1, 1]},
}


def as_nnunet_plans_it(network: str) -> ExpertPlans:
    kwargs = {
        "n_stages": 6,
        "features_per_stage": FEATURES,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **PLANNED[network],
    }
    return ExpertPlans("planned", "task", network, kwargs, ("liver", "spleen"))


@pytest.mark.parametrize("network", [PLAIN, RESIDUAL])
def test_a_network_that_nnunet_planned_fits(network: str) -> None:
    with torch.device("meta"):  # shapes alone: 30 million parameters are not needed to know them
        expert = Expert(as_nnunet_plans_it(network))
        features = expert(torch.empty(1, 1, 64, 64, 64))

    assert expert.channels == dict(zip([1, 2, 4, 8, 16, 32], FEATURES, strict=True))
    assert {s: tuple(f.shape) for s, f in features.items()} == {
        s: (1, n, 64 // s, 64 // s, 64 // s) for s, n in expert.channels.items()
    }


@pytest.mark.parametrize("index", [0, 1])
def test_the_encoder_of_a_trained_network_becomes_the_expert(index: int) -> None:
    """A checkpoint names the encoder's tensors `encoder.*`; with them the expert sees what the network sees."""
    plans = tiny_plans().experts[index]
    network = build_network(plans, deep_supervision=True)
    expert = Expert(plans)
    own = {k.removeprefix("encoder."): v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    expert.encoder.load_state_dict(own, strict=True)
    image = torch.randn(1, 1, 32, 32, 32)

    for mine, its in zip(expert(image).values(), network.encoder(image), strict=True):
        assert torch.equal(mine, its)
    assert network(image)[0].shape == (1, 3, 32, 32, 32), "two classes and background, deep supervision"


def test_strides_may_be_one_number_each() -> None:
    plans = tiny_plans().experts[0]
    plans = replace(plans, arch_kwargs={**plans.arch_kwargs, "strides": [1, 2, 2, 2, 2]})

    assert list(Expert(plans).channels) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.nn",
        "torch.nn.functional.relu",
        "torch.nn.Parameter",
        "torch.nn.modules.module.torch.load",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.no_such_thing",
        "torch.nnx.Conv3d",
        "dynamic_network_architectures.architectures.unet.np.load",
        "",
    ],
)
def test_plans_name_network_classes_and_nothing_else(name: str) -> None:
    with pytest.raises(BundleError, match=r"no network class of torch.nn or nnU-Net"):
        _locate(name, "an expert")


@pytest.mark.parametrize("field", ["conv_op", "norm_op", "nonlin", "dropout_op"])
def test_plans_with_a_command_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("payload.py").write_text("import pathlib; pathlib.Path('owned').touch()\nclass Conv3d: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    plans = tiny_plans().experts[0]

    for name in ("os.system", "payload.Conv3d"):
        with pytest.raises(BundleError, match=f"'tiny_trunk': its plans name '{name}'"):
            build_network(replace(plans, arch_kwargs={**plans.arch_kwargs, field: name}), deep_supervision=False)
        with pytest.raises(BundleError, match=f"'tiny_trunk': its plans name '{name}'"):
            build_network(replace(plans, network_class_name=name), deep_supervision=False)
    assert not Path("owned").exists()


def test_the_foundation_gives_features_at_strides_2_to_16() -> None:
    torch.manual_seed(0)
    foundation = Foundation(FoundationPlans(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 2, 2), window=2)).eval()
    with torch.no_grad():
        features = foundation(torch.randn(1, 1, 32, 32, 32))

    assert foundation.channels == {2: 12, 4: 24, 8: 48, 16: 96}
    assert {s: tuple(f.shape[1:]) for s, f in features.items()} == {
        s: (n, 32 // s, 32 // s, 32 // s) for s, n in foundation.channels.items()
    }
    for stride, feature in features.items():  # layer-normalised over the channels, as SwinUNETR does
        assert feature.mean(1).abs().max() < 1e-4, stride
