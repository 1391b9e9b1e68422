"""What a browser gets before the page's own code runs: trame's first page under our name, and a quiet spinner."""

from __future__ import annotations

import re
from pathlib import Path

from aiohttp import web
from trame_client.module import vue3

SPINNER = """<style>
body { margin: 0; height: 100vh; display: grid; place-items: center; background: #0b0e13; }
.first { width: 2.5rem; height: 2.5rem; border-radius: 50%; border: 3px solid #2a3342; border-top-color: #6cb6ff;
  animation: first 0.9s linear infinite; } @keyframes first { to { transform: rotate(1turn); } }
</style><div class="first" role="status" aria-label="Opening"></div>"""
CHANGES = (
    (r"<title>.*?</title>", "<title>KA2ER Segment</title>"),
    (r'<link rel="icon"[^>]*>', '<link rel="icon" href="ka2er/icon.svg" />'),
    (r'<meta\s+name="(description|keywords)"[^>]*>', ""),
    (r'(<script src="vue)', r'<script src="ka2er/page.js"></script>\1'),  # before trame connects: it watches that
    (r",maximum-scale=1,minimum-scale=1", ""),  # people may enlarge the page
    # trame asks the server for it, and writes it over the page itself where the answer comes after that.
    (r'<div id="app"></div>\s*<script>.*?</script>', f'<div id="app">{SPINNER}</div>'),
)


def routes() -> list[web.RouteDef]:
    """In place of trame's own."""
    text = (Path(vue3.www) / "index.html").read_text(encoding="utf-8")
    for pattern, ours in CHANGES:
        text = re.sub(pattern, ours, text, flags=re.S)

    async def index(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type="text/html", headers={"Cache-Control": "no-store"})

    return [web.get("/index.html", index)]
