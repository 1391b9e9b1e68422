"""The few pages that come from the server itself."""

from __future__ import annotations

FRAME = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>KA2ER Segment</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">{head}<style>
body {{ margin: 0; height: 100vh; display: grid; place-items: center; background: #0b0e13; color: #e6ebf2;
  font: 16px system-ui, sans-serif; }}
main {{ text-align: center; max-width: 28rem; padding: 2rem; }} p {{ color: #a3afc0; line-height: 1.5; }}
a {{ color: #6cb6ff; }} input, button {{ font: inherit; padding: .5rem .8rem; border-radius: 8px; }}
input {{ border: 1px solid #2a3342; background: #161c26; color: inherit; }}
button {{ border: 0; background: #6cb6ff; color: #0b0e13; }}
i {{ display: block; width: 2.5rem; height: 2.5rem; margin: 0 auto 1rem; border-radius: 50%; border: 3px solid #2a3342;
  border-top-color: #6cb6ff; animation: turn .9s linear infinite; }} @keyframes turn {{ to {{ rotate: 1turn; }} }}
</style></head><body><main>{body}</main></body></html>"""


def starting() -> str:
    """Shown until the page's process answers."""
    head = '<meta http-equiv="refresh" content="1">'
    return FRAME.format(head=head, body='<i></i><p role="status">Opening your viewer…</p>')


def over() -> str:
    """The page's process is gone."""
    body = (
        "<h1>This session is over</h1><p>Nobody looked at it for a while, or it was ended.</p>"
        '<p><a href="/">Begin another one</a></p>'
    )
    return FRAME.format(head="", body=body)


def failed() -> str:
    """The page's process ended while it started."""
    body = (
        "<h1>The viewer could not be started</h1><p>The reason is where the viewer was started: look into that "
        'terminal.</p><p><a href="/">Try again</a></p>'
    )
    return FRAME.format(head="", body=body)


def full() -> str:
    """Too many pages."""
    body = "<h1>All places are taken</h1><p>Close another tab of this viewer, or try again in a few minutes.</p>"
    return FRAME.format(head="", body=body)


def asking(wrong: bool = False) -> str:
    """For the token."""
    hint = "That was not it. " if wrong else ""
    body = (
        f"<h1>KA2ER Segment</h1><p>{hint}Type the token that was shown where the viewer was started.</p>"
        '<form method="post" action="/enter"><input name="token" type="password" autofocus aria-label="Token" '
        'autocomplete="current-password"> <button>Enter</button></form>'
    )
    return FRAME.format(head="", body=body)
