"""Building: a network for good plans, a BundleError for all others, and weights that fit or are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans, Plans
from KA2ERSegment.testing import tiny_plans


def with_expert(**changes: Any) -> Plans:
    """Tiny plans whose first expert's arch_kwargs are changed."""
    plans = tiny_plans()
    first = plans.experts[0]
    return replace(plans, experts=(replace(first, arch_kwargs={**first.arch_kwargs, **changes}),))


def test_default_plans_build_a_network_of_the_shipped_size() -> None:
    plain = tiny_plans().experts[0]
    expert = replace(plain, arch_kwargs={**plain.arch_kwargs, "features_per_stage": [16, 32, 64, 96, 96]})
    model = build_model(Plans(experts=(expert, replace(expert, name="other"))))
    bytes_as_half = 2 * sum(tensor.numel() for tensor in tensors_by_name(model).values())

    assert not model.training
    assert 1e6 < bytes_as_half < 16e6, "a shipped bundle has 16 MB at most"


def test_every_tensor_is_stored_once_and_all_are_enough_to_rebuild_the_model() -> None:
    torch.manual_seed(0)
    one = build_model(tiny_plans())
    tensors = tensors_by_name(one)
    addresses = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    torch.manual_seed(1)
    other = build_model(tiny_plans(), tensors)
    state = other.state_dict()

    assert len(set(addresses)) == len(addresses), "safetensors refuses shared tensors"
    for name, tensor in one.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_weights_that_do_not_fit_leave_the_module_as_it_was() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()

    with pytest.raises(BundleError, match=r"1 differ: bias \(plans \(2,\), weights \(3,\)\)"):
        load_tensors(module, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})
    with pytest.raises(BundleError, match=r"bias \(plans \(2,\), weights None\)"):
        load_tensors(module, {"weight": torch.zeros(2, 2)})
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strides": [1, 2, 2, 2, 1]}, "features at strides"),
        ({"strides": [[1, 1, 1], [1, 3, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]}, "must divide each other"),
        ({"strides": [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]]}, "along three axes"),
        ({"strides": 2}, "strides must be a list"),
        ({"features_per_stage": 8}, "list of features_per_stage"),
        ({"features_per_stage": [4, 4, 8]}, "tiny_trunk"),
        ({"features_per_stage": [4, 4, 8, 8, -1]}, "tiny_trunk"),
        ({"n_stages": None}, "tiny_trunk"),
        ({"kernel_sizes": "three"}, "tiny_trunk"),
        ({"input_channels": 3}, "tiny_trunk"),
        ({"dance": True}, "dance"),
        ({"conv_op": 3}, "tiny_trunk"),
    ],
)
def test_an_expert_that_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        build_model(with_expert(**changes))


@pytest.mark.parametrize("name", ["torch.nn.Identity", "torch.nn.Linear"])
def test_a_network_class_that_is_no_unet_is_refused(name: str) -> None:
    plans = tiny_plans()

    with pytest.raises(BundleError, match="tiny_trunk"):
        build_model(replace(plans, experts=(replace(plans.experts[0], network_class_name=name),)))


@pytest.mark.parametrize("name", ["keys", "forward", "training"])
def test_an_expert_named_like_a_part_of_torch_is_refused(name: str) -> None:
    expert = tiny_plans().experts[0]

    with pytest.raises(BundleError, match="no network can be built"):
        build_model(replace(tiny_plans(), experts=(replace(expert, name=name),)))


def test_an_expert_without_architecture_is_refused() -> None:
    with pytest.raises(BundleError, match="expert 'empty': nnU-Net's library refuses its plans"):
        build_model(replace(tiny_plans(), experts=(ExpertPlans("empty", "task"),)))
