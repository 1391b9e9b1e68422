"""Who may come in. A server on a real socket, with pages that only say that they were reached."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp")
from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from KA2ERViewer.options import ViewerError, ViewerOptions  # noqa: E402
from KA2ERViewer.server import gate as gates  # noqa: E402
from KA2ERViewer.server.libraries import require_libraries  # noqa: E402

TOKEN = "a long random text"


def ask(options: ViewerOptions, talk: Callable[[TestClient], Awaitable[Any]]) -> Any:
    """Run a conversation with a server that has nothing behind its gate."""

    async def reached(_: web.Request) -> web.Response:
        return web.Response(text="reached")

    async def run() -> Any:
        gate = gates.Gate(options)
        application = web.Application(middlewares=[gate.middleware])
        application.on_response_prepare.append(gate.headers)
        application.router.add_route("*", "/{path:.*}", reached)
        async with TestClient(TestServer(application), cookie_jar=aiohttp.CookieJar(unsafe=True)) as client:
            return await talk(client)

    # In a thread of its own: Playwright leaves a running event loop in the main one.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, run()).result()


def test_this_machine_needs_no_token() -> None:
    async def talk(client: TestClient) -> int:
        return (await client.get("/")).status

    assert ask(ViewerOptions(), talk) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_foreign_names_of_this_machine_are_refused(host: str) -> None:
    async def talk(client: TestClient) -> int:
        return (await client.get("/", headers={"Host": host})).status

    assert ask(ViewerOptions(), talk) == 403


def test_allowed_names_come_in() -> None:
    async def talk(client: TestClient) -> int:
        return (await client.get("/", headers={"Host": "segment.example.org"})).status

    assert ask(ViewerOptions(allowed_hosts=("segment.example.org",)), talk) == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", None])
@pytest.mark.parametrize("method", ["POST", "PUT", "socket"])
def test_web_pages_of_others_cannot_change_anything(origin: str | None, method: str) -> None:
    async def talk(client: TestClient) -> int:
        headers = {"Origin": origin} if origin else {}
        if method == "socket":
            headers |= {"Upgrade": "websocket", "Connection": "Upgrade"}
            return (await client.get("/s/1/ws", headers=headers)).status
        return (await client.request(method, "/s/1/upload", headers=headers)).status

    assert ask(ViewerOptions(), talk) == 403


def test_our_own_page_can_change_things() -> None:
    async def talk(client: TestClient) -> int:
        address = client.make_url("/")
        return (await client.post("/s/1/upload", headers={"Origin": f"http://{address.host}:{address.port}"})).status

    assert ask(ViewerOptions(), talk) == 200


def test_token_is_asked_for_and_let_in_with_a_cookie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "WRONG_TOKEN_COSTS", 0.0)

    async def talk(client: TestClient) -> list[Any]:
        origin = {"Origin": str(client.make_url("/")).rstrip("/")}
        seen = [(await client.get("/")).status]
        seen.append((await client.post("/enter", data={"token": "wrong"}, headers=origin)).status)
        seen.append((await client.get("/", params={"token": "wrong too"})).status)
        seen.append(await (await client.post("/enter", data={"token": TOKEN}, headers=origin)).text())
        seen.append((await client.get("/s/1/index.html")).status)
        return seen

    assert ask(ViewerOptions(token=TOKEN), talk) == [401, 401, 401, "reached", 200]


def test_cookie_is_for_the_server_alone() -> None:
    async def talk(client: TestClient) -> str:
        answer = await client.get("/", params={"token": TOKEN}, allow_redirects=False)
        return answer.headers["Set-Cookie"]

    cookie = ask(ViewerOptions(token=TOKEN), talk)

    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie


@pytest.mark.parametrize("path", ["/", "/refused"])
def test_every_answer_forbids_the_page_to_talk_to_others(path: str) -> None:
    async def talk(client: TestClient) -> str:
        headers = {"Host": "evil.example"} if path == "/refused" else {}
        return (await client.get(path, headers=headers)).headers["Content-Security-Policy"]

    policy = ask(ViewerOptions(), talk)

    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"host": "0.0.0.0"}, "a token is needed"),
        ({"host": "192.168.0.7"}, "a token is needed"),
        ({"token": "short"}, "at least 16 characters"),
    ],
)
def test_options_that_would_let_strangers_in_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ViewerError, match=words):
        ViewerOptions(**arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere they are part of the system")
def test_missing_system_library_is_named_with_the_command_that_installs_it() -> None:
    require_libraries({"libc.so.6": "libc6"})

    with pytest.raises(ViewerError, match=r"libnothing.so.7.*\n.*apt-get install .* libnothing7 libgl1-mesa-dri"):
        require_libraries({"libnothing.so.7": "libnothing7", "libc.so.6": "libc6"})
