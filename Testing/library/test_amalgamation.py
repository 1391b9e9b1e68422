"""The amalgamation: shares that sum to one, experts that can be switched off, and no fixed number of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from KA2ERSegment.amalgamation import Amalgamation

WIDTH, GRID, BATCH = 36, (4, 3, 2), 2


def a_level(experts: list[int], seed: int = 0) -> Amalgamation:
    torch.manual_seed(seed)
    level = Amalgamation(10, experts, WIDTH, heads=2).eval()
    with torch.no_grad():  # as after training: the arms' biases differ
        level.bias.normal_()
    return level


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
