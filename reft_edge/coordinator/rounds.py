"""One round as a state machine without I/O: phases, a transition table, and when collecting ends.

    planned -> published -> collecting -> screening -> merging -> distilling -> evaluating -> closed
                                |             |-> failed (nothing left to merge)
                                |-> failed (no quorum)

`advance(round, event)` is a pure function: it returns the next state and, for an event about an update, a verdict.
Time comes in with the events, as Unix seconds. Two kinds of event are kept apart, after h11: what the coordinator does
itself (`Published`, `Merged`, ...) must be legal, else `LocalProtocolError` is raised and nothing changes; what a
device reports may come in any order, twice, late or from a stranger, and never raises.

Collecting ends when every device has answered (update, refusal or failure), or at the deadline when the quorum is
there. With the quorum, devices that have been offline for `absent_s` are not waited for. A device that announced its
update in time but waits for its turn to upload gets `grace_s` more. Without the quorum the deadline is extended, a
limited number of times, or the round fails, as `RoundRules` say.

Screening looks at the updates beside each other and may take some back. It happens once: with the smaller cohort
that it leaves, another look might take back more. While merging, what our own disk has lost is taken back. The quorum
is about answers in time, so it is not asked again: else a few devices with odd updates could stop every round. Only a
round with nothing left to merge fails.

What this module does not know: blobs, weights, topics, the database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from reft_edge.errors import LocalProtocolError


class Phase(Enum):
    PLANNED = "planned"
    """Every device's variant is chosen."""
    PUBLISHED = "published"
    """Graphs and weights are in the blob store."""
    COLLECTING = "collecting"
    """Tasks are out, the deadline runs."""
    SCREENING = "screening"
    """The updates that came in time are here; none comes in any more."""
    MERGING = "merging"
    """The set of updates that count is fixed."""
    DISTILLING = "distilling"
    """The merged weights are stored."""
    EVALUATING = "evaluating"
    """The round's last weights are stored."""
    CLOSED = "closed"
    FAILED = "failed"


class Standing(Enum):
    """What is known of one device's part in a round."""

    ASKED = "asked"
    ACCEPTED = "accepted"
    OFFERED = "offered"
    """Trained; its update waits to be pulled."""
    UPDATED = "updated"
    """Its update is here, checked, and counts."""
    REFUSED = "refused"
    FAILED = "failed"
    REJECTED = "rejected"
    """Its update is here and is of no use, by itself or beside the others'."""


NOT_YET_COLLECTING = frozenset({Phase.PLANNED, Phase.PUBLISHED})
"""The tasks are not out. Devices that have theirs from an attempt before may speak all the same."""

ANSWERED = frozenset({Standing.UPDATED, Standing.REFUSED, Standing.FAILED, Standing.REJECTED})
"""Nothing more is expected of a device in these standings (but a later report is still heard)."""


class Verdict(Enum):
    """What becomes of an update."""

    COUNTED = "counted"
    DUPLICATE = "duplicate"
    LATE = "late"
    UNEXPECTED = "unexpected"
    """From a device that has no part in this round, or before the tasks were out."""


class RoundRules(msgspec.Struct, frozen=True, kw_only=True):
    """When collecting ends. Seconds."""

    deadline_s: float
    quorum: float
    """Share of the assigned devices whose updates are needed, above 0 and at most 1."""
    grace_s: float = 30.0
    """More time for announced updates that wait for their turn to upload."""
    absent_s: float = 120.0
    """With the quorum, devices that have been offline this long are not waited for."""
    on_missed_quorum: Literal["extend", "fail"] = "extend"
    max_extensions: int = 3
    """How often `deadline_s` is added before the round fails after all."""


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """Graphs and weights are in the blob store."""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks go out now; the deadline counts from here."""

    now: float


class Resumed(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator is back after it was away; devices whose deadline passed meanwhile get `grace_s` to report."""

    now: float


class Screened(msgspec.Struct, frozen=True, kw_only=True):
    """The updates were compared with each other; those of some devices, which counted, count no more."""

    taken_back: dict[str, str] = {}
    """Device -> reason."""


class Damaged(msgspec.Struct, frozen=True, kw_only=True):
    """Updates that counted cannot be read any more."""

    taken_back: dict[str, str]
    """Device -> reason."""


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """The merged weights are stored."""


class Distilled(msgspec.Struct, frozen=True, kw_only=True):
    """The round's last weights are stored."""


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics are stored."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    now: float


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    now: float
    reason: str = ""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    now: float
    reason: str = ""


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """A device has trained; its update can be pulled."""

    device: str
    now: float
    sha256: str


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """An update is on our disk and has passed its checks."""

    device: str
    now: float
    sha256: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """An update is on our disk and has not passed its checks."""

    device: str
    now: float
    sha256: str
    reason: str


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """An announced update cannot be had; the device may train and announce again."""

    device: str
    now: float


class Absent(msgspec.Struct, frozen=True, kw_only=True):
    """The device has gone offline. It may come back; what it then says is heard."""

    device: str
    now: float


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """The device is online."""

    device: str
    now: float


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    now: float


OwnEvent: TypeAlias = Published | Opened | Resumed | Screened | Damaged | Merged | Distilled | Evaluated
DeviceEvent: TypeAlias = Accepted | Refused | Failed | Offered | Received | Rejected | Lost
PresenceEvent: TypeAlias = Absent | Present
Event: TypeAlias = OwnEvent | DeviceEvent | PresenceEvent | Tick

TRANSITIONS: Mapping[tuple[Phase, type[OwnEvent]], Phase] = MappingProxyType(
    {
        (Phase.PLANNED, Published): Phase.PUBLISHED,
        (Phase.PUBLISHED, Opened): Phase.COLLECTING,
        (Phase.COLLECTING, Resumed): Phase.COLLECTING,
        (Phase.SCREENING, Screened): Phase.MERGING,
        (Phase.MERGING, Damaged): Phase.MERGING,
        (Phase.MERGING, Merged): Phase.DISTILLING,
        (Phase.DISTILLING, Distilled): Phase.EVALUATING,
        (Phase.EVALUATING, Evaluated): Phase.CLOSED,
    }
)
"""Everything the coordinator does itself. Collecting ends by device events and by the clock: see `_settle`. Screening
fails the round instead when it leaves nothing: see `_take_back`."""

STANDING_AFTER: Mapping[type[DeviceEvent], Standing] = MappingProxyType(
    {
        Accepted: Standing.ACCEPTED,
        Refused: Standing.REFUSED,
        Failed: Standing.FAILED,
        Offered: Standing.OFFERED,
        Received: Standing.UPDATED,
        Rejected: Standing.REJECTED,
        Lost: Standing.ACCEPTED,
    }
)
"""The standing that a report gives to a device while collecting. `UPDATED` is final: the first good update counts."""

_KEEPS_OFFER = (Standing.OFFERED, Standing.REJECTED)
"""A repeated `Accepted` does not take these back: MQTT may deliver it after the update's announcement."""


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part."""

    standing: Standing = Standing.ASKED
    update: str | None = None
    """SHA-256 of its offered, counted or rejected update."""
    reason: str = ""
    absent_since: float | None = None
    """When it went offline; None while it is there, as far as is known."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state of a round."""

    rules: RoundRules
    devices: dict[str, Participant]
    phase: Phase = Phase.PLANNED
    deadline: float | None = None
    """Unix time; None until the tasks are out."""
    extensions: int = 0
    reason: str = ""
    """Why the round failed."""

    @property
    def n_needed(self) -> int:
        """Updates that make the quorum, at least one."""
        return max(1, math.ceil(self.rules.quorum * len(self.devices) - 1e-9))

    @property
    def counted(self) -> dict[str, str]:
        """Device -> SHA-256 of every update that counts."""
        return {
            device: part.update
            for device, part in self.devices.items()
            if part.standing is Standing.UPDATED and part.update is not None
        }

    @property
    def next_deadline(self) -> float | None:
        """When a `Tick` can change something next; None outside collecting."""
        if self.phase is not Phase.COLLECTING or self.deadline is None:
            return None
        end = self.deadline + (self.rules.grace_s if self._uploads_pending else 0.0)
        everybody_gone = self._everybody_gone_at
        return end if everybody_gone is None else min(end, everybody_gone)

    @property
    def _everybody_gone_at(self) -> float | None:
        """When the last missing device will have been absent for too long; None while one is there, or no quorum."""
        missing = [part.absent_since for part in self.devices.values() if part.standing not in ANSWERED]
        if len(self.counted) < self.n_needed or not missing:
            return None
        times = [since for since in missing if since is not None]
        return max(times) + self.rules.absent_s if len(times) == len(missing) else None

    @property
    def _uploads_pending(self) -> bool:
        return any(part.standing is Standing.OFFERED for part in self.devices.values())


class Step(NamedTuple):
    """What `advance` returns. `verdict` is about the event's update; None for events that carry none."""

    round: Round
    verdict: Verdict | None = None


def start_round(
    devices: list[str], rules: RoundRules, *, begun: Mapping[str, Participant] = MappingProxyType({})
) -> Round:
    """A planned round. Raises `LocalProtocolError` without devices.

    `begun`: what devices have done for it in an attempt before.
    """
    if not devices:
        raise LocalProtocolError("a round needs at least one device")
    return Round(rules=rules, devices={device: begun.get(device, Participant()) for device in devices})


def advance(state: Round, event: Event) -> Step:
    """The state after `event`.

    Raises `LocalProtocolError` for an own event that is not legal now, or takes back what does not count.
    """
    if isinstance(event, Tick):
        return Step(_settle(state, event.now))
    if isinstance(event, OwnEvent):
        after = TRANSITIONS.get((state.phase, type(event)))
        if after is None:
            raise LocalProtocolError(f"{type(event).__name__} is not legal in phase {state.phase.value!r}")
        if isinstance(event, Screened | Damaged):
            return Step(_take_back(state, event, after))
        return Step(msgspec.structs.replace(state, phase=after, deadline=_deadline_after(state, event)))
    if isinstance(event, Absent | Present):
        return Step(_settle(_see(state, event), event.now))
    return _hear(state, event)


def _deadline_after(state: Round, event: OwnEvent) -> float | None:
    if isinstance(event, Opened):
        return event.now + state.rules.deadline_s
    if isinstance(event, Resumed) and state.deadline is not None:
        return max(state.deadline, event.now + state.rules.grace_s)
    return state.deadline


def _take_back(state: Round, event: Screened | Damaged, after: Phase) -> Round:
    """Take updates back; with nothing left the round fails, else it goes on in phase `after`."""
    if strangers := sorted(event.taken_back.keys() - state.counted.keys()):
        raise LocalProtocolError(f"the update of {strangers[0]!r} cannot be taken back: it does not count")
    devices = state.devices | {
        device: msgspec.structs.replace(state.devices[device], standing=Standing.REJECTED, reason=reason)
        for device, reason in event.taken_back.items()
    }
    screened = msgspec.structs.replace(state, devices=devices, phase=after)
    if screened.counted:
        return screened
    reason = f"no update is left to merge{_complaints(screened)}"
    return msgspec.structs.replace(screened, phase=Phase.FAILED, reason=reason)


def _see(state: Round, event: PresenceEvent) -> Round:
    """Note who is there; before the tasks are out and after collecting it does not matter."""
    part = state.devices.get(event.device)
    if part is None or state.phase is not Phase.COLLECTING:
        return state
    since = None if isinstance(event, Present) else part.absent_since if part.absent_since is not None else event.now
    changed = msgspec.structs.replace(part, absent_since=since)
    return msgspec.structs.replace(state, devices={**state.devices, event.device: changed})


def _hear(state: Round, event: DeviceEvent) -> Step:
    """A device's event, legal in every phase."""
    about_update = isinstance(event, Offered | Received | Rejected)
    part = state.devices.get(event.device)
    if part is None or state.phase in NOT_YET_COLLECTING:
        return Step(state, Verdict.UNEXPECTED if about_update else None)
    if part.standing is Standing.UPDATED:
        return Step(_settle(state, event.now), Verdict.DUPLICATE if about_update else None)
    # The clock first: what arrives after the deadline must not extend the round it is late for.
    state = _settle(state, event.now, before=event)
    if state.phase is not Phase.COLLECTING:
        return Step(state, Verdict.LATE if about_update else None)
    if isinstance(event, Accepted) and part.standing in _KEEPS_OFFER:
        return Step(state)
    if isinstance(event, Rejected | Offered) and part.standing is Standing.REJECTED and part.update == event.sha256:
        return Step(state, Verdict.DUPLICATE)
    changed = Participant(
        standing=STANDING_AFTER[type(event)],
        update=event.sha256 if isinstance(event, Offered | Received | Rejected) else None,
        reason=event.reason if isinstance(event, Refused | Failed | Rejected) else "",
    )
    state = msgspec.structs.replace(state, devices={**state.devices, event.device: changed})
    return Step(_settle(state, event.now), Verdict.COUNTED if isinstance(event, Received) else None)


def _settle(state: Round, now: float, *, before: DeviceEvent | None = None) -> Round:
    """End or extend collecting, if it is time.

    `before`: an event about to be applied; an upload that arrives within its grace is not overtaken by the clock.
    """
    if state.phase is not Phase.COLLECTING or state.deadline is None:
        return state
    n_updates = len(state.counted)
    if all(part.standing in ANSWERED for part in state.devices.values()) and before is None:
        return _end(state, n_updates, f"only {n_updates} of the {state.n_needed} updates needed came in")
    end = state.next_deadline
    if end is None or now < end or (before is not None and now <= end):
        return state
    if n_updates >= state.n_needed:
        return msgspec.structs.replace(state, phase=Phase.SCREENING)
    if state.rules.on_missed_quorum == "extend" and state.extensions < state.rules.max_extensions:
        deadline = state.deadline + state.rules.deadline_s
        extended = msgspec.structs.replace(state, deadline=deadline, extensions=state.extensions + 1)
        return _settle(extended, now, before=before)
    return _end(state, n_updates, f"{n_updates} of the {state.n_needed} updates needed came in before the deadline")


def _end(state: Round, n_updates: int, shortage: str) -> Round:
    """Go on when the quorum is there, else fail."""
    if n_updates >= state.n_needed:
        return msgspec.structs.replace(state, phase=Phase.SCREENING)
    return msgspec.structs.replace(state, phase=Phase.FAILED, reason=f"no quorum: {shortage}{_complaints(state)}")


def _complaints(state: Round) -> str:
    """What devices gave as reasons, for the one line a person reads."""
    reasons = [f"{device}: {part.reason}" for device, part in sorted(state.devices.items()) if part.reason]
    return f" ({'; '.join(reasons[:4])})" if reasons else ""
