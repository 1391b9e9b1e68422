"""Grow from seeds on phantoms where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from KA2ERSegment.errors import PromptError, SessionStateError
from KA2ERSegment.evaluation import dice, evaluate_object
from KA2ERSegment.geometry import BoolArray
from KA2ERSegment.growcut import GrowCut
from KA2ERSegment.manifests import seed_of
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, ScribblePrompt
from KA2ERSegment.volume import Volume

pytest.importorskip("slicer", reason="Grow from seeds needs slicer-core: pip install ka2ersegment[slicer]")

AFFINE = np.array([[-0.8, 0, 0, 12], [0, 0.8, 0, -30], [0, 0.3, 2.4, 7], [0, 0, 0, 1.0]])


@pytest.fixture
def a_phantom() -> tuple[Volume, BoolArray]:
    """A bright ellipsoid (round in mm) in a dark, noisy, anisotropic volume."""
    k, j, i = np.ogrid[:22, :60, :64]
    truth: BoolArray = (3 * (k - 10)) ** 2 + (j - 28) ** 2 + (i - 33) ** 2 <= 15**2
    noise = np.random.default_rng(0).normal(0, 8, truth.shape)
    return Volume((100 * truth + noise).astype(np.int16), AFFINE), truth


def test_box_alone_finds_a_bright_ellipsoid(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, truth = a_phantom
    method = GrowCut()
    method.start(volume)
    mask = method.add(BoxPrompt.from_ijk((16, 11, 4), (51, 46, 17), volume))
    assert mask.shape == volume.shape_kji
    assert mask.dtype == bool
    assert dice(mask, truth) > 0.9


def test_clicks_alone_find_a_bright_ellipsoid(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, truth = a_phantom
    scores = evaluate_object(GrowCut(), volume, truth, seed_of("phantom"), with_box=False)
    assert scores["dsc5"] > 0.9
    assert scores["box_dice"] is None


def test_clicks_are_seeds(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, _ = a_phantom
    method = GrowCut()
    method.start(volume)
    method.add(BoxPrompt.from_ijk((16, 11, 4), (51, 46, 17), volume))
    mask = method.add(PointPrompt.from_ijk((33, 28, 10), volume, Polarity.NEGATIVE))
    assert not mask[10, 28, 31:36].any()
    mask = method.add(PointPrompt.from_ijk((33, 28, 10), volume))  # the later stroke paints over the earlier one
    assert mask[10, 28, 31:36].all()
    mask = method.add(PointPrompt.from_ijk((60, 3, 20), volume))  # far outside the box: the region grows with it
    assert mask[20, 3, 60]


def test_background_scribble_keeps_a_second_object_out(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, truth = a_phantom
    array = volume.array_kji.copy()
    array[4:17, 10:14, 20:46] = 100  # a bar that touches the ellipsoid
    volume = Volume(array, AFFINE)
    method = GrowCut()
    method.start(volume)
    before = method.add(BoxPrompt.from_ijk((14, 9, 3), (53, 47, 18), volume))
    line = ScribblePrompt.from_ijk([(20, 12, 10), (45, 12, 10)], volume, Polarity.NEGATIVE, radius=1.5)
    after = method.add(line)
    assert dice(after, truth) > dice(before, truth)
    assert not after[10, 12, 21:44].any()


def test_same_prompts_give_the_same_mask_after_a_new_start(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, _ = a_phantom
    method = GrowCut()
    masks = []
    for _ in range(2):
        method.start(volume)
        method.add(BoxPrompt.from_ijk((16, 11, 4), (51, 46, 17), volume))
        masks.append(method.add(PointPrompt.from_ijk((20, 28, 10), volume)))
    assert np.array_equal(masks[0], masks[1])


def test_box_around_a_thin_slab_at_the_border_works(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, truth = a_phantom
    slab = Volume(volume.array_kji[9:11], AFFINE)
    method = GrowCut()
    method.start(slab)
    assert dice(method.add(BoxPrompt.from_ijk((16, 11, 0), (51, 46, 2), slab)), truth[9:11]) > 0.9


def test_rejected_prompts_change_nothing(a_phantom: tuple[Volume, BoolArray]) -> None:
    volume, _ = a_phantom
    method, untroubled = GrowCut(), GrowCut()
    with pytest.raises(SessionStateError, match="Call start first"):
        method.add(PointPrompt((0.0, 0.0, 0.0)))
    for each in (method, untroubled):
        each.start(volume)
        each.add(PointPrompt.from_ijk((33, 28, 10), volume))
    with pytest.raises(PromptError):
        method.add(PointPrompt((9000.0, 0.0, 0.0)))
    second = PointPrompt.from_ijk((30, 28, 10), volume)
    assert np.array_equal(method.add(second), untroubled.add(second))
