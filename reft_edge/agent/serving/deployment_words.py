"""The words of the deployment session: its state, the events it takes, and the actions it answers with."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from reft_edge.agent.session_words import BlobFetched, BlobLost, Fetch, Mark, Sweep
from reft_edge.wire.deployment import Attempt, Deploy, Health, Rollback

Reproach: TypeAlias = Literal["accuracy", "latency", "memory", "data", "bundle", "crashed", "storage"]
"""What a refusal or a failure is about; as in `Attempt`."""


class Stage(enum.Enum):
    SETTLED = "settled"
    """Nothing is under way."""
    FETCHING = "fetching"
    CHECKING = "checking"
    """The worker measures the model, or will when it has ended what it does; it installs what passes."""
    SWITCHING = "switching"
    """The model passed its check and is installed; from now on it is to serve."""
    RETURNING = "returning"
    """A deployment is being undone."""


class DeploymentState(msgspec.Struct, frozen=True, kw_only=True):
    """All that survives a restart. What is served stands in the slots, and only there."""

    stage: Stage = Stage.SETTLED
    deploy: Deploy | None = None
    """What is under way, from FETCHING to SWITCHING."""
    rollback: Rollback | None = None
    """What is under way while RETURNING."""
    missing: tuple[str, ...] = ()
    """Hashes of blobs that are not here yet."""
    attempts: int = 0
    """How often the check of this deployment was begun."""
    attempt: Attempt | None = None
    """What became of the deployment that we heard of last; the coordinator is told this."""
    mark: Mark | None = None
    """Of the message on `deployment` that was accepted last."""


# Events. `BlobFetched` and `BlobLost` are the session's: a blob may be for either.


@dataclass(frozen=True, kw_only=True)
class DeployArrived:
    deploy: Deploy
    mark: Mark | None = None
    serves: bool = False
    """Whether it is what is served already."""
    objection: str = ""
    """Why its files are not even fetched; empty: nothing speaks against it."""


@dataclass(frozen=True, kw_only=True)
class RollbackArrived:
    rollback: Rollback
    mark: Mark | None = None


@dataclass(frozen=True, kw_only=True)
class CheckBegan:
    """The worker is about to take it up; until then it was in line behind other work."""


@dataclass(frozen=True, kw_only=True)
class CheckPassed:
    """The model is installed in the slot that does not serve."""

    deployment: str
    model: str
    health: tuple[Health, ...]


@dataclass(frozen=True, kw_only=True)
class CheckNotPassed:
    """`refused`: what was measured breaks a rule. Otherwise it could not be measured."""

    deployment: str
    model: str
    refused: bool
    kind: Reproach
    reason: str
    health: tuple[Health, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FilesDamaged:
    """A blob was not what its SHA-256 says when it was read, and is gone; nothing was measured."""

    deployment: str
    model: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Switched:
    """What was installed is served."""


@dataclass(frozen=True, kw_only=True)
class NotInstalled:
    """There is nothing to switch to (any more)."""


@dataclass(frozen=True, kw_only=True)
class SwitchRefused:
    """The disk did not take the switch; what was served is."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Returned:
    """What was to be undone is not served (any more), and will not be."""


@dataclass(frozen=True, kw_only=True)
class ReturnRefused:
    """The disk did not take the roll-back."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ServedDamaged:
    """What was served was damaged on the disk, and given up."""

    reason: str


DeploymentEvent: TypeAlias = (
    DeployArrived
    | RollbackArrived
    | BlobFetched
    | BlobLost
    | CheckBegan
    | CheckPassed
    | CheckNotPassed
    | FilesDamaged
    | Switched
    | NotInstalled
    | SwitchRefused
    | Returned
    | ReturnRefused
    | ServedDamaged
)


# Actions. `Fetch` and `Sweep` are the session's as well.


@dataclass(frozen=True, kw_only=True)
class StartCheck:
    deploy: Deploy


@dataclass(frozen=True, kw_only=True)
class StopCheck:
    """The worker's check, in line or in progress, is of no use any more."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Serve what this deployment has installed; answer `Switched`, `NotInstalled` or `SwitchRefused`."""

    deploy: Deploy


@dataclass(frozen=True, kw_only=True)
class Return:
    """Serve what was served before this deployment, if it is what serves, and see that a later roll-back does not
    return to it; answer `Returned` or `ReturnRefused`."""

    deployment: str


@dataclass(frozen=True, kw_only=True)
class Tell:
    """Say how it is once more: somebody asked again."""


DeploymentAction: TypeAlias = Fetch | StartCheck | StopCheck | Switch | Return | Tell | Sweep
DeploymentActions: TypeAlias = tuple[DeploymentAction, ...]
