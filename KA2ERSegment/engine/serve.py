"""The program: load the model once, listen, and end when it should.

The first line on standard output is JSON with the port, written when requests are served; everything else goes to
standard error. Neither ever holds voxels, file names, or names of volumes and objects.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from KA2ERSegment.engine.process import KEY_VARIABLE, MEMORY_VARIABLE, process_alive
from KA2ERSegment.engine.wire import EXCHANGED, EngineError
from KA2ERSegment.errors import KA2ERError

if TYPE_CHECKING:
    from starlette.routing import Route

    from KA2ERSegment.engine.app import Engine

log = logging.getLogger("ka2ersegment.engine")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NOT_NEEDED = (
    "pandas",
    "matplotlib",
    "tensorboard",
    "tensorboardX",
    "skimage",
    "sklearn",
    "scipy.signal",
    "scipy.stats",
    "ignite",
    "itk",
    "mlflow",
    "clearml",
)
"""MONAI imports them where they are installed; what we use of MONAI does not, and they take a second and more."""


@dataclass(frozen=True)
class Options:
    """What the program is told.

    Args:
        host: to listen on.
        port: 0 for a free one.
        api_key: that every request must show; "": that of the environment, or a new one on this machine alone.
        bundle: folder; None for the shipped one.
        device: "auto", "cpu" or "cuda".
        max_sessions: at a time.
        idle_timeout: seconds without an action of its user after which a session is given up; 0: never.
        liveness_timeout: seconds without a sign of life of its client after which it is.
        max_voxels: of one volume.
        exchange: folder from which volumes are read.
        parent: process with which we end, and remove the exchange folder.
        threads: of the CPU; 0: as many as torch takes.
        allow_hosts: further names under which an engine on this machine may be addressed, e.g. that of a proxy.
    """

    host: str = "127.0.0.1"
    port: int = 1527
    api_key: str = ""
    bundle: Path | None = None
    device: str = "auto"
    max_sessions: int = 4
    idle_timeout: float = 1800.0
    liveness_timeout: float = 60.0
    max_voxels: int = 1 << 30
    exchange: Path | None = None
    parent: int | None = None
    threads: int = 0
    allow_hosts: tuple[str, ...] = ()


def serve(options: Options) -> None:
    """Run until somebody ends us.

    Raises:
        KA2ERError: a host without a key, a port that is taken, a bundle or device that cannot be used.
    """
    started = time.perf_counter()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if options.parent is not None:
        _end_with(options.parent, options.exchange)
    key, made = _key(options)
    sock = _listening(options.host, options.port)
    _import_quickly("KA2ERSegment.session")

    import uvicorn

    from KA2ERSegment.engine.app import make_app

    engine = load(options)

    def ready() -> None:
        port, seconds = sock.getsockname()[1], round(time.perf_counter() - started, 2)
        line: dict[str, Any] = {"port": port, "pid": os.getpid(), "seconds": seconds}
        if made:  # nobody else knows it
            line |= {"url": f"http://{options.host}:{port}", "api_key": key}
        print(json.dumps(line), flush=True)  # noqa: T201 - whoever started us waits for it
        log.info("model on %s, ready after %.1f s", engine.device, seconds)
        warm_up(engine)

    hosts = (*LOOPBACK, *options.allow_hosts) if options.host in LOOPBACK else options.allow_hosts
    app = make_app(engine, key, hosts, _other_routes(engine), ready)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=75, ws="none", lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[sock])


def _other_routes(engine: Engine) -> list[Route]:
    """Those of nnInteractive's protocol; a viewer of ours does without where blosc2 is not installed."""
    try:
        from KA2ERSegment.engine.nninteractive import routes
    except ModuleNotFoundError as error:
        log.warning("nnInteractive's protocol is off: %s is not installed", error.name)
        return []
    return routes(engine)


def load(options: Options) -> Engine:
    """The model, its worker, and no session yet."""
    import torch

    from KA2ERSegment.build import build_model
    from KA2ERSegment.bundle import load_bundle
    from KA2ERSegment.engine.app import Engine
    from KA2ERSegment.engine.workplaces import Worker, Workplaces
    from KA2ERSegment.session import Session, find_device

    threads = options.threads if options.threads > 0 else torch.get_num_threads()
    torch.set_num_threads(1)  # hundreds of small tensors: waking threads for each takes longer than the work
    device = find_device(options.device)
    bundle = load_bundle(options.bundle)
    model = build_model(bundle.plans, bundle.weights()).to(device)
    torch.set_num_threads(threads)
    worker = Worker()
    worker.watch(model)
    memory_mb = _feature_memory_mb(options.max_sessions)

    def make_session() -> Session:
        session = Session(bundle, str(device), memory_mb, model)
        session.checkpoint = worker.checkpoint
        return session

    places = Workplaces(make_session, options.max_sessions, options.idle_timeout, options.liveness_timeout)

    def free_memory() -> None:
        for place in places:
            place.session.forget_features()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    worker.free_memory = free_memory
    return Engine(bundle, model, str(device), worker, places, options.max_voxels, options.exchange)


def _feature_memory_mb(sessions: int) -> float:
    """Of one session: what its viewer asks for in the environment, else a fair share of 4 GB."""
    asked = os.environ.get(MEMORY_VARIABLE, "")
    try:
        return max(64.0, float(asked))
    except ValueError:
        return max(128.0, min(512.0, 4096.0 / sessions))


def warm_up(engine: Engine) -> None:
    """Let the network see noise once, so that the first prompt finds everything ready; it gives way to any request."""
    import numpy as np

    from KA2ERSegment.engine.workplaces import Job
    from KA2ERSegment.prompts import BoxPrompt
    from KA2ERSegment.session import Session
    from KA2ERSegment.volume import Volume

    def work() -> None:
        session = Session(engine.bundle, engine.device, model=engine.model)
        session.checkpoint = engine.worker.checkpoint
        volume = Volume(np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32), np.eye(4))
        session.set_volume(volume)
        session.add(BoxPrompt.from_ijk((4, 4, 4), (20, 20, 20), volume))

    engine.worker.submit(Job(work, gives_way=True))


# --- the start --------------------------------------------------------------------------------------------------------


def _key(options: Options) -> tuple[str, bool]:
    """The key, and whether it was made here."""
    key = options.api_key or os.environ.get(KEY_VARIABLE, "")
    os.environ.pop(KEY_VARIABLE, None)
    if key and not (key.isascii() and key.isprintable()):
        message = "an engine's key must be plain ASCII letters, digits and signs. Choose another one."
        raise EngineError(message, "auth")
    if not key and options.host not in LOOPBACK:
        message = (
            f"an engine that others can reach must have a key, got none for host {options.host!r}. Set {KEY_VARIABLE} "
            "or give --api-key, and put a TLS proxy in front (docs/engine.md)."
        )
        raise EngineError(message, "auth")
    return key or secrets.token_urlsafe(32), not key


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a taken port is known before the model is loaded."""
    try:
        if not 0 <= port < 1 << 16:
            message = "a port is a number from 0 to 65535"
            raise OverflowError(message)
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)  # there REUSEADDR shares a port
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except (OSError, OverflowError) as error:
        message = f"the engine cannot listen on {host}:{port}: {error}. Choose another --port, or 0 for a free one."
        raise KA2ERError(message) from error
    return sock


def _import_quickly(module: str) -> None:
    with _hidden(_NOT_NEEDED), contextlib.suppress(ImportError):  # a MONAI that does need one gets it later
        importlib.import_module(module)


@contextlib.contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Within it these modules cannot be imported, unless they are there already."""
    hidden = [name for name in names if name not in sys.modules]
    blocked: dict[str, Any] = dict.fromkeys(hidden)  # None: "not found" at once
    sys.modules.update(blocked)
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


# --- the end ----------------------------------------------------------------------------------------------------------


def _end_with(parent: int, exchange: Path | None) -> None:
    """End when our parent has: its pipe to us closes then, and its process is gone."""

    def end() -> None:
        if exchange is not None:
            with contextlib.suppress(OSError):
                for file in exchange.iterdir():
                    if EXCHANGED.fullmatch(file.name):
                        file.unlink()
                exchange.rmdir()
        os._exit(0)

    for watch in (_until_stdin_ends, lambda: _until_process_ends(parent)):
        threading.Thread(target=_then, args=(watch, end), name="parent watch", daemon=True).start()


def _then(watch: Callable[[], bool], end: Callable[[], None]) -> None:
    if watch():
        end()


def _until_stdin_ends() -> bool:
    """False at once where nobody holds the other end: some launchers give their child an empty standard input."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdin.readline().strip() != "watch":
            return False
        while sys.stdin.readline():
            pass
        return True
    return False


def _until_process_ends(pid: int) -> bool:
    if sys.platform == "win32":
        import ctypes

        kernel = ctypes.windll.kernel32
        kernel.OpenProcess.restype = ctypes.c_void_p
        kernel.WaitForSingleObject.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        handle = kernel.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE
        if handle:
            kernel.WaitForSingleObject(handle, 0xFFFFFFFF)
        return True
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            select.select([descriptor], [], [])
            return True
    while process_alive(pid):
        time.sleep(0.5)
    return True


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """As `ka2ersegment serve`, without what that needs to look good: how a viewer starts us."""
    parser = argparse.ArgumentParser(prog="ka2ersegment serve", description=serve.__doc__, allow_abbrev=False)
    parser.add_argument("--host", default=Options.host)
    parser.add_argument("--port", type=int, default=Options.port)
    parser.add_argument("--api-key", default=Options.api_key)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device", default=Options.device)
    parser.add_argument("--max-sessions", type=int, default=Options.max_sessions)
    parser.add_argument("--idle-timeout", type=float, default=Options.idle_timeout)
    parser.add_argument("--liveness-timeout", type=float, default=Options.liveness_timeout)
    parser.add_argument("--max-voxels", type=int, default=Options.max_voxels)
    parser.add_argument("--exchange", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--threads", type=int, default=Options.threads)
    parser.add_argument("--allow-host", dest="allow_hosts", action="append", default=[])
    told = vars(parser.parse_args(arguments))
    try:
        serve(Options(**{**told, "allow_hosts": tuple(told["allow_hosts"])}))
    except KA2ERError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
