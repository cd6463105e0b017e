"""The daemon's side of deployments: does what the deployment session says, and tells what becomes of it.

Fetching, the worker and the spool are shared with training; the daemon lends them. Everything here is quick, but for
reading the model that is served once at the start.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence

from reft_edge.agent.jobs import MAX_REASON_CHARACTERS, Job, Jobs
from reft_edge.agent.protocol import CheckModel
from reft_edge.agent.serving.condition import ConditionReport
from reft_edge.agent.serving.deployment_session import DeploymentSession
from reft_edge.agent.serving.deployment_words import (
    CheckBegan,
    DeployArrived,
    DeploymentAction,
    DeploymentEvent,
    DeploymentState,
    NotInstalled,
    Return,
    Returned,
    ReturnRefused,
    RollbackArrived,
    ServedDamaged,
    StartCheck,
    StopCheck,
    Switch,
    Switched,
    SwitchRefused,
    Tell,
)
from reft_edge.agent.serving.slots import CHECK, COUNTS, SERVING, InstalledModel, Slots
from reft_edge.agent.session_words import Fetch, Mark, Sweep
from reft_edge.agent.settings import AgentSettings, Limits
from reft_edge.agent.spool import Spool
from reft_edge.errors import ResourceError
from reft_edge.wire.deployment import Condition, Deploy, DeploymentMessage, Rollback

logger = logging.getLogger(__name__)


class Deployments:
    """`fetch` and `sweep` do the session's actions of these names; `say` publishes a condition.

    The jobs that are put in line here are started by the daemon.
    """

    def __init__(
        self,
        settings: AgentSettings,
        spool: Spool,
        jobs: Jobs,
        *,
        fetch: Callable[[Fetch], None],
        sweep: Callable[[], None],
        say: Callable[[Condition], None],
    ) -> None:
        self._limits = settings.limits
        self._spool = spool
        self._jobs = jobs
        self._fetch = fetch
        self._sweep = sweep
        self._session = DeploymentSession()
        self._waiting: deque[DeploymentEvent] = deque()
        self._busy = False
        self._slots = Slots(spool.root / SERVING)
        self.report = ConditionReport(self._slots, settings.serving, counts_folder=self._slots.root / COUNTS, say=say)

    @property
    def mark(self) -> Mark | None:
        return self._session.state.mark

    def needed_blobs(self) -> frozenset[str]:
        return self._session.needed_blobs()

    def start(self, *, signer: str | None) -> None:
        """Read the state, and make sure of what is served. `signer`: the only one whose words count."""
        self._session = DeploymentSession(self._spool.load_deployment())
        if signer is not None and self._session.obey_only(signer):
            logger.warning("the deployment in the spool was not signed by the enrolled coordinator; forgetting it")
        self._clear_check()
        try:
            damage = self._slots.repair()
        except ResourceError as exc:
            damage = str(exc)
        if damage is not None:
            logger.error("%s", damage)
            self.feed(ServedDamaged(reason=damage[:MAX_REASON_CHARACTERS]))

    def resume(self) -> None:
        """Go on where the state says."""
        before = self._session.state
        self._busy = True
        self._do(before, self._session.resume())
        self._busy = False
        self._handle_waiting()

    def stop(self) -> None:
        if self._jobs.is_checking:
            self._session.note_clean_stop()
            self._save()

    def obey(self, message: DeploymentMessage, mark: Mark) -> None:
        """Do what the coordinator says; it was checked who said it."""
        if isinstance(message, Rollback):
            self.feed(RollbackArrived(rollback=message, mark=mark))
            return
        serves = _is(self._slots.current(), message)
        self.feed(DeployArrived(deploy=message, mark=mark, serves=serves, objection=objection(message, self._limits)))

    def connected(self, now: float) -> None:
        self.report.connected(self._session.state.attempt, now)

    def tick(self, now: float) -> None:
        self.report.tick(self._session.state.attempt, now)

    def job_begins(self, job: Job) -> None:
        """The worker is about to get a job."""
        if isinstance(job, CheckModel):
            self.feed(CheckBegan())

    def feed(self, event: DeploymentEvent) -> None:
        """Give the session an event, and those that follow from its actions, in order."""
        self._waiting.append(event)
        if not self._busy:  # else we are inside an action of an earlier event
            self._handle_waiting()

    def _handle_waiting(self) -> None:
        self._busy = True
        while self._waiting:
            before = self._session.state
            self._do(before, self._session.handle(self._waiting.popleft()))
        self._busy = False
        self.report.update(self._session.state.attempt, time.monotonic())

    def _do(self, before: DeploymentState, actions: Sequence[DeploymentAction]) -> None:
        if self._session.state is not before:
            self._save()
            if self._session.state.attempt != before.attempt:
                self._log()
        for action in actions:
            self._apply(action)

    def _log(self) -> None:
        """What became of the deployment; the coordinator is told less of it (`agent.reasons`)."""
        attempt = self._session.state.attempt
        if attempt is not None:
            level = logging.WARNING if attempt.state in ("refused", "failed") else logging.INFO
            why = f": {attempt.reason}" if attempt.reason else ""
            logger.log(level, "deployment %s: %s (%s)%s", attempt.deployment, attempt.state, attempt.model, why)

    def _save(self) -> None:
        """A full disk must not end the agent: it goes on, and a restart would find an older state."""
        try:
            self._spool.save_deployment(self._session.state)
        except ResourceError as exc:
            logger.error("%s", exc)

    def _apply(self, action: DeploymentAction) -> None:
        match action:
            case Fetch():
                self._fetch(action)
            case Sweep():
                self._sweep()
            case StartCheck(deploy=deploy):
                self._jobs.add(CheckModel(deploy=deploy))
            case StopCheck():
                self._jobs.cancel_check(time.monotonic())
                self._clear_check()
            case Switch(deploy=deploy):
                self.feed(self._switch(deploy))
            case Return(deployment=deployment):
                self.feed(self._return(deployment))
            case Tell():
                self.report.update(self._session.state.attempt, time.monotonic(), again=True)

    def _clear_check(self) -> None:
        """What a worker that was ended has unpacked."""
        shutil.rmtree(self._slots.root / CHECK, ignore_errors=True)

    def _switch(self, deploy: Deploy) -> Switched | NotInstalled | SwitchRefused:
        try:
            if _is(self._slots.current(), deploy):
                return Switched()
            if not _is(self._slots.installed(), deploy):
                return NotInstalled()
            self._slots.switch()
        except ResourceError as exc:
            return SwitchRefused(reason=str(exc)[:MAX_REASON_CHARACTERS])
        return Switched()

    def _return(self, deployment: str) -> Returned | ReturnRefused:
        try:
            while (current := self._slots.current()) is not None and current.slot.deployment == deployment:
                self._slots.roll_back()
            if (before := self._slots.previous()) is not None and before.slot.deployment == deployment:
                self._slots.forget_previous()
        except ResourceError as exc:
            return ReturnRefused(reason=str(exc)[:MAX_REASON_CHARACTERS])
        return Returned()


def objection(deploy: Deploy, limits: Limits) -> str:
    """Why its files are not even fetched; empty: nothing speaks against it."""
    size = max(max(file.size_bytes, file.blob.size_bytes) for file in deploy.files)
    if size <= limits.max_model_bytes:
        return ""
    return f"the model has {size} bytes, [limits] max_model_bytes = {limits.max_model_bytes}"


def _is(model: InstalledModel | None, deploy: Deploy) -> bool:
    """Whether this is what was offered."""
    return model is not None and (model.slot.deployment, model.slot.model) == (deploy.deployment, deploy.model)
