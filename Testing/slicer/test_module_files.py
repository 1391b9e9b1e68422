"""What the Extensions Index and Slicer's build ask of the files: a file that no list names is not in the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.parent for path in (ROOT / "scripted_modules").glob("*/CMakeLists.txt"))
EXTENSION = ROOT / "KA2ERSegment.json"

SCHEMA = re.compile(
    r"https://raw\.githubusercontent\.com/Slicer/Slicer/main/Schemas/slicer-extension-catalog-entry-schema-v1\.0\.[12]\.json#"
)
KEYS = {
    "$schema": str,
    "category": str,
    "scm_url": str,
    "scm_revision": str,
    "scm_type": str,
    "build_dependencies": list,
    "build_subdirectory": str,
    "enabled": bool,
    "tier": int,
    "dicom_support_rule": str,
}
"""Of Slicer's schema 1.0.2 for entries of the Extensions Index; no others are allowed."""


@pytest.fixture
def entry() -> dict:
    return json.loads(EXTENSION.read_text(encoding="utf-8"))


def listed(module: Path, variable: str) -> list[str]:
    text = (module / "CMakeLists.txt").read_text(encoding="utf-8")
    names = re.search(rf"set\({variable}\s(.*?)\)", text, re.S)[1].split()
    return [name.replace("${MODULE_NAME}", module.name) for name in names]


@pytest.mark.parametrize("variable", ["MODULE_PYTHON_SCRIPTS", "MODULE_PYTHON_RESOURCES"])
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_cmake_lists_every_file_of_a_module_and_no_other(module: Path, variable: str) -> None:
    there = {
        path.relative_to(module).as_posix()
        for path in module.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "CMakeLists.txt"
    }
    there = {name for name in there if name.endswith(".py") == variable.endswith("SCRIPTS")}
    names = listed(module, variable)

    missing, gone = sorted(there - set(names)), sorted(set(names) - there)
    assert not missing, f"add to {variable} in {module.name}/CMakeLists.txt:\n  " + "\n  ".join(missing)
    assert not gone, f"remove from {variable} in {module.name}/CMakeLists.txt:\n  " + "\n  ".join(gone)
    assert len(names) == len(set(names))


def test_every_module_is_built() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    folders = sorted(path.name for path in (ROOT / "scripted_modules").iterdir() if path.is_dir())

    assert re.findall(r"add_subdirectory\(scripted_modules/(\w+)\)", text) == folders
    assert [module.name for module in MODULES] == folders


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_module_is_named_like_its_folder_and_takes_no_name_of_ours(module: Path) -> None:
    text = (module / "CMakeLists.txt").read_text(encoding="utf-8")

    assert re.search(r"set\(MODULE_NAME (\w+)\)", text)[1] == module.name
    assert [path.name for path in module.glob("*.py")] == [f"{module.name}.py"], "Slicer loads every .py as a module"
    assert module.name != "KA2ERSegment", "it would hide the package (style.md section 2)"


def test_entry_of_the_extensions_index_follows_the_schema(entry: dict) -> None:
    assert set(entry) >= {"$schema", "category", "scm_url"}
    for key, value in entry.items():
        assert key in KEYS, f"{key!r} is not allowed"
        assert type(value) is KEYS[key], f"{key!r} must be a {KEYS[key].__name__}"
    assert SCHEMA.fullmatch(entry["$schema"])
    assert 1 <= entry.get("tier", 1) <= 5


def test_entry_of_the_extensions_index_follows_the_rules_of_its_validator(entry: dict) -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    repository = re.fullmatch(r"https://[\w.-]+/[\w.-]+/([\w.-]+)\.git", entry["scm_url"])[1]

    assert EXTENSION.stem == re.search(r"project\((\w+)", cmake)[1]
    assert not EXTENSION.stem.startswith("Slicer")
    assert repository.startswith("Slicer")
    assert entry["category"] == re.search(r'EXTENSION_CATEGORY "(.*?)"', cmake)[1] == "Segmentation"
    assert entry["build_dependencies"] == re.search(r'EXTENSION_DEPENDS "(.*?)"', cmake)[1].split()
    assert re.search(r'EXTENSION_HOMEPAGE "(.*?)"', cmake)[1] == entry["scm_url"].removesuffix(".git")
    assert (ROOT / "LICENSE").is_file()
    assert b"\r" not in EXTENSION.read_bytes()


def test_drawing_the_icons_again_changes_nothing() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("drawing", ROOT / "Resources" / "Icons" / "draw_module_icons.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)

    icons = ROOT / "scripted_modules" / "SlicerKA2ER" / "Resources" / "Icons"
    assert {path.stem for path in icons.glob("*.svg")} == set(drawing.ICONS)
    for name, shapes in drawing.ICONS.items():
        assert shapes in (icons / f"{name}.svg").read_text(encoding="utf-8"), f"{name}.svg: run draw_module_icons.py"
