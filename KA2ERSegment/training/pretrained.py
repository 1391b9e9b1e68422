"""Public weights of MONAI's SwinUNETR as the foundation's beginning, from a file or a URL whose SHA-256 is known.

Two layouts are read: the self-supervised weights of Tang et al. 2022 (`model_swinvit.pt`: the Swin transformer alone,
`module.` before each name, `mlp.fc1` for MONAI's `mlp.linear1`, heads of the pretext tasks beside it) and state dicts
of a whole SwinUNETR (`swinViT.` before each name), as those trained on BTCV. Each may lie under "state_dict" or
"model".

In a config: `"foundation_weights": {"file": "model_swinvit.pt", "sha256": "..."}`, or "url" instead of "file". No
weights are fetched that no config asks for; their licence is for its author to check.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from KA2ERSegment.build import tensors_by_name
from KA2ERSegment.bundle import sha256_of
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.encoders.nnunet_results import why_not_plain
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import FoundationPlans

DROPPED = "layers4.0.downsample."
"""What SwinUNETR has to reach stride 32, where the foundation stops at 16."""
_OURS = ("patch_embed.", "layers")
_HEX = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 60.0


def foundation_weights(
    settings: Mapping[str, Any], plans: FoundationPlans, beside: Path, cache: Path
) -> dict[str, Tensor]:
    """The tensors to begin a foundation from, by their names in `Foundation`.

    Args:
        settings: "sha256", and "file" or "url".
        plans: of the foundation.
        beside: folder that a relative file name is relative to: the config's.
        cache: folder that a URL's file is kept in.

    Raises:
        BundleError: settings that say something else, another digest, no connection, a file that is not one of the two
            layouts, or weights of other sizes than the plans'; the message says which plans fit.
    """
    if set(settings) not in ({"file", "sha256"}, {"url", "sha256"}):
        message = f"foundation_weights must have 'sha256' and one of 'file' and 'url', got {sorted(settings)}."
        raise BundleError(message)
    digest = str(settings["sha256"]).lower()
    if not _HEX.fullmatch(digest):
        message = (
            f"foundation_weights: sha256 must be 64 hexadecimal digits, got {settings['sha256']!r}. Take it from who "
            "published the file, or, of a file that you trust, from sha256sum."
        )
        raise BundleError(message)
    path = _download(str(settings["url"]), digest, cache) if "url" in settings else beside / str(settings["file"])
    _verify(path, digest)
    return _fitted(_swin(_read(path), path.name), plans, path.name)


def _verify(path: Path, digest: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        message = f"foundation_weights: {path.name} cannot be read: {error}"
        raise BundleError(message) from error
    if found != digest:
        message = (
            f"foundation_weights: {path.name} must have SHA-256 {digest}, got {found}. It is another file, or damaged."
        )
        raise BundleError(message)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows no redirect that leaves https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The next request."""
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if not url.startswith("https://"):
        message = f"foundation_weights: a url must begin with https://, got {url!r}."
        raise BundleError(message)


def _download(url: str, digest: str, cache: Path) -> Path:
    """Fetch once; a file whose digest is another is never left in the cache."""
    _require_https(url)
    path = cache / f"{digest}.pt"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".fetching-", dir=cache)
    scratch = Path(name)
    try:
        opener = urllib.request.build_opener(_HttpsOnly)
        with os.fdopen(handle, "wb") as target, opener.open(url, timeout=_TIMEOUT) as answer:
            shutil.copyfileobj(answer, target, 1 << 20)
        _verify(scratch, digest)
        scratch.replace(path)
    except OSError as error:  # URLError is one
        message = (
            f"foundation_weights: {url} cannot be fetched: {getattr(error, 'reason', error)}. Without a connection, "
            'fetch it elsewhere and give it as "file", or leave foundation_weights out to train from scratch.'
        )
        raise BundleError(message) from error
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _read(path: Path) -> Mapping[str, Any]:
    """The state dict of a checkpoint; nothing but tensors and plain data is loaded."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        message = f"foundation_weights: {path.name} is no checkpoint of plain tensors: {why_not_plain(error)}."
        raise BundleError(message) from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        message = f"foundation_weights: {path.name} must hold tensors by name, got {type(data).__name__}."
        raise BundleError(message)
    return data


def _swin(state: Mapping[str, Any], file: str) -> dict[str, Tensor]:
    """The Swin transformer's tensors under MONAI's names, without what the foundation does not have."""
    found: dict[str, Tensor] = {}
    whole = any(".swinViT." in f".{name}" or ".swin_vit." in f".{name}" for name in state)
    for name, value in state.items():
        for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # torch.compile and DataParallel put these before
            name = name.removeprefix(prefix)
        plain = name.removeprefix("swinViT.").removeprefix("swin_vit.")
        if (whole and plain == name) or not plain.startswith(_OURS):
            continue  # convolutional encoders, decoders and pretext heads
        plain = plain.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
        if not plain.startswith(DROPPED) and not plain.endswith(".relative_position_index"):
            found[plain] = value
    if "patch_embed.proj.weight" not in found:
        message = (
            f"foundation_weights: {file} must be MONAI's self-supervised Swin transformer or a whole SwinUNETR, got "
            f"names such as {list(state)[:2]}."
        )
        raise BundleError(message)
    return found


def _fitted(found: dict[str, Tensor], plans: FoundationPlans, file: str) -> dict[str, Tensor]:
    expected = {name: tuple(value.shape) for name, value in tensors_by_name(Foundation(plans).swin).items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    if given == expected:
        return {f"swin.{name}": value.float() for name, value in found.items()}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    name = wrong[0]
    message = (
        f"foundation_weights: {file} does not fit the plans: {len(wrong)} tensors differ, {name} for one (plans "
        f"{expected.get(name)}, file {given.get(name)}). {_plans_that_fit(given)} The plans have feature_size "
        f"{plans.feature_size}, window {plans.window}, depths {plans.depths}, heads {plans.heads}."
    )
    raise BundleError(message)


def _plans_that_fit(given: Mapping[str, tuple[int, ...]]) -> str:
    """What the tensors' shapes say of the encoder that they are of."""
    try:
        tables = [[shape for name, shape in given.items() if re.fullmatch(_TABLE.format(n), name)] for n in range(1, 5)]
        window = (round(tables[0][0][0] ** (1 / 3)) + 1) // 2
        depths, heads = tuple(len(stage) for stage in tables), tuple(stage[0][1] for stage in tables)
        size, channels = given["patch_embed.proj.weight"][:2]
    except (IndexError, ValueError):
        return "It is of no SwinUNETR with four stages."
    if channels != 1:
        return f"It is of images with {channels} channels; a foundation sees one."
    return f"It needs plans.foundation with feature_size {size}, window {window}, depths {depths}, heads {heads}."


_TABLE = r"layers{}\.0\.blocks\.\d+\.attn\.relative_position_bias_table"
