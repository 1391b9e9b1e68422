"""What the commands share: options, and where their words go."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from KA2ERSegment.errors import KA2ERError

if TYPE_CHECKING:
    from rich.table import Table


class Device(str, Enum):
    """Where the network runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Bundle folder; default: the one shipped.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the network runs.")]
KeyOption = Annotated[
    str,
    typer.Option(
        "--api-key", envvar="KA2ERSEGMENT_API_KEY", show_envvar=True, help="The engine's key; other users can see it."
    ),
]


class Run:
    """Where one command's words go: text or JSON on stdout, everything else on stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        if not self._out.is_terminal:
            self._out.width = 140  # tables in files need not fit a screen
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner while the block runs."""
        with self._err.status(text):
            yield

    @contextlib.contextmanager
    def bar(self, text: str) -> Iterator[Any]:
        """A progress bar; the block calls what it gets with (done, total)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._err, transient=True) as progress:
            task = progress.add_task(text, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def report(self) -> Iterator[Callable[[str, float], None]]:
        """A bar for work of several parts: the block calls what it gets with (text, share done).

        Where stderr is no terminal, lines such as `progress 0.25 reading image 2 of 9`, at most two a second: another
        program may read them.
        """
        if not self._err.is_terminal:
            told: dict[str, float] = {}

            def tell(text: str, share: float) -> None:
                now, part = time.monotonic(), text.split(",")[0]
                if now - told.get(part, float("-inf")) > 0.5:
                    told[part] = now
                    typer.echo(f"progress {share:.2f} {text}", err=True)

            yield tell
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._err, transient=True) as bars:
            task = bars.add_task("", total=1.0)
            yield lambda text, share: bars.update(task, description=text, completed=share)

    def say(self, text: str | Table) -> None:
        """To people; silent where the output is JSON."""
        if not self.as_json:
            self._out.print(text, markup=False) if isinstance(text, str) else self._out.print(text)

    def warn(self, text: str) -> None:
        """To people, on stderr."""
        self._err.print(f"[yellow]warning:[/] {_plain(text)}")

    def result(self, value: dict[str, Any]) -> None:
        """To machines."""
        if self.as_json:
            typer.echo(json.dumps(value, indent=2))

    def fail(self, text: str, kind: str) -> None:
        """One clear line, and the same for machines."""
        self._err.print(f"[red]error:[/] {_plain(text)}")
        self.result({"error": text, "kind": kind})


@contextlib.contextmanager
def running(as_json: bool) -> Iterator[Run]:
    """Turn expected failures into one line and exit code 1."""
    run = Run(as_json)
    try:
        yield run
    except KA2ERError as error:
        run.fail(str(error), type(error).__name__)
        raise typer.Exit(1) from error
    except OSError as error:
        run.fail(f"a file could not be read or written: {error}.", type(error).__name__)
        raise typer.Exit(1) from error
    except MemoryError as error:
        run.fail("there is not enough memory: use a smaller volume or crop it.", "MemoryError")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        run.fail("interrupted, nothing more was written.", "KeyboardInterrupt")
        raise typer.Exit(1) from error


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def table_of(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    return table
