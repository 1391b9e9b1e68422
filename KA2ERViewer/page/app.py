"""One tab, put together: scene, bridge, layout and files. Started by `server.sessions` as a process of its own.

What it needs comes as one JSON object on standard input: the secret that every request must bring, the engine's
address, a folder for files, limits, and the volume to begin with. The first line on standard output is JSON with the
port. It ends when standard input closes: that is when the server ends, however it does.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from trame.app import get_server

from KA2ERViewer.options import SECRET_HEADER, Limits
from KA2ERViewer.shared import use_shared_code

use_shared_code()

from KA2ERViewer.page import first, layout, windows  # noqa: E402
from KA2ERViewer.page.bridge import Bridge  # noqa: E402
from KA2ERViewer.page.engine import KeptEngine  # noqa: E402
from KA2ERViewer.page.farewells import expect_farewells  # noqa: E402
from KA2ERViewer.page.files import Files  # noqa: E402
from KA2ERViewer.page.layout import SHOWN  # noqa: E402
from KA2ERViewer.page.scene import ViewerScene  # noqa: E402
from KA2ERViewer.page.views import decorate, follow_slices  # noqa: E402

logger = logging.getLogger("KA2ERViewer")
TURN = 10
"""Degrees that a key turns the 3D view."""


def main() -> None:
    """Serve one tab until standard input closes."""
    os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["WSLINK_READY_MSG"] = ""
    expect_farewells()
    server = get_server(client_type="vue3")
    folder = Path(told["folder"])
    around = ViewerScene(server, folder, decorate)
    bridge = Bridge(server, around, partial(KeptEngine, Path(told["engine"])))
    files = Files(around, bridge, folder, Limits(**told["limits"]))
    follow_slices(server.state, around.slices)
    layout.build(server)
    _more_triggers(server, around, bridge)
    server.controller.on_server_bind.add(partial(_guard, secret=told["secret"], files=files))
    server.controller.on_server_ready.add(partial(_begin, server, bridge, files, told.get("volume")))
    server.start(
        host="127.0.0.1", port=0, open_browser=False, show_connection_info=False, disable_logging=True, timeout=0
    )


def _more_triggers(server: Any, around: ViewerScene, bridge: Bridge) -> None:
    def window(name: str) -> None:
        if bridge.logic.volumeNode is not None:
            windows.apply(bridge.logic.volumeNode, name)

    def window_level(window: float, level: float) -> None:
        if bridge.logic.volumeNode is not None:
            windows.adjust(bridge.logic.volumeNode, float(window), float(level))

    def fit(name: str) -> None:
        around.views[name].fit_view_to_content()
        around.views[name].schedule_render()

    def zoom(name: str, nearer: bool) -> None:
        view = around.views[name]
        view.zoom_in() if nearer else view.zoom_out()
        view.schedule_render()

    def turn(right: int, up: int) -> None:
        camera = around.solid.first_renderer().GetActiveCamera()
        camera.Azimuth(-TURN * right)
        camera.Elevation(-TURN * up)
        camera.OrthogonalizeViewUp()
        around.solid.first_renderer().ResetCameraClippingRange()
        around.solid.schedule_render()

    def show(layout: str, **_: Any) -> None:
        around.app.view_manager.set_current_view_ids(list(SHOWN[layout]))

    server.state.change("layout")(show)
    server.trigger("windowPreset")(window)
    server.trigger("windowLevel")(window_level)
    server.trigger("zoom")(zoom)
    server.trigger("turn")(turn)
    server.trigger("fit")(fit)


def _guard(wslink_server: Any, secret: str, files: Files) -> None:
    """Other users of this machine can reach our port; they do not know the secret."""

    @web.middleware
    async def only_ours(request: web.Request, handler: Any) -> web.StreamResponse:
        if not hmac.compare_digest(request.headers.get(SECRET_HEADER, "").encode(), secret.encode()):
            raise web.HTTPForbidden
        return await handler(request)  # type: ignore[no-any-return]

    wslink_server.app.middlewares.append(only_ours)
    wslink_server.app.add_routes([web.get("/alive", _alive), *first.routes(), *files.routes()])


async def _alive(_: web.Request) -> web.Response:
    return web.json_response({})


def _begin(server: Any, bridge: Bridge, files: Files, volume: str | None, **_: Any) -> None:
    loop = asyncio.get_event_loop()
    server.context.follower = loop.create_task(bridge.run())
    if volume:
        files.open_local(Path(volume))
    bridge.refresh()
    sys.stdout.write(json.dumps({"port": server.port}) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)  # VTK's and asyncio's own endings can wait for each other; files are the server's to remove


if __name__ == "__main__":
    main()
