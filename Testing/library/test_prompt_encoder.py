"""Prompts to tokens and maps; the geodesic prior against a textbook Dijkstra."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from KA2ERSegment.prompt_encoder import (
    BOX_START,
    BOX_STOP,
    MAPS,
    NEGATIVE,
    NOT_A_POINT,
    POSITIVE,
    PRIOR,
    STEP_COST,
    PatchPrompts,
    PromptEncoder,
    dense_maps,
    edge_costs,
    geodesic_distance,
    geodesic_prior,
)

SIZE = 16
FAR = 1e3


def no_prompts(batch: int = 1, size: int = SIZE) -> PatchPrompts:
    nothing = torch.zeros(batch, size, size, size, dtype=torch.bool)
    return PatchPrompts(
        points=torch.zeros(batch, 0, 3),
        labels=torch.zeros(batch, 0, dtype=torch.long),
        positive=nothing,
        negative=nothing,
        box=nothing,
        outside=nothing,
        previous=torch.full(nothing.shape, 0.5),
    )


def at(*kji: int, size: int = SIZE) -> Tensor:
    """One sample, (1, S, S, S) bool."""
    seed = torch.zeros(1, size, size, size, dtype=torch.bool)
    seed[(0, *kji)] = True
    return seed


def a_ball_image(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """(1, 2, S, S, S) normalised image of a bright ball in noise, and the ball."""
    grid = np.indices((size, size, size)) - np.array([7, 8, 9])[:, None, None, None]
    ball = torch.from_numpy((grid**2).sum(0) <= 16)[None]
    noise = torch.rand(1, size, size, size, generator=torch.Generator().manual_seed(0)) * 0.1
    return torch.stack([ball * 2.0 - 1 + noise, ball * 0.8 - 0.4 + noise], dim=1), ball


def dijkstra(edges: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Exact distances on a (K, J, I) grid; edges (3, K, J, I) lead to the next sample along each axis."""
    distance = start.astype(float).copy()
    queue = [(float(distance[p]), p) for p in itertools.product(*map(range, start.shape))]
    heapq.heapify(queue)
    while queue:
        length, p = heapq.heappop(queue)
        if length > distance[p]:
            continue
        for axis, step in itertools.product(range(3), (-1, 1)):
            q = tuple(x + step * (a == axis) for a, x in enumerate(p))
            if not 0 <= q[axis] < start.shape[axis]:
                continue
            there = length + float(edges[(axis, *min(p, q))])
            if there < distance[q] - 1e-12:
                distance[q] = there
                heapq.heappush(queue, (there, q))
    return distance


@pytest.mark.parametrize("seed", [0, 1])
def test_geodesic_distance_is_that_of_dijkstra_and_never_shorter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = rng.uniform(0.02, 1.0, (3, 5, 6, 7)) ** 2  # non-cubic; winding paths are short ones
    start = np.full((5, 6, 7), FAR)
    start[1, 2, 3], start[4, 5, 0] = 0.0, 0.25
    exact = dijkstra(edges, start)
    quick, thorough = (
        geodesic_distance(torch.from_numpy(edges)[None], torch.from_numpy(start)[None, None], rounds)[0, 0].numpy()
        for rounds in (2, 12)
    )

    np.testing.assert_allclose(thorough, exact, rtol=1e-9)
    assert (quick >= exact - 1e-9).all()


def test_in_a_flat_image_two_rounds_are_exact() -> None:
    edges = edge_costs(torch.zeros(1, 2, 6, 6, 6))
    distance = geodesic_distance(edges, torch.where(at(1, 2, 3, size=6), 0.0, FAR)[:, None])[0, 0]
    k, j, i = torch.meshgrid(*[torch.arange(6)] * 3, indexing="ij")

    torch.testing.assert_close(distance, STEP_COST * ((k - 1).abs() + (j - 2).abs() + (i - 3).abs()).float())


def test_channels_and_cases_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.rand(2, 3, 5, 5, 5, generator=generator)
    start = torch.where(torch.rand(2, 2, 5, 5, 5, generator=generator) < 0.05, 0.0, FAR)
    together = geodesic_distance(edges, start)

    for case, channel in itertools.product(range(2), range(2)):
        alone = geodesic_distance(edges[case : case + 1], start[case : case + 1, channel : channel + 1])
        torch.testing.assert_close(together[case, channel], alone[0, 0])


def test_edges_cost_the_change_in_rank_along_their_own_axis() -> None:
    image = torch.zeros(1, 2, 4, 4, 4)
    image[0, 1, 2:] = 0.6  # a step in K, spread over two samples by the averaging
    costs = edge_costs(image)[0]

    assert costs[0, :3] == pytest.approx(torch.full((3, 4, 4), STEP_COST + 0.2))
    assert (costs[1:] - STEP_COST).abs().max() < 1e-7


def test_the_prior_is_positive_at_positive_seeds_and_negative_at_negative_ones() -> None:
    image, ball = a_ball_image()
    prompts = replace(no_prompts(), positive=at(7, 8, 9), negative=at(2, 3, 4))
    prior = geodesic_prior(edge_costs(image), prompts)

    assert prior[prompts.positive].item() > 0.9
    assert prior[prompts.negative].item() < -0.9
    assert prior.abs().max() <= 1
    assert ((prior > 0) == ball).float().mean() > 0.97, "it is what Grow from seeds answers: the ball"


def test_without_prompts_the_prior_knows_nothing() -> None:
    image, _ = a_ball_image()

    assert (geodesic_prior(edge_costs(image), no_prompts()) == 0).all()


def test_a_box_alone_gives_its_core_and_takes_what_is_outside() -> None:
    image, ball = a_ball_image()
    box = torch.zeros_like(ball)
    box[:, 2:13, 3:14, 4:15] = True
    prior = geodesic_prior(edge_costs(image), replace(no_prompts(), box=box, outside=~box))

    assert prior[0, 7, 8, 9] > 0.3
    assert (prior[~box] < 0).all()


def test_a_box_on_one_slice_takes_nothing_from_other_slices() -> None:
    flat = torch.zeros(1, 2, SIZE, SIZE, SIZE)
    box = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.bool)
    box[:, 7, 4:12, 4:12] = True
    slab = torch.zeros_like(box)
    slab[:, 7] = True
    prompts = replace(no_prompts(), box=box, outside=slab & ~box)
    prior = geodesic_prior(edge_costs(flat), prompts)

    assert (prior[prompts.outside] < 0).all()
    assert prior[0, 8, 8, 8] > 0, "next slice, above the middle of the box"


def test_dense_maps_hold_what_their_text_says() -> None:
    image, ball = a_ball_image()
    box = torch.zeros_like(ball)
    box[:, 2:13, 3:14, 4:15] = True
    positive, negative = at(7, 8, 9), at(1, 1, 1)
    previous = torch.rand(ball.shape)
    prompts = replace(no_prompts(), positive=positive, negative=negative, box=box, outside=~box, previous=previous)
    edges = edge_costs(image)
    maps = dense_maps(image, edges, prompts)

    assert maps.shape == (1, MAPS, SIZE, SIZE, SIZE)
    assert maps[0, 0].sum() == 27
    assert maps[0, 0, 6, 7, 8] == 1
    assert maps[0, 1, 0:3, 0:3, 0:3].all()
    assert torch.equal(maps[:, 2], box.float())
    assert (maps[:, 3] == 1).all()
    torch.testing.assert_close(maps[:, 4], previous * 2 - 1)
    torch.testing.assert_close(maps[:, PRIOR], geodesic_prior(edges, prompts))
    assert maps[:, 6][ball].mean() > 0.9 > 0.1 > maps[:, 7][ball].mean()
    empty = dense_maps(image, edges, no_prompts())
    assert (empty == 0).all(), "no prompt, no message"


def test_tokens_tell_kinds_and_places_apart_and_mark_padding() -> None:
    torch.manual_seed(0)
    encoder = PromptEncoder(36)
    labels = torch.tensor([[POSITIVE, NEGATIVE, BOX_START, BOX_STOP, NOT_A_POINT]])
    prompts = replace(no_prompts(), points=torch.full((1, 5, 3), 4.0), labels=labels)
    tokens, ignore = encoder(prompts, SIZE)
    moved, _ = encoder(replace(prompts, points=prompts.points + torch.tensor([1.0, 0, 0])), SIZE)
    swapped, _ = encoder(replace(prompts, points=prompts.points + torch.tensor([0, 0, 1.0])), SIZE)

    assert tokens.shape == (1, 5, 36)
    assert torch.cdist(tokens, tokens)[0].add(torch.eye(5)).min() > 0.5
    assert (tokens - moved).abs().max() > 1e-3
    assert (moved - swapped).abs().max() > 1e-3
    assert ignore.tolist() == [[False, False, False, False, True]]
