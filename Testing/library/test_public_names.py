"""What `from KA2ERSegment import ...` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import KA2ERSegment
from KA2ERSegment import errors

EXPECTED = {
    "BoxPrompt",
    "BundleError",
    "CancelledError",
    "DeviceError",
    "GeometryError",
    "KA2ERError",
    "LassoPrompt",
    "MaskPrompt",
    "Neighbours",
    "PointPrompt",
    "Polarity",
    "Prediction",
    "PromptError",
    "ScribblePrompt",
    "Session",
    "SessionStateError",
    "Step",
    "Suggestion",
    "Volume",
    "VolumeError",
    "__version__",
    "load_bundle",
}
"""Written down a second time on purpose: a public name neither comes nor goes by accident."""


def test_public_names_are_these() -> None:
    assert set(KA2ERSegment.__all__) == EXPECTED
    assert len(KA2ERSegment.__all__) == len(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    value = getattr(KA2ERSegment, name)

    assert value is getattr(KA2ERSegment, name)  # the same object each time
    if name != "__version__":
        assert value.__name__ == name
        assert inspect.getdoc(value)


def test_every_public_error_is_exported() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}

    assert defined <= EXPECTED


def test_dir_lists_public_names_before_they_are_used() -> None:
    listed = _run("import KA2ERSegment; print(*dir(KA2ERSegment))").split()

    assert set(listed) >= EXPECTED


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'KA2ERSegment' has no attribute 'Sesion'"):
        _ = KA2ERSegment.Sesion


def test_type_checker_sees_the_same_names() -> None:
    tree = ast.parse(Path(KA2ERSegment.__file__).read_text(encoding="utf-8"))
    seen = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}

    assert seen - {"import_module", "TYPE_CHECKING"} == EXPECTED - {"__version__"}


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", KA2ERSegment.__version__)


def test_import_of_the_package_loads_nothing_heavy() -> None:
    loaded = set(_run("import sys, KA2ERSegment; print(*sys.modules)").split())

    assert "KA2ERSegment" in loaded
    assert not loaded & {"torch", "monai", "numpy", "scipy", "SimpleITK", "nibabel", "KA2ERSegment.session"}


def test_volumes_and_prompts_do_not_load_torch() -> None:
    loaded = set(_run("import sys; from KA2ERSegment import BoxPrompt, Volume; print(*sys.modules)").split())

    assert {"KA2ERSegment.prompts", "KA2ERSegment.volume"} <= loaded
    assert not loaded & {"torch", "monai", "matplotlib"}


def test_what_slicer_needs_of_the_library_loads_no_torch() -> None:
    modules = ("prompts", "geometry", "steps", "errors", "cancellation")
    loaded = set(_run(f"import sys\nfrom KA2ERSegment import {', '.join(modules)}\nprint(*sys.modules)").split())

    assert {f"KA2ERSegment.{name}" for name in modules} <= loaded
    assert not loaded & {"torch", "monai", "scipy", "SimpleITK", "nibabel", "matplotlib"}


def _run(code: str) -> str:
    """Standard output of a fresh interpreter: this one has loaded everything already."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
