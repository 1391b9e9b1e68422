"""`ka2ersegment serve`: an engine for viewers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from KA2ERSegment.cli.common import BundleOption, Device, DeviceOption, KeyOption, running


def serve(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need a key.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 1527,
    api_key: KeyOption = "",
    *,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, help="Users at a time.")] = 4,
    idle_timeout: Annotated[
        float, typer.Option("--idle-timeout", min=0, help="Seconds after which an idle user's session ends; 0: never.")
    ] = 1800.0,
    liveness_timeout: Annotated[
        float, typer.Option("--liveness-timeout", min=1, help="Seconds after which a silent client's session ends.")
    ] = 60.0,
    max_voxels: Annotated[int, typer.Option("--max-voxels", min=1, help="Of one volume.")] = 1 << 30,
    exchange: Annotated[
        Path | None, typer.Option("--exchange", help="Private folder through which a local viewer hands volumes over.")
    ] = None,
    parent: Annotated[int | None, typer.Option("--parent", help="Process with which the engine ends.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: as many as PyTorch takes.")] = 0,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Name under which a proxy addresses this machine; repeat.")
    ] = None,
) -> None:
    """Keep a model loaded and segment for viewers: ours, and all that speak nnInteractive's protocol.

    Without a key a new one is made; the first line on stdout is JSON with the port and that key.
    """
    with running(as_json=False):
        from KA2ERSegment.engine import serve as engine

        hosts = tuple(allow_host or ())
        limits = (max_sessions, idle_timeout, liveness_timeout, max_voxels)
        engine.serve(
            engine.Options(host, port, api_key, bundle, device.value, *limits, exchange, parent, threads, hosts)
        )
