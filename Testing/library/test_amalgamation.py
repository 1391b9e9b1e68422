"""The amalgamation: shares that sum to one, experts that can be switched off, and no fixed number of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from KA2ERSegment.amalgamation import Amalgamation
from KA2ERSegment.attention import sine_position
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import AMALGAMATIONS, AmalgamationPlans
from KA2ERSegment.testing import tiny_plans

KINDS = [
    *(AmalgamationPlans(kind) for kind in AMALGAMATIONS),
    AmalgamationPlans("hierarchical", no_expert=False),
    AmalgamationPlans("cross_attention", no_expert=False),
    *(AmalgamationPlans(kind, enabled=False) for kind in AMALGAMATIONS),
]
SUBSETS = [arms for arms in itertools.product((False, True), repeat=3) if any(arms)]
WIDTH, GRID, BATCH = 36, (4, 3, 2), 2


def a_level(experts: list[int], seed: int = 0, plans: AmalgamationPlans | None = None) -> Amalgamation:
    torch.manual_seed(seed)
    level = Amalgamation(10, experts, WIDTH, heads=2, plans=plans).eval()
    if level.plans.kind == "hierarchical":
        with torch.no_grad():  # as after training: the arms' biases differ
            level.bias.normal_()
    return level


def name_of(plans: AmalgamationPlans) -> str:
    return f"{plans.kind}{'' if plans.no_expert else ' without c0'}{'' if plans.enabled else ' off'}"


def features(channels: list[int], seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    foundation = torch.randn(BATCH, 10, *GRID, generator=generator)
    return foundation, [torch.randn(BATCH, n, *GRID, generator=generator) for n in channels]


def arms(*present: bool) -> Tensor:
    return torch.tensor([present] * BATCH)


@pytest.mark.parametrize("channels", [[], [6], [6, 8], [6, 8, 6, 12]])
def test_any_number_of_experts_gives_the_same_embedding_shape_and_shares_of_one(channels: list[int]) -> None:
    foundation, experts = features(channels)
    embedding, weights = a_level(channels)(foundation, experts, arms(*[True] * (len(channels) + 1)))

    assert embedding.shape == (BATCH, WIDTH, *GRID)
    assert weights.shape == (BATCH, len(channels) + 1, *GRID)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(BATCH, *GRID))


@pytest.mark.parametrize("off", [0, 1, 2])
def test_an_absent_arm_has_no_share_and_no_influence(off: int) -> None:
    foundation, experts = features([6, 8])
    level = a_level([6, 8])
    present = [n != off for n in range(3)]
    embedding, weights = level(foundation, experts, arms(*present))

    assert (weights[:, off] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(BATCH, *GRID))
    if off:
        changed = [expert * 5 + 1 if n == off - 1 else expert for n, expert in enumerate(experts)]
        assert torch.equal(level(foundation, changed, arms(*present))[0], embedding)
    everything, _ = level(foundation, experts, arms(True, True, True))
    assert (everything - embedding).abs().max() > 1e-3


@pytest.mark.parametrize("only", [0, 1, 2])
def test_alone_an_arm_has_the_whole_share(only: int) -> None:
    foundation, experts = features([6, 8])
    _, weights = a_level([6, 8])(foundation, experts, arms(*[n == only for n in range(3)]))

    assert (weights[:, only] == 1).all()


def test_each_case_has_its_own_arms() -> None:
    foundation, experts = features([6, 8])
    level = a_level([6, 8])
    together, _ = level(foundation, experts, torch.tensor([[True, False, True], [True, True, True]]))
    first, _ = level(foundation[:1], [expert[:1] for expert in experts], torch.tensor([[True, False, True]]))
    second, _ = level(foundation[1:], [expert[1:] for expert in experts], torch.tensor([[True, True, True]]))

    torch.testing.assert_close(together, torch.cat([first, second]), atol=1e-5, rtol=1e-4)


def test_the_order_of_the_experts_does_not_matter() -> None:
    """Experts and their parameters exchanged: the same embedding, the shares exchanged."""
    foundation, experts = features([6, 8])
    level, swapped = a_level([6, 8]), a_level([8, 6], seed=9)
    state = level.state_dict()
    names = {"project_experts.0.": "project_experts.1.", "project_experts.1.": "project_experts.0."}
    state = {
        next((new + k[len(old) :] for old, new in names.items() if k.startswith(old)), k): v for k, v in state.items()
    }
    for name in ("codes", "bias"):
        state[name] = state[name][[0, 2, 1]]
    swapped.load_state_dict(state)
    one, shares = level(foundation, experts, arms(True, True, True))
    other, exchanged = swapped(foundation, experts[::-1], arms(True, True, True))

    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(exchanged[:, [0, 2, 1]], shares, atol=1e-5, rtol=1e-4)


def test_shares_differ_from_voxel_to_voxel() -> None:
    foundation, experts = features([6, 8])
    _, weights = a_level([6, 8])(foundation, experts, arms(True, True, True))

    assert weights.flatten(2).std(dim=2).min() > 1e-3


def test_the_hierarchical_kind_is_what_the_equations_say() -> None:
    """Written down once more, as bundles were trained with it; to the last bit."""
    foundation, experts = features([6, 8])
    level = a_level([6, 8])
    found, shares = level(foundation, experts, arms(True, False, True))

    position = sine_position(foundation.shape[2:], WIDTH, foundation.device)
    z = level.project_foundation(foundation).flatten(2).transpose(1, 2) + position + level.codes[0]
    normed = level.norm_self(z)
    z = z + level.self_attention(normed, normed, normed)
    e = level.project_experts[1](experts[1]).flatten(2).transpose(1, 2) + position + level.codes[2]
    context = level.norm_context(e)
    candidates = torch.stack([z, level.cross_attention(level.norm_query(z), context, context)], dim=1)
    scores = (level.a(level.norm_a(z))[:, None] * level.b(level.norm_b(candidates))).sum(-1) / WIDTH**0.5
    a = (scores + level.bias[[0, 2], None]).softmax(1)
    g = z + level.out((a[..., None] * candidates).sum(1))
    g = g + level.mlp(level.norm_mlp(g))

    assert torch.equal(found.flatten(2).transpose(1, 2), g)
    assert torch.equal(shares.flatten(2)[:, [0, 2]], a)


@pytest.mark.parametrize("present", SUBSETS, ids=str)
@pytest.mark.parametrize("plans", KINDS, ids=name_of)
def test_every_kind_answers_with_any_arms(plans: AmalgamationPlans, present: tuple[bool, ...]) -> None:
    foundation, experts = features([6, 8])
    embedding, weights = a_level([6, 8], plans=plans)(foundation, experts, arms(*present))

    assert embedding.isfinite().all()
    assert weights.shape == (BATCH, 3, *GRID)
    torch.testing.assert_close(weights.sum(1), torch.ones(BATCH, *GRID))
    allowed = [arm for arm in range(3) if present[arm]]
    if plans.kind == "foundation" or not plans.enabled:
        allowed = [0]
    elif not plans.no_expert and any(present[1:]):
        allowed = [arm for arm in allowed if arm]
    assert (weights[:, allowed] > 0).all()
    assert (weights[:, [arm for arm in range(3) if arm not in allowed]] == 0).all()


@pytest.mark.parametrize("off", [1, 2])
@pytest.mark.parametrize("plans", KINDS, ids=name_of)
def test_an_absent_expert_leaves_no_trace(plans: AmalgamationPlans, off: int) -> None:
    """Not even if its features are not numbers; nor where another case of the batch uses it."""
    foundation, experts = features([6, 8])
    level = a_level([6, 8], plans=plans)
    present = arms(*(arm != off for arm in range(3)))
    embedding, _ = level(foundation, experts, present)

    nothing = [expert * float("nan") if n == off - 1 else expert for n, expert in enumerate(experts)]
    assert torch.equal(level(foundation, nothing, present)[0], embedding)
    present[1] = True
    changed = [expert * 5 + 1 if n == off - 1 else expert for n, expert in enumerate(experts)]
    one, other = level(foundation, experts, present)[0], level(foundation, changed, present)[0]
    assert torch.equal(one[0], other[0])
    if level.asks_experts:
        assert (one[1] - other[1]).abs().max() > 1e-3


def test_switched_off_it_is_the_model_whose_experts_are_absent() -> None:
    foundation, experts = features([6, 8])
    level = a_level([6, 8])
    alone, _ = level(foundation, experts, arms(True, False, False))
    level.plans = AmalgamationPlans(enabled=False)
    off, _ = level(foundation, [], arms(True, True, True))

    assert torch.equal(off, alone)


def test_without_level_3_all_arms_in_use_count_alike() -> None:
    foundation, experts = features([6, 8])
    _, weights = a_level([6, 8], plans=AmalgamationPlans("cross_attention"))(
        foundation, experts, arms(True, False, True)
    )

    assert (weights[:, [0, 2]] == 0.5).all()


def test_an_arms_share_of_a_concatenation_is_how_much_of_the_sum_it_gives() -> None:
    foundation, experts = features([6, 8])
    level = a_level([6, 8], plans=AmalgamationPlans("concatenation"))
    with torch.no_grad():
        level.out.weight[:, WIDTH : 2 * WIDTH] = 0  # the first expert is not read
        level.out.weight[:, :WIDTH] *= 3
    _, weights = level(foundation, experts, arms(True, True, True))

    assert (weights[:, 1] < 1e-4).all()
    assert (weights[:, 0].mean() > weights[:, 2].mean()).all()


@pytest.mark.parametrize("kind", ["concatenation", "foundation"])
def test_no_expert_is_an_arm_of_the_kinds_with_attention_alone(kind: str) -> None:
    with pytest.raises(BundleError, match="no_expert"):
        AmalgamationPlans(kind, no_expert=False)


@pytest.mark.parametrize("plans", KINDS, ids=name_of)
def test_a_model_of_every_kind_is_built_and_encodes(plans: AmalgamationPlans) -> None:
    recipe = replace(tiny_plans(), amalgamation=plans)
    torch.manual_seed(0)
    model = build_model(recipe)
    again = build_model(type(recipe).from_json(recipe.to_json()), tensors_by_name(model))
    image = torch.randn(1, 2, 32, 32, 32)
    calls: list[Any] = []
    for expert in again.experts.values():
        expert.register_forward_hook(lambda *given: calls.append(given))
    with torch.no_grad():
        features, same = model.encode(image), again.encode(image)
        alone = again.only(same, 0)

    assert torch.equal(features.embedding, same.embedding)
    asked = plans.enabled and plans.kind != "foundation"
    assert len(calls) == (2 if asked else 0), "experts that are not read are not run"
    assert (alone.weights[:, 0] == 1).all()
    assert torch.equal(alone.embedding, same.embedding) == (not asked)


def test_kinds_that_need_less_hold_less() -> None:
    sizes = {
        kind: sum(t.numel() for t in a_level([6, 8], plans=AmalgamationPlans(kind)).parameters())
        for kind in AMALGAMATIONS
    }

    assert sizes["foundation"] < sizes["concatenation"] < sizes["cross_attention"] < sizes["hierarchical"]
