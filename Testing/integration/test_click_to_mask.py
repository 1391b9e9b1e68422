"""The shipped bundle on an image whose truth is known: from a prompt to a mask that is right."""

from __future__ import annotations

import numpy as np
import pytest

from KA2ERSegment import BoxPrompt, PointPrompt, Polarity, Session, Volume, load_bundle
from KA2ERSegment.evaluation import dice
from KA2ERSegment.geometry import BoolArray, Box

OBLIQUE = np.array([[0.9, -0.3, 0.2, -40], [0.4, 1.1, -0.3, 12], [-0.1, 0.4, 2.4, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def a_sphere() -> tuple[Volume, BoolArray]:
    """A ball of 22 mm in soft noise, on an oblique anisotropic grid, and its true mask."""
    shape = (40, 90, 80)
    kji = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    ras = kji[..., ::-1] @ OBLIQUE[:3, :3].T
    centre = np.array([42, 44, 21]) @ OBLIQUE[:3, :3].T
    truth: BoolArray = np.linalg.norm(ras - centre, axis=-1) < 22
    noise = np.random.default_rng(0).normal(0, 12, shape)
    return Volume((100 + 80 * truth + noise).astype(np.int16), OBLIQUE, "ball"), truth


@pytest.fixture
def a_session(a_sphere: tuple[Volume, BoolArray]) -> Session:
    session = Session(load_bundle(), device="cpu")
    session.set_volume(a_sphere[0])
    return session


def test_shipped_bundle_fits_its_limit() -> None:
    bundle = load_bundle()
    assert sum(file.stat().st_size for file in bundle.folder.iterdir()) <= 16e6
    assert len(bundle.plans.experts) >= 2
    assert "Not a medical device" in (bundle.folder / "model_card.md").read_text()


def test_a_box_gives_the_ball(a_session: Session, a_sphere: tuple[Volume, BoolArray]) -> None:
    volume, truth = a_sphere
    box = Box.around(truth)
    assert box is not None
    prediction = a_session.add(BoxPrompt.from_ijk(box.start, box.stop, volume))
    assert dice(prediction.mask, truth) > 0.9
    assert list(prediction.modes) == ["amalgamation", "decoders", "head"]
    seen = prediction.probability > 0
    for names in prediction.modes.values():
        weights = sum(prediction.experts[name].weight for name in names)
        np.testing.assert_allclose(np.asarray(weights)[seen & truth], 1, atol=1e-3)
        assert sum(prediction.shares[name] for name in names) == pytest.approx(1, abs=1e-3)


def test_one_click_finds_the_ball_and_its_size(a_session: Session, a_sphere: tuple[Volume, BoolArray]) -> None:
    volume, truth = a_sphere
    prediction = a_session.add(PointPrompt.from_ijk((42, 44, 21), volume))
    assert dice(prediction.mask, truth) > 0.8
    corrected = a_session.add(PointPrompt.from_ijk((42, 4, 21), volume, Polarity.NEGATIVE))
    assert dice(corrected.mask, truth) > 0.8
    assert not corrected.mask[21, 4, 42]
