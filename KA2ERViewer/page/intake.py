"""Files of strangers: what they are, whether they may be read, and what is in a zip. No Slicer here.

A name says nothing: the first bytes decide what a file is, and it is stored under a name of our own. Formats that
point to other files (a NRRD or MHA header with its voxels elsewhere) are refused: they could name any file of this
machine. What a header promises is compared with the limits before a reader takes memory for it.
"""

from __future__ import annotations

import gzip
import math
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from KA2ERSegment.errors import VolumeError
from KA2ERViewer.options import Limits

HEADER = 1 << 16
"""Bytes that are looked at."""
SUFFIXES = {"nifti": ".nii", "nifti.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom": ".dcm", "zip": ".zip"}


def kind_of(path: Path) -> str | None:
    """One of SUFFIXES by its first bytes; None where it is something else."""
    with path.open("rb") as file:
        start = file.read(HEADER)
    if start[:4] == b"PK\x03\x04":
        return "zip"
    if start[128:132] == b"DICM":
        return "dicom"
    if start[:4] == b"NRRD":
        return "nrrd"
    if start[:2] == b"\x1f\x8b":
        return "nifti.gz" if _is_nifti(_inflated(path)) else None
    if _is_nifti(start):
        return "nifti"
    if b"ElementDataFile" in start and b"DimSize" in start:
        return "mha"
    return None


def check_volume(path: Path, kind: str, limits: Limits) -> None:
    """Refuse what must not be read, by its header.

    Raises:
        VolumeError: too many voxels, not three-dimensional, or voxels in another file.
    """
    if kind == "dicom":
        return  # one slice per file; their number and size are limited already
    with path.open("rb") as file:
        start = _inflated(path) if kind == "nifti.gz" else file.read(HEADER)
    sizes = {"nrrd": _nrrd_sizes, "mha": _mha_sizes}.get(kind, _nifti_sizes)(start)
    wide = [size for size in sizes if size > 1]
    if len(sizes) < 3 or len(wide) > 3 or min(sizes, default=0) < 1:
        shape = " x ".join(str(size) for size in sizes)
        message = f"a volume must have three dimensions, this one has {shape}. Save one frame of it as a file."
        raise VolumeError(message)
    if math.prod(sizes) > limits.voxels:
        millions = limits.voxels / 1e6
        message = (
            f"a volume may have {millions:.0f} million voxels, this one has {math.prod(sizes) / 1e6:.0f}. Crop it."
        )
        raise VolumeError(message)


def unpack(archive: Path, folder: Path, limits: Limits) -> list[Path]:
    """Files of a zip, under names of our own: no entry can leave the folder. Archives in it stay packed.

    Args:
        folder: is made; must not exist.

    Raises:
        VolumeError: no zip, encrypted, more files or bytes than allowed. The folder is gone then.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as packed:
            return _unpack(packed, folder, limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        message = f"the zip must be whole and without a password, it could not be unpacked ({error}). Pack it again."
        raise VolumeError(message) from error
    except VolumeError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _unpack(packed: zipfile.ZipFile, folder: Path, limits: Limits) -> list[Path]:
    entries = [entry for entry in packed.infolist() if not entry.is_dir() and entry.file_size]
    if len(entries) > limits.files:
        message = f"a zip may hold {limits.files} files, this one has {len(entries)}. Take the series that you need."
        raise VolumeError(message)
    left, found = limits.unpacked_bytes, []
    for number, entry in enumerate(entries):
        path = folder / f"{number:06d}"
        with packed.open(entry) as source, path.open("wb") as target:
            left -= _copy(source, target, left)
        found.append(path)
    return found


def _copy(source: IO[bytes], target: IO[bytes], most: int) -> int:
    """What is really there counts: an archive can lie about its sizes."""
    count = 0
    while chunk := source.read(1 << 20):
        count += len(chunk)
        if count > most:
            message = "the zip holds more than may be unpacked. Take the series that you need."
            raise VolumeError(message)
        target.write(chunk)
    return count


def _inflated(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as file:
            return file.read(HEADER)
    except (OSError, EOFError, zlib.error):
        return b""


def _is_nifti(start: bytes) -> bool:
    """With its voxels in the same file."""
    return start[344:348] == b"n+1\0" or start[4:12] == b"n+2\0\r\n\x1a\n"


def _nifti_sizes(start: bytes) -> list[int]:
    if start[344:348] == b"n+1\0":
        order = "<" if struct.unpack("<i", start[:4])[0] == 348 else ">"
        count, *sizes = struct.unpack(f"{order}8h", start[40:56])
    else:
        order = "<" if struct.unpack("<i", start[:4])[0] == 540 else ">"
        count, *sizes = struct.unpack(f"{order}8q", start[16:80])
    return [int(size) for size in sizes[: max(0, min(int(count), 7))]]


def _nrrd_sizes(start: bytes) -> list[int]:
    head = start.replace(b"\r\n", b"\n").split(b"\n\n", 1)[0].decode("latin-1")
    fields = {}
    for line in head.split("\n")[1:]:
        if not line.startswith("#") and ":" in line:
            name, value = line.split(":", 1)
            fields[name.strip().lower().replace(" ", "")] = value.strip().lstrip("=")
    if "datafile" in fields:
        raise VolumeError(_ELSEWHERE.format(what="NRRD"))
    return _whole_numbers(fields.get("sizes", ""))


def _mha_sizes(start: bytes) -> list[int]:
    fields = {}
    for line in start.split(b"\n"):
        name, _, value = line.decode("latin-1").partition("=")
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            break
    if fields.get("elementdatafile", "").upper() != "LOCAL":
        raise VolumeError(_ELSEWHERE.format(what="MHA"))
    return _whole_numbers(fields.get("dimsize", ""))


def _whole_numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


_ELSEWHERE = "a {what} file must have its voxels in itself, this one names another file. Save it as one file."
