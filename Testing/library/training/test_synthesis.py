"""Made images: finite, different every time, and with a target that can be seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.training.synthesis import disturb, make_image

BATCH, SIZE = 4, 32


def label_maps() -> tuple[Tensor, Tensor]:
    labels = torch.zeros(BATCH, SIZE, SIZE, SIZE, dtype=torch.long)
    labels[:, 4:28, 4:28, 4:28] = 1
    labels[:, 10:20, 10:20, 8:20] = 60000
    return labels, labels == 60000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_the_target_stands_out_from_what_is_around_it(seed: int) -> None:
    labels, target = label_maps()
    image = make_image(labels, target, generator(seed))
    near = F.max_pool3d(target[:, None].float(), 5, 1, 2)[:, 0].bool() & ~target

    assert image.shape == labels.shape
    assert image.isfinite().all()
    for n in range(BATCH):
        assert (image[n][target[n]].mean() - image[n][near[n]].mean()).abs() > 0.03


def test_cases_and_seeds_differ_and_the_same_seed_repeats() -> None:
    labels, target = label_maps()
    one, same, other = (make_image(labels, target, generator(seed)) for seed in (1, 1, 2))

    assert torch.equal(one, same)
    assert (one - other).abs().mean() > 0.05
    assert (one[0] - one[1]).abs().mean() > 0.05, "blur is grouped by case: cases do not leak into each other"


def test_a_case_does_not_depend_on_its_neighbours() -> None:
    labels, target = label_maps()
    changed = labels.clone()
    changed[1:] = 0
    one, other = (make_image(given, target, generator(3)) for given in (labels, changed))

    torch.testing.assert_close(one[0], other[0])


@pytest.mark.parametrize("seed", range(12))
def test_disturbed_images_are_finite_and_keep_their_shape(seed: int) -> None:
    labels, target = label_maps()
    image = torch.stack([labels[0].float(), labels[0] * -1000.0 + 5, torch.zeros(SIZE, SIZE, SIZE), target[0] * 1e-3])
    disturbed = disturb(image, generator(seed))

    assert disturbed.shape == image.shape
    assert disturbed.isfinite().all()
    assert disturbed[0].std() > 0.01
    assert disturbed.abs().max() < 10
