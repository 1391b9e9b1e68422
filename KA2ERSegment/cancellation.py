"""How long work is stopped from outside: it calls `checkpoint` often, and whoever started it decides there.

    with checkpoints(stop_if_cancelled):   # raises, where the work is to end
        work()

What is called belongs to the thread that does the work, so several sessions can share one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.nn as nn

_asked: ContextVar[Callable[[], None] | None] = ContextVar("KA2ERSegment checkpoint", default=None)


def checkpoint() -> None:
    """Work may end here: calls what `checkpoints` was given in this thread, if anything."""
    ask = _asked.get()
    if ask is not None:
        ask()


@contextmanager
def checkpoints(ask: Callable[[], None] | None) -> Iterator[None]:
    """Within it, `checkpoint` calls `ask`; what that raises ends the work."""
    before = _asked.set(ask)
    try:
        yield
    finally:
        _asked.reset(before)


def watch_layers(network: nn.Module) -> None:
    """Make a checkpoint of every call of every layer of a network. Once per network."""
    for layer in network.modules():
        if next(layer.children(), None) is None:
            layer.register_forward_pre_hook(_at_a_layer)


def _at_a_layer(_layer: nn.Module, _inputs: Any) -> None:
    checkpoint()
