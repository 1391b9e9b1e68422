"""The rules on imports that import-linter cannot see by itself: what happens when modules really load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "KA2ERSegment"

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.name.startswith("__")
)

IMPORT_WITHOUT = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not for the library", name=name)

sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_every_module_loads_without_slicer_vtk_and_qt() -> None:
    blocked = {"slicer", "slicer_core", "vtk", "vtkmodules", "qt", "ctk", "qtpy", "PythonQt"}

    _import_all_without(blocked, MODULES)


def test_library_loads_without_the_extras() -> None:
    extras = {"matplotlib", "nilearn", "lightning", "tensorboard", "highdicom", "pydicom"}
    modules = [name for name in MODULES if not name.startswith("KA2ERSegment.training.")]

    _import_all_without(extras, modules)


def test_growcut_is_the_only_module_that_names_slicer_or_vtk() -> None:
    naming = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(
            r"^\s*(from|import) (slicer|slicer_core|vtk|vtkmodules|qt|ctk|qtpy)\b", path.read_text("utf-8"), re.M
        )
    }

    assert naming <= {"growcut.py"}


def test_contracts_forbid_slicer_for_everything_but_growcut() -> None:
    forbidden = _contract("library never imports Slicer, VTK or Qt")

    assert forbidden["source_modules"] == ["KA2ERSegment"]
    assert {"slicer", "vtk", "vtkmodules", "qt", "ctk", "qtpy", "PythonQt"} <= set(forbidden["forbidden_modules"])
    assert {line.split(" -> ")[0] for line in forbidden["ignore_imports"]} == {"KA2ERSegment.growcut"}


def test_contracts_keep_the_viewer_on_top_of_the_library() -> None:
    above = _contract("the viewer is on top: nothing of the library but its command knows of it")
    network = _contract("what listens on the network knows neither Slicer nor trame")

    assert above["source_modules"] == ["KA2ERSegment"]
    assert {line.split(" -> ")[0] for line in above["ignore_imports"]} == {"KA2ERSegment.cli.view"}
    assert {"slicer", "trame", "SlicerKA2ERLib"} <= set(network["forbidden_modules"])


def test_picture_of_the_layers_is_that_of_the_contract() -> None:
    layers = [" | ".join(re.findall(r"\w+", line)) for line in _contract("library layers, top to bottom")["layers"]]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    assert "\n".join(("```", *layers, "```")) in text, (
        "draw the layers of pyproject.toml in CONTRIBUTING.md, line by line"
    )


def _contract(name: str) -> dict[str, Any]:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    config = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in config["tool"]["importlinter"]["contracts"] if each["name"] == name)
    return contract


def _import_all_without(blocked: set[str], modules: list[str]) -> None:
    code = IMPORT_WITHOUT.format(blocked=blocked, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=False)

    assert done.returncode == 0, done.stderr
