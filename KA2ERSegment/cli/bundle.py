"""`ka2ersegment bundle`: look at a bundle, verify it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from KA2ERSegment.cli.common import JsonOption, running, table_of

if TYPE_CHECKING:
    from KA2ERSegment.bundle import Bundle


app = typer.Typer(help="Look at a trained bundle, or verify its files.", no_args_is_help=True)


@app.command("info")
def bundle_info(
    folder: Annotated[Path | None, typer.Argument(help="Bundle folder; default: the one shipped.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle is: experts, sizes, files."""
    with running(as_json) as run:
        with run.step("Verifying the bundle"):
            from KA2ERSegment.bundle import load_bundle

            bundle = load_bundle(folder)
        about = _about_bundle(bundle)
        run.result(about)
        table = table_of(about["folder"], "", "")
        for key in ("patch_size", "megabytes"):
            table.add_row(key.replace("_", " "), str(about[key]))
        for expert in about["experts"]:
            table.add_row(f"expert {expert['name']}", expert["task"])
        table.add_row("files", ", ".join(about["files"]))
        run.say(table)


@app.command("verify")
def bundle_verify(
    folder: Annotated[Path | None, typer.Argument(help="Bundle folder; default: the one shipped.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a bundle against its SHA-256; exit code 1 where one differs."""
    with running(as_json) as run:
        with run.step("Verifying the bundle"):
            from KA2ERSegment.bundle import load_bundle

            bundle = load_bundle(folder)
        files = dict(bundle.checksums)
        run.result({"folder": str(bundle.folder), "verified": True, "files": files})
        run.say(f"{bundle.folder}: {len(files)} files, all as their SHA-256 says")


def _about_bundle(bundle: Bundle) -> dict[str, Any]:
    files = dict(bundle.checksums)
    plans = bundle.plans
    return {
        "folder": str(bundle.folder),
        "patch_size": plans.patch_size,
        "experts": [{"name": e.name, "task": e.task, "classes": list(e.classes)} for e in plans.experts],
        "megabytes": round(bundle.nbytes / 1e6, 2),
        "files": files,
    }
