"""`ka2ersegment compare`: what each method brings, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from KA2ERSegment.cli.common import JsonOption, running


def compare(
    row: Annotated[
        list[str], typer.Argument(help="Folder that `evaluate` wrote, or name=folder; the first is compared with.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Markdown file; the JSON goes beside it.")] = Path(
        "output/comparison.md"
    ),
    *,
    as_json: JsonOption = False,
) -> None:
    """Compare results of `evaluate` on the same objects: means, and paired differences to the first with intervals."""
    if output.suffix != ".md":
        message = f"--output must end in .md, got {output.name!r}."
        raise typer.BadParameter(message)
    with running(as_json) as run:
        with run.step("Comparing"):
            from KA2ERSegment import comparison

            found = comparison.compare([comparison.read_row(text) for text in row])
            comparison.write_comparison(found, output)
        run.result({"output": str(output), **found})
        run.say(comparison.markdown(found))
        run.say(f"written to {output} and {output.with_suffix('.json')}")
