"""`python -m KA2ERSegment.training.thin CACHE THIN --max-mb 30`: a cache that is small enough to be carried along.

Training reads a thin cache as it reads any other (`--cache THIN`). What is always done loses nothing: labels are
numbered from 1, label maps without image are cropped to what is labelled, images are stored as differences between
neighbours, and all is packed with LZMA. Where that is not small enough, the next of `LOSSES` is tried: grey values are
rounded, and label maps of one source on one grid, of which there are many (stroke lesions in one template), are thinned
out. The same cache and size give the same bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import Box
from KA2ERSegment.training.coding import encoded
from KA2ERSegment.training.items import TrainingItem


@dataclass(frozen=True, slots=True)
class Loss:
    """What is given up.

    Args:
        alike: label maps of one source on one grid that are kept; 0: all.
        levels: grey levels between the darkest and the brightest 0.1 % of an image; 0: all. No value moves by more than
            half of such a level: 0.2 % of the image's range with 256, where training itself adds noise of up to 6 %.
    """

    alike: int = 0
    levels: int = 0

    def __str__(self) -> str:
        """For people."""
        alike = f"{self.alike} label maps of a source on one grid" if self.alike else "all label maps"
        return f"{alike}, {self.levels or 'all'} grey levels"


LOSSES = (Loss(), Loss(0, 256), Loss(0, 128), Loss(0, 64), Loss(32, 64), Loss(16, 64), Loss(16, 32), Loss(8, 32))
"""Tried one after the other. Label maps pack well: of 110 stroke lesions 78 are no more than 0.5 of 39.5 MB, so all
stay while 64 grey levels will do."""


def thin(cache: Path, output: Path, max_mb: float) -> tuple[Loss, int]:
    """Write a thin cache; it appears whole or not at all.

    Args:
        cache: packed items, as `items.pack` leaves them.
        output: folder to write; must not hold items.
        max_mb: size that the items may have together, in 10^6 bytes.

    Returns:
        What was given up, and the size in bytes.

    Raises:
        VolumeError: no items, or none of `LOSSES` makes them small enough.
    """
    paths = sorted(cache.glob("*.npz"))
    if not paths or any(output.glob("*.npz")):
        message = f"{str(cache)!r} must hold packed items and {str(output)!r} none; got {len(paths)} to thin out."
        raise VolumeError(message)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".thinning-", dir=output.parent))
    try:
        sizes: dict[tuple[Path, int], int] = {}
        alike = _alike(paths)
        for loss in LOSSES:
            kept = [(path, 0 if path in alike else loss.levels) for path in _kept(paths, alike, loss.alike)]
            todo = [pair for pair in kept if pair not in sizes]
            with ThreadPoolExecutor() as pool:
                written = pool.map(_write, *zip(*todo, strict=True), repeat(scratch)) if todo else ()
                sizes |= dict(zip(todo, written, strict=True))
            size = sum(sizes[pair] for pair in kept)
            typer.echo(f"{loss}: {len(kept)} of {len(paths)} items, {size / 1e6:.1f} MB", err=True)
            if size <= max_mb * 1e6:
                output.mkdir(exist_ok=True)
                for path, levels in kept:
                    (scratch / str(levels) / path.name).replace(output / path.name)
                return loss, size
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    message = f"{str(cache)!r} cannot be made smaller than {size / 1e6:.1f} MB without losing more than is useful."
    raise VolumeError(message)


def _alike(paths: list[Path]) -> dict[Path, tuple[Any, ...]]:
    """Of each label map without image: its source and grid."""
    groups = {}
    for path in paths:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            if not about["channels"]:
                groups[path] = (about["source"], tuple(about["spacing"]), stored["labels"].shape)
    return groups


def _kept(paths: list[Path], groups: dict[Path, tuple[Any, ...]], most: int) -> list[Path]:
    """All, but of each group at most so many, spread evenly."""
    if not most:
        return paths
    dropped: set[Path] = set()
    for group in set(groups.values()):
        members = [path for path in paths if groups.get(path) == group]
        chosen = np.linspace(0, len(members) - 1, min(most, len(members))).round().astype(int)
        dropped |= set(members) - {members[n] for n in chosen}
    return [path for path in paths if path not in dropped]


def _write(path: Path, levels: int, scratch: Path) -> int:
    """Pack one item again; its size."""
    item = TrainingItem.load(path)
    with np.load(path, allow_pickle=False) as stored:
        about: dict[str, Any] = json.loads(str(stored["about"]))
    labels, corner = (item.labels, (0, 0, 0)) if item.images else _cropped(item.labels)
    values = np.unique(labels)
    values = values[values > 0]
    table = np.zeros(65536, dtype=np.uint16)
    table[values] = np.arange(1, len(values) + 1)
    number = {int(value): int(table[value]) for value in values}
    about["names"] = {number[value]: name for value, name in item.names.items() if value in number}
    about["boxes"] = {
        number[value]: [[a - b for a, b in zip(end, corner, strict=True)] for end in (box.start, box.stop)]
        for value, box in item.boxes.items()
    }
    about["shape"] = list(item.packed_kji or item.labels.shape)  # what `domains` tells volumes apart by
    about["steps"] = [_step(image, levels) for image in item.images]
    arrays = {f"image{n}": encoded(image, about["steps"][n]) for n, image in enumerate(item.images)}
    arrays["labels"] = table[labels].astype(np.uint8 if len(values) < 256 else np.uint16)
    arrays["about"] = np.array(json.dumps(about))
    folder = scratch / str(levels)
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / path.name, "w") as target:
        for name in sorted(arrays):
            content = io.BytesIO()
            np.lib.format.write_array(content, arrays[name], allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy")  # with the date 1980-01-01: the same bytes each time
            target.writestr(member, content.getvalue(), compress_type=zipfile.ZIP_LZMA)
    return (folder / path.name).stat().st_size


def _cropped(labels: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint16], tuple[int, int, int]]:
    """What is labelled, and where it begins (I, J, K): outside of a label map everything is 0 anyway."""
    box = Box.around(labels > 0)
    if box is None:
        return labels, (0, 0, 0)
    (i0, j0, k0), (i1, j1, k1) = box.start, box.stop
    return np.ascontiguousarray(labels[k0:k1, j0:j1, i0:i1]), (i0, j0, k0)


def _step(image: npt.NDArray[np.int16], levels: int) -> int:
    """Between two grey values that are told apart."""
    if not levels:
        return 1
    low, high = np.percentile(image, [0.1, 99.9])
    return max(1, int((high - low) // levels))


def main(
    cache: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Packed items.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    max_mb: Annotated[float, typer.Option(min=0.0, help="Size to reach, in 10^6 bytes.")] = 30.0,
) -> None:
    """Make a cache small enough to be carried along."""
    loss, size = thin(cache, output, max_mb)
    typer.echo(f"{output}: {size / 1e6:.1f} MB; kept: {loss}")


if __name__ == "__main__":
    typer.run(main)
