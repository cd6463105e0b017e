"""What a device's word makes of its part in a deployment. Pure.

A device says how it is as often as it likes, in any order, late and again, and nothing that it says is an error here:
what says nothing about its part leaves that as it is. The state machine of a deployment uses it while that is rolled
out, and whoever keeps up what was deployed (`standing`) for as long after.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from reft_edge.coordinator.records import DeployedDevice, DeployedState
from reft_edge.wire.deployment import Attempt, Condition, Health

MAX_REASON = 500
"""Characters of a device's reason that are stored and shown."""

PENDING: frozenset[DeployedState] = frozenset({"asked", "fetching", "checking"})
"""An answer is expected of these."""

UNANSWERED: frozenset[DeployedState] = PENDING | {"late", "away"}
"""Nobody may wait for these any more, but they may still do what they were told last."""

SMALLER_HELPS = frozenset({"latency", "memory"})
"""Kinds of refusal that a smaller model may not get."""

Word: TypeAlias = Literal["deploy", "rollback"]


def word_for(part: DeployedDevice) -> Word | None:
    """What this device should have been told last. None: nothing."""
    if part.asked_at is None:
        return None
    return "rollback" if part.undone else "deploy"


def after_condition(part: DeployedDevice, condition: Condition, now: float) -> DeployedDevice:
    """The part as it is by the device's own word.

    One that refuses its model for latency or memory is asked anew, with the next smaller, if there is one: the caller
    has to tell it. `now`: Unix seconds.
    """
    if part.asked_at is None:
        return part
    if part.undone:
        return _after_undoing(part, condition, now)
    attempt, serving = _about(part, condition.attempt), condition.serving
    if serving is not None and serving.deployment == part.deployment and serving.model == part.model:
        part = msgspec.structs.replace(part, precision=serving.precision)
        return answered(part, "serving", "", now, None if attempt is None else attempt.health)
    if part.state == "serving":
        instead = "nothing" if serving is None else f"version {serving.version}"
        part = msgspec.structs.replace(part, precision=None)
        return answered(part, "failed", f"it went back and serves {instead}", now)
    return part if attempt is None else _after_attempt(part, attempt, now)


def may_serve(part: DeployedDevice) -> bool:
    """Whether the device has to be told to go back where the deployment is undone, and is to say that it has."""
    if part.state in ("refused", "failed"):
        return part.precision is not None  # it served it when it failed, and went on
    return part.asked_at is not None and part.state != "rolled_back"


def errors_of(condition: Condition) -> int:
    """Requests that the served version did not answer, where the device tells."""
    counts, serving = condition.counts, condition.serving
    return counts.errors if counts is not None and serving is not None and counts.version == serving.version else 0


def asked(part: DeployedDevice, now: float, *, reason: str = "") -> DeployedDevice:
    return msgspec.structs.replace(part, asked_at=now, state="asked", reason=reason)


def answered(
    part: DeployedDevice, state: DeployedState, reason: str, now: float, health: tuple[Health, ...] | None = None
) -> DeployedDevice:
    """`health`: what it has measured; None: as before."""
    since = part.answered_at if part.state == state and part.answered_at is not None else now
    measured = part.health if health is None else health
    return msgspec.structs.replace(part, state=state, reason=reason, answered_at=since, health=measured)


def _after_undoing(part: DeployedDevice, condition: Condition, now: float) -> DeployedDevice:
    """Of a device that was told to go back."""
    attempt, serving = condition.attempt, condition.serving
    tries = attempt is not None and attempt.deployment == part.deployment and attempt.state in PENDING
    serves = serving is not None and serving.deployment == part.deployment
    kept = part.state in ("refused", "failed")
    return part if kept or tries or serves else answered(part, "rolled_back", "", now)


def _about(part: DeployedDevice, attempt: Attempt | None) -> Attempt | None:
    """The attempt, if it is at what the device was offered last."""
    if attempt is None or attempt.deployment != part.deployment or attempt.model not in ("", part.model):
        return None
    return attempt


def _after_attempt(part: DeployedDevice, attempt: Attempt, now: float) -> DeployedDevice:
    """Of a device that does not serve it."""
    reason = (attempt.reason or attempt.kind)[:MAX_REASON]
    match attempt.state:
        case "refused" if part.smaller and attempt.kind in SMALLER_HELPS:
            smaller = msgspec.structs.replace(part, model=part.smaller, smaller="", answered_at=None, health=())
            return asked(smaller, now, reason=f"{part.model}: {reason}")
        case "refused" | "failed":
            return answered(part, attempt.state, reason, now, attempt.health)
        case "rolled_back":
            return answered(part, "failed", reason or "it went back by itself", now, attempt.health)
        case "fetching" | "checking" if part.state != "late":
            return msgspec.structs.replace(part, state=attempt.state, reason="")
    return part
