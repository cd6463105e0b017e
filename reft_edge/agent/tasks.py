"""The daemon's side of training: does what the session says, and tells what becomes of a task.

As `serving.deployments`, and beside it: fetching, the worker and the spool are shared, and the daemon lends them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from reft_edge import logs
from reft_edge.agent.admission import refusal, task_parts
from reft_edge.agent.jobs import MAX_REASON_CHARACTERS, Jobs
from reft_edge.agent.knowledge import Knowledge
from reft_edge.agent.protocol import Train
from reft_edge.agent.reminder import Reminder
from reft_edge.agent.session import Session
from reft_edge.agent.session_words import (
    Action,
    Fetch,
    LinkUp,
    ManifestAccepted,
    ManifestRefused,
    Mark,
    Phase,
    ReadManifest,
    ReleaseWorker,
    ReminderDue,
    RunClosed,
    Say,
    SessionEvent,
    SessionState,
    StartTraining,
    StopTraining,
    Sweep,
    TaskArrived,
)
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import Spool
from reft_edge.bundle.manifest import Manifest
from reft_edge.errors import BundleError, ResourceError
from reft_edge.wire.messages import Close, Done, Report, Task, TaskMessage

logger = logging.getLogger(__name__)


class Tasks:
    """`fetch` and `sweep` do the session's actions of these names; `say` publishes a report, `show` the status.

    The jobs that are put in line here are started by the daemon.
    """

    def __init__(
        self,
        settings: AgentSettings,
        spool: Spool,
        jobs: Jobs,
        knowledge: Knowledge,
        *,
        fetch: Callable[[Fetch], None],
        sweep: Callable[[], None],
        say: Callable[[Report], None],
        show: Callable[[SessionState], None],
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._jobs = jobs
        self._knowledge = knowledge
        self._fetch = fetch
        self._sweep = sweep
        self._say = say
        self._show = show
        self._session = Session()
        self._waiting: deque[SessionEvent] = deque()
        self._reminder = Reminder()

    @property
    def state(self) -> SessionState:
        return self._session.state

    @property
    def remind_at(self) -> float | None:
        """When to call `tick`."""
        return self._reminder.due_at

    def needed_blobs(self) -> frozenset[str]:
        return self._session.needed_blobs()

    def needed_residuals(self) -> frozenset[str]:
        return self._session.needed_residuals()

    def may_have(self, sha256: str) -> bool:
        """Whether the coordinator may fetch this blob: the update, and nothing else."""
        outcome = self.state.outcome
        return isinstance(outcome, Done) and sha256 == outcome.update.blob.sha256

    def start(self, *, signer: str | None) -> None:
        """Read the state. `signer`: the only one whose words count."""
        self._session = Session(self._spool.load_state())
        if signer is not None and self._session.obey_only(signer):
            logger.warning("the task in the spool was not signed by the enrolled coordinator; forgetting it")

    def resume(self) -> None:
        """Go on where the state says."""
        update = self.state.outcome
        is_here = isinstance(update, Done) and self._spool.blobs.has(update.update.blob.sha256)
        actions = self._session.resume(update_is_here=is_here, now=time.monotonic())
        logs.process_is_about(self._subject(self.state))
        self._apply(actions)

    def stop(self) -> None:
        if self.state.phase is Phase.TRAINING:
            self._session.note_clean_stop()
            self.save()

    def obey(self, message: TaskMessage, mark: Mark) -> None:
        """Do what the coordinator says; it was checked who said it."""
        self.feed(RunClosed(mark=mark) if isinstance(message, Close) else TaskArrived(task=message, mark=mark))

    def connected(self) -> None:
        self.feed(LinkUp())
        if self._reminder.due_at is not None:
            self._reminder.start(time.monotonic())  # the coordinator may come back later than we do

    def tick(self, now: float) -> None:
        if self._reminder.is_due(now):
            self.feed(ReminderDue())

    def feed(self, event: SessionEvent) -> None:
        """Give the session an event, and those that follow from its actions, in order."""
        self._waiting.append(event)
        if len(self._waiting) > 1:
            return  # we are inside an action of an earlier event
        while self._waiting:
            before = self.state
            actions = self._session.handle(self._waiting[0], time.monotonic())
            if self.state is not before:
                self.save()
            logs.process_is_about(self._subject(self.state, before))  # how a task ended is about it still
            self._apply(actions)
            self._waiting.popleft()
        logs.process_is_about(self._subject(self.state))
        if self.state.phase is not Phase.UPLOADING:
            self._reminder.stop()
        elif self._reminder.due_at is None:
            self._reminder.start(time.monotonic())
        self._show(self.state)

    def save(self) -> None:
        """A full disk must not end the agent: it goes on, and a restart would find an older state."""
        try:
            self._spool.save_state(self.state)
        except ResourceError as exc:
            logger.error("%s", exc)

    def _subject(self, *states: SessionState) -> logs.Subject:
        """What lines of the log are about: the task in hand in the first of the states that has one."""
        for state in states:
            if state.task is not None and state.phase is not Phase.IDLE:
                return logs.Subject(self._settings.device, state.task.round, state.task.task)
        return logs.Subject(self._settings.device)

    def _apply(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Fetch():
                    self._fetch(action)
                case ReadManifest(task=task, whole=whole):
                    self.feed(self._manifest(task, whole=whole))
                case StartTraining(task=task, residual=residual):
                    logger.info("training: task %s", task.task)
                    self._jobs.add(Train(task=task, residual=residual, asked_at=0.0))
                case StopTraining():
                    self._jobs.cancel_training(time.monotonic())
                case ReleaseWorker():
                    self._jobs.release()
                case Say(report=report):
                    self._say(report)
                case Sweep():
                    self._sweep()

    def _manifest(self, task: Task, *, whole: bool) -> ManifestAccepted | ManifestRefused:
        """Check what is to be trained against what this device can do."""
        try:
            manifest = Manifest.from_json(self._spool.blobs.read(task.bundle))
        except BundleError as exc:
            return ManifestRefused(reason=str(exc)[:MAX_REASON_CHARACTERS])
        known = self._knowledge
        reason = refusal(manifest, task, limits=self._settings.limits, profile=known.profile, data=known.description)
        if reason is not None:
            return ManifestRefused(reason=reason[:MAX_REASON_CHARACTERS])
        return ManifestAccepted(parts=task_parts(manifest, task, has_weights=self._spool.has_weights, whole=whole))
