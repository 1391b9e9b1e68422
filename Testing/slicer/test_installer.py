"""First run: what is missing is found without importing it, installed only when asked, half an install repaired."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("PySide6", reason="needs PySide6")
slicer = pytest.importorskip("slicer", reason="needs slicer-core")

from harness.fakes import FakeDialogs  # noqa: E402
from harness.fixtures import *  # noqa: E402, F403
from harness.fixtures import RESOURCES  # noqa: E402

ROOT = Path(__file__).parents[2]


class Python:
    """Slicer's Python with a site-packages of our own, in which installing is writing files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipCalls: list[tuple[list[str], str]] = []
        self.pipFails: list[Exception] = []
        self.torchCalls: list[dict[str, Any]] = []
        self.uninstalls = 0
        self.torchVersion = "2.9.0"

    def add(self, name: str, version: str) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def addTorch(self, version: str = "2.9.0", *, files: bool = True, metadata: bool = True) -> None:
        package = self.folder / "torch"
        package.mkdir(parents=True, exist_ok=True)
        if files:
            (package / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
            (package / "version.py").write_text(f"__version__ = {version!r}\n")
            (package / "_C.so").write_text("")
        if metadata:
            self.add("torch", version)

    def pip_ensure(self, requirements, constraints=None, prompt_install=True, requester=None):
        assert not prompt_install, "the panel has asked already"
        assert requester == "KA2ER Segment"
        self.pipCalls.append((requirements, Path(constraints).read_text()))
        if self.pipFails:
            raise self.pipFails.pop(0)
        for line in requirements:
            name, _, version = line.partition(">=")
            self.add(name, version)

    def offerTorch(self) -> None:
        """Slicer's extension PyTorch is loaded."""
        python = self

        class PyTorchUtilsLogic:
            def installTorch(self, askConfirmation=False, forceComputationBackend=None, torchVersionRequirement=None):
                python.torchCalls.append({"ask": askConfirmation, "version": torchVersionRequirement})
                python.addTorch(python.torchVersion)

            def uninstallTorch(self):
                python.uninstalls += 1
                msg = "expected string or bytes-like object, got 'NoneType'"  # as it does on half a torch
                raise TypeError(msg)

        module = types.ModuleType("PyTorchUtils")
        module.PyTorchUtilsLogic = PyTorchUtilsLogic
        sys.modules["PyTorchUtils"] = module


@pytest.fixture
def python(a_desktop, tmp_path, monkeypatch):
    """Nothing is installed; the extension PyTorch is not there."""
    site = tmp_path / "site-packages"
    site.mkdir()
    there = Python(site)
    hidden = {"torch", "blosc2", "einops", "monai", "nibabel", "rich", "safetensors", "slicerio", "starlette", "typer"}
    hidden |= {"uvicorn", "dynamic-network-architectures"}
    version = importlib.metadata.version

    def ofSite(name: str) -> str:
        for found in importlib.metadata.distributions(name=name, path=[str(site)]):
            return found.version
        if name.lower() in hidden:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def findSpec(name: str, *_args: Any) -> Any:
        return importlib.machinery.PathFinder.find_spec(name, [str(site)])

    monkeypatch.setattr("importlib.metadata.version", ofSite)
    monkeypatch.setattr("importlib.util.find_spec", findSpec)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    packaging = types.ModuleType("slicer.packaging")
    packaging.pip_ensure = there.pip_ensure
    monkeypatch.setitem(sys.modules, "slicer.packaging", packaging)
    monkeypatch.setattr(slicer, "packaging", packaging, raising=False)
    monkeypatch.delitem(sys.modules, "PyTorchUtils", raising=False)
    yield there
    sys.modules.pop("PyTorchUtils", None)


@pytest.fixture
def dialogs():
    return FakeDialogs()


@pytest.fixture
def settings(python):
    from SlicerKA2ERLib.Settings import Settings

    return Settings()


@pytest.fixture
def installer(python, settings, dialogs):
    from SlicerKA2ERLib.Installer import Installer

    return Installer(RESOURCES / "requirements.txt", settings, dialogs)


@pytest.fixture
def progress():
    return []


def report(progress):
    return lambda text, fraction: progress.append((text, fraction))


def test_an_empty_python_needs_the_extension_torch_and_the_packages(installer) -> None:
    plan = installer.plan()

    assert plan.packages[0].startswith("Slicer's extension PyTorch")
    assert plan.packages[1:3] == ("PyTorch", "blosc2")
    assert "uvicorn" in plan.packages
    assert 200 < plan.megabytes < 1000
    assert plan.reason == ""


def test_a_gpu_makes_the_download_larger(installer, monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)

    assert installer.plan().megabytes > 2000


def test_everything_is_installed_in_one_go_and_nothing_of_slicer_is_exchanged(installer, python, progress) -> None:
    python.offerTorch()

    installer.install(report(progress))

    assert python.torchCalls == [{"ask": False, "version": ">=2.1"}]
    requirements, constraints = python.pipCalls[0]
    assert "monai>=1.3" in requirements
    assert not any(line.startswith("torch") for line in requirements)
    assert f"numpy=={importlib.metadata.version('numpy')}" in constraints.splitlines()
    assert "torch==2.9.0" in constraints.splitlines()
    assert installer.plan().packages == ()
    assert progress[-1] == ("Everything is installed.", 1.0)
    assert len(python.pipCalls) == 1


def test_with_everything_there_nothing_is_asked_of_pip_or_the_network(installer, python, progress) -> None:
    python.offerTorch()
    installer.install(report(progress))
    python.pipCalls.clear()
    python.torchCalls.clear()
    sys.modules.pop("PyTorchUtils")

    installer.install(report(progress))

    assert installer.plan().packages == ()
    assert python.pipCalls == python.torchCalls == []


def test_torch_is_never_imported_to_find_out(installer, python) -> None:
    python.addTorch()

    assert "PyTorch" not in installer.plan().packages
    assert (
        "raise SystemExit" in (python.folder / "torch" / "__init__.py").read_text()
    )  # importing it would have ended us


@pytest.mark.parametrize(
    "what",
    [{"files": False}, {"metadata": False}, {"files": False, "metadata": False}],
    ids=["metadata", "files", "folder"],
)
def test_half_a_torch_is_said_and_repaired(installer, python, progress, what) -> None:
    python.addTorch(**what)
    python.offerTorch()
    plan = installer.plan()
    assert "PyTorch" in plan.packages
    assert "half installed" in plan.reason
    for info in python.folder.glob("torch-*"):  # what is left over is replaced
        for file in info.iterdir():
            file.unlink()
        info.rmdir()

    installer.install(report(progress))

    assert python.uninstalls == 1
    assert installer.plan().packages == ()


def test_a_torch_without_version_counts_as_half_a_torch(installer, python) -> None:
    python.addTorch(metadata=False)
    info = python.folder / "torch-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("")

    assert "PyTorch" in installer.plan().packages


def test_a_torch_too_old_is_replaced(installer, python, progress) -> None:
    python.addTorch("1.13.1")

    assert "PyTorch" in installer.plan().packages


def test_a_newer_or_local_version_satisfies(installer, python) -> None:
    python.addTorch("2.13.0+cu128")
    python.add("monai", "1.6.1")

    packages = installer.plan().packages

    assert "PyTorch" not in packages
    assert "monai" not in packages
    assert "einops" in packages


def test_without_the_extension_it_is_installed_and_slicer_restarts_when_the_user_agrees(
    installer, a_desktop, settings, dialogs, progress
) -> None:
    with pytest.raises(RuntimeError, match="Restart Slicer"):
        installer.install(report(progress))

    assert a_desktop.app.installed == {"PyTorch"}
    assert a_desktop.app.interactive is False
    assert "restarts" in dialogs.asked[0]
    assert a_desktop.restarts == 1
    assert settings.value("resumeInstall") is True


def test_without_a_restart_slicer_says_what_comes_next(installer, a_desktop, dialogs, progress) -> None:
    dialogs.answer = False

    with pytest.raises(RuntimeError, match="Restart Slicer, then press Install again"):
        installer.install(report(progress))

    assert a_desktop.restarts == 0
    assert "Restart Slicer" in installer.plan().reason


def test_a_slicer_without_extensions_manager_is_said(installer, a_desktop, progress, monkeypatch) -> None:
    monkeypatch.delattr(type(a_desktop.app), "extensionsManagerModel")

    with pytest.raises(RuntimeError, match="without an Extensions Manager"):
        installer.install(report(progress))


def test_an_extension_server_that_does_not_answer_is_said(installer, a_desktop, progress) -> None:
    a_desktop.app.offered = set()

    with pytest.raises(RuntimeError, match="Extensions Manager"):
        installer.install(report(progress))

    assert a_desktop.restarts == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "disk is full"),
        (OSError("[WinError 206] The filename or extension is too long"), "too long for Windows"),
        (subprocess.CalledProcessError(1, "pip", "SSLError(CERTIFICATE_VERIFY_FAILED)"), "proxy or certificate"),
        (subprocess.CalledProcessError(1, "pip", "Temporary failure in name resolution"), "online"),
        (PermissionError(13, "Permission denied"), "could not be written"),
        (subprocess.CalledProcessError(2, "pip install"), "returned non-zero exit status 2"),
    ],
)
def test_a_failure_is_said_in_plain_words_and_the_next_try_goes_on(installer, python, progress, error, words) -> None:
    python.offerTorch()
    python.pipFails = [error]

    with pytest.raises(RuntimeError, match=words):
        installer.install(report(progress))
    assert words in installer.plan().reason

    installer.install(report(progress))
    assert len(python.torchCalls) == 1  # torch was there already
    assert installer.plan().packages == ()
    assert installer.plan().reason == ""


def test_what_pip_left_out_is_named(installer, python, progress, monkeypatch) -> None:
    python.offerTorch()
    monkeypatch.setattr(python, "add", lambda *_args: None)
    monkeypatch.setattr(python, "addTorch", lambda *_args: Python.add(python, "torch", "2.9.0") or _files(python))
    monkeypatch.setattr(slicer.packaging, "pip_ensure", lambda *_args, **_more: None)  # as in testing mode

    with pytest.raises(RuntimeError, match=r"Still missing after the installation: blosc2, .*uvicorn"):
        installer.install(report(progress))


def _files(python: Python) -> None:
    python.addTorch = Python.addTorch.__get__(python)
    python.addTorch(metadata=False)


def test_offline_installs_nothing(installer, python, settings, progress, a_desktop) -> None:
    settings.setValue("offline", True)

    with pytest.raises(RuntimeError, match="offline"):
        installer.install(report(progress))

    assert a_desktop.app.installed == set()
    assert python.pipCalls == []


@pytest.mark.parametrize("engine", ["python", "remote"])
def test_another_python_or_a_remote_engine_needs_nothing_in_slicer(installer, settings, engine) -> None:
    settings.setValue("engine", engine)

    assert installer.plan().packages == ()


def test_a_keyword_that_the_extension_renamed_is_left_out(installer, python, progress) -> None:
    class PyTorchUtilsLogic:
        def installTorch(self, askConfirmation=False, torchSpecifier=None):
            python.torchCalls.append({"ask": askConfirmation})
            python.addTorch()

    sys.modules["PyTorchUtils"] = types.SimpleNamespace(PyTorchUtilsLogic=PyTorchUtilsLogic)

    installer.install(report(progress))

    assert python.torchCalls == [{"ask": False}]


def test_slicer_before_5_12_installs_with_its_own_pip_install(installer, python, progress, monkeypatch) -> None:
    python.offerTorch()
    monkeypatch.setitem(sys.modules, "slicer.packaging", None)  # importing it fails
    calls = []
    monkeypatch.setattr(slicer.util, "pip_install", lambda lines: calls.append(lines) or python.pip_ensure(
        lines, __file__, False, "KA2ER Segment"), raising=False)  # fmt: skip

    installer.install(report(progress))

    assert "einops>=0.6" in calls[0]


def test_requirements_are_those_of_the_library_but_what_slicer_brings() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bySlicer = {"numpy", "scipy", "SimpleITK", "torch"}  # torch by its extension PyTorch
    lines = (RESOURCES / "requirements.txt").read_text(encoding="utf-8").splitlines()

    listed = [line for line in lines if line and not line.startswith("#")]

    wanted = {line for line in project["dependencies"] if line.partition(">=")[0] not in bySlicer}
    assert set(listed) == wanted
    assert listed == sorted(listed)
