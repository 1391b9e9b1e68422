"""Losses at values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from KA2ERSegment.training.losses import (
    balance_loss,
    feature_loss,
    mask_loss,
    multi_class_loss,
    prediction_loss,
    quality_loss,
    routing_loss,
    shares_inside,
    soft_dice,
    vote_loss,
)

HALF = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
HALF[:, 0] = True


def test_soft_dice_of_perfect_useless_and_undecided_answers() -> None:
    perfect = torch.where(HALF, 50.0, -50.0)

    assert soft_dice(perfect, HALF).item() == pytest.approx(1.0)
    assert soft_dice(-perfect, HALF).item() == pytest.approx(1 / 9)  # no overlap: (0 + 1) / (4 + 4 + 1)
    assert soft_dice(torch.zeros(1, 2, 2, 2), HALF).item() == pytest.approx((2 * 2 + 1) / (4 + 4 + 1))


def test_mask_loss_is_dice_and_cross_entropy_one_to_one() -> None:
    assert mask_loss(torch.where(HALF, 50.0, -50.0), HALF).item() == pytest.approx(0.0, abs=1e-6)
    undecided = mask_loss(torch.zeros(1, 2, 2, 2), HALF).item()
    assert undecided == pytest.approx(1 - 5 / 9 + math.log(2), abs=1e-6)


def test_mask_loss_counts_a_small_object_as_much_as_its_background() -> None:
    target = torch.zeros(1, 10, 10, 10, dtype=torch.bool)
    target[0, 0, 0, 0] = True
    logits = torch.full(target.shape, -4.0)  # misses it
    entropy_of_miss = math.log(1 + math.exp(4))

    assert mask_loss(logits, target).item() > 0.5 * 0.5 * entropy_of_miss


def test_mask_loss_is_finite_without_object_and_without_background() -> None:
    for target in (torch.zeros_like(HALF), torch.ones_like(HALF)):
        assert mask_loss(torch.zeros(1, 2, 2, 2), target).isfinite().all()


def test_quality_loss_is_the_distance_to_the_masks_dice() -> None:
    logits = torch.full((1, 2, 2, 2), 1.0, requires_grad=True)  # everything: Dice 2 * 4 / 12
    quality = torch.tensor([0.9], requires_grad=True)
    loss = quality_loss(quality, logits, HALF)
    loss.sum().backward()

    assert loss.item() == pytest.approx(0.9 - 2 / 3)
    assert quality.grad is not None
    assert logits.grad is None, "it judges the mask and does not change it"


def test_multi_class_loss_of_right_and_undecided_answers() -> None:
    classes = torch.tensor([0, 1, 2, 2]).view(1, 1, 2, 2)
    right = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1) * 100.0

    assert multi_class_loss(right, classes, 255).item() == pytest.approx(0.0, abs=1e-5)
    dice = [(2 / 3 + 1) / (4 / 3 + 1 + 1), (4 / 3 + 1) / (4 / 3 + 2 + 1)]  # classes 1 and 2; background is left out
    undecided = multi_class_loss(torch.zeros(1, 3, 1, 2, 2), classes, 255).item()
    assert undecided == pytest.approx(math.log(3) + 1 - sum(dice) / 2, abs=1e-5)


def test_multi_class_loss_does_not_see_ignored_samples() -> None:
    classes = torch.tensor([0, 1, 255, 255]).view(1, 1, 2, 2)
    logits = torch.randn(1, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    changed = logits.clone()
    changed[..., 1, :] += 7

    assert multi_class_loss(logits, classes, 255).item() == pytest.approx(
        multi_class_loss(changed, classes, 255).item()
    )


def test_multi_class_loss_of_nothing_known_is_zero_and_not_nan() -> None:
    logits = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    loss = multi_class_loss(logits, torch.full((1, 2, 2, 2), 255), 255)
    loss.backward()

    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_multi_class_loss_of_background_alone_is_cross_entropy() -> None:
    loss = multi_class_loss(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.long), 255)

    assert loss.item() == pytest.approx(math.log(3))


def test_routing_loss_asks_for_the_cases_own_expert() -> None:
    weights = torch.tensor([0.2, 0.5, 0.3])[None, :, None, None, None].expand(2, 3, 2, 2, 2)

    assert routing_loss(weights, torch.tensor([2, 0])).item() == pytest.approx(-math.log(0.3))
    assert routing_loss(weights, torch.tensor([1, 2])).item() == pytest.approx(-(math.log(0.5) + math.log(0.3)) / 2)
    assert routing_loss(weights, torch.tensor([0, 0])).item() == 0, "a case of no task asks for none"


def test_vote_loss_is_what_each_expert_pays_by_its_weight() -> None:
    """One voxel: an expert that is sure and right, one undecided; the truth is half a voxel in the second case."""
    opinions = torch.tensor([[50.0, 0.0]])[..., None].expand(2, -1, -1)
    weights = torch.tensor([[0.75, 0.25], [0.0, 1.0]])[..., None]
    truth = torch.tensor([[1.0], [0.5]])
    variance = 0.75 * 0.25 * 0.5**2  # of 1 and 0.5

    expected = [0.25 * math.log(2) + 0.1 * variance, math.log(2)]
    assert vote_loss(weights, opinions, truth).tolist() == pytest.approx(expected, abs=1e-5)


def test_balance_loss_is_one_where_all_are_heard_alike_and_more_where_one_wins() -> None:
    turns = torch.eye(4)[None]  # four experts, each with a voxel of its own

    assert balance_loss(turns).item() == pytest.approx(1.0)
    assert balance_loss(torch.tensor([1.0, 0, 0, 0])[None, :, None].expand(1, 4, 5)).item() == pytest.approx(4.0)


def test_feature_loss_is_the_mean_difference_and_moves_the_learner_alone() -> None:
    learnt, taught = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4, requires_grad=True)
    loss = feature_loss(learnt, taught * torch.tensor([1.0, -2.0])[:, None, None])
    loss.sum().backward()

    assert loss.tolist() == [1.0, 2.0]
    assert learnt.grad is not None
    assert taught.grad is None


def test_prediction_loss_is_the_divergence_from_the_teacher() -> None:
    """KL(0.5 || 0.9) with both logits divided by two."""
    logits = torch.full((1, 2, 2, 2), 2 * math.log(9), requires_grad=True)
    taught = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = prediction_loss(logits, taught, HALF)
    loss.sum().backward()

    assert loss.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), abs=1e-6)
    assert logits.grad is not None
    assert (logits.grad[~HALF] == 0).all()
    assert (logits.grad[HALF] > 0).all(), "down, towards the teacher"
    assert taught.grad is None


def test_prediction_loss_is_0_where_they_agree_and_where_nothing_is_taught() -> None:
    logits = torch.randn(2, 2, 2, 2)
    where = torch.stack([HALF[0], torch.zeros_like(HALF[0])])

    assert prediction_loss(logits, logits, HALF.expand(2, 2, 2, 2)).abs().max() < 1e-6
    assert prediction_loss(logits, -logits, where)[1] == 0


def test_shares_are_measured_inside_the_object() -> None:
    """Arm 1 has the first plane, of which half is the object; without an object the whole patch counts."""
    weights = torch.zeros(2, 2, 2, 2, 2)
    weights[:, 0, 1], weights[:, 1, 0] = 1, 1
    target = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    target[0, :2, :2] = True
    target[0, 2:, 0, 0] = True  # two samples in the other plane

    assert shares_inside(weights, target).tolist() == [pytest.approx([2 / 18, 16 / 18]), [0.5, 0.5]]


def test_routing_loss_asks_for_the_own_expert_in_the_object_too() -> None:
    """Heard on most of the patch, but not inside the object: that is what the mean over the patch does not see."""
    weights = torch.full((1, 2, 2, 2, 2), 0.1)
    weights[:, 1] = 0.9
    weights[:, :, 0, 0, 0] = torch.tensor([0.9, 0.1])
    target = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    target[:, :2, :2, :2] = True
    task = torch.tensor([1])
    patch, inside = math.log(0.8), math.log(0.1)

    assert routing_loss(weights, task).item() == pytest.approx(-patch, abs=1e-5)
    assert routing_loss(weights, task, target).item() == pytest.approx(-(patch + inside) / 2, abs=1e-5)
    assert routing_loss(weights, task * 0, target).item() == 0
