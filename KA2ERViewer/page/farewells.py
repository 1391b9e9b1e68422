"""A tab may leave while it is being answered: nothing that anybody has to read about in a terminal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from wslink.protocol import WslinkHandler


def expect_farewells() -> None:
    """Have wslink drop what it cannot send any more. Goes once it does not log a traceback for that."""
    for name in {"sendWrappedMessage", "sendWrappedError"} & vars(WslinkHandler).keys():
        setattr(WslinkHandler, name, _if_there(getattr(WslinkHandler, name)))


def _if_there(send: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(send)
    async def sent(*arguments: Any, **more: Any) -> None:
        with contextlib.suppress(ConnectionError):
            await send(*arguments, **more)

    return sent
