"""What the worker is asked to do, one thing at a time.

Between the daemon and the supervisor: keeps a line of jobs, starts the next when one has ended, and says how each
ended. A worker that measured the device is let go, because what it measured with would count as memory of the next
training; a check gets a worker of its own for the same reason.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from reft_edge.agent.protocol import (
    Answer,
    BlobsDamaged,
    Cancel,
    CheckModel,
    DataDescribed,
    DataRefused,
    DeltaRefused,
    DescribeData,
    DeviceMeasured,
    Finished,
    MeasureDevice,
    MeasuringFailed,
    ModelChecked,
    ModelNotTaken,
    Stopped,
    TaskFailed,
    Train,
    TrainingProgress,
)
from reft_edge.agent.serving.deployment_words import CheckNotPassed, CheckPassed, FilesDamaged
from reft_edge.agent.session_words import DeltaUseless, TrainingFailed, TrainingFinished, TrainingProgressed
from reft_edge.agent.supervisor import Supervisor, WorkerEnded, WorkerSaid
from reft_edge.errors import ResourceError

Job: TypeAlias = MeasureDevice | DescribeData | Train | CheckModel

MAX_REASON_CHARACTERS = 1000
"""Reasons go into reports, which are bounded."""

CANCEL_S = 10.0
"""A cancelled training ends after its present step; the slowest boards take seconds for one."""

MAX_CHECK_S = 900.0
"""A check scores three models on at most a thousand samples each. One that takes longer is not worth serving, or does
not end, and training waits behind it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobEnded:
    """`answer` is what the worker said last, or how it died."""

    job: Job
    answer: Answer | WorkerEnded


class Jobs:
    """The worker's line of jobs. `now` is the monotonic clock in seconds."""

    def __init__(self, supervisor: Supervisor, *, starting: Callable[[Job], None] = lambda _: None) -> None:
        """`starting` is called with a job that the worker is about to be given."""
        self._supervisor = supervisor
        self._starting = starting
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._idle_since = 0.0
        self._released = False
        self.insist_at: float | None = None
        """When to call `insist`, if a cancelled training or a check still goes on then."""

    @property
    def is_checking(self) -> bool:
        """Whether the worker checks a model now."""
        return isinstance(self._current, CheckModel)

    def add(self, job: Job) -> None:
        """Put a job in line; `proceed` starts it."""
        self._waiting.append(job)
        self._released = False

    def cancel_training(self, now: float) -> None:
        """Trainings in line are dropped, one in progress is told to stop."""
        self._waiting = deque(job for job in self._waiting if not isinstance(job, Train))
        if isinstance(self._current, Train):
            self._supervisor.send(Cancel(task=self._current.task.task))
            self.insist_at = now + CANCEL_S

    def cancel_check(self, now: float) -> None:
        """Checks in line are dropped, the worker of one in progress is ended: what it writes may be cut anywhere."""
        self._waiting = deque(job for job in self._waiting if not isinstance(job, CheckModel))
        if self.is_checking:
            self._supervisor.stop()
            self._ended(now)

    def insist(self, now: float) -> JobEnded | None:
        """What should have ended goes on (a very long step, a disk that does not answer): end its worker."""
        job = self._current
        logger.warning("the worker does not stop; ending it")
        self._supervisor.stop()
        self._ended(now)
        if not isinstance(job, CheckModel):
            return None  # nobody waits for a training that was cancelled
        reason = f"it had not ended after {MAX_CHECK_S:.0f} s"
        return JobEnded(job=job, answer=WorkerEnded(worker=0, kind="crashed", reason=reason))

    def handle(self, event: WorkerSaid | WorkerEnded, now: float) -> JobEnded | TrainingProgressed | None:
        """What an event of the worker means; None when it is of no interest any more."""
        if event.worker != self._supervisor.worker:
            return None
        if isinstance(event, WorkerEnded):
            self._supervisor.forget(event.worker)
            job = self._current
            self._ended(now)
            return None if job is None else JobEnded(job=job, answer=event)
        answer = event.answer
        if isinstance(answer, TrainingProgress):
            done, total = answer.steps_done, answer.steps_total
            return TrainingProgressed(task=answer.task, steps_done=done, steps_total=total, loss=answer.loss)
        job = self._current
        if job is None or not _ends(job, answer):
            logger.error("the worker said %s while nobody asked", type(answer).__name__)
            return None
        self._ended(now)
        spent = isinstance(job, MeasureDevice | CheckModel) or (
            isinstance(answer, TaskFailed) and answer.kind == "out_of_memory"
        )
        if spent or self._released:
            self._supervisor.stop()
        return JobEnded(job=job, answer=answer)

    def proceed(self, now: float) -> JobEnded | None:
        """Start the next job if none is in progress; what comes back is a job whose worker could not be started."""
        if self._current is not None or not self._waiting:
            return None
        job = self._waiting.popleft()
        if isinstance(job, Train):
            job = msgspec.structs.replace(job, asked_at=now)
        elif isinstance(job, CheckModel):
            self._supervisor.stop()
        self._starting(job)
        try:
            self._supervisor.send(job)
        except ResourceError as exc:
            return JobEnded(job=job, answer=WorkerEnded(worker=0, kind="crashed", reason=str(exc)))
        self._current = job
        self.insist_at = now + MAX_CHECK_S if self.is_checking else None
        return None

    def idle_at(self, idle_s: float) -> float | None:
        """When the worker will have been idle for `idle_s`; None while there is none or it works."""
        busy = self._current is not None or self._waiting
        return None if busy or self._supervisor.worker is None else self._idle_since + idle_s

    def release(self) -> None:
        """Let the worker go, when it has ended what it does."""
        self._released = True
        if self._current is None:
            self._supervisor.stop()

    def _ended(self, now: float) -> None:
        self._current = None
        self._idle_since = now
        self.insist_at = None


def training_event(ended: JobEnded) -> TrainingFinished | TrainingFailed | DeltaUseless | None:
    """What the end of a job means to the session; None for one that was not about a task, or was cancelled."""
    match ended.job, ended.answer:
        case _, Finished() as finished:
            return TrainingFinished(
                task=finished.task, update=finished.update, measured=finished.measured, residual=finished.residual
            )
        case _, DeltaRefused(task=name, reason=reason):
            return DeltaUseless(task=name, reason=reason[:MAX_REASON_CHARACTERS])
        case Train(task=task), (TaskFailed() | WorkerEnded()) as failure:
            return TrainingFailed(task=task.task, kind=failure.kind, reason=failure.reason[:MAX_REASON_CHARACTERS])
    return None


def check_event(ended: JobEnded) -> CheckPassed | CheckNotPassed | FilesDamaged | None:
    """What the end of a job means to the deployment session; None for one that was no check."""
    job, answer = ended.job, ended.answer
    if not isinstance(job, CheckModel):
        return None
    deployment, model = job.deploy.deployment, job.deploy.model
    match answer:
        case ModelChecked(health=health):
            return CheckPassed(deployment=deployment, model=model, health=health)
        case ModelNotTaken(refused=refused, kind=kind, reason=reason, health=health):
            reason = reason[:MAX_REASON_CHARACTERS]
            return CheckNotPassed(
                deployment=deployment, model=model, refused=refused, kind=kind, reason=reason, health=health
            )
        case BlobsDamaged(reason=reason):
            return FilesDamaged(deployment=deployment, model=model, reason=reason)
        case WorkerEnded(kind=how, reason=reason):
            no_memory = how == "out_of_memory"
            return CheckNotPassed(
                deployment=deployment,
                model=model,
                refused=no_memory,
                kind="memory" if no_memory else "crashed",
                reason=f"during its check: {reason}"[:MAX_REASON_CHARACTERS],
            )
    return None


def _ends(job: Job, answer: Answer) -> bool:
    match job:
        case MeasureDevice():
            return isinstance(answer, DeviceMeasured | MeasuringFailed)
        case DescribeData():
            return isinstance(answer, DataDescribed | DataRefused)
        case Train(task=task):
            return isinstance(answer, Finished | TaskFailed | DeltaRefused | Stopped) and answer.task == task.task
        case CheckModel():
            return isinstance(answer, ModelChecked | ModelNotTaken | BlobsDamaged)
