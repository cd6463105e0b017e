"""What a device does about the model that it is to serve: a state machine without I/O, clock or threads.

As `agent.session`, and beside it: events go in, actions come out, and `DeploymentSession.state` is what must survive a
kill.

    SETTLED -> FETCHING -> CHECKING -> SWITCHING -> SETTLED (serving)
                 (lost, refused, failed: back to SETTLED, with what was served before)
    any     -> RETURNING -> SETTLED (rolled back)

Idempotence: an offer is known by its deployment and model. The same one again starts nothing and is answered with where
we are or how it ended; another one replaces what is under way at any moment. A roll-back undoes exactly the deployment
that it names, wherever that is, and needs no worker. Asked to undo something that we never heard of or that is undone
already, we say that it is undone: the coordinator wants to know that it is not served.

Whether a model serves is decided by the slots alone (`agent.serving.slots`). SWITCHING and RETURNING are written down
before they are done and are done again after a restart, which changes nothing where they were done already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from reft_edge.agent.serving.deployment_words import (
    CheckBegan,
    CheckNotPassed,
    CheckPassed,
    DeployArrived,
    DeploymentActions,
    DeploymentEvent,
    DeploymentState,
    FilesDamaged,
    NotInstalled,
    Reproach,
    Return,
    Returned,
    ReturnRefused,
    RollbackArrived,
    ServedDamaged,
    Stage,
    StartCheck,
    StopCheck,
    Switch,
    Switched,
    SwitchRefused,
    Tell,
)
from reft_edge.agent.session_words import BlobFetched, BlobLost, Fetch, Mark, Sweep
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.deployment import Attempt, AttemptState, Deploy, Health, Rollback

MAX_ATTEMPTS = 3
"""A model whose check was begun this often without an end takes the whole device down; it is given up."""


class DeploymentSession:
    """What one device serves next. `handle` changes `state`; an impossible event raises, changing nothing."""

    def __init__(self, state: DeploymentState | None = None) -> None:
        self.state = state if state is not None else DeploymentState()

    def handle(self, event: DeploymentEvent) -> DeploymentActions:
        """Raises `LocalProtocolError` for an event that makes no sense."""
        transition = _TRANSITIONS.get((self.state.stage, type(event)))
        if transition is None:
            raise LocalProtocolError(f"{type(event).__name__} cannot happen while {self.state.stage.value}")
        self.state, actions = transition(self.state, event)
        return actions

    def resume(self) -> DeploymentActions:
        """Go on after a restart."""
        state = self.state
        if state.stage is Stage.RETURNING and state.rollback is not None:
            return (Return(deployment=state.rollback.deployment),)
        if state.deploy is None:
            return ()
        if state.stage is Stage.SWITCHING:
            return (Switch(deploy=state.deploy),)
        self.state, actions = _begin(state, state.deploy, attempts=state.attempts)
        return actions

    def needed_blobs(self) -> frozenset[str]:
        """Hashes of the blobs that a restart would need."""
        deploy = self.state.deploy
        return frozenset() if deploy is None else frozenset(file.blob.sha256 for file in deploy.files)

    def obey_only(self, signer: str) -> bool:
        """Where messages are checked, before `resume`: forget what this signer did not sign. Was anything under way?

        What is served stays: it is the device's work, and whoever was obeyed then has chosen it.
        """
        state = self.state
        if state.mark is None or state.mark.signer == signer:
            return False
        self.state = DeploymentState()
        return state.stage is not Stage.SETTLED

    def note_clean_stop(self) -> None:
        """The agent is told to stop in the middle of a check: that it did not end is not the model's fault."""
        if self.state.stage is Stage.CHECKING:
            self.state = msgspec.structs.replace(self.state, attempts=max(0, self.state.attempts - 1))


# Transitions: (state, event) -> (state, actions)

_Step: TypeAlias = tuple[DeploymentState, DeploymentActions]


def _marked(state: DeploymentState, mark: Mark | None) -> DeploymentState:
    return state if mark is None or mark == state.mark else msgspec.structs.replace(state, mark=mark)


def _deploy_arrived(state: DeploymentState, event: DeployArrived) -> _Step:
    state, deploy = _marked(state, event.mark), event.deploy
    if _is_known(state, deploy):
        return state, (Tell(),)
    undo = _unfinished(state)
    if event.serves:
        state, actions = _end(state, deploy, "serving")
    elif event.objection:
        state, actions = _end(state, deploy, "refused", kind="memory", reason=event.objection)
    else:
        state, actions = _begin(state, deploy)
    return state, (*undo, *actions)


def _is_known(state: DeploymentState, deploy: Deploy) -> bool:
    """Whether this offer is under way or ended last. What was undone is not done again: the next one has a new name."""
    if state.rollback is not None:
        return state.rollback.deployment == deploy.deployment
    if state.deploy is not None:
        return _offer(state.deploy) == _offer(deploy)
    last = state.attempt
    if last is None or last.deployment != deploy.deployment:
        return False
    return last.state == "rolled_back" or last.model == deploy.model


def _unfinished(state: DeploymentState) -> DeploymentActions:
    """What is still to be done about what something else replaces."""
    if state.stage is Stage.CHECKING:
        return (StopCheck(),)
    if state.rollback is not None:
        return (Return(deployment=state.rollback.deployment),)
    return ()


def _offer(deploy: Deploy) -> tuple[str, str]:
    return deploy.deployment, deploy.model


def _begin(state: DeploymentState, deploy: Deploy, *, attempts: int = 0) -> _Step:
    """Fetch the files; those that are here come at once."""
    if attempts >= MAX_ATTEMPTS:
        reason = f"its check was begun {attempts} times and the agent was restarted each time"
        return _end(state, deploy, "failed", kind="crashed", reason=reason)
    blobs = {file.blob.sha256: file.blob for file in deploy.files}
    fetching = DeploymentState(
        stage=Stage.FETCHING,
        deploy=deploy,
        missing=tuple(blobs),
        attempts=attempts,
        attempt=_attempt(deploy, "fetching"),
        mark=state.mark,
    )
    return fetching, (Sweep(), *(Fetch(ref=ref, broadcast=deploy.broadcast) for ref in blobs.values()))


def _end(
    state: DeploymentState,
    deploy: Deploy,
    how: AttemptState,
    *,
    kind: Reproach | None = None,
    reason: str = "",
    health: tuple[Health, ...] = (),
) -> _Step:
    attempt = _attempt(deploy, how, kind=kind, reason=reason, health=health)
    return DeploymentState(attempt=attempt, mark=state.mark), (Sweep(),)


def _attempt(
    deploy: Deploy,
    how: AttemptState,
    *,
    kind: Reproach | None = None,
    reason: str = "",
    health: tuple[Health, ...] = (),
) -> Attempt:
    return Attempt(
        deployment=deploy.deployment, model=deploy.model, state=how, kind=kind or "", reason=reason, health=health
    )


def _rollback_arrived(state: DeploymentState, event: RollbackArrived) -> _Step:
    state, rollback = _marked(state, event.mark), event.rollback
    last = state.attempt
    if state.deploy is not None and state.deploy.deployment != rollback.deployment:
        # Another one is under way and goes on; what is to be undone may be what serves meanwhile.
        return state, (Return(deployment=rollback.deployment),)
    undone = "" if last is None or last.state != "rolled_back" else last.deployment
    if state.stage is Stage.SETTLED and undone == rollback.deployment:
        return state, (Tell(),)
    returning = DeploymentState(stage=Stage.RETURNING, rollback=rollback, attempt=last, mark=state.mark)
    return returning, (*_unfinished(state), Return(deployment=rollback.deployment))


def _fetched(state: DeploymentState, event: BlobFetched) -> _Step:
    if event.sha256 not in state.missing:
        return state, ()
    missing = tuple(sha256 for sha256 in state.missing if sha256 != event.sha256)
    if missing:
        return msgspec.structs.replace(state, missing=missing), ()
    deploy = _deploy(state)
    checking = msgspec.structs.replace(
        state,
        stage=Stage.CHECKING,
        missing=(),
        attempt=_attempt(deploy, "checking"),
    )
    return checking, (StartCheck(deploy=deploy),)


def _check_began(state: DeploymentState, _event: CheckBegan) -> _Step:
    return msgspec.structs.replace(state, attempts=state.attempts + 1), ()


def _lost(state: DeploymentState, event: BlobLost) -> _Step:
    if event.sha256 not in state.missing:
        return state, ()
    kind: Reproach = "storage" if event.no_room else "bundle"
    return _end(state, _deploy(state), "failed", kind=kind, reason=event.reason)


def _passed(state: DeploymentState, event: CheckPassed) -> _Step:
    deploy = _deploy(state)
    if (event.deployment, event.model) != _offer(deploy):
        return state, ()
    attempt = _attempt(deploy, "checking", health=event.health)
    return msgspec.structs.replace(state, stage=Stage.SWITCHING, attempt=attempt), (Switch(deploy=deploy),)


def _not_passed(state: DeploymentState, event: CheckNotPassed) -> _Step:
    deploy = _deploy(state)
    if (event.deployment, event.model) != _offer(deploy):
        return state, ()
    how: AttemptState = "refused" if event.refused else "failed"
    return _end(state, deploy, how, kind=event.kind, reason=event.reason, health=event.health)


def _damaged(state: DeploymentState, event: FilesDamaged) -> _Step:
    """Fetch what is gone once more; a disk that spoils it each time is not tried for ever."""
    deploy = _deploy(state)
    if (event.deployment, event.model) != _offer(deploy):
        return state, ()
    if state.attempts >= MAX_ATTEMPTS:
        return _end(state, deploy, "failed", kind="storage", reason=event.reason)
    return _begin(state, deploy, attempts=state.attempts)


def _switched(state: DeploymentState, _event: Switched) -> _Step:
    deploy, attempt = _deploy(state), state.attempt
    return _end(state, deploy, "serving", health=() if attempt is None else attempt.health)


def _not_installed(state: DeploymentState, _event: NotInstalled) -> _Step:
    """It was installed, and is gone or damaged after a restart: from the beginning."""
    return _begin(state, _deploy(state), attempts=state.attempts)


def _switch_refused(state: DeploymentState, event: SwitchRefused) -> _Step:
    return _end(state, _deploy(state), "failed", kind="storage", reason=event.reason)


def _returned(state: DeploymentState, _event: Returned) -> _Step:
    rollback, last = _rollback(state), state.attempt
    known = last is not None and last.deployment == rollback.deployment
    attempt = Attempt(
        deployment=rollback.deployment,
        model=last.model if last is not None and known else "",
        state="rolled_back",
        reason=rollback.reason,
        health=last.health if last is not None and known else (),
    )
    return DeploymentState(attempt=attempt, mark=state.mark), (Sweep(),)


def _return_refused(state: DeploymentState, event: ReturnRefused) -> _Step:
    """Said, and tried again when the roll-back is delivered again: it is retained."""
    attempt = Attempt(
        deployment=_rollback(state).deployment,
        state="failed",
        kind="storage",
        reason=f"it cannot be undone: {event.reason}",
    )
    return DeploymentState(attempt=attempt, mark=state.mark), (Sweep(),)


def _served_damaged(state: DeploymentState, event: ServedDamaged) -> _Step:
    last = state.attempt
    if last is None or last.state != "serving":
        return state, ()
    attempt = msgspec.structs.replace(last, state="failed", kind="storage", reason=event.reason)
    return msgspec.structs.replace(state, attempt=attempt), ()


def _ignore(state: DeploymentState, _event: DeploymentEvent) -> _Step:
    return state, ()


def _deploy(state: DeploymentState) -> Deploy:
    if state.deploy is None:
        raise LocalProtocolError(f"there is no deployment while {state.stage.value}")
    return state.deploy


def _rollback(state: DeploymentState) -> Rollback:
    if state.rollback is None:
        raise LocalProtocolError(f"nothing is undone while {state.stage.value}")
    return state.rollback


def _table() -> Mapping[tuple[Stage, type[DeploymentEvent]], Callable[[DeploymentState, object], _Step]]:
    """Every legal (stage, event). What is not here is a bug of the caller."""
    everywhere = dict.fromkeys(Stage, _ignore)
    rows: dict[type, dict[Stage, Callable[..., _Step]]] = {
        DeployArrived: dict.fromkeys(Stage, _deploy_arrived),
        RollbackArrived: dict.fromkeys(Stage, _rollback_arrived),
        # Blobs may be the training session's, and a transfer or a check that was just stopped may still have its say.
        BlobFetched: {**everywhere, Stage.FETCHING: _fetched},
        BlobLost: {**everywhere, Stage.FETCHING: _lost},
        CheckBegan: {Stage.CHECKING: _check_began},
        CheckPassed: {**everywhere, Stage.CHECKING: _passed},
        CheckNotPassed: {**everywhere, Stage.CHECKING: _not_passed},
        FilesDamaged: {**everywhere, Stage.CHECKING: _damaged},
        Switched: {Stage.SWITCHING: _switched},
        SwitchRefused: {Stage.SWITCHING: _switch_refused},
        NotInstalled: {Stage.SWITCHING: _not_installed},
        # What serves may be undone while another deployment is under way.
        Returned: {**everywhere, Stage.RETURNING: _returned},
        ReturnRefused: {**everywhere, Stage.RETURNING: _return_refused},
        ServedDamaged: dict.fromkeys(Stage, _served_damaged),
    }
    return {(stage, event): step for event, steps in rows.items() for stage, step in steps.items()}


_TRANSITIONS = _table()
