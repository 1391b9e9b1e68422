"""Packing: `train` alone, permissive alone unless asked, canonical, and whole or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.training import items as items_module
from KA2ERSegment.training.items import MIN_VOXELS, ItemName, TrainingItem, pack, split_held_out

COLUMNS = ["id", "split", "modality", "body_region", "has_image", "images", "label", "labels_json", "spacing"]
COLUMNS += ["source_repo", "licence", "share_alike"]
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])  # left-handed: I runs to the left


def labels_kji() -> np.ndarray:
    labels = np.zeros((10, 12, 14), dtype=np.uint16)
    labels[2:6, 3:8, 1:7] = 1
    labels[6:9, 4:10, 8:13] = 7
    labels[0, 0, :3] = 9  # too few voxels to be a target
    return labels


def write(path: Path, array_kji: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    nibabel.save(nibabel.Nifti1Image(array_kji.transpose(2, 1, 0), affine), path)
    return path.name


def a_manifest(folder: Path, **changes: Any) -> Path:
    """Three rows: with image, label map under share-alike, and one of split `val`."""
    folder.mkdir(exist_ok=True)
    image = (np.arange(10 * 12 * 14).reshape(10, 12, 14) - 500).astype(np.int16)
    write(folder / "ct.nii.gz", changes.get("image", image), changes.get("affine", AFFINE))
    write(folder / "lbl.nii.gz", labels_kji())
    (folder / "names.json").write_text(json.dumps({"1": "liver", "7": "spleen", "9": "duct"}))
    common = {"label": "lbl.nii.gz", "source_repo": "a/repo", "licence": "CC0", "share_alike": "no", "spacing": ""}
    common |= {"modality": "CT", "body_region": "abdomen", "has_image": "no"}
    rows = [
        {"id": "one", "split": "train", "images": "ct.nii.gz", "labels_json": "names.json"},
        {"id": "two", "split": "train", "share_alike": "yes", "licence": "CC-BY-SA"},
        {"id": "three", "split": "val", "images": "ct.nii.gz"},
    ]
    with (folder / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    return folder / "manifest.csv"


@pytest.mark.parametrize(("share_alike", "expected"), [(False, ["one"]), (True, ["one", "two"])])
def test_val_is_never_packed_and_share_alike_only_when_asked(
    tmp_path: Path, share_alike: bool, expected: list[str]
) -> None:
    manifest = a_manifest(tmp_path / "data")

    assert pack([manifest], tmp_path / "cache", share_alike) == expected
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"{name}.npz" for name in expected]


def test_a_packed_item_has_canonical_axes_and_boxes_of_its_labels(tmp_path: Path) -> None:
    pack([a_manifest(tmp_path / "data")], tmp_path / "cache", share_alike=False)
    item = TrainingItem.load(tmp_path / "cache" / "one.npz")
    expected = labels_kji()[:, :, ::-1]

    np.testing.assert_array_equal(item.labels, expected)
    assert item.images[0].dtype == np.int16
    assert item.images[0][0, 0].tolist() == list(range(-487, -501, -1))
    assert item.spacing == pytest.approx((2.0, 1.5, 3.0))
    assert item.names == {1: "liver", 7: "spleen", 9: "duct"}
    assert (item.source, item.licence, item.modality, item.region) == ("a/repo", "CC0", "CT", "abdomen")
    assert set(item.boxes) == {1, 7}, f"label 9 has fewer than {MIN_VOXELS} voxels"
    for value, box in item.boxes.items():
        assert (box.crop(expected) == value).sum() == (expected == value).sum() == box.size


def test_an_item_that_does_not_say_whose_it_is_is_refused(tmp_path: Path) -> None:
    pack([a_manifest(tmp_path / "data")], tmp_path / "cache", share_alike=False)
    path = tmp_path / "cache" / "one.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays.pop("about")))
    del about["subject"]
    np.savez_compressed(path, about=json.dumps(about), **arrays)

    for read in (TrainingItem.load, ItemName.read):
        with pytest.raises(VolumeError, match=r"'one.npz' must say whose it is.*Delete the cache's folder"):
            read(path)


def test_a_manifest_without_train_items_is_refused(tmp_path: Path) -> None:
    manifest = a_manifest(tmp_path / "data")
    manifest.write_text(manifest.read_text().replace(",train,", ",val,"))

    with pytest.raises(VolumeError, match="no item of split 'train'"):
        pack([manifest], tmp_path / "cache", share_alike=True)


def test_an_image_on_another_grid_is_refused_by_the_items_name(tmp_path: Path) -> None:
    manifest = a_manifest(tmp_path / "data", affine=AFFINE + np.eye(4)[:, [3, 3, 3, 0]])

    with pytest.raises(VolumeError, match="item 'one': image and label map must lie on one grid"):
        pack([manifest], tmp_path / "cache", share_alike=False)


@pytest.mark.parametrize(("scale", "dtype"), [(0.001, np.float32), (100, np.int32)])
def test_an_image_that_int16_cannot_hold_is_refused(tmp_path: Path, scale: float, dtype: type) -> None:
    image = (np.arange(10 * 12 * 14).reshape(10, 12, 14) * scale).astype(dtype)

    with pytest.raises(VolumeError, match="item 'one': images must hold whole numbers that fit int16"):
        pack([a_manifest(tmp_path / "data", image=image)], tmp_path / "cache", share_alike=False)


def test_packing_that_is_cut_short_leaves_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a cache would pass for a whole one the next time."""
    pack_item = items_module._pack_item

    def stop_at_two(row: dict[str, str], folder: Path, output: Path) -> None:
        if row["id"] == "two":
            raise KeyboardInterrupt
        pack_item(row, folder, output)

    monkeypatch.setattr(items_module, "_pack_item", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        pack([a_manifest(tmp_path / "data")], tmp_path / "cache", share_alike=True)
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_in_so_many_subjects_of_each_larger_source_is_held_out() -> None:
    def item(source: str, subject: str, number: int = 0) -> TrainingItem:
        name = f"{subject}_{number}"
        return TrainingItem(name, source, labels_kji(), (), (1, 1, 1), {}, {}, "CC0", "CT", "abdomen", subject)

    many = [item("many", f"s{n}", moment) for n in range(16) for moment in (0, 1)]
    few = [item("few", f"t{n}") for n in range(3)]
    pair = [item("pair", f"u{n}") for n in range(2)]
    learning, held_out = split_held_out([*many, *few, *pair], 8)
    assert sorted(x.name for x in (*learning, *held_out)) == sorted(x.name for x in (*many, *few, *pair))
    assert {x.subject for x in learning}.isdisjoint(x.subject for x in held_out)
    assert [sum(x.source == source for x in held_out) for source in ("many", "few", "pair")] == [4, 1, 0]
    again, _ = split_held_out([*reversed(many), *pair], 8)
    assert {x.name for x in again if x.source == "many"} == {x.name for x in learning if x.source == "many"}
    assert split_held_out(many, 0) == (many, [])
    assert len(split_held_out(pair, 8, least=2)[1]) == 1
