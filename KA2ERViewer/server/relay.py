"""What a tab and its process say to each other, passed on unchanged: HTTP, and one WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

from aiohttp import ClientError, ClientSession, ClientTimeout, ClientWebSocketResponse, WSMsgType, web

from KA2ERViewer.options import SECRET_HEADER
from KA2ERViewer.server.sessions import Session

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-encoding"}
OURS = {"host", "cookie", "origin", "content-length", *HOP_BY_HOP}
"""Headers that are not passed on: the cookie is nothing that a page's process needs to know."""
ELSEWHERE = 4001
"""WebSocket code: the session was opened in another tab."""
PING, PONG = "ka2er?", "ka2er!"
"""A page asks whether we still hear it: see page.js. Neither is passed on."""
FAREWELL = 1.0
"""Seconds that a tab has to answer when another one takes its session: a connection that died never does."""
LARGEST = 64 << 20
"""Bytes of one WebSocket message: an image of a 4K screen."""


async def pass_on(request: web.Request, session: Session, path: str, client: ClientSession) -> web.StreamResponse:
    """One HTTP request."""
    url = f"http://127.0.0.1:{session.port}/{path}"
    headers = {name: value for name, value in request.headers.items() if name.lower() not in OURS}
    body = request.content if request.can_read_body else None
    try:
        async with client.request(
            request.method,
            url,
            params=list(request.query.items()),
            headers={**headers, SECRET_HEADER: session.secret},
            data=body,
            allow_redirects=False,
            timeout=ClientTimeout(total=None, sock_connect=10),
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers=_kept(answer.headers))
            await response.prepare(request)
            async for chunk in answer.content.iter_chunked(1 << 18):
                await response.write(chunk)
            await response.write_eof()
            return response
    except ClientError as error:
        raise web.HTTPBadGateway(text="the session does not answer.") from error


async def pass_socket(request: web.Request, session: Session, client: ClientSession) -> web.StreamResponse:
    """The connection of a tab. The latest tab has the session; an earlier one is told so."""
    # Most of it are pictures, which are compressed already: doing so again would only take time.
    browser = web.WebSocketResponse(max_msg_size=LARGEST, heartbeat=20, compress=False)
    await browser.prepare(request)
    earlier, session.browser = session.browser, browser
    if isinstance(earlier, web.WebSocketResponse):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(earlier.close(code=ELSEWHERE, message=b"opened in another tab"), FAREWELL)
    try:
        async with client.ws_connect(
            f"http://127.0.0.1:{session.port}/ws", headers={SECRET_HEADER: session.secret}, max_msg_size=LARGEST
        ) as page:
            ways = {asyncio.create_task(_pump(browser, page)), asyncio.create_task(_pump(page, browser))}
            _, left = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for task in left:
                task.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
    except ClientError:
        pass  # the process is gone: the tab notices by the closed connection
    finally:
        if session.browser is browser:
            session.browser, session.left_at = None, time.monotonic()
        with contextlib.suppress(ConnectionError):
            await browser.close()
    return browser


async def _pump(
    source: web.WebSocketResponse | ClientWebSocketResponse, target: web.WebSocketResponse | ClientWebSocketResponse
) -> None:
    with contextlib.suppress(ConnectionError):
        async for message in source:
            if message.type is WSMsgType.TEXT and message.data == PING:
                await source.send_str(PONG)
            elif message.type is WSMsgType.TEXT:
                await target.send_str(message.data)
            elif message.type is WSMsgType.BINARY:
                await target.send_bytes(message.data)


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
