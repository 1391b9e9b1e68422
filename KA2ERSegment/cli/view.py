"""`ka2ersegment view`: the browser viewer."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from KA2ERSegment.cli.common import BundleOption, Device, DeviceOption, KeyOption, running
from KA2ERSegment.errors import KA2ERError

NEEDED = {"slicer": "slicer-core", "trame_slicer": "trame-slicer", "aiohttp": "aiohttp"}
"""What the viewer imports -> the package that has it."""


def view(
    volume: Annotated[
        Path | None, typer.Argument(help="NIfTI, NRRD or MHA file, or a folder with one DICOM series, to begin with.")
    ] = None,
    *,
    sample: Annotated[bool, typer.Option("--sample", help="Begin with a brain MR that comes along.")] = False,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8080,
    device: DeviceOption = Device.AUTO,
    bundle: BundleOption = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Address of a running engine to use instead of an own one.")
    ] = "",
    api_key: KeyOption = "",
    token: Annotated[
        str,
        typer.Option(
            "--token",
            envvar="KA2ERSEGMENT_VIEWER_TOKEN",
            show_envvar=True,
            help="Who opens the page must know it; other users of this machine can see a command line.",
        ),
    ] = "",
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Name under which a proxy addresses this machine; repeat.")
    ] = None,
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, help="Tabs at a time.")] = 8,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Segment in a browser: Slicer's views in a page of this machine."""
    with running(as_json=False) as run:
        missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
        if missing:
            message = (
                f"the viewer needs {', '.join(missing)}: pip install 'ka2ersegment[viewer]', in an environment of its "
                "own if this one has slicer-core 5.12 or newer. In a checkout: make run."
            )
            raise KA2ERError(message)
        if engine and (bundle is not None or device is not Device.AUTO):
            message = "an engine has its own bundle and device: leave out --bundle and --device, or --engine."
            raise typer.BadParameter(message)
        from KA2ERViewer.options import ViewerOptions
        from KA2ERViewer.server.run import serve

        with _sample() if sample and volume is None else contextlib.nullcontext(volume) as first:
            options = ViewerOptions(
                first, host, port, device.value, bundle, engine, api_key, token, tuple(allow_host or ()), max_sessions
            )
            serve(options, run.say, browser)


@contextlib.contextmanager
def _sample() -> Iterator[Path]:
    """The demo's volume as a file, for as long as the viewer runs."""
    import nibabel

    from KA2ERSegment.demo import load_sample

    volume, _ = load_sample()
    with tempfile.TemporaryDirectory(prefix="ka2er-sample-") as folder:
        path = Path(folder) / "MNI152.nii.gz"
        image: Any = nibabel.Nifti1Image
        nibabel.save(image(volume.array_kji.T, volume.ijk_to_ras), path)
        yield path
