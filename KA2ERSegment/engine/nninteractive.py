"""nnInteractive's HTTP protocol, version 2, so that viewers that speak it can use our model unchanged.

Its arrays have one channel and three spatial axes in an order that it leaves open, and coordinates follow the array.
Here these are our K, J and I. It knows no orientation: an image is taken to lie as scanners and ITK store it, I
towards the left, J towards the back, K towards the head. One session has one object; every prompt builds on the last.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import blosc2  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from KA2ERSegment.engine.app import Engine, Handler, answered, body_of, lease_of
from KA2ERSegment.engine.wire import (
    DTYPES,
    MAX_JSON,
    META_HEADER,
    EngineError,
    MalformedError,
    flag_of,
    list_of,
    object_of,
    read_json,
    refuse,
)
from KA2ERSegment.engine.workplaces import NOTHING, Workplace, difference
from KA2ERSegment.errors import PromptError
from KA2ERSegment.geometry import BoolArray, Box, FloatArray, check_affine
from KA2ERSegment.prediction import PackedMask
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, MaskPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.session import Session
from KA2ERSegment.steps import Step
from KA2ERSegment.volume import Volume

VERSION = "2.6.0"
"""Of the client package that this was tested with; clients compare it with what they need."""
UNDOS = 64
MAX_PROMPTS = 32
"""A drawn mask that needs more slices than this is refused."""
MAX_CORNERS = 20_000

_MAGIC = b"NNIA"
_FIXED = struct.Struct("<4sBBBB")  # magic, version, codec, number of axes, length of the dtype's name
_CHUNK = struct.Struct("<QQ")  # bytes before and after compression
_CODECS = {1: blosc2.Codec.ZSTD, 2: blosc2.Codec.LZ4}
_MASKS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_FLOATS = ("float16", "float32", "float64")


@dataclass
class Drawing:
    """What this protocol adds to a session.

    Args:
        buffer_shape: of the client's target buffer, (K, J, I); None before it has one.
        buffer_dtype: of that buffer.
        shown: the mask that lies in it, on the canonical volume; None: empty.
        waiting: prompts given without a prediction.
        units: the steps before each interaction, for undo.
        autozoom: what the client asked for; our sessions choose their zoom themselves.
    """

    buffer_shape: tuple[int, ...] | None = None
    buffer_dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    shown: PackedMask | None = None
    waiting: list[Prompt] = field(default_factory=list)
    units: list[tuple[Step, ...]] = field(default_factory=list)
    autozoom: bool = True


def routes(engine: Engine) -> list[Route]:
    """The protocol's routes, at the root."""
    peer = Peer(engine)
    gets: dict[str, Handler] = {
        "healthz": peer.healthz,
        "capabilities": peer.capabilities,
        "lease_status": peer.lease_status,
    }
    posts: dict[str, Handler] = {
        "claim": peer.claim,
        "release": peer.release,
        "heartbeat": peer.heartbeat,
        "set_image": peer.set_image,
        "set_target_buffer": peer.set_target_buffer,
        "set_do_autozoom": peer.set_do_autozoom,
        "reset_interactions": peer.reset,
        "undo": peer.undo,
        "predict": peer.predict,
        "add_point_interaction": peer.json_prompt(_point),
        "add_bbox_interaction": peer.json_prompt(_box),
        "add_scribble_interaction": peer.mask_prompt,
        "add_lasso_interaction": peer.mask_prompt,
        "add_initial_seg_interaction": peer.initial_mask,
    }

    def route(name: str, handler: Handler, method: str) -> Route:
        return Route(f"/{name}", answered(handler, lambda status: 400 if status == 422 else status), methods=[method])

    return [
        *(route(name, handler, "GET") for name, handler in gets.items()),
        *(route(name, handler, "POST") for name, handler in posts.items()),
    ]


class Peer:
    """The protocol's verbs on our sessions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- leases ------------------------------------------------------------------------------------------------------

    async def healthz(self, _request: Request) -> Response:
        """Whether the engine is there."""
        return JSONResponse({"ok": True})

    async def capabilities(self, _request: Request) -> Response:
        """What the model understands; channel numbers mean nothing here, but clients read them."""
        size = self._engine.bundle.plans.patch_size
        licence = self._engine.bundle.folder / "LICENSE"
        lines = licence.read_text(encoding="utf-8").split("\n\n")[0].split() if licence.is_file() else []
        return JSONResponse(
            {
                "supported_interactions": dict.fromkeys(("points", "bbox2d", "bbox3d", "scribble", "lasso"), True),
                "channel_mapping": {
                    "prev_seg": 0,
                    "bbox2d": [1, 2],
                    "bbox3d": [1, 2],
                    "lasso": [1, 2],
                    "points": [3, 4],
                    "scribble": [5, 6],
                },
                "num_interaction_channels": 7,
                "supports_initial_label": True,
                "supports_zero_shot_label_refinement": True,
                "preferred_scribble_thickness": [2, 2, 2],
                "interaction_decay": 1.0,
                "patch_size": [size, size, size],
                "do_autozoom": True,
                "inference_session_version": VERSION,
                "license": " ".join(lines) or "!!MISSING!!",
                "supports_undo": True,
            }
        )

    async def claim(self, _request: Request) -> Response:
        """A lease."""
        places = self._engine.places
        place = places.claim()
        place.extra = Drawing()
        return JSONResponse(
            {
                "lease_token": place.lease,
                "idle_timeout_seconds": places.idle_timeout,
                "liveness_timeout_seconds": places.liveness_timeout,
                "max_sessions": places.max_sessions,
            }
        )

    async def release(self, request: Request) -> Response:
        """End a lease; fine where there is none."""
        self._engine.places.release(lease_of(request))
        return JSONResponse({"released": True})

    async def heartbeat(self, request: Request) -> Response:
        """A sign of life."""
        place = self._engine.places.get(lease_of(request), active=False)
        return JSONResponse({"remaining_seconds": self._engine.places.remaining(place)})

    async def lease_status(self, request: Request) -> Response:
        """How much time is left."""
        places = self._engine.places
        place = places.peek(lease_of(request))
        return JSONResponse({"remaining_seconds": places.remaining(place), "idle_timeout_seconds": places.idle_timeout})

    # -- image and buffer --------------------------------------------------------------------------------------------

    async def set_image(self, request: Request) -> Response:
        """A volume in."""
        place, drawing = self._place(request)
        limit = self._engine.max_voxels
        affine = _affine(object_of({"image_properties": {}, **_meta(request)}, "image_properties"))
        body = await body_of(request, 8 * limit + 4096)

        def read() -> Volume:
            array = unpack(body, limit, (*DTYPES,))
            if array.ndim != 4 or array.shape[0] != 1:
                refuse("an image must have one channel and three axes, (1, K, J, I)", array.shape)
            return Volume(array[0], affine)

        volume = await run_in_threadpool(read)

        def work() -> None:
            place.session.set_volume(volume)
            place.extra = Drawing(autozoom=drawing.autozoom)

        await self._engine.run(request, place, work)
        return JSONResponse({"original_image_shape": [1, *volume.shape_kji]})

    async def set_target_buffer(self, request: Request) -> Response:
        """The client has a new, empty buffer of that shape and kind."""
        place, drawing = self._place(request)
        data = read_json(await body_of(request, MAX_JSON))
        shape, dtype = _whole(list_of(data, "shape")), data.get("dtype")
        if dtype not in _MASKS:
            refuse("the target buffer's dtype must be bool or an integer", dtype)

        def work() -> None:
            if shape != place.session.volume.shape_kji:
                refuse(f"the target buffer must have the image's shape {place.session.volume.shape_kji}", shape)
            drawing.buffer_shape, drawing.buffer_dtype, drawing.shown = shape, np.dtype(str(dtype)), None

        await self._engine.run(request, place, work)
        return JSONResponse({})

    async def set_do_autozoom(self, request: Request) -> Response:
        """Noted, without effect: a session looks as far as the object needs."""
        _, drawing = self._place(request)
        data = read_json(await body_of(request, MAX_JSON))
        if "do_autozoom" not in data:
            refuse("'do_autozoom' must be given", list(data))
        drawing.autozoom = flag_of(data, "do_autozoom", True)
        return JSONResponse({})

    async def reset(self, request: Request) -> Response:
        """Begin anew; cannot be undone."""
        place, drawing = self._place(request)

        def work() -> None:
            place.session.volume  # noqa: B018 - SessionStateError without one
            place.session.reset()
            drawing.shown, drawing.waiting, drawing.units = None, [], []

        await self._engine.run(request, place, work)
        return JSONResponse({})

    # -- prompts -----------------------------------------------------------------------------------------------------

    def json_prompt(self, read: Callable[[Mapping[str, Any], Volume], Prompt]) -> Handler:
        """The route of a prompt that is described in JSON."""

        async def handler(request: Request) -> Response:
            place, drawing = self._place(request)
            data = read_json(await body_of(request, MAX_JSON))
            predict = flag_of(data, "run_prediction", True)
            return await self._interaction(
                request, place, drawing, lambda volume: [read(data, volume)], predict=predict
            )

        return handler

    async def mask_prompt(self, request: Request) -> Response:
        """A scribble or a filled lasso, drawn as voxels."""
        place, drawing = self._place(request)
        meta = _meta(request)
        predict, positive = flag_of(meta, "run_prediction", True), _included(meta)
        body = await body_of(request, 8 * self._engine.max_voxels + 4096)
        array = await run_in_threadpool(unpack, body, self._engine.max_voxels, (*_MASKS, *_FLOATS))

        def read(volume: Volume) -> list[Prompt]:
            box, mask = _placed(array, meta.get("interaction_bbox"), volume)
            return drawn(box, mask, volume, positive)

        return await self._interaction(request, place, drawing, read, predict=predict)

    async def initial_mask(self, request: Request) -> Response:
        """Begin anew, from a mask."""
        place, drawing = self._place(request)
        predict = flag_of(_meta(request), "run_prediction", False)
        body = await body_of(request, 8 * self._engine.max_voxels + 4096)
        array = await run_in_threadpool(unpack, body, self._engine.max_voxels, (*_MASKS, *_FLOATS))

        def work(session: Session) -> None:
            if array.shape != session.volume.shape_kji:
                refuse(f"the segmentation must have the image's shape {session.volume.shape_kji}", array.shape)
            mask = array != 0
            session.reset()
            if mask.any():
                prompt = MaskPrompt.from_array(mask, session.volume)
                session.add(prompt) if predict else session.edit(prompt)
            own = Box.of_shape(mask.shape)
            drawing.shown = PackedMask.pack(own, session.volume.to_canonical(mask)) if mask.any() else None
            drawing.waiting = []

        return await self._engine.run(request, place, lambda: _unit(place, drawing, work, ran=predict))

    async def predict(self, request: Request) -> Response:
        """Predict from the prompts that wait."""
        place, drawing = self._place(request)
        return await self._interaction(request, place, drawing, lambda _volume: [], predict=True)

    async def undo(self, request: Request) -> Response:
        """Take back the last interaction."""
        place, drawing = self._place(request)

        def work() -> Response:
            session = place.session
            if drawing.waiting:
                drawing.waiting = drawing.waiting[:-1]
                return _answer(None, NOTHING, ran=True)
            if not drawing.units:
                return _answer(None, NOTHING, ran=False)
            session.revise(drawing.units[-1])
            drawing.units = drawing.units[:-1]
            return _shown(session, drawing, ran=True)

        return await self._engine.run(request, place, work)

    async def _interaction(
        self,
        request: Request,
        place: Workplace,
        drawing: Drawing,
        read: Callable[[Volume], list[Prompt]],
        *,
        predict: bool,
    ) -> Response:
        def work() -> Response:
            session = place.session
            prompts = read(session.volume)
            for prompt in prompts:
                prompt.region(session.volume)  # PromptError where it lies outside
            if not predict:
                drawing.waiting = [*drawing.waiting, *prompts]
                return _answer(None, NOTHING, ran=False)
            everything = [*drawing.waiting, *prompts]
            if not everything:
                return _answer(None, NOTHING, ran=False)

            def add(session: Session) -> None:
                steps = [Step(session.selected, prompt) for prompt in everything]
                session.revise([*session.steps, *steps])  # all of them or none, in one state of the history
                drawing.waiting = []

            return _unit(place, drawing, add, ran=True)

        return await self._engine.run(request, place, work)

    def _place(self, request: Request) -> tuple[Workplace, Drawing]:
        place = self._engine.places.get(lease_of(request))
        if not isinstance(place.extra, Drawing):
            message = "this lease is of another protocol. Claim one with POST /claim."
            raise EngineError(message, "lease")
        return place, place.extra


def _unit(place: Workplace, drawing: Drawing, work: Callable[[Session], None], *, ran: bool) -> Response:
    """Do something as one undoable unit; where it is refused, the session is as before."""
    session = place.session
    before = session.steps
    try:
        work(session)
    except BaseException:
        if session.steps != before:
            session.revise(before)
        raise
    drawing.units = [*drawing.units, before][-UNDOS:]
    return _shown(session, drawing, ran=ran)


def _shown(session: Session, drawing: Drawing, *, ran: bool) -> Response:
    """What differs between the mask and what the client's buffer holds."""
    prediction = session.prediction
    packed = prediction.packed if prediction is not None else None
    if not ran or drawing.buffer_shape is None:
        return _answer(None, NOTHING, ran=ran)
    box, mask = difference(drawing.shown, packed, session.volume)
    drawing.shown = packed
    return _answer(mask.astype(drawing.buffer_dtype), box, ran=ran)


def _answer(values: npt.NDArray[Any] | None, box: Box, *, ran: bool) -> Response:
    meta: dict[str, Any] = {"ran_prediction": ran, "bbox": None}
    body = b""
    if values is not None and box.size:
        i, j, k = zip(box.start, box.stop, strict=True)
        meta |= {"bbox": [k, j, i], "dtype": values.dtype.name, "shape": list(values.shape)}
        body = pack(values)
    headers = {META_HEADER: json.dumps(meta, separators=(",", ":"))}
    return Response(body, media_type="application/octet-stream", headers=headers)


# --- what requests say ------------------------------------------------------------------------------------------------


def _meta(request: Request) -> dict[str, Any]:
    text = request.headers.get(META_HEADER)
    return read_json(text) if text is not None else {}


def _included(data: Mapping[str, Any]) -> bool:
    if "include_interaction" not in data:
        refuse("'include_interaction' must be given", list(data))
    return flag_of(data, "include_interaction", True)


def _polarity(data: Mapping[str, Any]) -> Polarity:
    return Polarity.POSITIVE if _included(data) else Polarity.NEGATIVE


def _numbers(value: object, count: int) -> list[float]:
    fine = isinstance(value, list) and len(value) == count
    if not isinstance(value, list) or not fine:
        refuse(f"{count} numbers are needed", value)
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not abs(n) < 1e9 for n in value):
        refuse(f"{count} finite numbers are needed", value)
    return [float(n) for n in value]


def _whole(value: object) -> tuple[int, int, int]:
    a, b, c = _numbers(value, 3)
    if any(n != round(n) or n < 1 for n in (a, b, c)):
        refuse("three whole numbers above zero are needed", value)
    return round(a), round(b), round(c)


def _point(data: Mapping[str, Any], volume: Volume) -> Prompt:
    k, j, i = (round(x) for x in _numbers(data.get("coordinates"), 3))
    return PointPrompt.from_ijk((i, j, k), volume, _polarity(data))


def _box(data: Mapping[str, Any], volume: Volume) -> Prompt:
    """Half-open in array order; where it leaves the image it is clipped, and never thinner than a voxel."""
    sides = list_of(data, "bbox_coords")
    if len(sides) != 3:
        refuse("'bbox_coords' must be three pairs", sides)
    start, stop = [], []
    for side, size in zip(sides, volume.shape_kji, strict=True):
        low, high = (round(x) for x in _numbers(side, 2))
        if high <= low:
            refuse("each pair of 'bbox_coords' must have its start below its stop", side)
        if high <= 0 or low >= size:
            message = f"the box must meet the image; [{low}, {high}) lies outside [0, {size})."
            raise PromptError(message)
        start.append(max(low, 0))
        stop.append(min(high, size))
    (k0, j0, i0), (k1, j1, i1) = start, stop
    return BoxPrompt.from_ijk((i0, j0, k0), (i1, j1, k1), volume, _polarity(data))


def _placed(array: npt.NDArray[Any], bbox: object, volume: Volume) -> tuple[Box, BoolArray]:
    """A drawn mask and where it lies; without a box it is as large as the image."""
    if bbox is None:
        if array.shape != volume.shape_kji:
            refuse(f"the drawn mask must have the image's shape {volume.shape_kji}", array.shape)
        box = volume.box
    else:
        if not isinstance(bbox, list) or len(bbox) != 3:
            refuse("'interaction_bbox' must be three pairs", bbox)
        pairs = [[round(x) for x in _numbers(side, 2)] for side in bbox]
        (k0, k1), (j0, j1), (i0, i1) = pairs
        box = Box((i0, j0, k0), (i1, j1, k1))
        if box.size == 0 or box.intersect(volume.box) != box or array.shape != box.shape_kji:
            refuse(f"'interaction_bbox' must lie in the image and fit the drawn mask's shape {array.shape}", bbox)
    mask = np.asarray(array != 0, dtype=bool)
    around = Box.around(mask)
    if around is None:
        message = "the drawn mask must mark at least one voxel, got none. Draw again."
        raise PromptError(message)
    return around.shift(box.start), around.crop(mask)


def _affine(properties: Mapping[str, Any]) -> FloatArray:
    """From the spacing, in the order of the array's axes. A client of ours may give "ijk_to_ras" as well."""
    if "ijk_to_ras" in properties:
        rows = list_of(properties, "ijk_to_ras")
        return check_affine(np.array([_numbers(row, 4) for row in rows]))
    k, j, i = _numbers(properties.get("spacing", [1.0, 1.0, 1.0]), 3)
    return check_affine(np.diag([-i, -j, k, 1.0]))


# --- drawn masks ------------------------------------------------------------------------------------------------------


def drawn(box: Box, mask: BoolArray, volume: Volume, positive: bool) -> list[Prompt]:
    """Prompts that cover exactly the voxels of a drawn mask.

    Args:
        box: where it lies.
        mask: (K, J, I) bool of that box's shape, at least one voxel.
        volume: the image.
        positive: whether the object is there.
    """
    if not positive:
        return [MaskPrompt(mask, box, volume.ijk_to_ras, volume.shape_kji, Polarity.NEGATIVE)]
    axis = int(np.argmin(mask.shape))  # of the array: the drawing's slices lie across it
    prompts: list[Prompt] = []
    for first, last in _same_slices(np.moveaxis(mask, axis, 0)):
        corners = outline(np.take(mask, first, axis=axis))
        middle = np.full(len(corners), (first + last) / 2)
        kji = np.insert(corners, axis, middle, axis=1) + np.array(box.start[::-1])
        thickness = (last - first + 1) * volume.spacing[2 - axis]
        prompts.append(LassoPrompt.from_ijk(kji[:, ::-1], volume, thickness=thickness))
    if len(prompts) > MAX_PROMPTS:
        message = f"a drawn mask must have at most {MAX_PROMPTS} different slices, got {len(prompts)}. Draw on fewer."
        raise PromptError(message)
    return prompts


def _same_slices(slices: BoolArray) -> Iterator[tuple[int, int]]:
    """First and last of each run of equal slices that are not empty."""
    first = 0
    for n in range(1, len(slices) + 1):
        if n == len(slices) or not np.array_equal(slices[n], slices[first]):
            if slices[first].any():
                yield first, n - 1
            first = n


def outline(mask: BoolArray) -> npt.NDArray[np.float64]:
    """Corners (n, 2) of one closed polygon along pixel edges that holds the true pixels of a 2D mask, and no others.

    Pixels have their centres at whole numbers. Holes and separate parts are joined by bridges along pixel edges, which
    the outline passes once in each direction: by the even-odd rule they do not count.
    """
    loops = [_without_straight(loop) for loop in _loops(mask)]
    home = loops[0][0]
    corners = [*loops[0], home]
    for loop in loops[1:]:
        bridge = (home[0], loop[0][1])
        corners += [bridge, *loop, loop[0], bridge, home]
    if len(corners) > MAX_CORNERS:
        message = (
            f"a drawn mask's outline must have at most {MAX_CORNERS} corners, got {len(corners)}. Draw it simpler."
        )
        raise PromptError(message)
    return np.array(corners, dtype=np.float64) - 0.5


Corner = tuple[int, int]


def _loops(mask: BoolArray) -> list[list[Corner]]:
    """The border of a 2D mask as closed loops of pixel corners; each edge runs with the inside on the same hand."""
    padded = np.pad(mask, 1).astype(np.int8)
    edges: dict[Corner, list[Corner]] = {}

    def add(there: BoolArray, start: Corner, stop: Corner) -> None:
        for r, c in np.argwhere(there).tolist():
            edges.setdefault((r + start[0], c + start[1]), []).append((r + stop[0], c + stop[1]))

    down, right = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    add(down > 0, (0, 1), (0, 0))  # a pixel begins below this edge
    add(down < 0, (0, 0), (0, 1))
    add(right > 0, (0, 0), (1, 0))
    add(right < 0, (1, 0), (0, 0))
    loops = []
    while edges:
        first = next(iter(edges))
        loop, at = [first], first
        while True:
            after = edges[at].pop()
            if not edges[at]:
                del edges[at]
            at = after
            if at == first:
                break
            loop.append(at)
        loops.append(loop)
    return loops


def _without_straight(loop: list[Corner]) -> list[Corner]:
    """Only the corners where the outline turns."""
    turns = []
    for n, (r, c) in enumerate(loop):
        (r0, c0), (r1, c1) = loop[n - 1], loop[(n + 1) % len(loop)]
        if (r - r0, c - c0) != (r1 - r, c1 - c):
            turns.append((r, c))
    return turns


# --- packed arrays ----------------------------------------------------------------------------------------------------


def pack(array: npt.NDArray[Any]) -> bytes:
    """An array in the protocol's form: a head, then compressed chunks."""
    array = np.ascontiguousarray(array)
    raw = array.reshape(-1).view(np.uint8)
    name = array.dtype.name.encode("ascii")
    head = _FIXED.pack(_MAGIC, 1, 1, array.ndim, len(name)) + name + struct.pack(f"<{array.ndim}q", *array.shape)
    chunks = [raw[at : at + (1 << 30)] for at in range(0, raw.nbytes, 1 << 30)]
    parts = [head, struct.pack("<I", len(chunks))]
    for chunk in chunks:
        small = blosc2.compress2(
            chunk,
            typesize=array.dtype.itemsize,
            codec=blosc2.Codec.ZSTD,
            clevel=3,
            filters=[blosc2.Filter.NOFILTER],
            nthreads=1,
        )
        parts += [_CHUNK.pack(chunk.nbytes, len(small)), small]
    return b"".join(parts)


def unpack(data: bytes, max_values: int, dtypes: tuple[str, ...]) -> npt.NDArray[Any]:
    """The array that a client packed. No size is believed before it is compared with the limit.

    Raises:
        MalformedError: damaged.
        EngineError: "too large".
    """
    try:
        return _unpack(data, max_values, dtypes)
    except (struct.error, UnicodeDecodeError, RuntimeError, TypeError, OverflowError) as error:
        message = f"the packed array is damaged: {type(error).__name__}."
        raise MalformedError(message) from error


def _unpack(data: bytes, max_values: int, dtypes: tuple[str, ...]) -> npt.NDArray[Any]:
    magic, version, codec, axes, length = _FIXED.unpack_from(data)
    if magic != _MAGIC or version != 1 or codec not in _CODECS or not 1 <= axes <= 4:
        refuse("a packed array must begin with NNIA, version 1, a known codec and one to four axes", data[:8])
    at = _FIXED.size + length
    name = data[_FIXED.size : at].decode("ascii")
    shape = struct.unpack_from(f"<{axes}q", data, at)
    at += 8 * axes
    if name not in dtypes:
        refuse(f"a packed array's dtype must be one of {', '.join(dtypes)}", name)
    if min(shape) < 1:
        refuse("a packed array's shape must be above zero", shape)
    values = math.prod(shape)
    if values > max_values:
        message = f"an array must have at most {max_values} values here, got shape {shape}. Crop it."
        raise EngineError(message, "too large")
    dtype = np.dtype(name)
    (chunks,) = struct.unpack_from("<I", data, at)
    at += 4
    view, table, total = memoryview(data), [], 0
    for _ in range(chunks):
        size, small = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if size < 1 or small < 32 or at + small > len(data) or size % dtype.itemsize:  # 32: blosc2's own head
            refuse("a packed chunk must be as long as it says", (size, small))
        part = view[at : at + small]
        found, stored, _block = blosc2.get_cbuffer_sizes(part)
        if found != size or stored != small:
            refuse("a packed chunk must hold what it says", (found, stored))
        table.append((total, size, part))
        total += size
        at += small
    if total != values * dtype.itemsize or at != len(data):
        refuse(f"a packed array of shape {shape} and {name} must hold {values * dtype.itemsize} bytes", total)
    out = np.empty(values * dtype.itemsize, dtype=np.uint8)
    for begin, size, part in table:
        blosc2.decompress2(part, dst=out[begin : begin + size], nthreads=1)
    return out.view(dtype).reshape(shape)
