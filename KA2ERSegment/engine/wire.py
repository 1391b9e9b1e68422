"""What travels between an engine and its clients: plain values, JSON, and arrays in frames. Needs numpy alone.

Nothing that comes over the wire is trusted: every reader here raises `MalformedError` with the reason, and no size is
believed before it is compared with a limit.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from KA2ERSegment import errors
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import BoolArray, Box, FloatArray, check_affine
from KA2ERSegment.prompts import Polarity, Suggestion

PROTOCOL = 2
"""A client and an engine of different numbers do not talk to each other."""
API = "/ka2er/v1"
LEASE_HEADER = "X-Lease-Token"
META_HEADER = "X-Meta"
EXCHANGED = re.compile(r"[0-9a-f]{32}\.volume")
"""Name of a file in the exchange folder; no other is opened."""
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
"""Of volumes; little-endian on the wire."""
MAX_JSON = 64 << 20
"""Bytes of one JSON request: the bits of many masks."""

_MAGIC = b"KA2E"
_HEAD = struct.Struct("<4sII")  # magic, protocol, bytes of the JSON that follows
_MAX_HEAD = 256 << 20


class EngineError(KA2ERError):
    """The engine answered, and not with a result.

    Args:
        message: for people.
        kind: "auth", "capacity", "lease", "malformed", "memory", "protocol", "refused", "too large" or "failed".
    """

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message)
        self.kind = kind


class EngineGoneError(EngineError):
    """The engine does not answer: its process ended, or the connection is lost. Replay the journal in a new one."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "gone")


class MalformedError(EngineError):
    """Bytes that are not what the protocol says."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "malformed")


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ObjectChange:
    """What one verb did to one object.

    Args:
        name: of the object.
        box: half-open, on the volume's own grid: the mask differs nowhere else. Of size 0 where the mask is as before.
        mask: (K, J, I) bool, the new mask inside `box`.
        extent: smallest box around the whole mask; of size 0 where it is empty.
        voxels: of the whole mask.
        quality: Dice to expect, 0..1; None where there is no prediction.
        shares: mean weight of each expert inside the mask, by its name in `Prediction.experts`; empty where there is no
            prediction.
        exists: false where the object was removed.
    """

    name: str
    box: Box
    mask: BoolArray = field(repr=False)
    extent: Box
    voxels: int
    quality: float | None
    shares: Mapping[str, float]
    exists: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What one verb did to a session.

    Args:
        objects: whose mask, quality or existence changed.
        box: around all changes, on the volume's own grid.
        selected: name of the object that prompts go to.
        names: of all objects, oldest first.
        can_undo: whether there is something to take back.
        can_redo: whether there is something to bring back.
        seconds: that it took inside the engine, waiting for others left out.
        network: seconds of these in the network.
    """

    objects: tuple[ObjectChange, ...]
    box: Box
    selected: str
    names: tuple[str, ...]
    can_undo: bool
    can_redo: bool
    seconds: float
    network: float = 0.0

    def of(self, name: str) -> ObjectChange | None:
        """The change of one object; None where it did not change."""
        return next((change for change in self.objects if change.name == name), None)


@dataclass(frozen=True, slots=True, eq=False)
class Opinion:
    """One expert on one object, on the network's own grid: linear between the samples, 0 beyond them.

    Args:
        expert: its name in `Prediction.experts`.
        ijk_to_ras: 4x4 from sample index to RAS mm.
        probability: (K, J, I) uint8, 255 is 1: what the model answers with this expert alone.
        weight: (K, J, I) uint8, 255 is 1: its share in the decision of its mode.
    """

    expert: str
    ijk_to_ras: FloatArray = field(repr=False)
    probability: npt.NDArray[np.uint8] = field(repr=False)
    weight: npt.NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class VolumeHeader:
    """What an engine is told of a volume before its voxels. The name of a volume never travels.

    Args:
        shape_kji: its shape.
        dtype: one of DTYPES.
        ijk_to_ras: 4x4 affine.
        file: name of a file in the exchange folder; None where the voxels are the request's body.
        packed: the body is one zlib stream.
    """

    shape_kji: tuple[int, int, int]
    dtype: str
    ijk_to_ras: FloatArray
    file: str | None = None
    packed: bool = False

    @property
    def nbytes(self) -> int:
        """Of all voxels."""
        return math.prod(self.shape_kji) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`."""
        return {
            "shape_kji": list(self.shape_kji),
            "dtype": self.dtype,
            "ijk_to_ras": np.asarray(self.ijk_to_ras).tolist(),
            "file": self.file,
            "packed": self.packed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], max_voxels: int) -> VolumeHeader:
        """MalformedError for anything else; EngineError "too large" for more voxels than the engine takes."""
        shape = _whole(data, "shape_kji", 3)
        dtype, file, packed = data.get("dtype"), data.get("file"), data.get("packed", False)
        if min(shape) < 1:
            refuse("shape_kji must be above zero", shape)
        if math.prod(shape) > max_voxels:
            message = f"a volume must have at most {max_voxels} voxels here, got shape KJI {shape}. Crop it."
            raise EngineError(message, "too large")
        if dtype not in DTYPES:
            refuse(f"dtype must be one of {', '.join(DTYPES)}", dtype)
        if file is not None and not (isinstance(file, str) and EXCHANGED.fullmatch(file)):
            refuse("file must be 32 hexadecimal digits and '.volume'", file)
        if not isinstance(packed, bool):
            refuse("packed must be true or false", packed)
        return cls((shape[0], shape[1], shape[2]), dtype, affine_of(data, "ijk_to_ras"), file, packed)


# --- errors -----------------------------------------------------------------------------------------------------------

_STATUS = {
    "auth": 401,
    "cancelled": 409,
    "capacity": 503,
    "failed": 500,
    "forbidden": 403,
    "lease": 410,
    "malformed": 400,
    "memory": 507,
    "protocol": 400,
    "refused": 422,
    "too large": 413,
}


def error_to_json(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error; of one that nobody expected no more than its class."""
    if isinstance(error, errors.CancelledError):
        kind = "cancelled"
    elif isinstance(error, EngineError):
        kind = error.kind
    elif isinstance(error, KA2ERError):
        kind = "refused"
    else:
        text = f"the engine failed with {type(error).__name__}. Its log may say more."
        return 500, {"detail": text, "kind": "failed", "error": "EngineError"}
    return _STATUS.get(kind, 500), {"detail": str(error), "kind": kind, "error": type(error).__name__}


def error_from_json(status: int, body: bytes) -> KA2ERError:
    """The error that `error_to_json` described: the library's own class where it has one."""
    try:
        data = read_json(body)
    except MalformedError:
        data = {}
    text, kind, name = data.get("detail"), data.get("kind"), data.get("error")
    if not isinstance(text, str) or not isinstance(kind, str):
        text = f"the engine's address answered with HTTP status {status}. Is it a KA2ERSegment engine?"
        return EngineError(text, "protocol")
    if kind in ("cancelled", "refused") and isinstance(name, str):
        found = getattr(errors, name, None)
        if isinstance(found, type) and issubclass(found, KA2ERError):
            return found(text)
    return EngineError(text, kind)


def refuse(what: str, got: object) -> NoReturn:
    """MalformedError that says what must hold and what was given, cut short."""
    message = f"{what}, got {reprlib.repr(got)}."
    raise MalformedError(message)


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(data: bytes | str) -> dict[str, Any]:
    """A JSON object; MalformedError for anything else, NaN and infinity among it."""
    try:
        value = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        message = f"the request must be JSON: {error}."
        raise MalformedError(message) from error
    if not isinstance(value, dict):
        refuse("the request must be a JSON object", value)
    return value


def write_json(value: Mapping[str, Any]) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("utf-8")


def _no_number(constant: str) -> None:
    message = f"{constant} is no number"
    raise ValueError(message)


def text_of(data: Mapping[str, Any], key: str) -> str:
    """A member that must be text."""
    value = data.get(key)
    if not isinstance(value, str):
        refuse(f"{key!r} must be text", value)
    return value


def flag_of(data: Mapping[str, Any], key: str, default: bool) -> bool:
    """A member that must be true or false."""
    value = data.get(key, default)
    if not isinstance(value, bool):
        refuse(f"{key!r} must be true or false", value)
    return value


def number_of(data: Mapping[str, Any], key: str, default: float) -> float:
    """A member that must be a finite number."""
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e18:
        refuse(f"{key!r} must be a finite number", value)
    return float(value)


def list_of(data: Mapping[str, Any], key: str) -> list[Any]:
    """A member that must be a list."""
    value = data.get(key)
    if not isinstance(value, list):
        refuse(f"{key!r} must be a list", value)
    return value


def object_of(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A member that must be an object."""
    value = data.get(key)
    if not isinstance(value, dict):
        refuse(f"{key!r} must be an object", value)
    return value


def affine_of(data: Mapping[str, Any], key: str) -> FloatArray:
    """A member that must be a 4x4 matrix to RAS mm that can be used."""
    try:
        return check_affine(np.array(data.get(key), dtype=np.float64))
    except (ValueError, TypeError) as error:
        message = f"{key}: {error}"
        raise MalformedError(message) from error


def _whole(data: Mapping[str, Any], key: str, count: int) -> tuple[int, ...]:
    value = data.get(key)
    if not isinstance(value, list) or len(value) != count:
        refuse(f"{key!r} must be {count} whole numbers", value)
    if any(isinstance(n, bool) or not isinstance(n, int) or abs(n) > 1 << 31 for n in value):
        refuse(f"{key!r} must be {count} whole numbers", value)
    return tuple(value)


def box_to_json(box: Box) -> list[int]:
    """Six numbers: start and stop, IJK."""
    return [*box.start, *box.stop]


def box_from_json(data: Mapping[str, Any], key: str) -> Box:
    """The box that `box_to_json` described."""
    a, b, c, d, e, f = _whole(data, key, 6)
    return Box((a, b, c), (d, e, f))


# --- frames -----------------------------------------------------------------------------------------------------------


def pack_frame(head: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]] = (), *, level: int = 1) -> bytes:
    """One JSON object and some arrays as bytes. Bool arrays travel as bits.

    Args:
        head: the object; its member "arrays" is set here.
        arrays: of bool or uint8.
        level: of zlib; 0 leaves uint8 arrays as they are.
    """
    entries: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for array in arrays:
        raw = np.packbits(array).tobytes() if array.dtype == np.bool_ else np.ascontiguousarray(array).tobytes()
        small = level > 0 or array.dtype == np.bool_
        part = zlib.compress(raw, max(level, 1)) if small else raw
        entries.append({"shape": list(array.shape), "dtype": str(array.dtype), "zlib": small, "bytes": len(part)})
        parts.append(part)
    text = write_json({**head, "arrays": entries})
    return b"".join((_HEAD.pack(_MAGIC, PROTOCOL, len(text)), text, *parts))


def unpack_frame(data: bytes, max_bytes: int = 1 << 33) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """The object and the arrays of `pack_frame`.

    Args:
        data: the frame.
        max_bytes: of all arrays together.

    Raises:
        MalformedError: damaged, larger, or of another protocol.
    """
    if len(data) < _HEAD.size:
        refuse("a frame must have a head", data[:16])
    magic, protocol, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        refuse(f"a frame must begin with {_MAGIC!r}", data[:8])
    if protocol != PROTOCOL:
        message = (
            f"a frame must be of protocol {PROTOCOL}, got one of {protocol}. "
            "Install the same version of KA2ERSegment on both sides."
        )
        raise MalformedError(message)
    if length > min(_MAX_HEAD, len(data) - _HEAD.size):
        refuse("a frame's head must be as long as it says", length)
    at = _HEAD.size + length
    head = read_json(data[_HEAD.size : at])
    arrays: list[npt.NDArray[Any]] = []
    for entry in list_of(head, "arrays"):
        if not isinstance(entry, dict):
            refuse("an array must be described by an object", entry)
        shape, size = _whole(entry, "shape", 3), _whole({"bytes": [entry.get("bytes")]}, "bytes", 1)[0]
        dtype, voxels = entry.get("dtype"), math.prod(shape)
        if dtype not in ("bool", "uint8") or min(shape) < 0 or not 0 <= size <= len(data) - at:
            refuse("an array must be of bool or uint8 and lie in its frame", entry)
        wanted = (voxels + 7) // 8 if dtype == "bool" else voxels
        max_bytes -= voxels
        if max_bytes < 0:
            refuse("the arrays of a frame must be smaller", shape)
        part: bytes | memoryview = memoryview(data)[at : at + size]
        at += size
        if flag_of(entry, "zlib", False):
            part = inflate(part, wanted)
        if len(part) != wanted:
            refuse(f"an array of shape {shape} must have {wanted} bytes", len(part))
        flat = np.frombuffer(part, dtype=np.uint8)
        if dtype == "bool":
            arrays.append(np.unpackbits(flat, count=voxels).view(np.bool_).reshape(shape))
        else:
            arrays.append(flat.reshape(shape))
    if at != len(data):
        refuse("a frame must end with its last array", len(data) - at)
    return head, arrays


def inflate(data: bytes | memoryview, size: int) -> bytes:
    """Undo zlib, never to more than `size` bytes (and one, so that more can be told)."""
    unpack = zlib.decompressobj()
    try:
        return unpack.decompress(data, size + 1)
    except zlib.error as error:
        message = f"compressed bytes are damaged: {error}."
        raise MalformedError(message) from error


# --- changes in frames ------------------------------------------------------------------------------------------------


def change_to_head(change: Change) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """JSON and arrays of a change, for `pack_frame`."""
    head = {
        "box": box_to_json(change.box),
        "selected": change.selected,
        "names": list(change.names),
        "can_undo": change.can_undo,
        "can_redo": change.can_redo,
        "seconds": change.seconds,
        "network": change.network,
        "objects": [
            {
                "name": one.name,
                "box": box_to_json(one.box),
                "extent": box_to_json(one.extent),
                "voxels": one.voxels,
                "quality": one.quality,
                "shares": dict(one.shares),
                "exists": one.exists,
            }
            for one in change.objects
        ],
    }
    return head, [one.mask for one in change.objects]


def change_from_head(head: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> Change:
    """The change that `change_to_head` described."""
    entries = list_of(head, "objects")
    if len(entries) != len(arrays):
        refuse("a change must have one array for each object", len(arrays))
    names = list_of(head, "names")
    if not all(isinstance(name, str) for name in names):
        refuse("'names' must be text", names)
    return Change(
        objects=tuple(_object_change(entry, mask) for entry, mask in zip(entries, arrays, strict=True)),
        box=box_from_json(head, "box"),
        selected=text_of(head, "selected"),
        names=tuple(names),
        can_undo=flag_of(head, "can_undo", False),
        can_redo=flag_of(head, "can_redo", False),
        seconds=number_of(head, "seconds", 0.0),
        network=number_of(head, "network", 0.0),
    )


def _object_change(entry: object, mask: npt.NDArray[Any]) -> ObjectChange:
    if not isinstance(entry, dict):
        refuse("an object's change must be an object", entry)
    box = box_from_json(entry, "box")
    if mask.dtype != np.bool_ or mask.shape != box.shape_kji:
        refuse(f"a mask must be bool of shape KJI {box.shape_kji}", (str(mask.dtype), mask.shape))
    shares = object_of(entry, "shares")
    return ObjectChange(
        name=text_of(entry, "name"),
        box=box,
        mask=mask,
        extent=box_from_json(entry, "extent"),
        voxels=_whole({"voxels": [entry.get("voxels")]}, "voxels", 1)[0],
        quality=None if entry.get("quality") is None else number_of(entry, "quality", 0.0),
        shares={str(arm): number_of(shares, arm, 0.0) for arm in shares},
        exists=flag_of(entry, "exists", True),
    )


def suggestion_to_json(suggestion: Suggestion | None) -> dict[str, Any] | None:
    """Plain data for `suggestion_from_json`."""
    if suggestion is None:
        return None
    return {
        "ras": list(suggestion.ras),
        "polarity": suggestion.polarity.value,
        "expected_gain": suggestion.expected_gain,
    }


def suggestion_from_json(data: object) -> Suggestion | None:
    """The suggestion that `suggestion_to_json` described."""
    if data is None:
        return None
    if not isinstance(data, dict) or data.get("polarity") not in [polarity.value for polarity in Polarity]:
        refuse("a suggestion must have ras, polarity and expected_gain", data)
    ras = list_of(data, "ras")
    if len(ras) != 3:
        refuse("ras must be three numbers", ras)
    r, a, s = (number_of({"ras": x}, "ras", 0.0) for x in ras)
    return Suggestion((r, a, s), Polarity(data["polarity"]), number_of(data, "expected_gain", 0.0))


def around(boxes: Iterable[Box]) -> Box:
    """Smallest box around some; of size 0 where all are."""
    box = Box((0, 0, 0), (0, 0, 0))
    for one in boxes:
        box = box.union(one)
    return box
