"""What experts teach: the right features of the right expert, and its class of the object, where it was asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.encoders.expert import build_network
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.testing import tiny_plans
from KA2ERSegment.training.distillation import Distillation, Overheard, dilated_box, overhear
from KA2ERSegment.training.sampling import IGNORE

PLANS = tiny_plans()
SIZE = PLANS.patch_size


@pytest.fixture
def a_model() -> PromptableModel:
    torch.manual_seed(0)
    return build_model(PLANS)


@pytest.fixture
def some_networks(a_model: PromptableModel) -> dict[str, nn.Module]:
    """The experts' whole networks, of which the model has the encoders."""
    networks = {}
    for expert in PLANS.experts:
        network = build_network(expert, deep_supervision=False).eval()
        own = tensors_by_name(a_model.experts[expert.name])
        load_tensors(network, tensors_by_name(network) | own)
        networks[expert.name] = network
    return networks


@pytest.fixture
def a_target() -> Tensor:
    """Three cases: a block, the same elsewhere, nothing."""
    target = torch.zeros(3, SIZE, SIZE, SIZE, dtype=torch.bool)
    target[0, 4:12, 6:14, 8:20] = True
    target[1, 20:28, 6:14, 8:20] = True
    return target


def an_image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def overheard(model: PromptableModel, experts: tuple[str, ...] = ()) -> Overheard:
    with overhear(model, experts) as heard:
        model.encode(an_image())
    return heard


def test_listening_changes_nothing_and_ends(a_model: PromptableModel) -> None:
    before = a_model.encode(an_image()).embedding
    with overhear(a_model, tuple(a_model.experts)) as heard:
        during = a_model.encode(an_image()).embedding

    assert torch.equal(before, during)
    assert set(heard.levels) == {8, 16}
    assert set(heard.skips) == set(a_model.experts)
    heard.levels.clear()
    a_model.encode(an_image())
    assert not heard.levels


def test_the_cases_own_expert_teaches_its_features(a_model: PromptableModel) -> None:
    """Worked out once more, with heads that change nothing."""
    distillation = Distillation(a_model.arms, PLANS.width)
    for heads in distillation.heads.values():
        for head in heads:
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
    heard = overheard(a_model)
    found = distillation.feature_loss(a_model, heard, torch.tensor([2, 0, 2]))

    expected = []
    for stride in (8, 16):
        experts, embedding = heard.levels[stride]
        for case in (0, 2):
            e = a_model.amalgamation[str(stride)].project_experts[1](experts[1][case : case + 1])
            taught = F.layer_norm(e.movedim(1, -1), (PLANS.width,)).movedim(-1, 1)
            expected.append((embedding[case] - taught[0]).abs().mean())
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_features_teach_all_but_the_experts_and_their_projections(a_model: PromptableModel) -> None:
    distillation = Distillation(a_model.arms, PLANS.width)
    heard = overheard(a_model)
    distillation.feature_loss(a_model, heard, torch.tensor([1, 0, 0])).backward()
    reached = {name for name, p in a_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    assert any(name.startswith("foundation.") for name in reached)
    assert not any(name.startswith("experts.") for name in reached)
    (head,) = {n for n, p in distillation.named_parameters() if p.grad is not None and n.startswith("heads.8.")} - {
        "heads.8.0.bias"
    }
    assert head == "heads.8.0.weight"


def test_without_a_known_expert_no_features_are_taught(a_model: PromptableModel) -> None:
    loss = Distillation(a_model.arms, PLANS.width).feature_loss(a_model, overheard(a_model), torch.zeros(3).long())

    assert loss.item() == 0


def test_the_box_is_dilated_by_a_quarter_of_the_extent(a_target: Tensor) -> None:
    box = dilated_box(a_target)
    expected = torch.zeros_like(a_target)
    expected[0, 2:14, 4:16, 5:23] = True
    expected[1, 18:30, 4:16, 5:23] = True

    assert torch.equal(box, expected)


def test_an_expert_teaches_the_class_that_the_object_is(
    a_model: PromptableModel, some_networks: dict[str, nn.Module], a_target: Tensor
) -> None:
    """Logits are those of its whole network, of that class against all others, in the dilated box."""
    classes = torch.zeros(a_target.shape, dtype=torch.long)
    classes[a_target] = 2
    classes[0, 4, 6:14, 8:20] = 1  # less of the object
    distillation = Distillation(a_model.arms, PLANS.width, {n: m.decoder for n, m in some_networks.items()})
    heard = overheard(a_model, tuple(some_networks))
    logits, where = distillation.taught(heard, torch.tensor([1, 2, 1]), classes, a_target)

    assert torch.equal(where, dilated_box(a_target))
    for case, name in enumerate(a_model.arms[1:]):
        with torch.no_grad():
            p = some_networks[name](an_image()[case : case + 1, :1])[0].softmax(0)[2]
        torch.testing.assert_close(logits[case], p.logit(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reason", ["no decoder", "no class", "another task", "a part", "no task"])
def test_an_expert_that_was_not_asked_for_the_object_teaches_nothing(
    a_model: PromptableModel, some_networks: dict[str, nn.Module], a_target: Tensor, reason: str
) -> None:
    classes = torch.zeros(a_target.shape, dtype=torch.long)
    if reason == "a part":  # the organ is larger than what is prompted
        classes[0, 4:16, 4:16, 6:23] = 1
    elif reason == "another task":
        classes[:] = IGNORE
    elif reason != "no class":
        classes[a_target] = 1
    decoders = {} if reason == "no decoder" else {n: m.decoder for n, m in some_networks.items()}
    distillation = Distillation(a_model.arms, PLANS.width, decoders)
    task = torch.tensor([0 if reason == "no task" else 1] * 3)
    _, where = distillation.taught(overheard(a_model, tuple(decoders)), task, classes, a_target)

    assert not where.any()
