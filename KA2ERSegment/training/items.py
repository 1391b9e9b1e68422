"""Training items: canonical label maps, with their image where there is one, packed into one folder.

`pack` writes one `.npz` per item of split `train`; training does it where its cache is missing. Nothing of split `val`
is ever packed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from torch import Tensor

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import Box
from KA2ERSegment.preprocessing import image_statistics
from KA2ERSegment.training.coding import decoded
from KA2ERSegment.volume import Volume

MIN_VOXELS = 12
"""Labels with fewer voxels are left out as targets."""


@dataclass(frozen=True, eq=False)
class TrainingItem:
    """One subject.

    Args:
        name: id in the manifest.
        source: repository it came from; sources are drawn evenly.
        labels: (K, J, I) uint16, canonical axes.
        images: for each channel (K, J, I) int16, or float32 where the grey values need it; empty for a label map
            without image.
        spacing: mm (I, J, K).
        names: name of each label value.
        boxes: for each label with enough voxels, the box around it.
        licence: as in the manifest.
        modality: as in the manifest.
        region: body region, as in the manifest.
        subject: whose it is, as in the manifest; one subject may have several items.
        packed_kji: shape of the label map when it was packed; a thin cache keeps of it what is labelled. Empty: that of
            `labels`.
    """

    name: str
    source: str
    labels: npt.NDArray[np.uint16]
    images: tuple[npt.NDArray[Any], ...]
    spacing: tuple[float, float, float]
    names: dict[int, str]
    boxes: dict[int, Box]
    licence: str
    modality: str
    region: str
    subject: str = ""
    packed_kji: tuple[int, ...] = ()

    @cached_property
    def statistics(self) -> tuple[Tensor, ...]:
        """For each image its `image_statistics`, (6,) float32."""
        return tuple(image_statistics(image) for image in self.images)

    @classmethod
    def load(cls, path: Path) -> TrainingItem:
        """Read one packed item."""
        with np.load(path, allow_pickle=False) as stored:
            about = _about(path, stored)
            labels = stored["labels"].astype(np.uint16, copy=False)
            steps = about.get("steps")  # of a thin cache
            images = tuple(
                stored[f"image{n}"] if steps is None else decoded(stored[f"image{n}"], steps[n])
                for n in range(about["channels"])
            )
        known = about.get("boxes")
        boxes = boxes_of(labels) if known is None else {int(value): Box(*map(tuple, known[value])) for value in known}
        names = {int(value): name for value, name in about["names"].items()}
        return cls(
            about["id"], about["source"], labels, images, tuple(about["spacing"]), names, boxes,
            about["licence"], about["modality"], about["region"], about["subject"], tuple(about.get("shape", ())),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ItemName:
    """What is known of a packed item without reading its arrays.

    Args:
        name: id in the manifest.
        source: repository it came from.
        subject: whose it is.
    """

    name: str
    source: str
    subject: str

    @classmethod
    def read(cls, path: Path) -> ItemName:
        """Of one packed item."""
        with np.load(path, allow_pickle=False) as stored:
            about = _about(path, stored)
        return cls(about["id"], about["source"], about["subject"])


def _about(path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a packed item says of itself."""
    about: dict[str, Any] = json.loads(str(stored["about"]))
    if "subject" not in about:
        message = (
            f"packed item {path.name!r} must say whose it is; an earlier version packed it. "
            "Delete the cache's folder; the next call packs it again."
        )
        raise VolumeError(message)
    return about


Named = TypeVar("Named", TrainingItem, ItemName)


def split_held_out(items: Sequence[Named], one_in: int, least: int = 3) -> tuple[list[Named], list[Named]]:
    """Items to learn from, and items of other subjects on which gates and temperatures are fitted.

    Of each source with enough subjects one in `one_in` is held out, at least one; which ones follows from their names
    alone. Smaller sources are all learnt from.

    Args:
        items: of split `train`.
        one_in: 0 holds nothing out.
        least: number of subjects that are enough.
    """
    subjects: dict[str, set[str]] = {}
    for item in items:
        subjects.setdefault(item.source, set()).add(item.subject or item.name)
    apart: set[tuple[str, str]] = set()
    for source, names in subjects.items():
        if one_in and len(names) >= least:
            order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
            apart |= {(source, name) for name in order[: max(1, round(len(names) / one_in))]}
    held = [(item.source, item.subject or item.name) in apart for item in items]
    return (
        [item for item, out in zip(items, held, strict=True) if not out],
        [item for item, out in zip(items, held, strict=True) if out],
    )


def load_items(cache: Path) -> list[TrainingItem]:
    """All items of a cache, in the order of their ids."""
    with ThreadPoolExecutor() as pool:  # most of the time goes into unpacking, which lets other threads run
        return list(pool.map(TrainingItem.load, sorted(cache.glob("*.npz"))))


def read_items(manifests: Sequence[Path], split: str, share_alike: bool) -> list[TrainingItem]:
    """Items of any split, to measure on; no cache keeps them.

    Args:
        manifests: as in `pack`.
        split: for instance `val`.
        share_alike: also those under a share-alike licence.
    """
    items = []
    with tempfile.TemporaryDirectory(prefix="ka2er-items-") as scratch:
        for manifest in manifests:
            for row in _rows(manifest, split, share_alike):
                _pack_item(row, manifest.parent, Path(scratch))
                items.append(TrainingItem.load(Path(scratch) / f"{row['id']}.npz"))
    if not items:
        message = f"no item of split {split!r} in {[str(m) for m in manifests]} (share_alike={share_alike})."
        raise VolumeError(message)
    return items


def _rows(manifest: Path, split: str, share_alike: bool) -> list[dict[str, str]]:
    with manifest.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["split"] == split]
    return [row for row in rows if share_alike or row["share_alike"] != "yes"]


def boxes_of(labels: npt.NDArray[np.unsignedinteger[Any]]) -> dict[int, Box]:
    """The box around each label that has enough voxels to be a target."""
    counts = np.bincount(labels.ravel())
    boxes = {}
    for value, slices in enumerate(ndimage.find_objects(labels), start=1):
        if slices is not None and counts[value] >= MIN_VOXELS:
            k, j, i = slices
            boxes[value] = Box((i.start, j.start, k.start), (i.stop, j.stop, k.stop))
    return boxes


def pack(manifests: list[Path], output: Path, share_alike: bool) -> list[str]:
    """Pack the `train` items of the manifests; all of them appear in `output`, or none.

    Args:
        manifests: `manifest.csv` files, in the layout of their folder's README.
        output: folder to write into.
        share_alike: also take items under a share-alike licence; weights trained on them may inherit it.

    Returns:
        The ids that were packed.
    """
    output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".packing-", dir=output))  # a cache that was cut short would pass for whole
    packed = []
    try:
        for manifest in manifests:
            for row in _rows(manifest, "train", share_alike):
                _pack_item(row, manifest.parent, scratch)
                packed.append(row["id"])
        for path in sorted(scratch.iterdir()):
            path.replace(output / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not packed:
        message = f"no item of split 'train' in {[str(m) for m in manifests]} (share_alike={share_alike})."
        raise VolumeError(message)
    return packed


def pack_where_missing(cache: Path, data: Path, settings: Mapping[str, Any]) -> list[str]:
    """Make the cache of a config's manifests, as `pack` does, unless there are items in it.

    Args:
        cache: folder of packed items.
        data: folder that holds the manifests' folders.
        settings: the config.

    Returns:
        The ids that were packed; none where the cache was there.
    """
    if any(cache.glob("*.npz")):
        return []
    return pack([data / name for name in settings["manifests"]], cache, settings["share_alike"])


def _pack_item(row: dict[str, str], folder: Path, output: Path) -> None:
    label = Volume.read(folder / row["label"]).canonical()
    images = [Volume.read(folder / name).canonical() for name in row["images"].split(";") if name]
    for image in images:
        if not label.same_grid(image.shape_kji, image.ijk_to_ras):
            message = f"item {row['id']!r}: image and label map must lie on one grid, got {image} and {label}."
            raise VolumeError(message)
        values = image.array_kji
        if values.min() < -32768 or values.max() > 32767 or (values != values.astype(np.int16)).any():
            message = f"item {row['id']!r}: images must hold whole numbers that fit int16, got {values.dtype} values."
            raise VolumeError(message)
    names = json.loads((folder / row["labels_json"]).read_text(encoding="utf-8")) if row["labels_json"] else {}
    about = {
        "id": row["id"],
        "source": row["source_repo"],
        "spacing": label.spacing,
        "names": names,
        "channels": len(images),
        "licence": row["licence"],
        "modality": row["modality"],
        "region": row["body_region"],
        "subject": row.get("subject") or row["id"],
    }
    labels = np.ascontiguousarray(label.array_kji, dtype=np.uint16)
    about["boxes"] = {value: (box.start, box.stop) for value, box in boxes_of(labels).items()}
    arrays: dict[str, Any] = {
        f"image{n}": np.ascontiguousarray(image.array_kji, dtype=np.int16) for n, image in enumerate(images)
    }
    np.savez_compressed(output / f"{row['id']}.npz", about=json.dumps(about), labels=labels, **arrays)
