"""A file that CMakeLists.txt does not list is missing in the packaged Slicer extension."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "KA2ERSegment"


@pytest.mark.parametrize("variable", ["KA2ERSegment_PYTHON_SCRIPTS", "KA2ERSegment_PYTHON_RESOURCES"])
def test_cmake_lists_every_file_of_the_package_and_no_other(variable: str) -> None:
    text = (PACKAGE / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = re.search(rf"set\({variable}\s(.*?)\)", text, re.S)[1].split()
    there = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "CMakeLists.txt"
    }
    there = {name for name in there if name.endswith(".py") == variable.endswith("SCRIPTS")}
    missing, gone = sorted(there - set(listed)), sorted(set(listed) - there)

    assert not missing, f"add to {variable} in KA2ERSegment/CMakeLists.txt:\n  " + "\n  ".join(missing)
    assert not gone, f"remove from {variable} in KA2ERSegment/CMakeLists.txt:\n  " + "\n  ".join(gone)
    assert listed == sorted(set(listed)), f"keep {variable} sorted, each file once"


@pytest.mark.parametrize(
    "name", ["HOMEPAGE", "CATEGORY", "CONTRIBUTORS", "DESCRIPTION", "ICONURL", "SCREENSHOTURLS", "DEPENDS"]
)
def test_extension_metadata_is_set_once(name: str) -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")

    assert len(re.findall(rf'^set\(EXTENSION_{name} "[^"\n]*"\)$', text, re.M)) == 1


def test_icon_that_the_metadata_name_is_in_the_repository() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    path = ROOT / re.search(r'EXTENSION_ICONURL ".*?/main/(.*?)"', text)[1]

    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (128, 128)
