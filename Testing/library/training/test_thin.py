"""Thin caches: training sees the same, but for what is said to be lost; and they are as small as asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.preprocessing import Patch, sample_nearest
from KA2ERSegment.training import thin as thin_module
from KA2ERSegment.training.coding import decoded, encoded
from KA2ERSegment.training.items import TrainingItem, load_items
from KA2ERSegment.training.thin import LOSSES, Loss, thin


def write(folder: Path, name: str, labels: np.ndarray, *images: np.ndarray, source: str = "a/repo") -> None:
    about = {"id": name, "source": source, "spacing": [1.0, 1.5, 2.0], "channels": len(images), "licence": "CC0"}
    about |= {"names": {"7": "liver", "900": "spleen"}, "modality": "CT", "region": "abdomen", "subject": name}
    arrays: Any = {f"image{n}": image for n, image in enumerate(images)}
    np.savez_compressed(folder / f"{name}.npz", about=json.dumps(about), labels=labels, **arrays)


@pytest.fixture
def a_cache(tmp_path: Path) -> Path:
    """One CT, and twelve label maps on one grid that are labelled in a corner; each a little different."""
    folder = tmp_path / "cache"
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = np.zeros((20, 22, 24), dtype=np.uint16)
    labels[8:14, 6:12, 4:15], labels[15:19, 14:20, 16:22] = 7, 900
    image = (labels + rng.normal(0, 300, labels.shape)).clip(-1024, 3071).astype(np.int16)
    write(folder, "ct", labels, image, -image)
    for n in range(12):
        moved = labels.copy()
        moved[8 : 10 + n % 5, 6, 4] = 0
        write(folder, f"lesion_{n:02}", moved)
    write(folder, "other", labels, source="another/repo")
    return folder


def sampled(item: TrainingItem, corner: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Label names on a patch that reaches beyond the volume."""
    patch = Patch(np.array([-3.0, -2.0, -5.0]) - corner, np.array([1.0, 1.0, 1.0]), 32)
    names = np.array([item.names.get(value, "") for value in range(1000)])
    return names[sample_nearest(item.labels, patch)]


def test_without_loss_training_sees_the_same(a_cache: Path, tmp_path: Path) -> None:
    loss, size = thin(a_cache, tmp_path / "thin", max_mb=100)

    assert loss == Loss()
    assert size == sum(path.stat().st_size for path in (tmp_path / "thin").iterdir())
    assert size < sum(path.stat().st_size for path in a_cache.iterdir())
    before, after = load_items(a_cache), load_items(tmp_path / "thin")
    assert [item.name for item in after] == [item.name for item in before]
    for one, other in zip(before, after, strict=True):
        corner = (0, 0, 0) if one.images else (4, 6, 8)
        assert (sampled(one) == sampled(other, corner)).all()
        assert [image.tolist() for image in one.images] == [image.tolist() for image in other.images]
        assert sorted(other.names) == sorted(other.boxes) == [1, 2]
        for value, box in other.boxes.items():
            former = next(one.boxes[v] for v in one.boxes if one.names[v] == other.names[value])
            assert tuple(np.array(box.start) + corner) == former.start
            assert tuple(np.array(box.stop) + corner) == former.stop
        for key in ("source", "spacing", "licence", "modality", "region"):
            assert getattr(one, key) == getattr(other, key)


def test_label_maps_on_one_grid_go_first_and_evenly(
    a_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_module, "LOSSES", (Loss(), Loss(4)))
    whole = thin(a_cache, tmp_path / "whole", max_mb=100)[1]

    loss, size = thin(a_cache, tmp_path / "thin", max_mb=0.9 * whole / 1e6)

    assert loss == Loss(4)
    assert size < whole
    kept = [item.name for item in load_items(tmp_path / "thin")]
    assert kept == ["ct", "lesion_00", "lesion_04", "lesion_07", "lesion_11", "other"], "what has an image stays"


@pytest.mark.parametrize("levels", [256, 64])
def test_grey_values_move_by_half_a_level_at_most(
    levels: int, a_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_module, "LOSSES", (Loss(0, levels),))

    thin(a_cache, tmp_path / "thin", max_mb=100)

    before, after = load_items(a_cache)[0].images, load_items(tmp_path / "thin")[0].images
    for one, other in zip(before, after, strict=True):
        span = np.subtract(*np.percentile(one, [99.9, 0.1]))
        error = np.abs(one.astype(int) - other.astype(int)).max()
        assert 0 < error <= span / levels / 2


@pytest.mark.parametrize("step", [1, 2, 3, 16, 1000])
def test_any_image_survives_its_coding(step: int) -> None:
    values = [-32768, 32767, 0, -1, 1, -32767, 12345, -12345]
    image = np.random.default_rng(1).choice(values, (3, 5, 7)).astype(np.int16)

    error = np.abs(decoded(encoded(image, step), step).astype(int) - image)

    assert error.max() < step, "also where the next multiple is no int16"
    assert error[np.abs(image.astype(int)) < 32000].max() <= step / 2


def test_the_same_cache_gives_the_same_bytes(a_cache: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "other"):
        thin(a_cache, tmp_path / name, max_mb=100)
        digests.append([hashlib.sha256(path.read_bytes()).digest() for path in sorted((tmp_path / name).iterdir())])

    assert digests[0] == digests[1]


def test_what_cannot_be_made_small_enough_leaves_nothing(a_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="cannot be made smaller than"):
        thin(a_cache, tmp_path / "thin", max_mb=0.001)

    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_in_use_is_not_overwritten(a_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="must hold packed items"):
        thin(a_cache, a_cache, max_mb=100)
    with pytest.raises(VolumeError, match="must hold packed items"):
        thin(tmp_path / "nothing", tmp_path / "thin", max_mb=100)


def test_less_is_lost_before_more() -> None:
    levels = [loss.levels or 10_000 for loss in LOSSES]
    alike = [loss.alike or 10_000 for loss in LOSSES]

    assert levels == sorted(levels, reverse=True)
    assert alike == sorted(alike, reverse=True)
