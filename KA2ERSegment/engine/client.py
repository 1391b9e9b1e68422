"""`EngineClient` and `RemoteSession`: the verbs of `Session` on an engine in another process or on another machine.

Needs numpy alone. A session keeps a journal of what was done, so that nothing is lost when its engine dies: open the
volume in the next engine and `give` it `to_json()`.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import ssl
import sys
import threading
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from KA2ERSegment.engine.wire import (
    API,
    DTYPES,
    LEASE_HEADER,
    META_HEADER,
    PROTOCOL,
    Change,
    EngineError,
    EngineGoneError,
    Opinion,
    VolumeHeader,
    affine_of,
    box_from_json,
    change_from_head,
    error_from_json,
    list_of,
    number_of,
    object_of,
    read_json,
    refuse,
    suggestion_from_json,
    text_of,
    unpack_frame,
    write_json,
)
from KA2ERSegment.errors import SessionStateError, VolumeError
from KA2ERSegment.geometry import BoolArray, Box, FloatArray, check_affine
from KA2ERSegment.prompts import MaskPrompt, Prompt, Suggestion
from KA2ERSegment.steps import Neighbours, Step

_SLAB = 8 << 20
"""Bytes of voxels that are written at once."""
_PER_STEP = 30.0
"""Seconds that a step may take where many are done again: a long journal takes longer than one answer may."""


class EngineClient:
    """One engine. Safe to use from several threads: each has its own connection, which stays open.

    Args:
        url: "http://host:port" or "https://...", whose certificate is verified.
        api_key: the engine's token.
        exchange: folder that the engine reads volumes from, where it runs on this machine for us alone.
        timeout: seconds to wait for one answer.
    """

    def __init__(self, url: str, api_key: str = "", exchange: Path | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            message = f"an engine's address must be like https://host:port, got {url!r}."
            raise EngineError(message, "protocol")
        if not api_key.isascii() or not api_key.isprintable():
            message = "an engine's key must be plain ASCII letters, digits and signs. Copy it again."
            raise EngineError(message, "auth")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.exchange = exchange
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = timeout
        self._local = threading.local()
        self._connections: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        self._sessions: weakref.WeakSet[RemoteSession] = weakref.WeakSet()
        self._beating: threading.Thread | None = None
        self._closed = threading.Event()

    def info(self) -> dict[str, Any]:
        """Version, protocol, device, names of the experts by mode, and the bundle.

        Raises:
            EngineError: of kind "protocol" where it is no engine, or of another protocol; "auth" for a wrong key.
        """
        info = read_json(self.request("GET", f"{API}/info"))
        if info.get("protocol") != PROTOCOL:
            message = (
                f"the engine must speak protocol {PROTOCOL}, it speaks {info.get('protocol')!r} (version "
                f"{info.get('version')!r}). Install the same version of KA2ERSegment on both sides."
            )
            raise EngineError(message, "protocol")
        return info

    def open(self, array_kji: npt.NDArray[Any], ijk_to_ras: npt.ArrayLike, name: str = "volume") -> RemoteSession:
        """Hand a volume over, once, and begin a session on it.

        Args:
            array_kji: (K, J, I) real numbers.
            ijk_to_ras: 4x4 affine.
            name: for this side's own use; it does not travel.

        Raises:
            VolumeError: an image that cannot be segmented.
            EngineError: "capacity" or "too large" where the engine has no room.
        """
        array = np.asarray(array_kji)
        if array.ndim != 3 or array.size == 0 or array.dtype.name not in DTYPES:
            message = f"volume {name!r} must be 3D real numbers, got {array.dtype} of shape {array.shape}."
            raise VolumeError(message)
        matrix = check_affine(ijk_to_ras)
        k, j, i = array.shape
        path = None if self.exchange is None else _file_of(self.exchange, array)
        packed = path is None and self._tls is not None  # over a network fewer bytes are quicker than fewer cycles
        file = None if path is None else path.name
        header = VolumeHeader((k, j, i), array.dtype.name, matrix, file, packed)
        headers = {
            META_HEADER: json.dumps(header.to_json(), separators=(",", ":")),
            "Content-Type": "application/octet-stream",
        }
        body: bytes | Iterator[bytes | memoryview] = b""
        if path is None:
            body = _deflated(_voxels(array)) if packed else _voxels(array)
            if not packed:
                headers["Content-Length"] = str(header.nbytes)
        try:
            answer = read_json(self.request("POST", f"{API}/session", body, headers))
        finally:
            if path is not None:
                with suppress(OSError):  # Windows: it goes with the folder, the engine still reads it
                    path.unlink()
        session = RemoteSession(self, name, (k, j, i), matrix, answer)
        self._sessions.add(session)
        self._keep_alive(number_of(answer, "liveness_timeout", 0.0))
        return session

    def close(self) -> None:
        """Close all sessions of this client, its connections, and stop its heartbeat."""
        for session in list(self._sessions):
            session.close()
        self.forget()

    def forget(self) -> None:
        """The engine is known to be gone: ask it nothing more. Journals stay."""
        self._closed.set()
        for session in list(self._sessions):
            session._gone = True
        for connection in list(self._connections):
            connection.close()

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes | memoryview] = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """One request on this thread's connection.

        Raises:
            EngineGoneError: no connection, or it broke.
            KA2ERError: what the engine refused, by the library's own classes.
        """
        connection = self._connection()
        everything = {**self._headers, **(headers or {})}
        chunked = not isinstance(body, bytes) and "Content-Length" not in everything
        if chunked:
            everything["Transfer-Encoding"] = "chunked"
        try:
            if connection.sock is None:
                connection.connect()  # sets TCP_NODELAY
            sock: socket.socket | None = connection.sock
            if sock is not None:
                sock.settimeout(self.timeout if timeout is None else timeout)
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it read everything
                connection.request(method, self._path + path, body, everything, encode_chunked=chunked)
            response = connection.getresponse()
            status, data = response.status, response.read()
        except ssl.SSLError as error:
            connection.close()
            message = f"no safe connection to the engine at {self.url}: {error.reason or error}."
            raise EngineGoneError(message) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            message = f"the engine at {self.url} does not answer: {error or type(error).__name__}."
            raise EngineGoneError(message) from error
        except BaseException:
            connection.close()
            raise
        if status != 200:
            if not isinstance(body, bytes):
                connection.close()  # the rest of the body may still be under way
            raise error_from_json(status, data)
        return data

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            if self._tls is not None:
                connection = http.client.HTTPSConnection(self._host, self._port, timeout=10, context=self._tls)
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=10, blocksize=1 << 20)
            self._local.connection = connection
            self._connections.add(connection)
        elif connection.sock is not None and _readable(connection.sock):
            connection.close()  # the other side closed it meanwhile
        return connection

    # -- heartbeat ---------------------------------------------------------------------------------------------------

    def _keep_alive(self, liveness_timeout: float) -> None:
        if liveness_timeout > 0 and self._beating is None:
            arguments = (weakref.ref(self), self._closed, liveness_timeout / 3)
            self._beating = threading.Thread(target=_beat, args=arguments, name="KA2ER heartbeat", daemon=True)
            self._beating.start()


class RemoteSession:
    """`Session` on an engine; each verb returns what it changed. Make one with `EngineClient.open`.

    Verbs wait for each other; `cancel`, `progress` and `heartbeat` may be called from any thread meanwhile. A verb
    that raises has changed nothing.
    """

    def __init__(
        self,
        client: EngineClient,
        name: str,
        shape_kji: tuple[int, int, int],
        ijk_to_ras: FloatArray,
        answer: Mapping[str, Any],
    ) -> None:
        self.client, self.name = client, name
        self.shape_kji, self.ijk_to_ras = shape_kji, ijk_to_ras
        self._lease = {LEASE_HEADER: text_of(answer, "lease")}
        self._lock = threading.RLock()
        self._busy = False
        self._gone = False
        self._steps: tuple[dict[str, Any], ...] = ()
        self._revision = -1
        self._about: dict[str, Any] = {}
        self._names: tuple[str, ...] = ()
        self._note(object_of(answer, "journal"))

    # -- verbs -------------------------------------------------------------------------------------------------------

    def select(self, name: str) -> Change:
        """As `Session.select`: prompts go to that object; it is made where there is none."""
        return self._do("select", name=name)

    def add(self, prompt: Prompt, neighbours: Neighbours = Neighbours.COMPETE) -> Change:
        """As `Session.add`: one prompt for the selected object."""
        return self._do("add", prompt=prompt.to_json(), neighbours=Neighbours(neighbours).value)

    def edit(self, mask: MaskPrompt, amend: bool = False) -> Change:
        """As `Session.edit`: the selected object's mask becomes exactly this."""
        return self._do("edit", mask=mask.to_json(), amend=amend)

    def finish(self, smoothing_mm: float = 0.0, islands: bool = True) -> Change:
        """As `Session.finish`: smoothness and islands of the selected object, without a new prediction."""
        return self._do("finish", smoothing_mm=smoothing_mm, islands=islands)

    def revise(self, steps: Sequence[Step | Mapping[str, Any]]) -> Change:
        """As `Session.revise`: the whole list of steps becomes this; `steps` holds the present one."""
        entries = [step.to_json() if isinstance(step, Step) else dict(step) for step in steps]
        return self._do("revise", _PER_STEP * len(entries), steps=entries)

    def undo(self) -> Change:
        """As `Session.undo`."""
        return self._do("undo")

    def redo(self) -> Change:
        """As `Session.redo`."""
        return self._do("redo")

    def reset(self) -> Change:
        """As `Session.reset`: drop the selected object's prompts and mask."""
        return self._do("reset")

    def lock(self, name: str | None = None) -> Change:
        """As `Session.lock`."""
        return self._do("lock", name=self.selected if name is None else name)

    def unlock(self, name: str | None = None) -> Change:
        """As `Session.unlock`."""
        return self._do("unlock", name=self.selected if name is None else name)

    def remove(self, name: str) -> Change:
        """As `Session.remove`."""
        return self._do("remove", name=name)

    def rename(self, old: str, new: str) -> Change:
        """As `Session.rename`."""
        return self._do("rename", old=old, new=new)

    def use_experts(self, names: Iterable[str] | None) -> Change:
        """As `Session.use_experts`: which experts take part from the next prompt on; None: all."""
        return self._do("use_experts", names=None if names is None else list(names))

    def give(self, saved: Mapping[str, Any]) -> Change:
        """As `Session.give`: do again what `to_json` described."""
        steps = saved.get("steps")
        seconds = _PER_STEP * len(steps) if isinstance(steps, (list, tuple)) else 0.0
        return self._do("give", seconds, saved=dict(saved))

    # -- questions ---------------------------------------------------------------------------------------------------

    def opinion(self, name: str, expert: str) -> Opinion:
        """What one expert alone answers for an object, and its share in the decision: any of `Prediction.experts`."""
        head, (probability, weight) = self._ask("opinion", 2, name=name, expert=expert)
        return Opinion(expert, affine_of(head, "ijk_to_ras"), probability, weight)

    def disagreement(self, name: str) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
        """Where the arms disagree on an object: 4x4 from sample index to RAS mm, and (K, J, I) uint8; 255 is 1."""
        head, (values,) = self._ask("disagreement", 1, name=name)
        return affine_of(head, "ijk_to_ras"), values

    def suggest(self, name: str | None = None) -> Suggestion | None:
        """Where the next click for an object (the selected one by default) is expected to help most."""
        head, _ = self._ask("suggest", 0, name=self.selected if name is None else name)
        return suggestion_from_json(head.get("suggestion"))

    def mask(self, name: str) -> tuple[Box, BoolArray]:
        """The whole mask of an object: smallest box around it, and (K, J, I) bool in it."""
        head, (mask,) = self._ask("mask", 1, name=name)
        return box_from_json(head, "box"), mask

    # -- what is known here ------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Of the objects, oldest first."""
        return self._names

    @property
    def selected(self) -> str:
        """Name of the object that prompts go to."""
        return str(self._about.get("selected", ""))

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """All that was done, oldest first, as `Step.to_json` writes it; for `revise`."""
        return self._steps

    @property
    def busy(self) -> bool:
        """Whether a verb or a question is under way."""
        return self._busy

    def to_json(self) -> dict[str, Any]:
        """As `Session.to_json`, from the journal kept here: also when the engine is gone."""
        return {**self._about, "steps": list(self._steps)}

    # -- beside the work ---------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop what is under way, from any thread: the verb raises CancelledError and has changed nothing."""
        self.client.request("POST", f"{API}/session/cancel", b"{}", self._lease, timeout=10)

    def progress(self) -> tuple[str, float | None]:
        """What the engine is doing for this session in a few words ("" for nothing), and its fraction if known."""
        answer = read_json(self.client.request("GET", f"{API}/session/progress", b"", self._lease, timeout=10))
        fraction = answer.get("fraction")
        return text_of(answer, "text"), None if fraction is None else number_of(answer, "fraction", 0.0)

    def heartbeat(self) -> None:
        """Tell the engine that we are still here; the client does so by itself."""
        self.client.request("POST", f"{API}/session/heartbeat", b"{}", self._lease, timeout=10)

    def close(self) -> None:
        """Free the engine's memory of this session. The journal stays."""
        if self._gone:
            return
        self._gone = True
        with suppress(EngineError, SessionStateError):
            self.client.request("POST", f"{API}/session/close", b"{}", self._lease, timeout=10)

    # -- how ---------------------------------------------------------------------------------------------------------

    def _do(self, verb: str, seconds: float = 0.0, /, **arguments: Any) -> Change:
        """A verb; `seconds` where it may take longer than the client waits for others."""
        with self._lock:
            head, arrays = self._call(verb, {"known": self._revision, **arguments}, seconds)
            change = change_from_head(head, arrays)
            self._note(object_of(head, "journal"))
            self._names = change.names
            return change

    def _ask(self, what: str, count: int, **arguments: Any) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        with self._lock:
            head, arrays = self._call(what, arguments)
        if len(arrays) != count:
            refuse(f"the answer to {what} must have {count} arrays", len(arrays))
        return head, arrays

    def _call(
        self, verb: str, arguments: Mapping[str, Any], seconds: float = 0.0
    ) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        headers = {**self._lease, "Content-Type": "application/json"}
        timeout = max(self.client.timeout, seconds)
        self._busy = True
        try:
            path, body = f"{API}/session/{verb}", write_json(arguments)
            return unpack_frame(self.client.request("POST", path, body, headers, timeout))
        finally:
            self._busy = False

    def _note(self, journal: Mapping[str, Any]) -> None:
        """Bring the journal up to date: the first steps stay, the others are new."""
        keep = int(number_of(journal, "keep", 0))
        if not 0 <= keep <= len(self._steps):
            refuse("a journal must keep steps that are known", keep)
        self._steps = (*self._steps[:keep], *list_of(journal, "steps"))
        self._about = object_of(journal, "about")
        self._revision = int(number_of(journal, "revision", -1))
        self._names = tuple(str(name) for name in self._about.get("objects", ()))


def _beat(client: weakref.ref[EngineClient], closed: threading.Event, interval: float) -> None:
    """Heartbeats of all open sessions of a client, until it is closed or forgotten."""
    while not closed.wait(interval):
        alive = client()
        if alive is None:
            return
        for session in list(alive._sessions):
            with suppress(EngineError):
                if not session._gone:
                    session.heartbeat()
        del alive


def _readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to read: its end."""
    try:
        if sys.platform == "win32":
            return bool(select.select([sock], [], [], 0)[0])
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True


def _voxels(array: npt.NDArray[Any]) -> Iterator[memoryview]:
    """Little-endian voxels, some slices at a time; a copy only of those that lie otherwise in memory."""
    slices = max(1, _SLAB // max(1, array[0].nbytes))
    little = array.dtype.newbyteorder("<")
    for k in range(0, len(array), slices):
        yield np.ascontiguousarray(array[k : k + slices], dtype=little).reshape(-1).view(np.uint8).data


def _deflated(parts: Iterable[memoryview]) -> Iterator[bytes]:
    pack = zlib.compressobj(1)
    for part in parts:
        if done := pack.compress(part):
            yield done
    yield pack.flush()


def _file_of(folder: Path, array: npt.NDArray[Any]) -> Path | None:
    """A new file of the voxels; None where there is no room for one: containers have little memory for files."""
    path = folder / f"{uuid.uuid4().hex}.volume"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags, 0o600), "wb") as stream:
            for part in _voxels(array):
                stream.write(part)
    except OSError:
        with suppress(OSError):
            path.unlink()
        return None
    return path
