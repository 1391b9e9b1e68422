"""Simulated prompts: clicks in the error with the right label, boxes by their corners."""

from __future__ import annotations

import torch
from torch import Tensor

from KA2ERSegment.prompt_encoder import BOX_START, BOX_STOP, NEGATIVE, NOT_A_POINT, POSITIVE
from KA2ERSegment.training.simulation import box_corners, first_prompts, next_prompts

SIZE = 20


def cube(start: int, stop: int, batch: int = 1) -> Tensor:
    mask = torch.zeros(batch, SIZE, SIZE, SIZE, dtype=torch.bool)
    mask[:, start:stop, start + 1 : stop + 1, start + 2 : stop + 2] = True
    return mask


def test_without_a_box_the_first_prompt_is_a_click_in_the_target() -> None:
    target, nothing = cube(5, 12, batch=8), torch.zeros(8, SIZE, SIZE, SIZE, dtype=torch.bool)
    prompts = first_prompts(target, nothing, nothing, torch.Generator().manual_seed(0))

    assert prompts.labels.tolist() == [[NOT_A_POINT, NOT_A_POINT, POSITIVE]] * 8
    assert prompts.positive.flatten(1).sum(1).tolist() == [1] * 8
    assert (prompts.positive & ~target).sum() == 0
    assert not prompts.negative.any()
    for n, (k, j, i) in enumerate(prompts.points[:, 2].long().tolist()):
        assert prompts.positive[n, k, j, i]
    assert (prompts.previous == 0.5).all()


def test_with_a_box_the_first_prompt_is_the_box() -> None:
    target, box = cube(5, 12), cube(4, 13)
    prompts = first_prompts(target, box, ~box, torch.Generator().manual_seed(0))

    assert prompts.labels.tolist() == [[BOX_START, BOX_STOP, NOT_A_POINT]]
    assert prompts.points[0, :2].tolist() == [[3.5, 4.5, 5.5], [12.5, 13.5, 14.5]]
    assert not prompts.positive.any()
    assert torch.equal(prompts.box, box)
    assert torch.equal(prompts.outside, ~box)


def test_a_batch_may_hold_boxes_and_clicks() -> None:
    target = cube(5, 12, batch=2)
    box = cube(4, 13, batch=2)
    box[1] = False
    prompts = first_prompts(target, box, torch.zeros_like(box), torch.Generator().manual_seed(0))

    assert prompts.labels.tolist() == [[BOX_START, BOX_STOP, NOT_A_POINT], [NOT_A_POINT, NOT_A_POINT, POSITIVE]]


def test_corners_of_a_box_are_its_outer_faces() -> None:
    start, stop = box_corners(cube(0, 18))

    assert start.tolist() == [[-0.5, 0.5, 1.5]]
    assert stop.tolist() == [[17.5, 18.5, 19.5]]


def test_clicks_land_in_the_error_with_the_right_label() -> None:
    target, nothing = cube(5, 14, batch=3), torch.zeros(3, SIZE, SIZE, SIZE, dtype=torch.bool)
    mask = target.clone()
    mask[0, 5:10] = False  # missed
    mask[1, 15:19] = True  # too much
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        prompts = first_prompts(target, nothing, nothing, generator)
        logits = torch.where(mask, 3.0, -3.0)
        after = next_prompts(prompts, logits, target, generator)

        assert after.labels[:, 3].tolist() == [POSITIVE, NEGATIVE, NOT_A_POINT], "the third has no error: no click"
        k, j, i = after.points[0, 3].long().tolist()
        assert target[0, k, j, i]
        assert not mask[0, k, j, i]
        assert after.positive[0, k, j, i]
        k, j, i = after.points[1, 3].long().tolist()
        assert mask[1, k, j, i]
        assert not target[1, k, j, i]
        assert after.negative[1, k, j, i]
        assert after.positive.flatten(1).sum(1).tolist() == [2, 1, 1], "earlier clicks are kept"
        assert after.negative.flatten(1).sum(1).tolist() == [0, 1, 0]
        torch.testing.assert_close(after.previous, logits.sigmoid())


def test_most_clicks_are_made_deep_inside_the_error() -> None:
    target, nothing = cube(4, 15, batch=40), torch.zeros(40, SIZE, SIZE, SIZE, dtype=torch.bool)
    prompts = first_prompts(target, nothing, nothing, torch.Generator().manual_seed(1))
    middle = torch.tensor([9.0, 10.0, 11.0])
    deep = ((prompts.points[:, 2] - middle).abs().amax(1) <= 2).float().mean()

    assert 0.6 < deep < 1.0, "and some are sloppy"
