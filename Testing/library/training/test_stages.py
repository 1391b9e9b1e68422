"""What a stage promises besides learning: the same weights from the same seed, and no step that spoils them."""

from __future__ import annotations

import logging

import pytest
import torch

from KA2ERSegment.build import tensors_by_name
from KA2ERSegment.testing import tiny_plans
from KA2ERSegment.training.stages import ExpertStage

PLANS = tiny_plans()


def an_expert_stage(seed: int = 1) -> ExpertStage:
    return ExpertStage(PLANS.experts[1], steps=2, minutes=1, learning_rate=1e-3, seed=seed)


def test_a_stage_begins_with_the_weights_of_its_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (tensors_by_name(an_expert_stage(seed).network) for seed in (1, 1, 2))

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(value: float, caplog: pytest.LogCaptureFixture) -> None:
    stage = an_expert_stage()
    optimizer = stage.configure_optimizers()
    before = {name: tensor.clone() for name, tensor in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)
    last = list(stage.parameters())[-1]
    assert last.grad is not None
    last.grad.view(-1)[0] = value

    with caplog.at_level(logging.WARNING, "KA2ERSegment"):
        stage.on_before_optimizer_step(optimizer)
    optimizer.step()

    assert "left out" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.named_parameters())


def test_any_other_step_is_made() -> None:
    stage = an_expert_stage()
    optimizer = stage.configure_optimizers()
    before = {name: tensor.clone() for name, tensor in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)

    stage.on_before_optimizer_step(optimizer)
    optimizer.step()

    assert not any(torch.equal(tensor, before[name]) for name, tensor in stage.named_parameters())
