"""Attention that skips what it is told to skip, and position codes without two alike."""

from __future__ import annotations

import torch

from KA2ERSegment.attention import Attention, sine_code, sine_position

WIDTH, GRID = 36, (4, 3, 2)


def test_ignored_context_is_not_read() -> None:
    torch.manual_seed(0)
    attention = Attention(WIDTH, 2)
    queries, context = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
    ignore = torch.tensor([[False, False, True, True]] * 2)
    masked = attention(queries, context, context, ignore)

    torch.testing.assert_close(masked, attention(queries, context[:, :2], context[:, :2]), atol=1e-6, rtol=1e-5)
    assert (masked - attention(queries, context, context)).abs().max() > 1e-3


def test_position_codes_tell_all_places_apart_and_name_their_axes() -> None:
    codes = sine_position(torch.Size(GRID), WIDTH, torch.device("cpu"))

    assert codes.shape == (24, WIDTH)
    assert torch.cdist(codes, codes).add(torch.eye(24)).min() > 1e-2
    k, j, i = torch.unravel_index(torch.tensor(17), GRID)
    at = torch.tensor([k / 3, j / 2, i / 1])
    torch.testing.assert_close(codes[17], sine_code(at, WIDTH))
