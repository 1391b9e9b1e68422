"""`ka2ersegment doctor`: is everything there that is needed?"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import typer

from KA2ERSegment.cli.common import JsonOption, running, table_of
from KA2ERSegment.errors import KA2ERError

_NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "monai": "monai",
    "einops": "einops",
    "nibabel": "nibabel",
    "SimpleITK": "SimpleITK",
    "slicerio": "slicerio",
    "safetensors": "safetensors",
    "dynamic_network_architectures": "dynamic-network-architectures",
}
_OPTIONAL = {
    "slicer": ("slicer-core", "slicer"),
    "matplotlib": ("matplotlib", "pictures"),
    "nilearn": ("nilearn", "demo"),
    "lightning": ("lightning", "training"),
}


def doctor(
    *,
    as_json: JsonOption = False,
) -> None:
    """Check that this machine has what is needed; exit code 1 where something needed is missing."""
    with running(as_json) as run:
        with run.step("Looking around"):
            checks = _checks()
        healthy = all(check["ok"] for check in checks if check["needed"])
        run.result({"ok": healthy, "checks": checks})
        table = table_of("", "", "what", "found")
        for check in checks:
            mark = "[green]ok[/]" if check["ok"] else "[red]missing[/]" if check["needed"] else "[yellow]absent[/]"
            table.add_row(mark, check["name"], check["found"])
        run.say(table)
        if not healthy:
            raise typer.Exit(1)


def _checks() -> list[dict[str, Any]]:
    """What `doctor` looks at, each with `name`, `ok`, `needed` and `found`."""
    version = platform.python_version()
    supported = (3, 10) <= tuple(int(n) for n in platform.python_version_tuple()[:2]) <= (3, 13)
    checks = [_check("python 3.10 to 3.13", ok=supported, found=version)]
    checks += [_module_check(name, package, needed=True) for name, package in _NEEDED.items()]
    if importlib.util.find_spec("torch") is not None:
        import torch

        cuda = torch.cuda.is_available()
        checks.append(_check("device", ok=True, found=torch.cuda.get_device_name() if cuda else "cpu (no CUDA)"))
        checks.append(_check("threads", ok=True, found=f"{torch.get_num_threads()} of {os.cpu_count()} processors"))
        checks.append(_bundle_check())
    checks.append(_memory_check())
    checks += [_module_check(name, pkg, needed=False, extra=extra) for name, (pkg, extra) in _OPTIONAL.items()]
    return checks


def _check(name: str, *, ok: bool, found: str, needed: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "needed": needed, "found": found}


def _module_check(name: str, package: str, *, needed: bool, extra: str = "") -> dict[str, Any]:
    from importlib import metadata

    there = importlib.util.find_spec(name) is not None
    found = f"pip install ka2ersegment[{extra}]" if extra else f"pip install {package}"
    if there:
        found = "version unknown"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(package)
    return _check(package, ok=there, found=found, needed=needed)


def _bundle_check() -> dict[str, Any]:
    from KA2ERSegment.bundle import load_bundle

    try:
        bundle = load_bundle()
    except (KA2ERError, OSError) as error:
        return _check("shipped bundle", ok=False, found=str(error))
    return _check("shipped bundle", ok=True, found=f"verified, {len(bundle.checksums)} files in {bundle.folder}")


def _memory_check() -> dict[str, Any]:
    """At least 2 GB free; machines that do not say pass."""
    free = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what caches can give back
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
        free = int(match[1]) / 1e6 if match else free
    disk = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free is None:
        return _check("free memory", ok=True, found="unknown on this system", needed=False)
    return _check("free memory, 2 GB", ok=free >= 2, found=f"{free:.1f} GB, and {disk:.0f} GB of temporary disk")
