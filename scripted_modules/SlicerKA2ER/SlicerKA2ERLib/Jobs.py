"""Work off the main thread: one worker, one job at a time, results delivered in the main thread by `poll`.

    submit -> waiting -> prepare (main thread) -> work (worker thread) -> done or failed (main thread)

`prepare` runs right before the work, when all earlier results have been delivered: it may read MRML. `work` must not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], Any]


@dataclass(eq=False)
class Job:
    """One piece of work.

    Args:
        text: for people; "" is not shown as busy.
        prepare: gives the work to do, or None where nothing is left to do. What it raises goes to `failed`.
        done: gets what the work returned.
        failed: gets what it raised.
        key: a job that waits is replaced by a later one of the same key.
        background: lets all others go first.
        segment: that it is about, for `drop`.
    """

    text: str
    prepare: Callable[[], Work | None]
    done: Callable[[Any], None]
    failed: Callable[[BaseException], None]
    key: Hashable = None
    background: bool = False
    segment: str = ""
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0


class Jobs:
    """A queue in the main thread in front of one worker thread that starts with the first job."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: list[Job] = []
        self.running: Job | None = None
        self._toWorker: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._fromWorker: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.paused = False
        """While true nothing new is started."""

    @property
    def waiting(self) -> tuple[Job, ...]:
        return tuple(self._waiting)

    @property
    def idle(self) -> bool:
        return self.running is None and not self._waiting

    def submit(self, job: Job) -> None:
        """Queue a job; it starts at once where nothing is under way."""
        if job.key is not None:
            self._waiting = [other for other in self._waiting if other.key != job.key]
        place = len(self._waiting)
        while not job.background and place and self._waiting[place - 1].background:
            place -= 1
        self._waiting.insert(place, job)
        self._startNext()

    def drop(self, wanted: Callable[[Job], bool] = lambda job: True) -> None:
        """Forget jobs that wait."""
        self._waiting = [job for job in self._waiting if not wanted(job)]

    def poll(self) -> None:
        """Deliver what is ready, and start what is next. Main thread."""
        while not self._fromWorker.empty():
            result, error = self._fromWorker.get_nowait()
            job, self.running = self.running, None
            if job is not None and not self._closed:
                _deliver(job, result, error)
        self._startNext()

    def close(self) -> None:
        """Deliver nothing more. The worker ends after what it is doing; it is not waited for."""
        self._closed = True
        self._waiting.clear()
        self._toWorker.put(None)

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def _startNext(self) -> None:
        while self.running is None and self._waiting and not self._closed and not self.paused:
            job = self._waiting.pop(0)
            job.started = time.perf_counter()
            try:
                work = job.prepare()
            except Exception as error:
                job.failed(error)
                continue
            if work is None:
                continue
            self.running = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._toWorker.put(work)

    def _run(self) -> None:
        while (work := self._toWorker.get()) is not None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            self._fromWorker.put((result, error))
            del work, result, error  # what they hold (a volume's voxels, a mask, a traceback's frames) may go


def _deliver(job: Job, result: Any, error: BaseException | None) -> None:
    if error is not None:
        job.failed(error)
        return
    job.done(result)
