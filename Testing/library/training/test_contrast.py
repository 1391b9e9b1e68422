"""Semantic-guided contrast: it falls as classes part, is led by right and sure voxels alone, and is always finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from KA2ERSegment.training.contrast import ANCHORS, BACKGROUND, MOMENTUM, Contrast, choose_anchors

SIDE, WIDTH = 12, 6
VOXELS = SIDE**3


def a_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def a_cube(foreground: int = 1) -> Tensor:
    """(1, V) int64: a cube of one class off the middle of its background."""
    classes = torch.full((1, SIDE, SIDE, SIDE), BACKGROUND)
    classes[:, 3:8, 4:10, 2:9] = foreground
    return classes.flatten(1)


def a_contrast(classes: int = 3) -> Contrast:
    contrast = Contrast(WIDTH, classes)
    torch.nn.init.eye_(contrast.project.weight)
    return contrast


def features_apart(classes: Tensor, distance: float) -> Tensor:
    """(1, V, W): noise, and an axis of its own for each class."""
    noise = torch.randn(*classes.shape, WIDTH, generator=a_generator())
    return noise + distance * torch.nn.functional.one_hot(classes, WIDTH)


def an_answer(classes: Tensor, probability: float = 0.95) -> Tensor:
    """(1, V), right everywhere and as sure as said."""
    return torch.where(classes != BACKGROUND, probability, 1 - probability)


def test_it_falls_as_the_classes_part() -> None:
    classes = a_cube()
    losses = []
    for distance in (0.0, 2.0, 6.0, 30.0):
        contrast = a_contrast()
        losses.append(contrast(features_apart(classes, distance), classes, an_answer(classes), a_generator()).item())

    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] + 3


def test_training_with_it_parts_the_classes() -> None:
    classes, contrast = a_cube(), a_contrast()
    features = features_apart(classes, 0.3).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = contrast(features, classes, an_answer(classes), a_generator())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("probability", [0.5, 0.89, 0.05])
def test_it_is_finite_where_no_voxel_is_right_and_sure(probability: float) -> None:
    """Undecided, not sure enough, sure and wrong: no prototype is made, and the anchors are compared all the same."""
    classes, contrast = a_cube(), a_contrast()
    features = features_apart(classes, 1.0).requires_grad_()
    loss = contrast(features, classes, an_answer(classes, probability), a_generator())
    loss.backward()

    assert loss.isfinite()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert not contrast.known.any()


def test_it_is_nothing_where_there_is_one_class_and_no_prototype() -> None:
    classes = torch.full((1, VOXELS), BACKGROUND)
    loss = a_contrast()(torch.zeros(1, VOXELS, WIDTH), classes, torch.full((1, VOXELS), 0.5), a_generator())

    assert loss.item() == 0


def test_prototypes_come_from_voxels_that_are_right_and_sure_and_move_slowly() -> None:
    classes, contrast = a_cube(2), a_contrast()
    x, y = torch.eye(WIDTH)[:2]
    z = torch.where((classes == 2)[..., None], x, y)
    wrong = z.clone()
    wrong[:, ::2] = -1.0  # half the voxels are elsewhere, but not right
    answer = an_answer(classes)
    answer[:, ::2] = 1 - answer[:, ::2]
    contrast.remember(wrong, classes, answer)

    assert contrast.known.tolist() == [True, False, True]
    torch.testing.assert_close(contrast.prototypes[2], x)
    torch.testing.assert_close(contrast.prototypes[BACKGROUND], y)
    contrast.remember(torch.where((classes == 2)[..., None], y, y), classes, an_answer(classes))
    moved = MOMENTUM * x + (1 - MOMENTUM) * y
    torch.testing.assert_close(contrast.prototypes[2], moved / moved.norm())
    before = contrast.prototypes.clone()
    contrast.remember(z, classes, torch.full((1, VOXELS), 0.5))
    assert torch.equal(contrast.prototypes, before)


def test_foregrounds_of_other_groups_are_compared_with_too() -> None:
    """The same features cost more where another group's prototype is like theirs."""
    classes = a_cube(1)
    features = features_apart(classes, 5.0)
    alone, beside = a_contrast(), a_contrast()
    other = a_cube(2)
    beside.remember(torch.eye(WIDTH)[(other > 0).long()], other, an_answer(other))

    costs = [c(features, classes, an_answer(classes), a_generator()).item() for c in (alone, beside)]
    assert costs[1] > costs[0] + 0.2


def test_anchors_are_half_from_the_border_and_half_from_the_errors() -> None:
    foreground = a_cube() > 0
    wrong = torch.zeros_like(foreground)
    wrong[:, -500:] = True  # far from the cube
    at = choose_anchors(foreground, wrong, ANCHORS, a_generator())

    cube = foreground.view(1, 1, SIDE, SIDE, SIDE).float()
    shell = torch.nn.functional.max_pool3d(cube, 3, 1, 1) != -torch.nn.functional.max_pool3d(-cube, 3, 1, 1)
    assert at.shape == (1, ANCHORS)
    assert len(set(at[0].tolist())) == ANCHORS
    assert shell.flatten()[at[0, : ANCHORS // 2]].all()
    assert wrong[0, at[0, ANCHORS // 2 :]].all()
    without_errors = choose_anchors(foreground, torch.zeros_like(wrong), ANCHORS, a_generator())
    assert shell.flatten()[without_errors[0]].all(), "the border takes their place"
    assert choose_anchors(foreground, wrong, 10**6, a_generator()).shape == (1, VOXELS)
