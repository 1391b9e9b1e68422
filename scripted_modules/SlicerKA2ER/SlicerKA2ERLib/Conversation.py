"""The engine and what it is asked, one verb after another: prompts wait for their turn and can be cancelled.

    submit -> (turn) plan what the engine must know first -> worker: plan, verb -> outcome -> onOutcome

A verb that is refused, cancelled or lost takes its markers out of the scene again. A dead engine is none of this
file's business: `EngineLink` starts another and tells it everything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from KA2ERSegment.errors import CancelledError, SessionStateError
from KA2ERSegment.prompts import Prompt
from SlicerKA2ERLib.EngineLink import EngineLink
from SlicerKA2ERLib.EngineMirror import EngineMirror, Plan, Steps
from SlicerKA2ERLib.Jobs import Job, Jobs
from SlicerKA2ERLib.PromptLedger import PromptLedger
from SlicerKA2ERLib.SegmentWriter import segmentIds
from SlicerKA2ERLib.VolumeIO import VolumeData, volumeData

SEGMENTING, STARTING, UPDATING = "Segmenting", "Starting the engine", "Updating"
PROGRESS_AFTER, PROGRESS_EVERY = 0.3, 0.25
"""Seconds of work before the engine is asked how far it is, and between such questions."""
KEPT_TIMINGS = 1000

Verb = Callable[[Any], tuple[Any, ...]]
"""Worker thread: gets the session, gives its changes."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a verb did.

    Args:
        changes: of the engine, in order.
        steps: its journal now.
        seconds: that plan and verb took, waiting for the worker included.
        network: of these, in the engine's network.
        pushed: by how many states the engine's history grew.
    """

    changes: tuple[Any, ...]
    steps: Steps
    seconds: float
    network: float
    pushed: int


@dataclass(eq=False)
class Request:
    """One verb on its way.

    Args:
        text: for people.
        verb: to carry out.
        segment: that it is about: the engine must know its prompts; "" for none.
        keys: of the pending markers whose prompts it brings.
        jobKey: a later request of the same key takes the place of one that waits.
        direction: -1 for undo, +1 for redo.
        isRevision: it changes prompts that the engine has.
        revises: those prompts, found when its turn comes: what they were, and are now.
    """

    text: str
    verb: Verb
    segment: str = ""
    keys: tuple[str, ...] = ()
    jobKey: Any = None
    direction: int = 0
    isRevision: bool = False
    revises: list[tuple[Prompt, Prompt | None]] = field(default_factory=list)
    submitted: float = field(default_factory=time.perf_counter)
    epoch: int = -1
    plan: Plan | None = None


class Conversation:
    """Asks the engine about one segmentation on one volume.

    Args:
        mirror: what the engine knows of the segments.
        ledger: what it knows of the markers.
        onOutcome: gets what a verb did, and its direction. Main thread.
        onFailure: gets what went wrong. Main thread.
    """

    def __init__(
        self,
        mirror: EngineMirror,
        ledger: PromptLedger,
        onOutcome: Callable[[Outcome, int], None],
        onFailure: Callable[[BaseException], None],
    ) -> None:
        self.link = EngineLink()
        self.mirror, self.ledger = mirror, ledger
        self.volumeNode: Any = None
        self.segmentationNode: Any = None
        self.progress: tuple[str, float | None] = ("", None)
        self.timings: dict[str, list[float]] = {
            part: [] for part in ("event", "queue", "engine", "network", "write", "overlays")
        }
        self._onOutcome, self._onFailure = onOutcome, onFailure
        self._jobs, self._side, self._cancels = (Jobs(f"KA2ER {name}") for name in ("engine", "progress", "cancel"))
        self._running: Request | None = None
        self._lastAsked = 0.0

    # -- asking ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a verb."""
        self._jobs.submit(
            Job(
                request.text,
                lambda: self._prepare(request),
                lambda outcome: self._done(request, outcome),
                lambda error: self._failed(request, error),
                request.jobKey,
                segment=request.segment,
            )
        )

    def ask(self, key: Any, question: Callable[[Any], Any], answer: Callable[[Any], None]) -> None:
        """Queue a question that changes nothing and lets all verbs go first. Answers for another session are lost."""
        epochs: list[int] = []

        def prepare() -> Callable[[], Any] | None:
            if self.volumeNode is None or self.volumeNode.GetImageData() is None:
                return None
            data = self._volume()
            epochs.append(self.mirror.epoch)
            return lambda: self.link.perform(data, question)

        def done(result: Any) -> None:
            if epochs[-1] == self.mirror.epoch:
                answer(result)

        self._jobs.submit(Job("", prepare, done, self._onFailure, key, background=True))

    def inWorker(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Queue something else that must not run beside a verb."""
        self._jobs.submit(Job("", lambda: work, done, self._onFailure))

    def cancel(self) -> None:
        """Stop what is under way and forget what waits."""
        waiting = [job for job in self._jobs.waiting if job.text]
        self._jobs.drop(lambda job: bool(job.text))
        for job in waiting:
            job.failed(CancelledError("the prompt was cancelled before its turn."))
        if self._running is not None:
            self._stopRunning()

    def withdraw(self, keys: list[str]) -> None:
        """The markers of prompts that wait are gone: so are the prompts. One under way comes to its end first."""
        waiting = {job.key for job in self._jobs.waiting}
        for key in keys:
            if ("prompt", key) in waiting:
                self._jobs.drop(lambda job, key=key: job.key == ("prompt", key))
                self.ledger.pending.pop(key, None)

    def forgetSegment(self, segment: str) -> None:
        """A segment is gone: nobody waits for its prompts."""
        self._jobs.drop(lambda job: bool(segment) and job.segment == segment)
        self.ledger.forgetSegment(segment)
        if self._running is not None and self._running.segment == segment:
            self._stopRunning()

    def abandon(self) -> None:
        """What is under way and what waits is for another session than the next: nobody wants it any more."""
        running = self._running is not None
        self._jobs.drop()
        self._running = None
        self.mirror.forgetAll(running)
        self.ledger.clear()
        if running:
            self._stopRunning()

    def _stopRunning(self) -> None:
        """Nothing new is started before that is done: a late cancel would hit the next prompt."""
        self._jobs.paused = True
        self._cancels.submit(Job("", lambda: self.link.cancel, self._resume, self._resume))

    def _resume(self, _: Any) -> None:
        self._jobs.paused = False

    @property
    def isIdle(self) -> bool:
        """Whether nothing at all is under way."""
        return self._jobs.idle and self._cancels.idle

    @property
    def busy(self) -> str:
        if self._running is None:
            return next((job.text for job in self._jobs.waiting if job.text), "")
        return self._running.text if self.link.state == "ready" else STARTING

    @property
    def elapsedSeconds(self) -> float:
        running = self._jobs.running
        return time.perf_counter() - running.started if running is not None and self._running is not None else 0.0

    def poll(self) -> bool:
        """Deliver what is ready. Returns whether `progress` is news."""
        self._cancels.poll()
        self._jobs.poll()
        self._side.poll()
        now, session = time.perf_counter(), self.link.session
        if self._running is None:
            news, self.progress = self.progress != ("", None), ("", None)
            return news
        if self.elapsedSeconds < PROGRESS_AFTER or now - self._lastAsked < PROGRESS_EVERY:
            return False
        self._lastAsked = now
        if session is not None and self._side.idle:
            self._side.submit(Job("", lambda: session.progress, self._noteProgress, _nothing))
        return True

    def close(self) -> None:
        """Ends the engine. Waits for it a moment, so that no process outlives Slicer."""
        self._jobs.close()
        self._side.close()
        self._cancels.close()
        self.link.close()

    def time(self, part: str, seconds: float) -> None:
        values = self.timings[part]
        values.append(seconds)
        del values[:-KEPT_TIMINGS]

    # -- the way of a request ----------------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> Callable[[], Outcome]:
        self.time("queue", time.perf_counter() - request.submitted)
        if self.volumeNode is None or self.segmentationNode is None:
            message = "there is nothing to undo or redo: a volume and a segmentation must be chosen first."
            raise SessionStateError(message)
        data = self._volume()
        if request.isRevision:
            request.revises[:] = self.ledger.differences().moved.get(request.segment, [])
        plan = self._plan(data, request)
        request.plan, request.epoch = plan, self.mirror.epoch
        self._running = request
        begin = time.perf_counter()
        return lambda: self.link.perform(data, lambda session: _carryOut(session, plan, request, begin))

    def reconcile(self, restore: bool = False) -> None:
        """Let the markers be those of the engine's journal."""
        if self.segmentationNode is not None and self.volumeNode is not None:
            self.ledger.reconcile(self.mirror.steps, segmentIds(self.segmentationNode), restore)

    def _volume(self) -> VolumeData:
        data = volumeData(self.volumeNode)
        if not self.mirror.isOf(data):
            self._forgetAll()
        return self.mirror.sessionKey(data)

    def _forgetAll(self) -> None:
        """What the engine knew is of no use: the next verb tells it everything that is in the scene."""
        self.mirror.forgetAll()
        self.ledger.forgetTold()

    def _plan(self, data: VolumeData, request: Request) -> Plan:
        if request.direction > 0:  # after a hand's edit there would be nothing to bring back
            return Plan.nothing(data)
        untold = self.ledger.untold(request.segment)
        return self.mirror.plan(self.segmentationNode, self.volumeNode, data, request.segment, untold)

    def _done(self, request: Request, outcome: Outcome) -> None:
        if request.epoch != self.mirror.epoch:
            return
        self._running = None
        self._noteTold(request)
        self.ledger.accept(request.keys)
        self.ledger.noteRevised(request.segment, request.revises)
        self.time("engine", outcome.seconds)
        self.time("network", outcome.network)
        self._onOutcome(outcome, request.direction)

    def _failed(self, request: Request, error: BaseException) -> None:
        if request.epoch not in (-1, self.mirror.epoch):
            return
        if request.epoch != -1:
            self._running = None
            if self.link.session is not None and request.plan is not None:
                self._noteTold(request)
                self.mirror.steps = self.link.session.steps
        self.ledger.withdraw(request.keys)
        self.reconcile(restore=request.isRevision)
        if self.link.session is None and self.link.journal is None:
            self._forgetAll()  # it lost all that it knew: the next prompt begins from the scene
        self._onFailure(error)

    def _noteTold(self, request: Request) -> None:
        assert request.plan is not None, "planned when its turn came"
        self.mirror.noteTold(request.plan)
        if request.plan.replay[0] in request.plan.told:
            self.ledger.acceptForeign(request.segment)

    def _noteProgress(self, progress: tuple[str, float | None]) -> None:
        if self._running is not None:
            self.progress = progress


def _carryOut(session: Any, plan: Plan, request: Request, begin: float) -> Outcome:
    """Worker thread."""
    plan.carryOut(session)
    before = session.steps
    changes = request.verb(session)
    back = request.direction if len(changes) == 1 else 0  # two: an undo that was brought back at once
    pushed = back if request.direction else _grown(before, session.steps)
    network = sum(getattr(change, "network", 0.0) for change in changes)
    return Outcome(changes, session.steps, time.perf_counter() - begin, network, pushed)


def _grown(before: Steps, after: Steps) -> int:
    """By how much a verb made the history longer: a finish takes the place of the one before it."""
    if before == after:
        return 0
    replaced = (
        len(before) == len(after)
        and "finish" in after[-1]
        and "finish" in before[-1]
        and after[-1]["object"] == before[-1]["object"]
    )
    return 0 if replaced else max(1, len(after) - len(before))


def _nothing(_: Any) -> None:
    """Progress of an engine that is gone: nobody needs to know."""
