"""Who may come in: right host, right origin, right token. And what a page may do in a browser.

On this machine alone no token is needed; a web page of a stranger still must not reach us. It would come with its own
name as `Origin`, or (DNS rebinding) with its own name as `Host`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from KA2ERViewer.options import LOOPBACK, ViewerOptions
from KA2ERViewer.server import pages

COOKIE = "ka2er"
WRONG_TOKEN_COSTS = 1.0
"""Seconds that a wrong token takes, so that nobody can try many."""
HEADERS = {
    # Vue compiles its templates in the browser, hence unsafe-eval; Vuetify sets style attributes.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-eval' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send our own form with "null" as its Origin
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gate:
    """Looks at every request before anything else does.

    Args:
        options: host, token and further names of this machine.
    """

    def __init__(self, options: ViewerOptions) -> None:
        self._token = options.token
        self._cookie = hashlib.sha256(b"ka2er viewer cookie " + options.token.encode()).hexdigest()
        self._hosts = {*LOOPBACK, *(name.lower() for name in options.allowed_hosts)}
        self._any_host = options.host in ("0.0.0.0", "::") and not options.allowed_hosts
        if not self._any_host:
            self._hosts.add(options.host.lower())

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse, ask for the token, or let in."""
        self._check_host(request)
        self._check_origin(request)
        if self._token:
            if request.path == "/enter":
                return await self._enter(request)
            if "token" in request.query:
                return await self._welcome(request.query["token"])
            if not hmac.compare_digest(request.cookies.get(COOKIE, ""), self._cookie):
                return web.Response(text=pages.asking(), content_type="text/html", status=401)
        return await handler(request)

    async def headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For every answer."""
        for name, value in HEADERS.items():
            response.headers[name] = value

    def _check_host(self, request: web.Request) -> None:
        host = (urlsplit(f"//{request.headers.get('Host', '')}").hostname or "").lower()
        if not self._any_host and host not in self._hosts:
            text = f"this viewer is not called {host!r}. Start it with --allow-host NAME if a proxy calls it so."
            raise web.HTTPForbidden(text=text)

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        changes = request.method not in ("GET", "HEAD") or request.headers.get("Upgrade", "").lower() == "websocket"
        if origin is None and not changes:
            return
        if origin is None or urlsplit(origin).netloc.lower() != request.headers.get("Host", "").lower():
            raise web.HTTPForbidden(text="requests of other web pages are refused.")

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        if request.method != "POST":
            return web.Response(text=pages.asking(), content_type="text/html")
        form = await request.post()
        return await self._welcome(str(form.get("token", "")))

    async def _welcome(self, token: str) -> web.StreamResponse:
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            await asyncio.sleep(WRONG_TOKEN_COSTS)
            return web.Response(text=pages.asking(wrong=True), content_type="text/html", status=401)
        answer = web.HTTPSeeOther("/")
        answer.set_cookie(COOKIE, self._cookie, httponly=True, samesite="Strict", path="/")
        raise answer
