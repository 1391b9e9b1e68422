"""Manifests of test data: items with image and label map, and the objects in them that are to be segmented."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.image_files import read_image
from KA2ERSegment.volume import Volume


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a manifest that has an image. Of several channels the first one is used."""

    id: str
    source: str
    image: Path
    label: Path
    names: dict[int, str]
    subject: str = ""
    modality: str = ""
    region: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What was not evaluated, and why. `name` is empty where it is a whole item."""

    item: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One object of an item: what is to be segmented."""

    item: Item
    label: int
    name: str


def seed_of(*words: str) -> np.random.Generator:
    """Random generator that depends on these words only, the same on every machine and Python version."""
    digest = hashlib.sha256("/".join(words).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def read_manifest(path: str | os.PathLike[str], split: str) -> tuple[list[Item], list[LeftOut]]:
    """Items of one split that have an image, and those that have none.

    Args:
        path: CSV with columns id, split, has_image, images (separated by ;), label, labels_json (label value to
            name), source_repo; where there are any, subject, modality and body_region are read too. Files are
            relative to the manifest's folder.
        split: for instance `val`.
    """
    path = Path(path)
    columns = {"id", "split", "has_image", "images", "label", "labels_json", "source_repo"}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"manifest {path.name!r} must be a readable CSV file: {error}."
        raise KA2ERError(message) from error
    missing = columns - set(rows[0]) if rows else columns
    if missing:
        message = (
            f"manifest {path.name!r} must have rows and the columns {sorted(columns)}, got none of {sorted(missing)}."
        )
        raise KA2ERError(message)
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        message = (
            f"manifest {path.name!r} must have items of split {split!r}, got {sorted({r['split'] for r in rows})}."
        )
        raise KA2ERError(message)
    items, left_out = [], []
    for row in chosen:
        if row["has_image"] != "yes":
            left_out.append(LeftOut(row["id"], "", "a label map without an image"))
            continue
        try:
            names = json.loads((path.parent / row["labels_json"]).read_text(encoding="utf-8"))
            labels = {int(value): str(name) for value, name in names.items()}
        except (OSError, ValueError, AttributeError) as error:
            message = (
                f"item {row['id']!r} must have label names, label value to name, in {row['labels_json']!r}: {error}."
            )
            raise KA2ERError(message) from error
        image, label = path.parent / row["images"].split(";")[0], path.parent / row["label"]
        about = (row.get(column) or "" for column in ("subject", "modality", "body_region"))
        items.append(Item(row["id"], row["source_repo"], image, label, labels, *about))
    return items, left_out


def read_item(item: Item) -> tuple[Volume, npt.NDArray[Any]]:
    """Image and label map (K, J, I) of an item; KA2ERError where they lie on different grids."""
    volume = Volume.read(item.image)
    labels, affine, _ = read_image(item.label)
    if not volume.same_grid(labels.shape, affine):
        message = (
            f"the label map of item {item.id!r} must lie on its image's grid of shape KJI {volume.shape_kji}, "
            f"got shape KJI {labels.shape} or another affine. Resample it first."
        )
        raise KA2ERError(message)
    return volume, labels


def targets_of(item: Item, min_voxels: int, at_most: int | None) -> tuple[list[Target], list[LeftOut]]:
    """Objects of an item that have enough voxels, and what was left out.

    Args:
        item: with a label map on disk.
        min_voxels: an object must have.
        at_most: that many objects, chosen at random by the item's name alone; None: all.
    """
    labels, _, _ = read_image(item.label)
    values, counts = np.unique(labels, return_counts=True)
    voxels = {int(v): int(n) for v, n in zip(values, counts, strict=True)}
    present = [value for value in sorted(item.names) if value != 0 and voxels.get(value, 0) > 0]
    large = [value for value in present if voxels[value] >= min_voxels]
    left_out = [
        LeftOut(item.id, item.names[v], f"{voxels[v]} voxels, fewer than {min_voxels}")
        for v in present
        if v not in large
    ]
    if at_most is not None and len(large) > at_most:
        chosen = {large[n] for n in seed_of(item.id).permutation(len(large))[:at_most]}
        left_out += [LeftOut(item.id, item.names[v], f"more than {at_most} objects") for v in large if v not in chosen]
        large = [value for value in large if value in chosen]
    return [Target(item, value, item.names[value]) for value in large], left_out
