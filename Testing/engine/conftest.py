"""Engines with a tiny untrained bundle: one in a process of its own, one in ours whose network can be held up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from KA2ERSegment.engine.client import EngineClient
from KA2ERSegment.engine.process import LocalEngine


@pytest.fixture(scope="session")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained bundle with experts of every mode; its gate hears whom it likes best."""
    import torch

    from KA2ERSegment.experts import Content
    from KA2ERSegment.plans import GatePlans, VotingPlans
    from KA2ERSegment.testing import tiny_bundle, tiny_plans

    plans, folder = tiny_plans(), tmp_path_factory.mktemp("bundle")
    names = tuple(expert.name for expert in plans.experts)
    gate = GatePlans(names, hidden=8, threshold=0.0)
    voting = VotingPlans(names, prototypes=4, adaptive=2, top=1, rank=2, width=8)
    content = Content.of(tiny_bundle(folder / "random", replace(plans, gate=gate, voting=voting)))
    generator = torch.Generator().manual_seed(5)
    opinions = {  # zeros until they are trained: all voters would say the same
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in content.tensors.items()
        if name.startswith("voting.") and name.endswith("_out")
    }
    assert opinions
    return replace(content, tensors={**content.tensors, **opinions}).save(folder / "tiny").folder


@pytest.fixture(scope="session")
def an_engine(a_bundle: Path) -> Iterator[LocalEngine]:
    """A ready engine in a process of its own."""
    engine = LocalEngine([sys.executable], a_bundle, "cpu", arguments=["--threads", "1", "--max-sessions", "500"])
    engine.start()
    engine.wait()
    yield engine
    engine.stop()


@pytest.fixture
def a_client(an_engine: LocalEngine) -> EngineClient:
    """With the exchange folder."""
    return an_engine.client()


@dataclass
class HeldUp:
    """The network's decoder, which waits where it is told to, and fails as it is told to."""

    inside: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    fail: BaseException | None = None
    calls: int = 0


@dataclass
class EngineHere:
    """An engine in this process, served by uvicorn on a real socket."""

    engine: object
    held: HeldUp
    url: str
    api_key: str
    app: object

    def client(self) -> EngineClient:
        """Without exchange folder: voxels travel as bodies."""
        return EngineClient(self.url, self.api_key)


@pytest.fixture(scope="module")
def engine_here(a_bundle: Path) -> Iterator[EngineHere]:
    """An engine whose decoder can be held up at a checkpoint, or fail."""
    import socket

    import uvicorn

    from KA2ERSegment.cancellation import checkpoint
    from KA2ERSegment.engine.app import make_app
    from KA2ERSegment.engine.nninteractive import routes
    from KA2ERSegment.engine.serve import Options, load

    engine = load(Options(bundle=a_bundle, device="cpu", threads=1, max_sessions=8, max_voxels=1_000_000))
    held, decode = HeldUp(), type(engine.model).decode
    held.go_on.set()

    def held_up(*arguments: object) -> object:
        held.calls += 1
        held.inside.set()
        while not held.go_on.wait(0.001):
            checkpoint()
        if held.fail is not None:
            raise held.fail
        return decode(engine.model, *arguments)

    engine.model.decode = held_up
    del engine.model.encode  # watched again, now with the one above
    engine.worker.watch(engine.model)
    ready = threading.Event()
    app = make_app(engine, "a key", more=routes(engine), on_ready=ready.set)
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_keep_alive=75))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    assert ready.wait(30)
    yield EngineHere(engine, held, f"http://127.0.0.1:{sock.getsockname()[1]}", "a key", app)
    held.go_on.set()
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def held(engine_here: EngineHere) -> Iterator[HeldUp]:
    """The decoder of the engine in this process, in order before and after."""
    held = engine_here.held
    held.inside.clear()
    yield held
    held.fail = None
    held.go_on.set()
