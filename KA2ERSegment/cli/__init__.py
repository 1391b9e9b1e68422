"""The command line `ka2ersegment`. Imports that take time are inside the commands, so that help is quick.

Exit codes: 0 done, 1 the run failed (one line says why), 2 wrong usage. With `--json` there is exactly one JSON
document on stdout; messages and progress always go to stderr. Neither holds voxels or anything of a DICOM
header; an error names the file that was given.
"""

from __future__ import annotations

import typer

from KA2ERSegment.cli import assess, bundle, compare, demo, doctor, evaluate, expert, segment, serve, view

app = typer.Typer(
    help="Segment 3D medical images from a few prompts: boxes and clicks in, masks out.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals may hold file names of patients
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(segment.segment)
app.command()(serve.serve)
app.command()(view.view)
app.command()(evaluate.evaluate)
app.command()(assess.assess)
app.command()(compare.compare)
app.command()(doctor.doctor)
app.command()(demo.demo)
app.add_typer(bundle.app, name="bundle")
app.add_typer(expert.app, name="expert")


def main() -> None:
    """Entry point of the console script."""
    app()
