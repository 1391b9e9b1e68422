"""`Bundle`: a folder with plans, weights, model card and licences, checked before it is used.

plans.json            the recipe (`Plans`)
weights.safetensors   float16, every learnt tensor once; loading it runs no code
model_card.md         what it was trained on, what it can do
LICENSE, ...          licences of the weights and of the data
checksums.json        SHA-256 of every file above

Looking at a bundle needs neither torch nor safetensors: Slicer shows one before it has installed them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import Plans

if TYPE_CHECKING:
    from torch import Tensor

PLANS, WEIGHTS, CARD, CHECKSUMS = "plans.json", "weights.safetensors", "model_card.md", "checksums.json"
DEFAULT = "ka2er-base"
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle.

    Args:
        folder: where it lies.
        plans: its recipe.
        checksums: SHA-256 (hex) of each file by name.
    """

    folder: Path
    plans: Plans
    checksums: Mapping[str, str]

    @property
    def identity(self) -> str:
        """Short name for prompts files and messages: folder name and the start of the weights' SHA-256."""
        return f"{self.folder.name}@{self.checksums[WEIGHTS][:12]}"

    @property
    def nbytes(self) -> int:
        """Size of all its files."""
        return sum((self.folder / name).stat().st_size for name in self.checksums)

    def weights(self) -> dict[str, Tensor]:
        """The tensors by parameter name, float32.

        Raises:
            BundleError: the file changed since it was verified, or is no safetensors file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = _verified(self.folder, WEIGHTS, self.checksums[WEIGHTS])
        try:
            tensors = {name: tensor.float() for name, tensor in load(data).items()}
        except SafetensorError as error:
            message = f"bundle {self.folder.name!r}: {WEIGHTS} is no safetensors file: {error}"
            raise BundleError(message) from error
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            message = f"bundle {self.folder.name!r}: weights must be finite; {len(broken)} are not: {broken[:3]}."
            raise BundleError(message)
        return tensors


def load_bundle(folder: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle and verify it whole.

    Args:
        folder: the bundle; without it the one that the package ships.

    Raises:
        BundleError: missing, damaged or foreign files; the message names the file.
    """
    bundle = look_into_bundle(folder)
    _verify_file(bundle.folder, WEIGHTS, bundle.checksums[WEIGHTS])
    return bundle


def look_into_bundle(folder: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle and verify all but its weights, which are most of it: quick enough for a user interface.

    Args:
        folder: the bundle; without it the one that the package ships.

    Raises:
        BundleError: missing, damaged or foreign files; the message names the file.
    """
    path = Path(folder) if folder is not None else default_bundle_folder()
    manifest = path / CHECKSUMS
    if not manifest.is_file():
        message = (
            f"a bundle is a folder with {CHECKSUMS}, {PLANS} and {WEIGHTS}; {str(path)!r} has no {CHECKSUMS}. "
            "Give the bundle's own folder."
        )
        raise BundleError(message)
    checksums = read_json_object(manifest, f"bundle {path.name!r}: {manifest.name}")
    if not all(isinstance(value, str) and Path(name).name == name for name, value in checksums.items()):
        message = f"bundle {path.name!r}: {CHECKSUMS} must map plain file names to SHA-256 sums."
        raise BundleError(message)
    for name in (PLANS, WEIGHTS, CARD):
        if name not in checksums:
            message = f"bundle {path.name!r}: {CHECKSUMS} does not list {name}. The bundle is incomplete."
            raise BundleError(message)
    foreign = sorted(file.name for file in path.iterdir() if file.name not in checksums and file.name != CHECKSUMS)
    if foreign:
        message = f"bundle {path.name!r}: {CHECKSUMS} does not list {foreign[:3]}. Remove what is not the bundle's own."
        raise BundleError(message)
    for name, expected in checksums.items():
        if name != WEIGHTS:
            _verified(path, name, str(expected))
    if not (path / WEIGHTS).is_file():
        message = f"bundle {path.name!r}: {WEIGHTS} cannot be read: there is no such file."
        raise BundleError(message)
    plans = Plans.from_json(read_json_object(path / PLANS, f"bundle {path.name!r}: {PLANS}"))
    return Bundle(path, plans, {name: str(value) for name, value in checksums.items()})


def default_bundle_folder() -> Path:
    """Where the shipped bundle lies: inside the installed package, or in `Resources` of the checkout."""
    for base in (_PACKAGE, _PACKAGE.parent):
        folder = base / "Resources" / "Models" / DEFAULT
        if folder.is_dir():
            return folder
    message = f"the shipped bundle {DEFAULT!r} is not installed with this package. Reinstall it, or name a bundle."
    raise BundleError(message)


def user_bundles_folder() -> Path:
    """Where bundles of one's own go unless told otherwise: the user's data folder of this system."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "KA2ERSegment" / "bundles"


def save_bundle(
    folder: Path, plans: Plans, tensors: Mapping[str, Tensor], card: str, licences: Mapping[str, str]
) -> Bundle:
    """Write a bundle; the folder appears whole or not at all.

    Args:
        folder: must not exist, or hold an older bundle, which is then replaced.
        plans: the recipe.
        tensors: by parameter name; stored as float16.
        card: text of the model card (Markdown).
        licences: text of each licence by file name.

    Raises:
        BundleError: the folder holds something that is no bundle, a weight is not finite in float16, or the disk is
            full.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if folder.exists() and not all((folder / name).is_file() for name in (CHECKSUMS, PLANS, WEIGHTS)):
        message = f"{str(folder)!r} exists and is no bundle. Choose another folder."
        raise BundleError(message)
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in halves.items() if not bool(tensor.isfinite().all())]
    if broken:
        message = f"bundle {str(folder)!r}: weights must be finite in float16; {len(broken)} are not: {broken[:3]}."
        raise BundleError(message)
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        save_file(halves, scratch / WEIGHTS)
        (scratch / WEIGHTS).chmod(0o644)
        (scratch / PLANS).write_text(json.dumps(plans.to_json(), indent=1) + "\n", encoding="utf-8")
        (scratch / CARD).write_text(card, encoding="utf-8")
        for name, text in licences.items():
            (scratch / name).write_text(text, encoding="utf-8")
        sums = {file.name: sha256_of(file) for file in sorted(scratch.iterdir())}
        (scratch / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        _swap(scratch, folder)
    except (OSError, SafetensorError) as error:
        message = f"bundle {str(folder)!r} could not be written: {error}. Nothing was changed; check the free space."
        raise BundleError(message) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return load_bundle(folder)


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; what was there is only deleted once `new` is in its place."""
    if not folder.exists():
        new.replace(folder)
        return
    old = new.with_name(f"{new.name}-old")
    folder.replace(old)
    try:
        new.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _verified(folder: Path, name: str, expected: str) -> bytes:
    """A file's content, read once and checked."""
    try:
        data = (folder / name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        message = f"bundle {folder.name!r}: {name} cannot be read: {error}"
        raise BundleError(message) from error
    _compare(folder, name, expected, hashlib.sha256(data).hexdigest())
    return data


def _verify_file(folder: Path, name: str, expected: str) -> None:
    try:
        found = sha256_of(folder / name)
    except OSError as error:
        message = f"bundle {folder.name!r}: {name} cannot be read: {error}"
        raise BundleError(message) from error
    _compare(folder, name, expected, found)


def _compare(folder: Path, name: str, expected: str, found: str) -> None:
    if found != expected:
        message = (
            f"bundle {folder.name!r}: {name} must have SHA-256 {expected}, got {found}: it is damaged or was changed. "
            "Get the bundle again."
        )
        raise BundleError(message)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json_object(path: Path, what: str) -> dict[str, object]:
    """What a JSON file holds; BundleError, with `what` as its name, where that is no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{what} must be JSON: {error}"
        raise BundleError(message) from error
    if not isinstance(data, dict):
        message = f"{what} must be a JSON object, got {type(data).__name__}."
        raise BundleError(message)
    return data
