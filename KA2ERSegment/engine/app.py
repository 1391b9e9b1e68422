"""The engine's own HTTP interface, `/ka2er/v1/...`, and what every request has to pass first. See docs/engine.md.

GET  info                  what runs here
POST session               a volume in, a lease out
POST session/<verb>        what `Session` can do; a frame with the change comes back
POST session/cancel        and heartbeat, close; GET session/progress: answered at once, beside the work
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import stat
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np
import numpy.typing as npt
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from KA2ERSegment import __version__
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.engine.wire import (
    API,
    LEASE_HEADER,
    MAX_JSON,
    META_HEADER,
    PROTOCOL,
    EngineError,
    MalformedError,
    VolumeHeader,
    box_to_json,
    change_to_head,
    error_to_json,
    flag_of,
    list_of,
    number_of,
    object_of,
    pack_frame,
    read_json,
    refuse,
    suggestion_to_json,
    text_of,
)
from KA2ERSegment.engine.workplaces import (
    Worker,
    Workplace,
    Workplaces,
    as_bytes,
    change_between,
    stopwatch,
    where,
)
from KA2ERSegment.errors import KA2ERError, SessionStateError
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.prediction import Prediction, experts_by_mode
from KA2ERSegment.prompts import MaskPrompt, prompt_from_json
from KA2ERSegment.session import Session
from KA2ERSegment.steps import Neighbours, Step
from KA2ERSegment.volume import Volume

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
Verb = Callable[[Session, Mapping[str, Any]], object]
Ask = Callable[[Session, Mapping[str, Any]], tuple[dict[str, Any], list[npt.NDArray[Any]]]]
log = logging.getLogger("ka2ersegment.engine")

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Engine:
    """All that the routes need.

    Args:
        bundle: that the network is of.
        model: the one copy of the weights.
        device: where it is.
        worker: the thread that uses it.
        places: of the clients.
        max_voxels: of one volume.
        exchange: folder with volumes of a client on this machine, None where there is none.
    """

    bundle: Bundle
    model: PromptableModel
    device: str
    worker: Worker
    places: Workplaces
    max_voxels: int = 1 << 30
    exchange: Path | None = None

    async def run(
        self, request: Request, place: Workplace, work: Callable[[], T], doing: str = "Updating the mask"
    ) -> T:
        """The result of work in the worker's thread; it is cancelled where the client hangs up."""
        job = place.begin(work, self.worker, doing)
        done = asyncio.wrap_future(job.result)
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                job.cancel()
            result: T = await done
        finally:
            gone.cancel()
        place.active = place.seen = max(place.seen, self.places.now())
        return result


def make_app(
    engine: Engine,
    api_key: str,
    hosts: Sequence[str] = LOOPBACK,
    more: Sequence[Route] = (),
    on_ready: Callable[[], None] = lambda: None,
) -> ASGIApp:
    """The whole application.

    Args:
        engine: what answers.
        api_key: that every request must show.
        hosts: names under which the engine may be addressed; empty for any.
        more: routes of other protocols.
        on_ready: called when requests are served.
    """
    routes = [*Api(engine).routes(), *more]
    return Guard(Starlette(routes=routes, lifespan=_life(engine, on_ready)), api_key, hosts)


class Guard:
    """Nothing passes without the key, nor from a web page of somebody else."""

    def __init__(self, app: ASGIApp, api_key: str, hosts: Sequence[str]) -> None:
        self._app, self._key, self._hosts = app, f"Bearer {api_key}".encode(), set(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refused(dict(scope["headers"]))
        if refused is None:
            await self._app(scope, receive, send)
        else:
            status, body = error_to_json(refused)
            await JSONResponse(body, status, {"Connection": "close"})(scope, receive, send)

    def _refused(self, headers: Mapping[bytes, bytes]) -> EngineError | None:
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        if self._hosts and _address(f"//{host}").hostname not in self._hosts:
            message = "this engine must be addressed as this machine, or by a name given with --allow-host."
            return EngineError(message, "forbidden")
        if origin is not None and _address(origin.decode("latin-1")).netloc != host:
            message = "this engine does not answer web pages that it does not serve."
            return EngineError(message, "forbidden")
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            message = "the engine's key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
            return EngineError(message, "auth")
        return None


def _address(text: str) -> SplitResult:
    """Its parts, all empty where it is no address; nobody has shown a key yet, so anything may come."""
    try:
        return urlsplit(text if text.isascii() else "")
    except ValueError:
        return urlsplit("")


class Api:
    """Our own routes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        """Where what is."""
        beside: dict[str, Handler] = {
            "close": self.close,
            "heartbeat": self.heartbeat,
            "cancel": self.cancel,
        }
        return [
            Route(f"{API}/info", answered(self.info), methods=["GET"]),
            Route(f"{API}/session", answered(self.open), methods=["POST"]),
            Route(f"{API}/session/progress", answered(self.progress), methods=["GET"]),
            *(Route(f"{API}/session/{name}", answered(beside[name]), methods=["POST"]) for name in beside),
            *(Route(f"{API}/session/{name}", answered(self._changing(name)), methods=["POST"]) for name in VERBS),
            *(Route(f"{API}/session/{name}", answered(self._asking(ASKS[name])), methods=["POST"]) for name in ASKS),
        ]

    # -- beside the work ---------------------------------------------------------------------------------------------

    async def info(self, _request: Request) -> Response:
        """What runs here."""
        engine = self._engine
        experts = [
            {"name": expert.name, "task": expert.task, "classes": list(expert.classes)}
            for expert in engine.bundle.plans.experts
        ]
        return JSONResponse(
            {
                "version": __version__,
                "protocol": PROTOCOL,
                "device": engine.device,
                "bundle": {"identity": engine.bundle.identity, "experts": experts},
                "experts": experts_by_mode(engine.model.arms, engine.model.decoders, engine.model.voters),
                "sessions": len(engine.places),
                "max_sessions": engine.places.max_sessions,
                "max_voxels": engine.max_voxels,
            }
        )

    async def heartbeat(self, request: Request) -> Response:
        """A sign of life."""
        place = self._engine.places.get(lease_of(request), active=False)
        return JSONResponse({"remaining_seconds": self._engine.places.remaining(place)})

    async def cancel(self, request: Request) -> Response:
        """Stop what is under way."""
        self._engine.places.get(lease_of(request)).cancel()
        return JSONResponse({})

    async def close(self, request: Request) -> Response:
        """End a session; fine where there is none."""
        self._engine.places.release(lease_of(request))
        return JSONResponse({})

    async def progress(self, request: Request) -> Response:
        """What is being done, and for how long."""
        job = self._engine.places.get(lease_of(request), active=False).current
        seconds = 0.0 if job is None else self._engine.places.now() - job.began
        return JSONResponse({"text": "" if job is None else job.text, "fraction": None, "seconds": round(seconds, 2)})

    # -- volumes -----------------------------------------------------------------------------------------------------

    async def open(self, request: Request) -> Response:
        """A volume in, a lease out."""
        engine = self._engine
        header = VolumeHeader.from_json(read_json(request.headers.get(META_HEADER, "")), engine.max_voxels)
        place = engine.places.claim()
        try:
            if header.file is not None:
                array = await run_in_threadpool(_exchanged, engine.exchange, header)
            else:
                array = await _received(request, header, lambda: engine.places.get(place.lease))
            volume = await run_in_threadpool(Volume, array, header.ijk_to_ras)
            await engine.run(request, place, lambda: place.session.set_volume(volume), "Reading the volume")
        except BaseException:
            engine.places.release(place.lease)
            raise
        return JSONResponse(
            {
                "lease": place.lease,
                "journal": place.journal(-1),
                "idle_timeout": engine.places.idle_timeout,
                "liveness_timeout": engine.places.liveness_timeout,
            }
        )

    # -- the work ----------------------------------------------------------------------------------------------------

    def _changing(self, name: str) -> Handler:
        verb = VERBS[name]
        doing = "Doing the prompts again" if name in ("give", "revise") else "Updating the mask"

        async def handler(request: Request) -> Response:
            engine, place = self._engine, self._engine.places.get(lease_of(request))
            body = await body_of(request, MAX_JSON)

            def work() -> bytes:
                data = read_json(body)
                known = int(number_of(data, "known", -1))
                before = place.masks()
                with stopwatch() as seconds:
                    verb(place.session, data)
                    change = change_between(before, place)
                    change = replace(change, seconds=seconds(), network=engine.worker.network)
                head, masks = change_to_head(change)
                return pack_frame({**head, "journal": place.journal(known)}, masks)

            return framed(await engine.run(request, place, work, doing))

        return handler

    def _asking(self, ask: Ask) -> Handler:
        async def handler(request: Request) -> Response:
            engine, place = self._engine, self._engine.places.get(lease_of(request))
            body = await body_of(request, MAX_JSON)
            local = request.client is not None and request.client.host in LOOPBACK

            def work() -> bytes:
                head, arrays = ask(place.session, read_json(body))
                return pack_frame(head, arrays, level=0 if local else 1)

            return framed(await engine.run(request, place, work, "Asking the experts"))

        return handler


# --- verbs ------------------------------------------------------------------------------------------------------------


def _neighbours(data: Mapping[str, Any]) -> Neighbours:
    value = data.get("neighbours", Neighbours.COMPETE.value)
    if value not in [each.value for each in Neighbours]:
        refuse("'neighbours' must be keep, compete or overlap", value)
    return Neighbours(value)


def _mask(data: Mapping[str, Any]) -> MaskPrompt:
    prompt = prompt_from_json(object_of(data, "mask"))
    if not isinstance(prompt, MaskPrompt):
        refuse("'mask' must be a mask prompt", type(prompt).__name__)
    return prompt


def _experts(data: Mapping[str, Any]) -> list[str] | None:
    if data.get("names") is None:
        return None
    names = list_of(data, "names")
    return names if all(isinstance(name, str) for name in names) else refuse("'names' must be text", names)


def _steps(data: Mapping[str, Any]) -> list[Step]:
    return [Step.from_json(entry) for entry in list_of(data, "steps")]


VERBS: dict[str, Verb] = {
    "select": lambda session, data: session.select(text_of(data, "name")),
    "add": lambda session, data: session.add(prompt_from_json(object_of(data, "prompt")), _neighbours(data)),
    "edit": lambda session, data: session.edit(_mask(data), flag_of(data, "amend", False)),
    "finish": lambda session, data: session.finish(
        number_of(data, "smoothing_mm", 0.0), flag_of(data, "islands", True)
    ),
    "revise": lambda session, data: session.revise(_steps(data)),
    "undo": lambda session, data: session.undo(),
    "redo": lambda session, data: session.redo(),
    "reset": lambda session, data: session.reset(),
    "lock": lambda session, data: session.lock(text_of(data, "name")),
    "unlock": lambda session, data: session.unlock(text_of(data, "name")),
    "remove": lambda session, data: session.remove(text_of(data, "name")),
    "rename": lambda session, data: session.rename(text_of(data, "old"), text_of(data, "new")),
    "use_experts": lambda session, data: session.use_experts(_experts(data)),
    "give": lambda session, data: session.give(object_of(data, "saved")),
}
"""The names are those of `RemoteSession`'s methods."""


def _predicted(session: Session, data: Mapping[str, Any]) -> Prediction:
    name = text_of(data, "name")
    prediction = session.prediction_of(name)
    if prediction is None:
        message = f"object {name!r} has no prediction yet. Give it a prompt first."
        raise SessionStateError(message)
    return prediction


def _opinion(session: Session, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    prediction, name = _predicted(session, data), text_of(data, "expert")
    if name not in prediction.experts:
        message = f"there is no expert {name!r} in this prediction; there are {list(prediction.experts)}."
        raise SessionStateError(message)
    probability, weight = prediction.opinion_on_patch(name)
    return {"ijk_to_ras": prediction.patch_to_ras.tolist()}, [as_bytes(probability), as_bytes(weight)]


def _disagreement(session: Session, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    prediction = _predicted(session, data)
    return {"ijk_to_ras": prediction.patch_to_ras.tolist()}, [as_bytes(prediction.disagreement_on_patch())]


def _mask_of(session: Session, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    prediction = session.prediction_of(text_of(data, "name"))
    if prediction is None:
        return {"box": [0] * 6}, [np.zeros((0, 0, 0), dtype=bool)]
    box, mask = prediction.mask_crop()
    return {"box": box_to_json(box)}, [mask]


def _suggest(session: Session, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    before = session.selected
    name = text_of(data, "name")
    _predicted(session, data)
    session.select(name)  # no part of the history
    try:
        return {"suggestion": suggestion_to_json(session.suggest())}, []
    finally:
        session.select(before)


ASKS: dict[str, Ask] = {"opinion": _opinion, "disagreement": _disagreement, "mask": _mask_of, "suggest": _suggest}


# --- requests ---------------------------------------------------------------------------------------------------------


def answered(handler: Handler, status_of: Callable[[int], int] = lambda status: status) -> Handler:
    """Turn errors into answers; a client gets the reason, the log no names."""

    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            status, body = error_to_json(error)
            if status >= 500 and not isinstance(error, KA2ERError):
                log.error("%s", where(error))
            return JSONResponse(body, status_of(status), {"Retry-After": "10"} if status == 503 else None)

    return wrapped


def lease_of(request: Request) -> str | None:
    """The lease that a request shows."""
    return request.headers.get(LEASE_HEADER)


def framed(frame: bytes) -> Response:
    """A frame as an answer."""
    return Response(frame, media_type="application/octet-stream")


async def body_of(request: Request, limit: int) -> bytes:
    """The whole body; EngineError "too large" as soon as it is longer than the limit."""
    parts: list[bytes] = []
    announced_size(request, limit)
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def announced_size(request: Request, limit: int) -> int | None:
    """What the Content-Length says, None where nothing; EngineError "too large" above the limit."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if int(text) > limit:  # the server has checked that it is a number
        raise _too_large(limit)
    return int(text)


def _too_large(limit: int) -> EngineError:
    message = f"a request of this kind must have at most {limit} bytes."
    return EngineError(message, "too large")


async def _hung_up(request: Request) -> None:
    """Until the client closes its connection."""
    with contextlib.suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def _received(request: Request, header: VolumeHeader, alive: Callable[[], object]) -> npt.NDArray[Any]:
    """The voxels in a request's body, straight into the array: memory is taken once, for what was announced.

    Over a slow network that takes longer than a workplace is kept without a sign of life: each part is one.
    """
    size = announced_size(request, header.nbytes)
    if size is not None and not header.packed and size != header.nbytes:
        refuse(f"the body must be the {header.nbytes} bytes of the voxels", size)
    voxels = np.empty(header.nbytes, dtype=np.uint8)  # untouched pages cost nothing
    unpack = zlib.decompressobj() if header.packed else None
    at = 0
    async for part in request.stream():
        alive()
        room = header.nbytes - at
        try:
            raw = part if unpack is None else unpack.decompress(part, room + 1)
        except zlib.error as error:
            message = f"the compressed voxels are damaged: {error}."
            raise MalformedError(message) from error
        if len(raw) > room:
            refuse(f"the body must be the {header.nbytes} bytes of the voxels", "more")
        voxels[at : at + len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        at += len(raw)
    if at != header.nbytes or (unpack is not None and not unpack.eof):
        refuse(f"the body must be the {header.nbytes} bytes of the voxels", at)
    return voxels.view(np.dtype(header.dtype).newbyteorder("<")).reshape(header.shape_kji)


def _exchanged(folder: Path | None, header: VolumeHeader) -> npt.NDArray[Any]:
    """The voxels in a file that a client on this machine wrote; they are mapped, not copied."""
    if folder is None or header.file is None:
        message = "this engine has no exchange folder. Send the voxels in the request's body."
        raise EngineError(message, "protocol")
    path = folder / header.file
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    dtype = np.dtype(header.dtype).newbyteorder("<")
    try:
        if path.is_symlink():  # where there is no O_NOFOLLOW
            raise FileNotFoundError
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size != header.nbytes:
                refuse(f"the file must be a plain one of {header.nbytes} bytes", found.st_size)
            return np.memmap(stream, dtype=dtype, mode="r", shape=header.shape_kji)
    except OSError as error:
        message = f"'file' must name a plain file in the exchange folder, got {header.file!r}."
        raise MalformedError(message) from error


def _life(
    engine: Engine, on_ready: Callable[[], None]
) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(engine.places.sweep_seconds)
                engine.places.sweep()

        task = asyncio.create_task(sweep())
        on_ready()
        try:
            yield
        finally:
            task.cancel()
            for place in engine.places:
                engine.places.release(place.lease)
            engine.worker.close()

    return lifespan
