"""What a device does about its task: a state machine without I/O, clock or threads.

Events go in, actions come out; the daemon feeds it and does what it says. `Session.state` is everything that must
survive a kill: the daemon writes it to the spool before it does the actions, so that after a restart `resume` goes on
from there.

    IDLE -> READING -> FETCHING -> TRAINING -> UPLOADING -> IDLE
                 (refused, lost, failed: back to IDLE with the outcome remembered)

Idempotence: a task is known by its id. The same task delivered again starts nothing; it is answered with where we are
or with how it ended. Any other task replaces the present one, its unfinished training and its undelivered update,
because a coordinator gives a new task only when it has moved on. An update stays in the spool until then, also after
its receipt: a broker or a coordinator that lost our words can ask again.

Weights may come as a delta to those of an earlier task (`wire.deltas`). What the task names is what is kept, so nothing
else has to be remembered: its weights, as the next delta's base, and until training has ended the base of its own.
Where the delta cannot be had or does not fit, the whole weights are fetched, once a task, and nothing fails.

What an update's encoding left out goes into the next one. Where the coordinator remembers something as well, the task
names the update that it remembers: two are kept here, the last one and the one before it, until that is known.

Being connected is not a state here: training goes on while the broker is away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from reft_edge.agent.session_words import (
    Actions,
    BlobDelivered,
    BlobFetched,
    BlobLost,
    DeltaUseless,
    Fetch,
    LinkUp,
    ManifestAccepted,
    ManifestRefused,
    Phase,
    ReadManifest,
    ReleaseWorker,
    ReminderDue,
    Residual,
    RunClosed,
    Say,
    SessionEvent,
    SessionState,
    StartTraining,
    StopTraining,
    Sweep,
    TaskArrived,
    TrainingFailed,
    TrainingFinished,
    TrainingProgressed,
)
from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.compensation_names import keeps_memory
from reft_edge.wire.messages import Accepted, Done, Failed, Progress, Refused, Task

MAX_ATTEMPTS = 3
"""A task that was begun this often without an end takes the whole device down; it is given up."""


class Session:
    """One device's task. `handle` changes `state` and says what to do; an impossible event raises, changing nothing."""

    def __init__(self, state: SessionState | None = None) -> None:
        self.state = state if state is not None else SessionState()

    def handle(self, event: SessionEvent, now: float) -> Actions:
        """`now` is a monotonic clock in seconds. Raises `LocalProtocolError` for an event that makes no sense."""
        transition = _TRANSITIONS.get((self.state.phase, type(event)))
        if transition is None:
            raise LocalProtocolError(f"{type(event).__name__} cannot happen while {self.state.phase.value}")
        self.state, actions = transition(self.state, event, now)
        return actions

    def resume(self, *, update_is_here: bool, now: float) -> Actions:
        """Go on after a restart. `update_is_here`: whether the update's blob is still in the spool."""
        state, task = self.state, self.state.task
        if state.phase is Phase.IDLE or task is None or (state.phase is Phase.UPLOADING and update_is_here):
            return (Sweep(),)
        self.state, actions = _begin(state, task, now, attempts=state.attempts, again=True)
        return actions

    def needed_residuals(self) -> frozenset[str]:
        """File names of what the next update may go on from."""
        return frozenset(one.name for one in (self.state.residual, self.state.merged) if one is not None)

    def obey_only(self, signer: str) -> bool:
        """Where messages are checked, before `resume`: forget a task that this signer did not sign. Was there one?

        It came before signatures were asked for, or from the coordinator of an earlier enrolment.
        """
        mark = self.state.mark
        if self.state.task is None or (mark is not None and mark.signer == signer):
            return False
        self.state = SessionState(mark=mark)
        return True

    def note_clean_stop(self) -> None:
        """The agent is told to stop: that training did not end is not the task's fault."""
        self.state = msgspec.structs.replace(self.state, attempts=max(0, self.state.attempts - 1))

    def needed_blobs(self) -> frozenset[str]:
        """Hashes of the blobs that a restart would need, and of weights that a delta starts from."""
        state = self.state
        if state.task is None:
            return frozenset()
        needed = {state.task.bundle.sha256, state.task.weights.blob.sha256, *(ref.sha256 for ref in state.parts)}
        if state.task.delta is not None and not state.whole and state.outcome is None:
            needed.add(state.task.delta.base)
        if isinstance(state.outcome, Done):
            needed.add(state.outcome.update.blob.sha256)
        return frozenset(needed)


# Transitions: (state, event, now) -> (state, actions)

_Step: TypeAlias = tuple[SessionState, Actions]


def _begin(state: SessionState, task: Task, now: float, *, attempts: int = 0, again: bool = False) -> _Step:
    """Start on a task from its first blob; blobs that are here already come at once.

    `again`: the agent was restarted while it had this task.
    """
    if attempts >= MAX_ATTEMPTS:
        reason = f"training was begun {attempts} times and the agent was restarted each time"
        return _end(state, Failed(task=task.task, kind="crashed", reason=reason))
    fresh = SessionState(
        phase=Phase.READING,
        task=task,
        parts=state.parts,
        began_at=now,
        down_bytes=state.down_bytes if again else 0,
        whole=state.whole and again,
        attempts=attempts,
        residual=state.residual,
        merged=state.merged,
        mark=state.mark,
    )
    return fresh, (
        Sweep(),
        Say(report=Progress(task=task.task, state="fetching")),
        Fetch(ref=task.bundle, broadcast=task.broadcast),
    )


def _end(state: SessionState, outcome: Refused | Failed) -> _Step:
    """The task is over without an update."""
    idle = msgspec.structs.replace(state, phase=Phase.IDLE, missing=(), outcome=outcome)
    return idle, (Say(report=outcome), Sweep())


def _task_arrived(state: SessionState, event: TaskArrived, now: float) -> _Step:
    if event.mark is not None and event.mark != state.mark:
        state = msgspec.structs.replace(state, mark=event.mark)
    if state.task is not None and state.task.task == event.task.task:
        return state, _where_we_are(state)
    stop = (StopTraining(),) if state.phase is Phase.TRAINING else ()
    state, actions = _begin(state, event.task, now)
    return state, (*stop, *actions)


def _where_we_are(state: SessionState) -> Actions:
    if state.outcome is not None:
        return (Say(report=state.outcome),)
    if state.phase in (Phase.FETCHING, Phase.TRAINING) and state.task is not None:
        return (Say(report=Accepted(task=state.task.task)),)
    return ()


def _run_closed(state: SessionState, event: RunClosed, _now: float) -> _Step:
    return SessionState(mark=event.mark or state.mark), (StopTraining(), ReleaseWorker(), Sweep())


def _link_up(state: SessionState, _event: LinkUp, _now: float) -> _Step:
    return state, _where_we_are(state)


def _remind(state: SessionState, _event: ReminderDue, _now: float) -> _Step:
    return state, _where_we_are(state)


def _manifest_fetched(state: SessionState, event: BlobFetched, _now: float) -> _Step:
    task = _task(state)
    if event.sha256 != task.bundle.sha256:
        return state, ()
    return _count(state, event, task.bundle), (ReadManifest(task=task, whole=state.whole),)


def _count(state: SessionState, event: BlobFetched, ref: BlobRef) -> SessionState:
    """Add what a blob has cost."""
    if event.was_here:
        return state
    return msgspec.structs.replace(state, down_bytes=state.down_bytes + ref.size_bytes)


def _manifest_accepted(state: SessionState, event: ManifestAccepted, _now: float) -> _Step:
    task = _task(state)
    parts = tuple({ref.sha256: ref for ref in event.parts}.values())
    fetching = msgspec.structs.replace(
        state, phase=Phase.FETCHING, parts=parts, missing=tuple(ref.sha256 for ref in parts)
    )
    return fetching, (Say(report=Accepted(task=task.task)), Sweep(), *(_fetch(task, ref) for ref in parts))


def _fetch(task: Task, ref: BlobRef) -> Fetch:
    """With a delta, weights or delta may be for few devices, and are not laid at the broker then."""
    exceptions = {task.weights.blob: task.weights.broadcast}
    if task.delta is not None:
        exceptions[task.delta.blob] = task.delta.broadcast
    return Fetch(ref=ref, broadcast=task.broadcast and exceptions.get(ref, True))


def _manifest_refused(state: SessionState, event: ManifestRefused, _now: float) -> _Step:
    return _end(state, Refused(task=_task(state).task, reason=event.reason))


def _part_fetched(state: SessionState, event: BlobFetched, now: float) -> _Step:
    ref = next((ref for ref in state.parts if ref.sha256 == event.sha256), None)
    if ref is None or event.sha256 not in state.missing:
        return state, ()
    state = _count(state, event, ref)
    missing = tuple(sha256 for sha256 in state.missing if sha256 != event.sha256)
    if missing:
        return msgspec.structs.replace(state, missing=missing), ()
    training = msgspec.structs.replace(
        state,
        phase=Phase.TRAINING,
        missing=(),
        download_s=max(0.0, now - state.began_at),
        attempts=state.attempts + 1,
    )
    return training, (StartTraining(task=_task(state), residual=_residual(state)),)


def _residual(state: SessionState) -> Residual | None:
    """What the encoding goes on from. With a shared memory that is what the coordinator names, or nothing."""
    task = _task(state)
    if not keeps_memory(task.plan.compensation):
        return state.residual
    known = (state.residual, state.merged)
    return next((one for one in known if one is not None and one.update == task.memory), None)


def _blob_lost(state: SessionState, event: BlobLost, _now: float) -> _Step:
    task = _task(state)
    if event.sha256 != task.bundle.sha256 and event.sha256 not in state.missing:
        return state, ()
    if event.no_room:  # nor for the whole weights, which are larger than a delta
        return _end(state, Failed(task=task.task, kind="storage", reason=event.reason))
    if task.delta is not None and event.sha256 == task.delta.blob.sha256:
        return _fetch_whole(state, task)
    return _end(state, Failed(task=task.task, kind="bundle", reason=event.reason))


def _delta_useless(state: SessionState, event: DeltaUseless, _now: float) -> _Step:
    """The worker could not put the weights together; that it was asked is no attempt at training.

    After whole weights were fetched, they have vanished from the spool.
    """
    task = _task(state)
    if event.task != task.task:
        return state, ()
    if state.whole:
        return _end(state, Failed(task=task.task, kind="bundle", reason=event.reason))
    return _fetch_whole(msgspec.structs.replace(state, attempts=max(0, state.attempts - 1)), task)


def _fetch_whole(state: SessionState, task: Task) -> _Step:
    """Fetch the task's weights in place of its delta."""
    delta = None if task.delta is None else task.delta.blob
    weights = task.weights.blob
    others = tuple(sha256 for sha256 in state.missing if delta is None or sha256 != delta.sha256)
    fetching = msgspec.structs.replace(
        state,
        phase=Phase.FETCHING,
        parts=(*(ref for ref in state.parts if ref not in (delta, weights)), weights),
        missing=(*others, weights.sha256),
        whole=True,
    )
    return fetching, (Sweep(), _fetch(task, weights))


def _progressed(state: SessionState, event: TrainingProgressed, _now: float) -> _Step:
    if event.task != _task(state).task:
        return state, ()
    report = Progress(
        task=event.task,
        state="training",
        steps_done=event.steps_done,
        steps_total=event.steps_total,
        loss=event.loss,
    )
    return state, (Say(report=report),)


def _finished(state: SessionState, event: TrainingFinished, _now: float) -> _Step:
    task = _task(state)
    if event.task != task.task:
        return state, ()
    measured = msgspec.structs.replace(event.measured, download_s=state.download_s, down_bytes=state.down_bytes)
    done = Done(task=task.task, round=task.round, update=event.update, measured=measured)
    uploading = msgspec.structs.replace(
        state,
        phase=Phase.UPLOADING,
        outcome=done,
        residual=event.residual,
        merged=_residual(state) if keeps_memory(task.plan.compensation) else None,
    )
    return uploading, (Say(report=done), Sweep())


def _failed(state: SessionState, event: TrainingFailed, _now: float) -> _Step:
    if event.task != _task(state).task:
        return state, ()
    return _end(state, Failed(task=event.task, kind=event.kind, reason=event.reason))


def _delivered(state: SessionState, event: BlobDelivered, _now: float) -> _Step:
    if not isinstance(state.outcome, Done) or event.sha256 != state.outcome.update.blob.sha256:
        return state, ()
    return msgspec.structs.replace(state, phase=Phase.IDLE), ()


def _ignore(state: SessionState, _event: SessionEvent, _now: float) -> _Step:
    return state, ()


def _task(state: SessionState) -> Task:
    if state.task is None:
        raise LocalProtocolError(f"there is no task while {state.phase.value}")
    return state.task


def _table() -> Mapping[tuple[Phase, type[SessionEvent]], Callable[[SessionState, object, float], _Step]]:
    """Every legal (phase, event). What is not here is a bug of the caller."""
    idle, reading, fetching, training, uploading = Phase
    rows: dict[type, dict[Phase, Callable[..., _Step]]] = {
        TaskArrived: dict.fromkeys(Phase, _task_arrived),
        RunClosed: dict.fromkeys(Phase, _run_closed),
        LinkUp: {**dict.fromkeys(Phase, _link_up), idle: _ignore},
        ReminderDue: {**dict.fromkeys(Phase, _ignore), uploading: _remind},
        # A transfer or a worker that was just cancelled may still have its say.
        BlobFetched: {**dict.fromkeys(Phase, _ignore), reading: _manifest_fetched, fetching: _part_fetched},
        BlobLost: {**dict.fromkeys(Phase, _ignore), reading: _blob_lost, fetching: _blob_lost},
        ManifestAccepted: {reading: _manifest_accepted},
        ManifestRefused: {reading: _manifest_refused},
        TrainingProgressed: {**dict.fromkeys(Phase, _ignore), training: _progressed},
        TrainingFinished: {**dict.fromkeys(Phase, _ignore), training: _finished},
        TrainingFailed: {**dict.fromkeys(Phase, _ignore), training: _failed},
        DeltaUseless: {**dict.fromkeys(Phase, _ignore), training: _delta_useless},
        BlobDelivered: {**dict.fromkeys(Phase, _ignore), uploading: _delivered},
    }
    return {(phase, event): step for event, steps in rows.items() for phase, step in steps.items()}


_TRANSITIONS = _table()
