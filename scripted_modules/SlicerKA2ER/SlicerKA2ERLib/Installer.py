"""First run: what the local engine needs in Slicer's Python, and how it gets there once the user agreed. No Qt.

torch comes through the PyTorch extension, everything else through `slicer.packaging`. What is there is found out from
the packages' metadata: importing torch would take seconds and lock its files.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .Protocols import DialogsProtocol, InstallPlan, SettingsProtocol

TORCH = "torch>=2.1"
TORCH_MEGABYTES, TORCH_CUDA_MEGABYTES, PACKAGE_MEGABYTES = 250, 3000, 4
"""To download, roughly: torch with torchvision for a CPU, for CUDA; one line of requirements.txt with what it needs."""
KEPT = ("numpy", "scipy", "SimpleITK", "pydicom", "torch", "torchvision", "packaging", "requests")
"""Packages that Slicer and its other extensions rely on: pip must not exchange them for us."""

REASONS = (
    (("no space left", "errno 28", "disk full"), lambda: _("The disk is full.")),
    (
        ("winerror 206", "path too long", "filename or extension is too long"),
        lambda: _("A path is too long for Windows."),
    ),
    (
        ("ssl", "certificate"),
        lambda: _("The secure connection to the package server was refused (proxy or certificate)."),
    ),
    (
        ("name resolution", "getaddrinfo", "connection", "timed out", "max retries", "network is unreachable", "proxy"),
        lambda: _("The package server could not be reached. Is this computer online?"),
    ),
    (("permission denied", "winerror 5", "access is denied"), lambda: _("Slicer's folder could not be written.")),
    (("resolutionimpossible", "conflict"), lambda: _("Packages of another extension need other versions.")),
)
"""Words in pip's output -> what they mean for a user."""


class Installer:
    """InstallerProtocol for Slicer.

    Args:
        requirementsFile: one requirement per line.
        settings: says whether the engine runs in Slicer's Python at all.
        dialogs: asks before Slicer restarts.
    """

    def __init__(self, requirementsFile: str | Path, settings: SettingsProtocol, dialogs: DialogsProtocol) -> None:
        self._requirementsFile, self._settings, self._dialogs = Path(requirementsFile), settings, dialogs
        self._reason = ""

    def plan(self) -> InstallPlan:
        if self._settings.value("engine") != "local":
            return InstallPlan((), 0)
        torch, missing = torchState(), self._missing()
        packages = [] if torch == "ready" else ["PyTorch"]
        if packages and pyTorchUtils() is None:
            packages.insert(0, _("Slicer's extension PyTorch (Slicer restarts)"))
        packages += [requirement.name for requirement in missing]
        megabytes = PACKAGE_MEGABYTES * len(missing)
        if torch != "ready":
            megabytes += TORCH_CUDA_MEGABYTES if shutil.which("nvidia-smi") else TORCH_MEGABYTES
        reason = self._reason
        if torch == "broken" and not reason:
            reason = _("PyTorch is only half installed. Installing again repairs it.")
        return InstallPlan(tuple(packages), megabytes if packages else 0, reason if packages else "")

    def install(self, onProgress: Callable[[str, float | None], None]) -> None:
        self._reason = ""
        try:
            self._install(onProgress)
        except Exception as error:
            logging.getLogger("KA2ERSegment").exception("Installation failed")
            self._reason = plainReason(error)
            raise RuntimeError(self._reason) from error

    def _install(self, onProgress: Callable[[str, float | None], None]) -> None:
        plan = self.plan()
        if not plan.packages:
            return
        if self._settings.value("offline"):
            raise RuntimeError(_("The settings say offline. Switch that off in the settings, or use another Python."))
        if torchState() != "ready":
            if pyTorchUtils() is None:
                self._installExtension(onProgress)
            onProgress(_("Installing PyTorch. This takes minutes; Slicer may not answer meanwhile."), None)
            self._installTorch()
        missing = self._missing()
        if missing:
            onProgress(_("Installing {count} packages.").format(count=len(missing)), 0.8)
            self._installPackages([str(requirement) for requirement in missing])
        left = self.plan().packages
        if left:
            raise RuntimeError(_("Still missing after the installation: {names}.").format(names=", ".join(left)))
        onProgress(_("Everything is installed."), 1.0)

    def _installExtension(self, onProgress: Callable[[str, float | None], None]) -> None:
        """Slicer's extension PyTorch knows which build of torch fits the computer; it is loaded after a restart."""
        import slicer

        if not hasattr(slicer.app, "extensionsManagerModel"):
            raise RuntimeError(_("This Slicer was built without an Extensions Manager. Use another Python."))
        model = slicer.app.extensionsManagerModel()
        onProgress(_("Installing Slicer's extension PyTorch."), 0.1)
        if not model.isExtensionInstalled("PyTorch"):
            model.interactive = False
            if not model.installExtensionFromServer("PyTorch", False):
                raise RuntimeError(
                    _("Slicer's extension PyTorch was not installed. Get it in the Extensions Manager, then try again.")
                )
        self._settings.setValue("resumeInstall", True)
        if self._dialogs.confirm(_("Slicer restarts to load the extension PyTorch, and the installation goes on.")):
            slicer.util.restart()
        raise RuntimeError(_("Restart Slicer, then press Install again."))

    def _installTorch(self) -> None:
        logic = pyTorchUtils().PyTorchUtilsLogic()
        if torchState() == "broken":
            with contextlib.suppress(Exception):  # what is half there may not even uninstall
                logic.uninstallTorch()
        wanted = {"askConfirmation": False, "torchVersionRequirement": TORCH.removeprefix("torch")}
        known = inspect.signature(logic.installTorch).parameters  # the extension has renamed keywords before
        logic.installTorch(**{name: value for name, value in wanted.items() if name in known})
        if torchState() != "ready":
            raise RuntimeError(_("PyTorch was not installed. Slicer's Python console says why."))

    def _installPackages(self, requirements: list[str]) -> None:
        import slicer

        try:
            import slicer.packaging
        except ImportError:  # Slicer before 5.12
            slicer.util.pip_install(requirements)
            return
        with constraintsFile() as constraints:
            slicer.packaging.pip_ensure(
                requirements, constraints=constraints, prompt_install=False, requester="KA2ER Segment"
            )

    def _missing(self) -> list[Any]:
        from packaging.requirements import Requirement

        lines = self._requirementsFile.read_text(encoding="utf-8").splitlines()
        requirements = [Requirement(line) for line in map(str.strip, lines) if line and not line.startswith("#")]
        return [requirement for requirement in requirements if not satisfied(requirement)]


def satisfied(requirement: Any) -> bool:
    """Whether a distribution that fits is installed; extras are not looked into."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    version = installedVersion(requirement.name)
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def torchState() -> str:
    """ "ready", "missing", "old" or "broken" (half installed). Does not import it."""
    from packaging.requirements import Requirement

    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    version = installedVersion("torch")
    if spec is None and not version:
        return "missing"
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not version or not (folder / "version.py").is_file() or not any(folder.glob("_C*")):
        return "broken"
    return "ready" if Requirement(TORCH).specifier.contains(version, prereleases=True) else "old"


def installedVersion(name: str) -> str:
    """ "" where there is none, or where what is left of it has no version."""
    try:
        return importlib.metadata.version(name) or ""
    except (importlib.metadata.PackageNotFoundError, KeyError, TypeError):
        return ""


def pyTorchUtils() -> Any:
    """The module of Slicer's extension PyTorch; None where the extension is missing."""
    try:
        return importlib.import_module("PyTorchUtils")
    except ImportError:
        return None


@contextlib.contextmanager
def constraintsFile() -> Iterator[str]:
    """A pip constraints file that keeps KEPT as they are."""
    lines = [f"{name}=={version}" for name in KEPT if (version := installedVersion(name))]
    with tempfile.TemporaryDirectory(prefix="ka2er-") as folder:
        path = Path(folder) / "constraints.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield str(path)


def plainReason(error: BaseException) -> str:
    """One sentence for a user, from whatever pip, the extension server or PyTorchUtils raised."""
    text = f"{error}\n{getattr(error, 'output', '') or ''}".lower()
    for words, reason in REASONS:
        if any(word in text for word in words):
            return reason()
    if isinstance(error, RuntimeError):
        return str(error)
    return _("The installation ended with an error: {error}").format(error=error)


def isIntelMac() -> bool:
    """Slicer's Macs run x86_64, for which there is no torch after 2.2: another Python is the better way there."""
    return sys.platform == "darwin" and platform.machine() == "x86_64"
