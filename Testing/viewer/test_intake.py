"""Files of strangers."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from KA2ERSegment.errors import VolumeError
from KA2ERViewer.options import Limits
from KA2ERViewer.page.intake import check_volume, kind_of, unpack

SMALL = Limits(upload_bytes=10_000, unpacked_bytes=10_000, files=5, voxels=1000)


def nifti(shape: tuple[int, ...], magic: bytes = b"n+1\0") -> bytes:
    header = bytearray(352)
    header[:4] = struct.pack("<i", 348)
    header[40:56] = struct.pack("<8h", len(shape), *shape, *[1] * (7 - len(shape)))
    header[344:348] = magic
    return bytes(header)


def nrrd(*lines: str) -> bytes:
    return "\n".join(("NRRD0004", "type: short", "dimension: 3", *lines, "", "")).encode()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (nifti((4, 5, 6)), "nifti"),
        (gzip.compress(nifti((4, 5, 6))), "nifti.gz"),
        (nifti((4, 5, 6), b"ni1\0"), None),  # its voxels are in another file
        (nrrd("sizes: 4 5 6"), "nrrd"),
        (b"ObjectType = Image\nDimSize = 4 5 6\nElementDataFile = LOCAL\n", "mha"),
        (b"\0" * 128 + b"DICM", "dicom"),
        (b"PK\x03\x04", "zip"),
        (gzip.compress(b"something else"), None),
        (b"\x1f\x8b broken", None),
        (b"", None),
        (b"#!/bin/sh", None),
    ],
)
def test_first_bytes_say_what_a_file_is(content: bytes, kind: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)

    assert kind_of(path) == kind


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("nrrd", nrrd("sizes: 4 5 6", "data file: /etc/passwd"), "voxels in itself"),
        ("nrrd", nrrd("sizes: 4 5 6", "datafile:=LIST"), "voxels in itself"),
        ("mha", b"DimSize = 4 5 6\nElementDataFile = /etc/passwd\n", "voxels in itself"),
        ("nifti", nifti((11, 11, 11)), "million voxels"),
        ("nrrd", nrrd("sizes: 100000 100000 100000"), "million voxels"),
        ("nifti", nifti((4, 5, 6, 7)), "three dimensions"),
        ("nifti", nifti((4, 5)), "three dimensions"),
        ("nifti", nifti((4, -5, 6)), "three dimensions"),
    ],
)
def test_headers_that_must_not_be_read_are_refused(kind: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)

    with pytest.raises(VolumeError, match=words):
        check_volume(path, kind, SMALL)


def test_good_headers_pass(tmp_path: Path) -> None:
    for kind, content in {"nifti": nifti((4, 5, 6, 1)), "nrrd": nrrd("sizes: 4 5 6"), "dicom": b""}.items():
        path = tmp_path / kind
        path.write_bytes(content)
        check_volume(path, kind, SMALL)


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    return path


def test_no_entry_of_a_zip_leaves_its_folder(tmp_path: Path) -> None:
    names = ["../up.txt", "/tmp/root.txt", "a/../../b.txt", "C:\\windows.txt", "fine/1.dcm"]
    archive = zipped(tmp_path / "evil.zip", dict.fromkeys(names, b"x"))

    found = unpack(archive, tmp_path / "out", SMALL)

    assert {path.parent for path in found} == {tmp_path / "out"}
    assert len(found) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip", "out"]


def test_link_in_a_zip_is_a_small_file_and_no_link(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as packed:
        packed.writestr(info, "/etc/passwd")

    (found,) = unpack(tmp_path / "link.zip", tmp_path / "out", SMALL)

    assert not found.is_symlink()
    assert found.read_text() == "/etc/passwd"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"bomb": b"\0" * 1_000_000}, "more than may be unpacked"),
        ({f"{n}": b"x" for n in range(6)}, "5 files"),
    ],
)
def test_bombs_are_stopped_and_leave_nothing(entries: dict[str, bytes], words: str, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "bomb.zip", entries)

    with pytest.raises(VolumeError, match=words):
        unpack(archive, tmp_path / "out", SMALL)

    assert not (tmp_path / "out").exists()


def test_zip_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:
        packed.writestr("a", np.random.default_rng(0).bytes(5000))
    (tmp_path / "cut.zip").write_bytes(whole.getvalue()[:3000])

    with pytest.raises(VolumeError, match="Pack it again"):
        unpack(tmp_path / "cut.zip", tmp_path / "out", SMALL)
