"""Drawn cases: whole, of one shape, with a target in them, and with the box that a hand would draw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import Box
from KA2ERSegment.preprocessing import image_statistics
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.sampling import (
    IGNORE,
    LESION,
    PART,
    ClassMap,
    Mode,
    SamplingOptions,
    TargetDataset,
    draw_case,
    hand_drawn,
    raw_patch,
)

TASK = ClassMap("trunk", "^one", {"soft": "liver|spleen", "hard": "rib"})


def an_item(image: bool = True, name: str = "one") -> TrainingItem:
    """Two ellipsoids and a rod in an anisotropic volume; the image shows the label's value."""
    shape = (24, 40, 44)
    k, j, i = np.indices(shape)
    labels = np.zeros(shape, dtype=np.uint16)
    labels[((k - 11) / 7) ** 2 + ((j - 15) / 9) ** 2 + ((i - 14) / 10) ** 2 < 1] = 3
    labels[((k - 13) / 6) ** 2 + ((j - 27) / 7) ** 2 + ((i - 33) / 8) ** 2 < 1] = 5
    labels[4:20, 36:39, 8:11] = 9
    found = {value: Box.around(labels == value) for value in (3, 5, 9)}
    boxes = {value: box for value, box in found.items() if box is not None}
    images = ((labels * 100).astype(np.int16),) if image else ()
    names = {3: "liver", 5: "spleen", 9: "rib_left_1"}
    return TrainingItem(name, "a/repo", labels, images, (1.0, 1.2, 2.5), names, boxes, "CC0", "CT", "abdomen")


def test_steps_are_those_of_the_turned_patch() -> None:
    """A ramp of 1 along R, 10 along A and 100 along S, per mm: its slope tells which axis came out where."""
    item = an_item()
    k, j, i = np.indices(item.labels.shape)
    ramp = (i * 1.0 * 1 + j * 1.2 * 10 + k * 2.5 * 100).astype(np.float32)
    item = replace(item, images=(ramp,))
    orders = set()
    for case in draws(Mode.BOX, 30, item, real_images=1.0):
        inner = case["image"][12:20, 12:20, 12:20].double()
        slopes = [float(inner.diff(dim=axis).mean().abs() / case["step"][axis]) for axis in range(3)]
        assert sorted(slopes) == pytest.approx([1, 10, 100], rel=0.02)
        orders.add(tuple(round(np.log10(slope)) for slope in slopes))
        assert torch.equal(case["statistics"], image_statistics(ramp))
    assert (2, 1, 0) in orders
    assert len(orders) > 2


def test_experts_read_real_images_as_they_are_and_made_ones_as_they_are_shown() -> None:
    cases = draws(Mode.BOX, 12, real_images=0.5)
    batch = {key: torch.stack([case[key] for case in cases]) for key in cases[0]}
    shown = torch.rand(12, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    raw = raw_patch(batch, shown)

    real = batch["real"]
    assert 0 < real.sum() < 12
    assert torch.equal(raw.has_unit, real)
    assert torch.equal(raw.values[real], batch["image"][real])
    assert torch.equal(raw.values[~real], shown[~real])
    assert torch.equal(raw.statistics[real], batch["statistics"][real])
    torch.testing.assert_close(raw.statistics[~real, 0], shown[~real].flatten(1).mean(1))


def options(mode: Mode, **changes: float) -> SamplingOptions:
    modes = tuple(float(mode is other) for other in Mode)
    return SamplingOptions(patch_size=32, modes=modes, **changes)  # type: ignore[arg-type]


def draws(mode: Mode, count: int, item: TrainingItem | None = None, **changes: float) -> list[dict[str, torch.Tensor]]:
    rng, cases, item = np.random.default_rng(mode.value), [], item or an_item()
    for _ in range(4 * count):
        case = draw_case(item, options(mode, **changes), rng, [TASK])
        if case is not None:
            cases.append(case)
        if len(cases) == count:
            return cases
    pytest.fail("most draws must give a case")


@pytest.mark.parametrize("mode", Mode)
def test_cases_of_every_mode_are_whole(mode: Mode) -> None:
    seen = set()
    for case in draws(mode, 50, real_images=0.4, lesions=0.3, parts=0.3):
        for key in ("labels", "image", "inside", "target", "box", "outside", "classes"):
            assert case[key].shape == (32, 32, 32), key
        assert case["target"].dtype == case["box"].dtype == case["outside"].dtype == torch.bool
        assert case["target"].sum() >= 8
        assert case["mode"] == mode.value
        assert case["task"] == 1
        assert case["box"].any() == (mode in (Mode.BOX, Mode.SLICE_BOX))
        assert not (case["box"] & case["outside"]).any()
        assert set(case["classes"].unique().tolist()) <= {0, 1, 2}
        seen.add("real" if case["real"] else "made")
        if len(case["labels"][case["target"]].unique()) > 1:
            seen.add("union")
        seen |= {name for name, value in (("lesion", LESION), ("part", PART)) if (case["labels"] == value).any()}
    assert seen == {"real", "made", "union", "lesion", "part"}


def test_a_3d_box_holds_the_target_and_everything_else_is_outside() -> None:
    shares = []
    for case in draws(Mode.BOX, 50):
        shares.append(float((case["box"] & case["target"]).sum() / case["target"].sum()))
        assert torch.equal(case["outside"], ~case["box"])
        assert case["target"].sum() > 0.05 * case["box"].sum(), "and is not much larger"
    assert min(shares) >= 0.9


def test_a_made_up_lesion_lies_in_its_box() -> None:
    for case in draws(Mode.BOX, 30, item=an_item(image=False), lesions=1.0):
        assert (case["labels"][case["target"]] == LESION).all()
        assert (case["box"] & case["target"]).sum() >= 0.9 * case["target"].sum()


def test_a_box_on_one_slice_bounds_that_slice_alone() -> None:
    for case in draws(Mode.SLICE_BOX, 50):
        known = case["box"] | case["outside"]
        whole = [plane.flatten(1) for plane in (known.movedim(axis, 0) for axis in range(3))]
        slabs = [axis for axis, planes in enumerate(whole) if planes.all(1).equal(planes.any(1))]
        assert len(slabs) == 1, "whole slices along one axis"
        planes = known.movedim(slabs[0], 0).flatten(1).any(1)
        assert 1 <= planes.sum() <= 4
        section = (case["target"] & known).movedim(slabs[0], 0)[planes]
        boxed = (case["target"] & case["box"]).movedim(slabs[0], 0)[planes]
        largest = section.flatten(1).sum(1).max()
        assert largest > 0, "drawn where the target is"
        assert boxed.sum() >= 0.7 * section.sum()


def test_real_images_stay_on_their_labels_through_flips_and_turns() -> None:
    for case in draws(Mode.CLICK, 20, real_images=1.0, unions=0.0):
        assert case["real"]
        inside = case["inside"]
        core = inside & (torch.nn.functional.max_pool3d(-case["labels"][None].float(), 3, 1, 1)[0] == -case["labels"])
        core &= torch.nn.functional.max_pool3d(case["labels"][None].float(), 3, 1, 1)[0] == case["labels"]
        assert core.sum() > 100
        difference = (case["image"] - 100 * case["labels"]).abs()[core]
        assert difference.quantile(0.9) < 60, "the image is 100 x the label"
        assert (case["labels"][~inside] == 0).all()


def test_the_same_seed_draws_the_same_cases_and_another_does_not() -> None:
    def first(seed: int) -> dict[str, torch.Tensor]:
        return next(iter(TargetDataset([an_item()], SamplingOptions(patch_size=32), seed, [TASK])))

    one, same, other = first(1), first(1), first(2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_training_without_a_single_target_is_refused() -> None:
    with pytest.raises(VolumeError, match="training needs items with labels"):
        TargetDataset([], SamplingOptions(), 0)


@pytest.mark.parametrize("extent", [(7, 30, 200), (100, 51, 64)])
def test_faces_of_a_drawn_box_move_by_minus_2_to_plus_10_percent(extent: tuple[int, int, int]) -> None:
    box = Box((10, 20, 30), (10 + extent[0], 20 + extent[1], 30 + extent[2]))
    rng = np.random.default_rng(0)
    moves = []
    for _ in range(300):
        start, stop = hand_drawn(box, rng)
        assert (start == np.round(start)).all()
        moves.append([(np.array(box.start) - start), (stop - np.array(box.stop))])
    outward = np.array(moves)  # (300, 2, 3), voxels

    assert (outward >= np.round(-0.02 * np.array(extent)) - 1e-9).all()
    assert (outward <= np.round(0.10 * np.array(extent)) + 1e-9).all()
    np.testing.assert_allclose(outward.mean(axis=(0, 1)) / extent, 0.04, atol=0.012)
    assert (outward.min(axis=(0, 1))[1:] < 0).any(), "a hand also cuts off a little"


def test_a_drawn_box_is_never_empty() -> None:
    for seed in range(20):
        start, stop = hand_drawn(Box((5, 5, 5), (6, 6, 6)), np.random.default_rng(seed))
        assert (stop > start).all()


def test_a_task_covers_items_by_id_and_sorts_labels_by_name() -> None:
    item = an_item()
    assert TASK.covers(item)
    assert not TASK.covers(an_item(name="two"))
    assert ClassMap("ct", "ct abdomen", {}).covers(item), "modality and region count too"
    classes = TASK.classes(item, np.array([[[0, 3, 5, 9, 42]]]))
    assert classes.tolist() == [[[0, 1, 1, 2, 0]]]
    rng = np.random.default_rng(0)
    case = next(c for c in (draw_case(an_item(name="two"), options(Mode.BOX), rng, [TASK]) for _ in range(9)) if c)
    assert case["task"] == 0
    assert (case["classes"] == IGNORE).all()
