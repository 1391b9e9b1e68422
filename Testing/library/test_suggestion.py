"""Where to click next: in doubt, well inside, and never where a click makes no sense."""

from __future__ import annotations

import numpy as np
import pytest

from KA2ERSegment import MaskPrompt, PointPrompt, Polarity, Session, Suggestion, Volume
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.geometry import Box
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch, upsample
from KA2ERSegment.suggestion import suggest
from KA2ERSegment.testing import tiny_bundle

SIZE = 32
DOUBTED_IN = (slice(6, 12), slice(6, 12), slice(6, 12))
DOUBTED_OUT = (slice(20, 27), slice(20, 27), slice(20, 27))
"""Samples (K, J, I); the second region is the larger one."""


def a_prediction(volume: Volume, logits: np.ndarray, weights: np.ndarray | None = None) -> Prediction:
    """One whose mask is what the logits say, on a patch half beyond the volume."""
    canonical = volume.canonical()
    i, j, k = (n / SIZE for n in canonical.shape_ijk)
    patch = Patch((0.3, 0.2, 0.1), (i * 1.1, j * 1.1, k * 1.1), SIZE)
    box = patch.box(canonical.shape_kji)
    return Prediction(
        volume=volume,
        canonical=canonical,
        name="object",
        patch=patch,
        logits=logits.astype(np.float32),
        packed=PackedMask.pack(box, upsample(logits.astype(np.float32), patch, box) > 0),
        changed=volume.box,
        arms=("foundation", "expert"),
        weights=np.full((2, 4, 4, 4), 0.5, dtype=np.float32) if weights is None else weights,
        opinion=lambda arm: logits,
    )


def some_logits() -> np.ndarray:
    """A sure object with one unsure part in it, and an unsure region beside it."""
    logits = np.full((SIZE,) * 3, -20.0)
    logits[3:18, 3:18, 3:18] = 20.0
    logits[DOUBTED_IN] = 0.3
    logits[DOUBTED_OUT] = -0.3
    return logits


@pytest.fixture
def a_fine_volume() -> Volume:
    """Fine enough that every sample of the patch is a voxel of its own; oblique, left-handed, axes turned."""
    matrix = np.array([[0.1, -0.8, 0.1, 5.0], [0.7, 0.1, 0.2, -9.0], [-0.1, 0.1, 1.4, 30.0], [0, 0, 0, 1]])
    array = np.random.default_rng(0).normal(0, 1, (60, 80, 100)).astype(np.float32)
    return Volume(array, matrix, "fine")


def sample_of(prediction: Prediction, suggestion: Suggestion) -> np.ndarray:
    ijk = PointPrompt(suggestion.ras).ijk(prediction.canonical)
    return np.round(prediction.patch.to_patch(ijk))[::-1]


def inside(sample: np.ndarray, region: tuple[slice, ...], depth: int = 0) -> bool:
    return all(s.start + depth <= x < s.stop - depth for x, s in zip(sample, region, strict=True))


def test_the_largest_doubtful_region_is_suggested_in_its_middle(a_fine_volume: Volume) -> None:
    prediction = a_prediction(a_fine_volume, some_logits())
    first = suggest(prediction, [], [])
    assert first is not None
    assert inside(sample_of(prediction, first), DOUBTED_OUT, depth=2)
    assert first.polarity is Polarity.POSITIVE
    assert 0 < first.expected_gain < 1
    assert suggest(prediction, [], []) == first
    ijk = np.array(PointPrompt(first.ras).ijk(a_fine_volume))
    np.testing.assert_allclose((a_fine_volume.ijk_to_ras @ (*ijk, 1))[:3], first.ras, atol=1e-9)  # a voxel's centre


def test_locked_objects_and_made_clicks_are_kept_clear(a_fine_volume: Volume) -> None:
    prediction = a_prediction(a_fine_volume, some_logits())
    patch, shape = prediction.patch, prediction.canonical.shape_kji
    whole = patch.box(shape)
    region = np.full((SIZE,) * 3, -1.0, dtype=np.float32)
    region[19:28, 19:28, 19:28] = 1
    locked = PackedMask.pack(whole, upsample(region, patch, whole) > 0)
    second = suggest(prediction, [], [locked])
    assert second is not None
    assert inside(sample_of(prediction, second), DOUBTED_IN, depth=1)
    assert second.polarity is Polarity.NEGATIVE
    made: list[tuple[int, int, int]] = []
    for _ in range(20):
        other = suggest(prediction, made, [])
        if other is None:
            break
        ijk = PointPrompt(other.ras).ijk(prediction.canonical)
        assert all(np.abs(prediction.patch.to_patch(ijk) - prediction.patch.to_patch(m)).max() > 1 for m in made)
        made.append(ijk)
    assert len(made) > 1


def test_a_boundary_alone_is_not_worth_a_click(a_fine_volume: Volume) -> None:
    logits = np.full((SIZE,) * 3, -20.0)
    logits[5:20, 5:20, 5:20] = 20
    logits[5, 5:20, 5:20] = 0.2
    assert suggest(a_prediction(a_fine_volume, logits), [], []) is None
    assert suggest(a_prediction(a_fine_volume, np.full((SIZE,) * 3, -0.2)), [], []) is None  # nothing is there yet


def test_divided_arms_count_more_than_one_that_is_trusted(a_fine_volume: Volume) -> None:
    logits = some_logits()
    logits[DOUBTED_OUT] = -20
    logits[20:26, 20:26, 20:26] = -0.3  # as large as the other one
    weights = np.zeros((2, 4, 4, 4), dtype=np.float32)
    weights[0] = 1
    for cell, region in (((slice(0, 2),) * 3, DOUBTED_IN), ((slice(2, 4),) * 3, (slice(20, 26),) * 3)):
        divided = weights.copy()
        divided[(slice(None), *cell)] = 0.5
        prediction = a_prediction(a_fine_volume, logits, divided)
        found = suggest(prediction, [], [])
        assert found is not None
        assert inside(sample_of(prediction, found), region)


def test_a_suggestion_can_be_clicked_and_changes_nothing_by_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle: Bundle = tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
    random = np.random.default_rng(0)
    matrix = np.diag([-0.8, 1.1, 2.0, 1.0])
    session = Session(bundle, device="cpu")
    session.set_volume(Volume(random.normal(0, 1, (24, 40, 50)).astype(np.float32), matrix))
    assert session.suggest() is None
    session.select("locked")
    block = np.zeros((24, 40, 50), dtype=bool)
    block[:12, :20, :25] = True
    session.edit(MaskPrompt.from_array(block, session.volume))
    session.lock()
    session.select("own")
    session.add(PointPrompt.from_ijk((30, 25, 15), session.volume))
    suggested = 0
    for _ in range(6):
        state = session._state
        suggestion = session.suggest()
        assert session._state is state
        if suggestion is None:
            break
        suggested += 1
        ijk = PointPrompt(suggestion.ras).ijk(session.volume)
        assert not block[ijk[2], ijk[1], ijk[0]]
        assert session.prediction is not None
        mask = session.prediction.mask
        assert mask[ijk[2], ijk[1], ijk[0]] == (suggestion.polarity is Polarity.NEGATIVE)
        session.add(PointPrompt(suggestion.ras, suggestion.polarity))
    assert suggested > 0
    assert Box.of_shape(mask.shape) == session.volume.box
