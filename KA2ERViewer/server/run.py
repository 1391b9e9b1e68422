"""`serve`: the viewer, until Ctrl+C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

from aiohttp import ClientSession, web

from KA2ERViewer.options import ViewerError, ViewerOptions
from KA2ERViewer.server import pages, relay
from KA2ERViewer.server.engine_keeper import EngineKeeper
from KA2ERViewer.server.gate import Gate
from KA2ERViewer.server.libraries import require_libraries
from KA2ERViewer.server.sessions import Sessions

UNBOUNDED = 1 << 62
"""Bytes of one request here; a page's process counts them."""


def serve(options: ViewerOptions, say: Callable[[str], None], open_browser: bool = True) -> None:
    """Run the viewer until Ctrl+C, then end all that it started.

    Args:
        options: how.
        say: gets the address, and what people should know.
        open_browser: where there is one.

    Raises:
        ViewerError: the port is taken, or the system lacks what views are drawn with.
    """
    require_libraries()
    with tempfile.TemporaryDirectory(prefix="ka2er-viewer-") as folder, contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(options, Path(folder), say, open_browser))


async def _serve(options: ViewerOptions, folder: Path, say: Callable[[str], None], open_browser: bool) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
    engine = EngineKeeper(options, folder)
    sessions = Sessions(options, folder, engine.file)
    async with ClientSession(auto_decompress=False) as client:
        runner = web.AppRunner(_application(options, sessions, client), access_log=None)
        await runner.setup()
        tasks = []
        try:
            port = await _listen(runner, options)
            engine.start()
            sessions.prepare()
            tasks = [asyncio.create_task(engine.watch()), asyncio.create_task(sessions.watch())]
            _tell(options, port, say, open_browser)
            await ended.wait()
        finally:
            for task in tasks:
                task.cancel()
            await sessions.close()
            await runner.cleanup()
            engine.stop()


async def _listen(runner: web.AppRunner, options: ViewerOptions) -> int:
    site = web.TCPSite(runner, options.host, options.port, shutdown_timeout=1.0)
    try:
        await site.start()
    except OSError as error:
        message = (
            f"port {options.port} of {options.host} must be free, it is not ({error.strerror}). Is a "
            "viewer running already? Choose another port with --port (make run PORT=...); 0 takes a free one."
        )
        raise ViewerError(message) from error
    return int(runner.addresses[0][1])


def _tell(options: ViewerOptions, port: int, say: Callable[[str], None], open_browser: bool) -> None:
    name = "localhost" if options.is_local else options.host
    address = f"http://{name}:{port}/"
    say(f"The viewer is at {address}")
    if options.token:
        say("Who opens it is asked for the token.")
    say("Ctrl+C ends it.")
    if open_browser and options.is_local and _has_desktop():
        # Some browsers return only when their window is closed.
        threading.Thread(target=_open, args=(address,), daemon=True).start()


def _has_desktop() -> bool:
    """Without one `webbrowser` would start a browser for terminals, in ours."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(address: str) -> None:
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(address)


def _application(options: ViewerOptions, sessions: Sessions, client: ClientSession) -> web.Application:
    async def begin(_: web.Request) -> web.StreamResponse:
        session = sessions.new()
        if session is None:
            return web.Response(text=pages.full(), content_type="text/html", status=503)
        address = f"/s/{session.id}/index.html"
        raise web.HTTPSeeOther(address)

    async def page(request: web.Request) -> web.StreamResponse:
        session, path = sessions.find(request.match_info["id"]), request.match_info["path"]
        if session is None:
            text = pages.failed() if sessions.has_failed(request.match_info["id"]) else pages.over()
            return web.Response(text=text, content_type="text/html", status=404)
        if not session.port:
            return web.Response(text=pages.starting(), content_type="text/html", headers={"Cache-Control": "no-store"})
        if path == "ws":
            return await relay.pass_socket(request, session, client)
        return await relay.pass_on(request, session, path, client)

    gate = Gate(options)
    application = web.Application(middlewares=[gate.middleware], client_max_size=UNBOUNDED)
    application.on_response_prepare.append(gate.headers)
    application.router.add_get("/", begin)
    application.router.add_route("*", "/s/{id}/{path:.*}", page)
    return application
