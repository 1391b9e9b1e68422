"""A patch as an nnU-Net reads it: its numbers, spacing and axes; and what it gives lies where it saw it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from KA2ERSegment import PointPrompt, Session, Volume
from KA2ERSegment.build import build_model
from KA2ERSegment.encoders.expert import features_on_patch
from KA2ERSegment.encoders.reading import MAX_SAMPLES, network_input, normalised, on_patch, samples
from KA2ERSegment.model import PatchFeatures
from KA2ERSegment.plans import ExpertPlans, Normalisation, Plans
from KA2ERSegment.preprocessing import RawPatch, image_statistics, normalise, resample, sample_image
from KA2ERSegment.testing import tiny_bundle, tiny_plans

STEP_KJI = (2.5, 0.8, 1.1)  # mm
SIZE = 32
CT = Normalisation("CTNormalization", percentile_00_5=-100.0, percentile_99_5=300.0, mean=50.0, std=40.0)
ZSCORE = Normalisation("ZScoreNormalization")


def positions(size: int = SIZE, step: tuple[float, ...] = STEP_KJI) -> Tensor:
    """(3, size, size, size): mm along K, J and I from the patch's face to each sample's centre."""
    axes = [(np.arange(size) + 0.5) * mm for mm in step]
    return torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32))


def raw_patch(values: Tensor, step: tuple[float, ...] = STEP_KJI, has_unit: bool = True) -> RawPatch:
    return RawPatch(
        values=values[None].float(),
        inside=torch.ones(1, *values.shape, dtype=torch.bool),
        step=torch.tensor([step]),
        statistics=image_statistics(values.numpy())[None],
        has_unit=torch.tensor([has_unit]),
    )


def planned(spacing: tuple[float, ...] = (1.5, 1.0, 0.9), axes: tuple[int, ...] = (), *channels: Normalisation) -> Any:
    none = Normalisation("NoNormalization")
    return ExpertPlans("planned", "", spacing_kji=spacing, normalisation=channels or (none,), axes=axes)


@pytest.mark.parametrize("scheme", ["CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization"])
@pytest.mark.parametrize("use_mask", [False, True])
def test_grey_values_are_normalised_as_nnunet_does(scheme: str, use_mask: bool) -> None:
    schemes = pytest.importorskip("nnunetv2.preprocessing.normalization.default_normalization_schemes")
    image = np.random.default_rng(0).normal(40, 90, (20, 22, 24)).astype(np.float32)
    if use_mask:
        image[:4] = 0  # what nnU-Net crops away does not count
        image[10, 3:9] = 0
    numbers = {"percentile_00_5": -100.0, "percentile_99_5": 300.0, "mean": 50.0, "std": 40.0}
    crop = image[4:] if use_mask else image
    zero = np.where(crop == 0, -1, 0)
    expected = getattr(schemes, scheme)(use_mask, numbers).run(crop.copy(), zero)
    channel = replace(CT, scheme=scheme, use_mask=use_mask)
    found = normalised(raw_patch(torch.from_numpy(image)), channel)[0].numpy()

    np.testing.assert_allclose(found[4:] if use_mask else found, expected, atol=2e-5)


def test_rgb_and_no_normalisation() -> None:
    raw = raw_patch(torch.linspace(-20, 300, 64).reshape(4, 4, 4))

    assert torch.equal(normalised(raw, Normalisation("NoNormalization")), raw.values)
    rgb = normalised(raw, Normalisation("RGBTo01Normalization"))
    assert (rgb.min(), rgb.max()) == (0, 1)


def test_outside_the_volume_is_zero() -> None:
    raw = raw_patch(torch.full((4, 4, 4), 200.0) + torch.arange(4))
    raw.inside[:, 2:] = False

    found = normalised(raw, CT)
    assert (found[:, 2:] == 0).all()
    assert (found[:, :2] > 3).all()


def test_an_image_without_a_unit_is_moved_into_the_window() -> None:
    """Made images have grey values of about 0 to 1: in Hounsfield units that were all one tissue."""
    values = torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0))
    found = normalised(raw_patch(values, has_unit=False), CT)
    read_as_hounsfield = normalised(raw_patch(values), CT)

    assert read_as_hounsfield.std() < 0.01
    torch.testing.assert_close(found[0], (values - values.mean()) / values.std(correction=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axes", [(), (1, 0, 2), (2, 0, 1)])
def test_the_network_sees_its_own_spacing_along_its_own_axes(axes: tuple[int, ...]) -> None:
    """A ramp in mm along each axis, on anisotropic steps: its slope per sample is the spacing of the grid."""
    plans = planned((1.5, 1.0, 0.9), axes)
    order = axes or (0, 1, 2)
    extent = [SIZE * mm for mm in STEP_KJI]  # 80, 25.6, 35.2 mm
    expected = [samples(extent[axis], plans.spacing_kji[axis], 4) for axis in order]

    for axis, ramp in enumerate(positions()):
        seen = network_input(plans, raw_patch(ramp), (4, 4, 4))[0, 0]
        assert list(seen.shape) == expected
        along = order.index(axis)
        inner = seen.narrow(along, 4, seen.shape[along] - 8)  # beyond the outermost samples nothing is known
        slope = inner.diff(dim=along)
        torch.testing.assert_close(slope, torch.full_like(slope, extent[axis] / seen.shape[along]), atol=0.05, rtol=0)
        for other in {0, 1, 2} - {along}:
            assert inner.diff(dim=other).abs().max() < 1e-3
        assert extent[axis] / seen.shape[along] == pytest.approx(plans.spacing_kji[axis], rel=0.1)


@pytest.mark.parametrize("axes", [(), (1, 0, 2), (2, 0, 1)])
def test_features_lie_where_the_network_saw_them(axes: tuple[int, ...]) -> None:
    """An encoder that averages: at stride 8 of the patch its features are the positions of the blocks' centres."""

    class Averages(torch.nn.Module):
        def forward(self, image: Tensor) -> list[Tensor]:
            return [image, torch.nn.functional.avg_pool3d(image, (2, 4, 4))]

    stages = [(1, 1, 1), (2, 4, 4)]
    plans = planned((1.5, 1.0, 0.9), axes)
    for axis, ramp in enumerate(positions()):
        found = features_on_patch(Averages(), stages, plans, raw_patch(ramp), (1, 4))
        centres = positions(SIZE // 4, tuple(4 * mm for mm in STEP_KJI))[axis]
        tolerance = 0.6 * max(STEP_KJI)
        inner = slice(1, -1)

        assert found[4].shape == (1, 1, 8, 8, 8)
        assert (found[4][0, 0] - centres)[inner, inner, inner].abs().max() < tolerance
        assert (found[1][0, 0] - ramp)[2:-2, 2:-2, 2:-2].abs().max() < tolerance


def test_what_was_seen_finds_its_way_back() -> None:
    axes = (2, 0, 1)
    values = torch.rand(1, 2, 5, 6, 7)
    turned = values.permute(0, 1, *(axis + 2 for axis in axes))

    assert torch.equal(on_patch(turned, planned(axes=axes), 6), resample(values, (6, 6, 6)))


def test_numbers_of_samples_are_bounded() -> None:
    assert samples(100.0, 1.0, 16) == 96
    assert samples(70.0, 1.0, 16) == 64
    assert samples(1000.0, 1.0, 16) == MAX_SAMPLES
    assert samples(1.0, 20.0, 16) == 32
    assert samples(1000.0, 1.0, 64) == 128  # two of the deepest stride at least
    assert samples(21.0, 1.0, 1) == 21


def test_resampling_keeps_the_region_and_a_constant() -> None:
    values = torch.full((2, 9, 16, 33), 7.0)
    assert torch.allclose(resample(values, (32, 5, 33)), torch.tensor(7.0))

    spot = torch.zeros(1, 24, 24, 24)
    spot[0, 3:9, 12:18, 18:24] = 1
    for shape in ((48, 8, 24), (12, 36, 16)):
        found = resample(spot, shape)
        middle = [float((found.sum(dim=[d for d in (1, 2, 3) if d != n + 1]).flatten() * (torch.arange(s) + 0.5)).sum()
                  / found.sum() / s) for n, s in enumerate(shape)]  # fmt: skip
        assert middle == pytest.approx([6 / 24, 15 / 24, 21 / 24], abs=0.02)


def test_several_channels_see_the_one_image() -> None:
    raw = raw_patch(torch.randn(SIZE, SIZE, SIZE) * 100)
    seen = network_input(planned((2.5, 0.8, 1.1), (), CT, ZSCORE), raw, (1, 1, 1))

    assert seen.shape == (1, 2, SIZE, SIZE, SIZE)
    assert torch.equal(seen[:, 0], normalised(raw, CT))
    assert torch.equal(seen[:, 1], normalised(raw, ZSCORE))


def with_own_reading(plans: Plans) -> Plans:
    """The second expert reads Hounsfield units at 2 mm, through two channels."""
    first, second = plans.experts
    return replace(
        plans, experts=(first, replace(second, spacing_kji=(2.0, 1.5, 1.5), normalisation=(CT, ZSCORE), axes=(1, 0, 2)))
    )


def test_only_the_expert_that_wants_it_reads_raw_grey_values() -> None:
    torch.manual_seed(0)
    model = build_model(with_own_reading(tiny_plans()))
    values = torch.randn(2, SIZE, SIZE, SIZE) * 200
    inside = torch.ones_like(values, dtype=torch.bool)
    statistics = torch.stack([image_statistics(case.numpy()) for case in values])
    steps = torch.tensor([STEP_KJI, (1.0, 1.0, 1.0)])
    raw = RawPatch(values, inside, steps, statistics, torch.ones(2, dtype=torch.bool))
    image = normalise(values, inside)
    with torch.no_grad():
        before = model.encode(image, raw=raw)
        brighter = model.encode(image, raw=replace(raw, values=raw.values + 150))
        wider = model.encode(image, raw=replace(raw, step=raw.step * 2))
        alone = model.encode(image[1:], raw=raw.case(1))

    assert model.reads_raw
    for changed in (brighter, wider):
        for stride in (8, 16):
            assert torch.equal(changed.experts[0][stride], before.experts[0][stride])
            assert not torch.allclose(changed.experts[1][stride], before.experts[1][stride], atol=1e-3)
    assert before.experts[1][8].shape == (2, 8, 4, 4, 4)
    torch.testing.assert_close(alone.experts[1][8], before.experts[1][8][1:])
    with pytest.raises(ValueError, match="'tiny_brain' reads grey values in their own unit"):
        model.encode(image)


def test_experts_of_former_bundles_are_bit_identical_whatever_else_is_known_of_the_patch() -> None:
    torch.manual_seed(0)
    model = build_model(tiny_plans())
    raw = raw_patch(torch.randn(SIZE, SIZE, SIZE))
    image = normalise(raw.values, raw.inside)
    with torch.no_grad():
        plain, told = model.encode(image), model.encode(image, raw=raw)

    assert not model.reads_raw
    assert torch.equal(plain.embedding, told.embedding)
    assert all(torch.equal(a[s], b[s]) for a, b in zip(plain.experts, told.experts, strict=True) for s in (8, 16))


def test_a_session_gives_the_expert_the_volumes_own_unit_and_steps(
    any_volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way the volume is stored, the expert reads canonical axes in mm."""
    session = Session(tiny_bundle(tmp_path / "bundle", with_own_reading(tiny_plans())), device="cpu")
    session.set_volume(any_volume)
    session.select("bead")
    seen: list[RawPatch] = []
    encode = session.model.encode

    def watched(
        image: Tensor, present: Tensor | None = None, raw: RawPatch | None = None, prior: Tensor | None = None
    ) -> PatchFeatures:
        assert raw is not None
        seen.append(raw)
        return encode(image, present, raw, prior)

    monkeypatch.setattr(session.model, "encode", watched)
    k, j, i = (n // 2 for n in any_volume.shape_kji)
    session.add(PointPrompt.from_ijk((i, j, k), any_volume))
    canonical = any_volume.canonical()

    answerer = session._answerer
    assert answerer is not None
    for raw in seen:
        steps = {patch: np.multiply(patch.step, canonical.spacing)[::-1] for patch, _ in answerer.features}
        patch = next(patch for patch, step in steps.items() if np.allclose(step, raw.step[0], atol=1e-3))
        assert torch.equal(raw.values[0], sample_image(canonical.array_kji, patch)[0])
        assert raw.has_unit.all()
        assert torch.equal(raw.statistics[0], image_statistics(canonical.array_kji))
