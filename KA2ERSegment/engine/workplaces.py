"""Who works on what: the one thread of the network, and a workplace for each client.

    request -> Workplaces.get(lease) -> Workplace -> Worker (one job after the other) -> Session

A workplace lasts as long as its client shows signs of life and does something now and then. All of them share one
copy of the weights, and since only one job runs at a time, nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from KA2ERSegment.cancellation import checkpoints
from KA2ERSegment.engine.wire import Change, EngineError, ObjectChange, around
from KA2ERSegment.errors import CancelledError, KA2ERError
from KA2ERSegment.geometry import BoolArray, Box
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.prediction import PackedMask, Prediction
from KA2ERSegment.session import Session
from KA2ERSegment.steps import Step
from KA2ERSegment.volume import Volume

T = TypeVar("T")
log = logging.getLogger("ka2ersegment.engine")

NOTHING = Box((0, 0, 0), (0, 0, 0))
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.int64)


# --- the one thread ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """Something for the worker to do.

    Args:
        work: what.
        doing: the same for people, in a few words.
        gives_way: it ends as soon as another job waits.
    """

    work: Callable[[], Any]
    doing: str = "Working"
    gives_way: bool = False
    result: Future[Any] = field(default_factory=Future)
    text: str = "Waiting for others"
    began: float = field(default_factory=time.monotonic)
    network: float = 0.0
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Let it end at its next checkpoint, or before it begins."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return self._cancelled.is_set()


class Worker:
    """The one thread in which everything of the network happens, one job after the other."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._current: Job | None = None
        self._closed = False
        self._closing = threading.Lock()
        self.free_memory: Callable[[], None] = lambda: None
        """Called where a job ran out of memory."""
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue; once closed, jobs are cancelled at once, so that nobody waits for ever."""
        with self._closing:
            if not self._closed:
                self._jobs.put(job)
                return job
        job.result.set_exception(_ending())
        return job

    def close(self) -> None:
        """No more jobs; what runs and what waits is cancelled."""
        with self._closing:
            self._closed = True
            self._jobs.put(None)

    def watch(self, model: PromptableModel) -> None:
        """Note when the network works, and for how long."""
        for verb, text in (("encode", "Computing features"), ("decode", "Decoding")):
            setattr(model, verb, self._watched(text, getattr(model, verb)))

    @property
    def network(self) -> float:
        """Seconds that the current job spent in the network."""
        return self._current.network if self._current is not None else 0.0

    def _watched(self, text: str, verb: Callable[..., T]) -> Callable[..., T]:
        def watched(*arguments: Any, **keywords: Any) -> T:
            job = self._current
            if job is None or threading.current_thread() is not self._thread:
                return verb(*arguments, **keywords)
            before, job.text = job.text, text
            begin = time.perf_counter()
            try:
                return verb(*arguments, **keywords)
            finally:
                job.network += time.perf_counter() - begin
                job.text = before

        return watched

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job

    def _do(self, job: Job) -> None:
        if not job.result.set_running_or_notify_cancel():  # nobody waits for it; from here on nobody can withdraw
            return
        work, job.work = job.work, _nothing  # what it holds, volumes among it, goes with it
        self._current = job
        try:
            with checkpoints(self.checkpoint):
                self.checkpoint()
                job.text = job.doing
                value = work()
        except BaseException as error:
            job.result.set_exception(self._told(error))
        else:
            job.result.set_result(value)
        self._current = None

    def checkpoint(self) -> None:
        """For sessions: ends the current job where somebody asked for that."""
        if self._closed:
            raise _ending()
        job = self._current
        if job is not None and (job.cancelled or (job.gives_way and not self._jobs.empty())):
            message = "the work was cancelled; everything is as it was before."
            raise CancelledError(message)

    def _told(self, error: BaseException) -> BaseException:
        """The error that the client gets; traces that hold the work's arrays end here."""
        if isinstance(error, KA2ERError):
            return error.with_traceback(None)
        if out_of_memory(error):
            told = EngineError(
                "there is not enough memory for this; everything is as it was before. Close other programs, use a "
                "smaller volume, or let the engine run on the CPU.",
                "memory",
            )
            error.__traceback__ = None
            self.free_memory()
            log.warning("out of memory")
            return told
        log.error("%s", where(error))
        return error.with_traceback(None)


def _ending() -> CancelledError:
    return CancelledError("the work was cancelled because the engine ends.")


def _nothing() -> None:
    """The work of a job that is done."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the CPU or the GPU had no memory left."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def where(error: BaseException) -> str:
    """Class of an error and lines of code for the log; not its message, which may hold names or voxels."""
    lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' > '.join(lines[-6:])}"


# --- workplaces -------------------------------------------------------------------------------------------------------


class Workplace:
    """One client's session, its lease, and what its client was told so far.

    Args:
        lease: the token that its client shows.
        session: of its own; only the worker's thread calls it.
        now: seconds of a clock.
    """

    def __init__(self, lease: str, session: Session, now: float) -> None:
        self.lease, self.session = lease, session
        self.seen = self.active = now
        self.jobs: list[Job] = []
        self.extra: Any = None
        """State of another protocol on top of this one."""
        self._told: tuple[Step, ...] = ()
        self._revision = 0

    def begin(self, work: Callable[[], T], worker: Worker, doing: str) -> Job:
        """Hand work to the worker, so that `cancel` finds it."""
        job = Job(work, doing)
        self.jobs = [other for other in self.jobs if not other.result.done()] + [job]
        return worker.submit(job)

    def cancel(self) -> None:
        """Stop all that is under way here."""
        for job in list(self.jobs):
            job.cancel()

    @property
    def current(self) -> Job | None:
        """The oldest job that is not done."""
        return next((job for job in list(self.jobs) if not job.result.done()), None)

    def masks(self) -> dict[str, Prediction | None]:
        """The prediction of each object."""
        return {name: self.session.prediction_of(name) for name in self.session.objects}

    def journal(self, known: int) -> dict[str, Any]:
        """What a client must change in its journal, of which it knows the revision that it was told last."""
        steps = self.session.steps
        keep = 0
        if known == self._revision:
            while keep < min(len(steps), len(self._told)) and steps[keep] is self._told[keep]:
                keep += 1
        self._told, self._revision = steps, self._revision + 1
        return {
            "revision": self._revision,
            "keep": keep,
            "steps": [step.to_json() for step in steps[keep:]],
            "about": self.session.to_json(steps=False),
        }


class Workplaces:
    """The workplaces by lease; safe to use from several threads.

    Args:
        make_session: a new session that shares the weights.
        max_sessions: at a time.
        idle_timeout: seconds after the last action of its user that a workplace is kept; 0: for ever, and without
            signs of life as well.
        liveness_timeout: seconds after the last sign of life.
        clock: seconds.
    """

    def __init__(
        self,
        make_session: Callable[[], Session],
        max_sessions: int = 4,
        idle_timeout: float = 1800.0,
        liveness_timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_session = make_session
        self.max_sessions, self.idle_timeout = max_sessions, idle_timeout
        self.liveness_timeout = liveness_timeout if idle_timeout > 0 else 0.0
        self.now = clock
        limits = [seconds for seconds in (self.idle_timeout, self.liveness_timeout) if seconds > 0]
        self.sweep_seconds = min(15.0, max(0.05, min(limits, default=60.0) / 4))
        self._places: dict[str, Workplace] = {}
        self._lock = threading.Lock()

    def claim(self) -> Workplace:
        """A new workplace; EngineError "capacity" where there is none left."""
        with self._lock:
            if len(self._places) >= self.max_sessions:
                message = f"all {self.max_sessions} sessions of this engine are taken. Try again later."
                raise EngineError(message, "capacity")
            place = Workplace(secrets.token_hex(24), self._make_session(), self.now())
            self._places[place.lease] = place
        log.info("session opened, %d of %d", len(self._places), self.max_sessions)
        return place

    def get(self, lease: str | None, active: bool = True) -> Workplace:
        """The workplace of a lease, which is a sign of life and, by default, an action of its user.

        Raises:
            EngineError: "lease" where there is none (any more).
        """
        place = self.peek(lease)
        place.seen = self.now()
        if active:
            place.active = place.seen
        return place

    def peek(self, lease: str | None) -> Workplace:
        """As `get`, and no sign of anything."""
        place = self._places.get(lease or "")
        if place is None:
            message = "this session does not exist (any more): it was idle for too long, or the engine was restarted."
            raise EngineError(message, "lease")
        return place

    def release(self, lease: str | None) -> None:
        """End a workplace where there is one."""
        with self._lock:
            place = self._places.pop(lease or "", None)
        if place is not None:
            place.cancel()
            log.info("session closed, %d of %d", len(self._places), self.max_sessions)

    def remaining(self, place: Workplace) -> float:
        """Seconds until it is taken away from an idle user; a year where it never is."""
        left = place.active + self.idle_timeout - self.now()
        return max(0.0, left) if self.idle_timeout > 0 else 365 * 86400.0

    def sweep(self) -> None:
        """Take away workplaces of users who left and of clients that died; never one that is at work."""
        if self.idle_timeout <= 0:
            return
        now = self.now()
        for place in list(self._places.values()):
            dead = now - place.seen > self.liveness_timeout or now - place.active > self.idle_timeout
            if dead and place.current is None:
                self.release(place.lease)

    def __iter__(self) -> Iterator[Workplace]:
        return iter(list(self._places.values()))

    def __len__(self) -> int:
        return len(self._places)


# --- what a verb changed ----------------------------------------------------------------------------------------------


def change_between(before: Mapping[str, Prediction | None], place: Workplace) -> Change:
    """What is different now; times are the caller's to fill in."""
    session, after = place.session, place.masks()
    objects = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old is not new:
            objects.append(_object_change(name, old, new, session.volume, exists=name in after))
    return Change(
        objects=tuple(objects),
        box=around(one.box for one in objects),
        selected=session.selected,
        names=session.objects,
        can_undo=session.can_undo,
        can_redo=session.can_redo,
        seconds=0.0,
    )


def _object_change(
    name: str, old: Prediction | None, new: Prediction | None, volume: Volume, exists: bool
) -> ObjectChange:
    box, mask = difference(old.packed if old else None, new.packed if new else None, volume)
    return ObjectChange(
        name=name,
        box=box,
        mask=mask,
        extent=new.box if new else NOTHING,
        voxels=count(new.packed) if new else 0,
        quality=float(new.quality) if new else None,
        shares=new.shares if new else {},
        exists=exists,
    )


def difference(old: PackedMask | None, new: PackedMask | None, volume: Volume) -> tuple[Box, BoolArray]:
    """Smallest box on the volume's own grid outside which two masks are the same, and the new one inside it."""
    nothing = np.zeros((0, 0, 0), dtype=bool)
    if old is new:
        return NOTHING, nothing
    boxes = [mask.box for mask in (old, new) if mask is not None]
    box = around(boxes)
    if box.size == 0:
        return NOTHING, nothing
    was = old.on(box) if old is not None else np.zeros(box.shape_kji, dtype=bool)
    is_now = new.on(box) if new is not None else np.zeros(box.shape_kji, dtype=bool)
    differs = Box.around(was ^ is_now)
    if differs is None:
        return NOTHING, nothing
    changed = differs.shift(box.start)
    own = volume.from_canonical_box(changed)
    out = np.empty(own.shape_kji, dtype=bool)
    volume.to_canonical(out)[...] = differs.crop(is_now)
    return own, out


def count(mask: PackedMask) -> int:
    """Voxels of a mask."""
    return int(_ONES[mask.bits].sum())


def as_bytes(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """0..1 as 0..255; works in place."""
    np.multiply(values, 255, out=values)
    np.add(values, 0.5, out=values)
    return values.astype(np.uint8)


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    begin = time.perf_counter()
    yield lambda: time.perf_counter() - begin
