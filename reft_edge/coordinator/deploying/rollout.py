"""One deployment as a state machine without I/O: who is asked when, and when all of it is undone.

    canary -> soaking -> rolling_out -> done
       |         |            |           |
       |---------|------------|-----------|-> rolling_back -> rolled_back

First a few devices are asked, the canaries. When they serve the version, they are watched for a while; then the rest is
asked, all at once. Where too many canaries refuse, fail, do not answer, count errors or go away, or too many of the
rest refuse or fail, everybody who was asked is told to go back. A canary that falls silent counts against the version,
because that may be the model's doing; a device of the rest that does is not waited for. A person may undo a deployment
at any time (`Stopped`).

`advance(state, event)` is a pure function. Time comes in with the events, as Unix seconds. Nothing is ever "sent" here:
`word_for` says what every device should have been told by now, which is what a process that begins, or comes back, or
has lost its broker says again. What a device tells may come in any order, twice or late, and never raises (`answers`).

What this module does not know: files, blobs, topics, the database.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

import msgspec

from reft_edge.coordinator.deploying.answers import PENDING, after_condition, answered, asked, errors_of, may_serve
from reft_edge.coordinator.records import DeployedDevice, DeployedState, DeploymentRecord, Wave
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.deployment import Condition


class Phase(Enum):
    """As in `DeploymentRecord.state`."""

    CANARY = "canary"
    SOAKING = "soaking"
    """The canaries serve it and are watched."""
    ROLLING_OUT = "rolling_out"
    DONE = "done"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"


MOVES: Mapping[Phase, frozenset[Phase]] = MappingProxyType(
    {
        Phase.CANARY: frozenset({Phase.SOAKING, Phase.ROLLING_BACK}),
        Phase.SOAKING: frozenset({Phase.ROLLING_OUT, Phase.ROLLING_BACK}),
        Phase.ROLLING_OUT: frozenset({Phase.DONE, Phase.ROLLING_BACK}),
        Phase.DONE: frozenset({Phase.ROLLING_BACK}),
        Phase.ROLLING_BACK: frozenset({Phase.ROLLED_BACK}),
        Phase.ROLLED_BACK: frozenset({Phase.ROLLING_BACK}),
    }
)
"""Each phase and those that may follow. After `DONE` and `ROLLED_BACK` only a person goes on: the latter for devices
that were away."""

ENDED = frozenset({Phase.DONE, Phase.ROLLED_BACK})

FAILING: Mapping[Wave, frozenset[DeployedState]] = MappingProxyType(
    {"canary": frozenset({"refused", "failed", "late"}), "rest": frozenset({"refused", "failed"})}
)
"""What counts against a version, by wave."""


class RolloutRules(msgspec.Struct, frozen=True, kw_only=True):
    """When to go on and when to turn back. See `DeploymentSettings`, where the defaults are."""

    soak_s: float
    timeout_s: float
    max_failed_canaries: float
    max_failed: float
    absent_s: float
    """Devices of the rest that have been offline this long are not waited for."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """A device has told its condition."""

    device: str
    now: float
    condition: Condition


class Absent(msgspec.Struct, frozen=True, kw_only=True):
    """The device has gone offline."""

    device: str
    now: float


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """The device is online."""

    device: str
    now: float


class Resumed(msgspec.Struct, frozen=True, kw_only=True):
    """A process goes on with what another began: who was asked gets the whole time again, and canaries are watched
    anew, because nobody listened meanwhile."""

    now: float


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """A person wants it undone."""

    now: float
    reason: str


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    now: float


Event: TypeAlias = Heard | Absent | Present | Resumed | Stopped | Tick


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state of a deployment."""

    rules: RolloutRules
    parts: Mapping[str, DeployedDevice]
    """By device."""
    phase: Phase
    since: float
    """When it came to this phase."""
    reason: str = ""
    """Why it is rolled back."""
    absent_since: Mapping[str, float] = MappingProxyType({})
    """Devices that are offline."""

    @property
    def pending(self) -> list[DeployedDevice]:
        """Devices whose answer is waited for."""
        return [part for part in self.parts.values() if part.state in PENDING]

    def wave(self, wave: Wave) -> list[DeployedDevice]:
        return [part for part in self.parts.values() if part.wave == wave]

    @property
    def next_deadline(self) -> float | None:
        """When a `Tick` can change something next; None when it has ended."""
        if self.phase in ENDED:
            return None
        times = [_deadline(self, part) for part in self.pending]
        if self.phase is Phase.SOAKING:
            times.append(self.since + self.rules.soak_s)
            if self.silent_canaries:
                times.append(self.since + self.rules.soak_s + self.rules.timeout_s)
        return min(times, default=self.since)

    @property
    def silent_canaries(self) -> list[DeployedDevice]:
        """Canaries that serve it, as far as is known, and are offline."""
        return [part for part in self.wave("canary") if part.state == "serving" and part.device in self.absent_since]


def start_rollout(
    parts: Iterable[DeployedDevice], *, online: Iterable[str], rules: RolloutRules, now: float
) -> Rollout:
    """The canaries are asked. Parts that serve the version already are left alone, and stand for canaries.

    Raises `LocalProtocolError` where nobody could show that it is good, or a canary is not online.
    """
    by_device = {part.device: part for part in parts}
    absent_since = dict.fromkeys(sorted(by_device.keys() - set(online)), now)
    canaries = [part for part in by_device.values() if part.wave == "canary" and part.state == "waiting"]
    if not canaries and not any(part.state == "serving" for part in by_device.values()):
        raise LocalProtocolError("a deployment needs at least one canary")
    if away := [part.device for part in canaries if part.device in absent_since]:
        raise LocalProtocolError(f"canaries must be online; {away} are not")
    state = Rollout(
        rules=rules,
        parts=by_device,
        phase=Phase.CANARY,
        since=now,
        absent_since=absent_since,
    )
    return _settle(_ask(state, canaries, now), now)


def resume_rollout(
    record: DeploymentRecord,
    parts: Iterable[DeployedDevice],
    *,
    online: Iterable[str],
    rules: RolloutRules,
    now: float,
) -> Rollout:
    """The state as it was stored last. Where it was interrupted, the devices tell how far it had come."""
    by_device = {part.device: part for part in parts}
    if record.state in ("done", "rolling_back", "rolled_back"):
        phase = Phase(record.state)
    elif any(part.wave == "rest" and part.asked_at is not None for part in by_device.values()):
        phase = Phase.ROLLING_OUT
    else:
        phase = Phase.CANARY
    return Rollout(
        rules=rules,
        parts=by_device,
        phase=phase,
        since=record.since,
        reason=record.reason if phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK) else "",
        absent_since=dict.fromkeys(sorted(by_device.keys() - set(online)), now),
    )


def advance(state: Rollout, event: Event) -> Rollout:
    """The state after `event`."""
    match event:
        case Heard():
            state = _hear(state, event)
        case Absent(device=device, now=now):
            if device in state.parts and device not in state.absent_since:
                state = msgspec.structs.replace(state, absent_since={**state.absent_since, device: now})
        case Present(device=device):
            state = _welcome(state, device)
        case Resumed(now=now):
            state = _restart_clocks(state, now)
        case Stopped(now=now, reason=reason):
            if state.phase is not Phase.ROLLING_BACK:
                state = _turn_back(state, reason, now)
        case Tick():
            pass
    return _settle(state, event.now)


# What is heard.


def _hear(state: Rollout, event: Heard) -> Rollout:
    before = state.parts.get(event.device)
    if before is None:
        return state
    after = after_condition(before, event.condition, event.now)
    if after.state == "serving" and after.wave == "canary" and (errors := errors_of(event.condition)):
        counted = f"{errors} error{'' if errors == 1 else 's'}"
        after = answered(after, "failed", f"it counted {counted} while it served it", event.now)
    return _put(state, after)


def _welcome(state: Rollout, device: str) -> Rollout:
    if device not in state.absent_since:
        return state
    absent_since = {name: since for name, since in state.absent_since.items() if name != device}
    state = msgspec.structs.replace(state, absent_since=absent_since)
    part = state.parts[device]
    if part.state == "away" and state.phase not in ENDED:
        return _put(state, msgspec.structs.replace(part, state="asked", reason=""))
    return state


# When to go on.


def _settle(state: Rollout, now: float) -> Rollout:
    """Let the clock and what is known act, until nothing changes any more."""
    state = _time_out(state, now)
    while (after := _next(state, now)) is not state:
        state = after
    return state


def _next(state: Rollout, now: float) -> Rollout:
    """The state after one move; the same object where there is none to make."""
    if state.phase in ENDED:
        return state
    if state.phase is Phase.ROLLING_BACK:
        return state if state.pending else _move(state, Phase.ROLLED_BACK, now)
    if reason := _why_back(state):
        return _turn_back(state, reason, now)
    if state.phase is Phase.CANARY and not any(part.state in PENDING for part in state.wave("canary")):
        return _move(state, Phase.SOAKING, now)
    if state.phase is Phase.SOAKING and now >= state.since + state.rules.soak_s and not state.silent_canaries:
        waiting = [part for part in state.parts.values() if part.state == "waiting"]
        return _ask(_move(state, Phase.ROLLING_OUT, now), waiting, now)
    if state.phase is Phase.ROLLING_OUT and not state.pending:
        return _move(state, Phase.DONE, now)
    return state


def _time_out(state: Rollout, now: float) -> Rollout:
    """Wait no longer for those who had their time."""
    silent = [part for part in state.pending if now >= _deadline(state, part)]
    state = _put(state, *(_given_up(state, part) for part in silent))
    if state.phase is Phase.SOAKING and now >= state.since + state.rules.soak_s + state.rules.timeout_s:
        gone = state.silent_canaries
        reason = "it went away while it served it"
        state = _put(state, *(answered(part, "late", reason, now) for part in gone))
    return state


def _given_up(state: Rollout, part: DeployedDevice) -> DeployedDevice:
    patient = part.wave == "canary" and state.phase is not Phase.ROLLING_BACK
    fate: DeployedState = "late" if patient or part.device not in state.absent_since else "away"
    return msgspec.structs.replace(part, state=fate, reason=_silence(state, part))


def _deadline(state: Rollout, part: DeployedDevice) -> float:
    """Until when the answer of a pending device is waited for."""
    end = (part.asked_at or 0.0) + state.rules.timeout_s
    since = state.absent_since.get(part.device)
    patient = part.wave == "canary" and state.phase is not Phase.ROLLING_BACK
    return end if since is None or patient else min(end, since + state.rules.absent_s)


def _silence(state: Rollout, part: DeployedDevice) -> str:
    if part.device in state.absent_since:
        return "it is offline"
    doing = "no answer" if part.state == "asked" else f"still {part.state}"
    return f"{doing} after {state.rules.timeout_s:g} s"


def _why_back(state: Rollout) -> str:
    """Why all of it must be undone; empty where it need not."""
    canaries, rest = state.wave("canary"), [part for part in state.wave("rest") if part.asked_at is not None]
    waves: list[tuple[Wave, list[DeployedDevice], float]] = [
        ("canary", canaries, state.rules.max_failed_canaries),
        ("rest", rest, state.rules.max_failed),
    ]
    for wave, parts, share in waves:
        failing = [part for part in parts if part.state in FAILING[wave]]
        if len(failing) > math.floor(share * len(parts) + 1e-9):
            return _complaint("canaries" if wave == "canary" else "devices", failing, len(parts))
    nobody_serves = canaries and all(part.state in FAILING["canary"] for part in canaries)
    return _complaint("canaries", canaries, len(canaries)) if nobody_serves else ""


def _complaint(who: str, failing: list[DeployedDevice], n_parts: int) -> str:
    first = failing[0]
    others = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
    return f"{len(failing)} of {n_parts} {who} failed: {first.device}: {first.reason or first.state}{others}"


# Changes.


def _move(state: Rollout, phase: Phase, now: float) -> Rollout:
    if phase not in MOVES[state.phase]:
        raise LocalProtocolError(f"a deployment that is {state.phase.value} cannot become {phase.value}")
    return msgspec.structs.replace(state, phase=phase, since=now)


def _turn_back(state: Rollout, reason: str, now: float) -> Rollout:
    """Everybody who was asked is to go back; answers are expected of those who may serve it."""
    state = msgspec.structs.replace(_move(state, Phase.ROLLING_BACK, now), reason=reason)
    undone = [msgspec.structs.replace(one, undone=True) for one in state.parts.values() if one.asked_at is not None]
    state = _put(state, *undone)
    return _ask(state, [part for part in undone if may_serve(part)], now)


def _ask(state: Rollout, parts: Iterable[DeployedDevice], now: float) -> Rollout:
    away = state.absent_since
    return _put(state, *(_set_away(part, now) if part.device in away else asked(part, now) for part in parts))


def _set_away(part: DeployedDevice, now: float) -> DeployedDevice:
    return msgspec.structs.replace(part, asked_at=now, state="away", reason="it is offline")


def _restart_clocks(state: Rollout, now: float) -> Rollout:
    if state.phase in ENDED:
        return state
    pending = [msgspec.structs.replace(part, asked_at=now) for part in state.pending]
    back = [part for part in state.parts.values() if part.state == "away" and part.device not in state.absent_since]
    state = _put(state, *pending, *(asked(part, now) for part in back))
    return msgspec.structs.replace(state, since=now)


def _put(state: Rollout, *parts: DeployedDevice) -> Rollout:
    return msgspec.structs.replace(state, parts={**state.parts, **{part.device: part for part in parts}})
