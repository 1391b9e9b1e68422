"""What a stage promises besides learning: the same weights from the same seed, and no step that spoils them."""

from __future__ import annotations

import hashlib
import logging

import pytest
import torch
from torch import Tensor

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.encoders.expert import build_network
from KA2ERSegment.plans import Plans
from KA2ERSegment.testing import tiny_plans
from KA2ERSegment.training.amalgamation import PromptableStage, draw_arms, shares_of_all
from KA2ERSegment.training.experts import ExpertStage
from KA2ERSegment.training.sampling import Mode, encoded

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


def a_batch() -> dict[str, Tensor]:
    """Two cases: one of the first expert's task with a box, one of none with a click."""
    size = PLANS.patch_size
    target = torch.zeros(2, size, size, size, dtype=torch.bool)
    target[:, 8:20, 9:22, 10:24] = True
    box = target & torch.tensor([True, False])[:, None, None, None]
    image = target * 100.0 + torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    return {
        "labels": target.long(), "image": image, "inside": torch.ones_like(target), "target": target, "box": box,
        "outside": box.flatten(1).any(1)[:, None, None, None] & ~box,
        "classes": torch.where(torch.tensor([True, False])[:, None, None, None], target.long(), 255),
        "step": torch.ones(2, 3), "statistics": torch.zeros(2, 6), "real": torch.ones(2, dtype=torch.bool),
        "mode": torch.tensor([Mode.BOX.value, Mode.CLICK.value]), "task": torch.tensor([1, 0]),
    }  # fmt: skip


def trained(
    plans: Plans, monkeypatch: pytest.MonkeyPatch, **options: float
) -> tuple[PromptableStage, dict[str, float]]:
    """A stage after two steps, and what it logged; experts as in a model of seed 5."""
    torch.manual_seed(5)
    model = build_model(plans)
    experts = {name: tensors_by_name(expert.encoder) for name, expert in model.experts.items()}
    network = build_network(plans.experts[0], deep_supervision=False)
    stage = PromptableStage(
        plans, experts, 2, 1.0, 1e-2, 1, clicks=1, decoders={"tiny_trunk": network.decoder}, **options
    )
    logged: dict[str, float] = {}
    monkeypatch.setattr(stage, "log", lambda name, value, **_: logged.update({name: float(value)}))
    optimizer = stage.configure_optimizers()
    for step in range(2):
        optimizer.zero_grad()
        stage.training_step(a_batch(), step).backward()
        optimizer.step()
    return stage, logged


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def test_the_amalgamation_learns_and_its_experts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    given = digests({f"experts.{n}": t for n, t in tensors_by_name(build_model(PLANS).experts).items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        begun = digests(tensors_by_name(build_model(PLANS)))
    stage, logged = trained(PLANS, monkeypatch)
    found = digests(tensors_by_name(stage.model))

    assert {name: found[name] for name in given} == given
    still = {name for name in found.keys() - given.keys() if found[name] == begun[name]}
    assert not {name for name in still if name.startswith(("foundation.", "merge.", "mask_decoder.", "amalgamation."))}
    assert logged["features"] > 0


def test_expert_dropout_leaves_nobody_in_a_quarter_of_the_cases_and_each_expert_in_half() -> None:
    generator, cases = torch.Generator().manual_seed(0), 40_000
    present = draw_arms(cases, 4, generator)
    foundation, experts = present[:, 0], present[:, 1:]
    share = {name: float(rows.float().mean()) for name, rows in {
        "nobody": ~experts.any(1), "all experts": experts.all(1), "all arms": present.all(1),
        "no foundation": ~foundation, "an expert alone": (present.sum(1) == 1) & ~foundation,
    }.items()}  # fmt: skip

    assert present.dtype == torch.bool
    assert present.any(1).all()
    assert foundation[~experts.any(1)].all()
    assert share["nobody"] == pytest.approx(0.25, abs=0.01)
    assert (~experts).float().mean(0).tolist() == pytest.approx([0.49] * 3, abs=0.015)
    assert share["all experts"] == pytest.approx(0.75 * (2 / 3) ** 3, abs=0.01)
    assert share["all arms"] == pytest.approx(0.75**2 * (2 / 3) ** 3, abs=0.01)
    assert share["no foundation"] == pytest.approx(0.75 * 0.25, abs=0.01)
    assert share["an expert alone"] > 0.03


@pytest.mark.parametrize("experts", [0, 1])
def test_expert_dropout_of_few_experts(experts: int) -> None:
    present = draw_arms(20_000, experts + 1, torch.Generator().manual_seed(0))
    nobody = float((~present[:, 1:].any(1)).float().mean())

    assert present.shape == (20_000, experts + 1)
    assert present.any(1).all()
    assert nobody == pytest.approx(0.25, abs=0.01) if experts else bool(present.all())


def test_the_routing_loss_asks_one_expert_among_all_of_them_whoever_is_dropped() -> None:
    torch.manual_seed(5)
    model, batch = build_model(PLANS), a_batch()
    present = torch.tensor([[True, False, True], [True, False, False]])
    with torch.no_grad():
        some, everyone = encoded(model, batch, batch["image"], present), encoded(model, batch, batch["image"])

    assert not some.weights[:, 1].any()
    torch.testing.assert_close(shares_of_all(model, some), everyone.weights)
    assert shares_of_all(model, everyone) is everyone.weights


def test_the_foundation_learns_without_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only experts need stays as it was; no expert is run."""
    plans = PLANS.without("experts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        begun = digests(tensors_by_name(build_model(plans)))
    stage, logged = trained(plans, monkeypatch)
    found = digests(tensors_by_name(stage.model))
    moved = {name for name in found if found[name] != begun[name] and not name.startswith("experts.")}

    assert any(name.startswith("foundation.") for name in moved)
    assert any("self_attention" in name for name in moved)
    assert not [name for name in moved if "project_experts" in name or "cross_attention" in name]
    assert not logged.keys() & {"features", "route"}


def test_distillation_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    _, with_both = trained(PLANS, monkeypatch)
    stage, without = trained(PLANS, monkeypatch, features=0.0, predictions=0.0)

    assert "features" not in without
    assert not stage.distillation.decoders
    assert with_both["loss"] != without["loss"]
