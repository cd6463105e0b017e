"""The rounds of a run, one after another: wait for devices, plan, play; again with a new plan where nobody could.

The first round waits for `min_devices`. Later ones go on as soon as the quorum's share of them is there, so that a
device that was lost on the way does not hold up the others. Who has trained in an attempt before need not be there.
"""

from __future__ import annotations

import logging
import math

from reft_edge.coordinator import events
from reft_edge.coordinator.assigning import Plan, Planner
from reft_edge.coordinator.attempts import is_finished, left_over, participants
from reft_edge.coordinator.collecting import Collector
from reft_edge.coordinator.conductor import Conductor, clear_leftovers
from reft_edge.coordinator.fleet import Device
from reft_edge.coordinator.open_round import OpenRound
from reft_edge.coordinator.parts import RunParts
from reft_edge.coordinator.records import QuarantineRecord, RoundKey, RoundRecord
from reft_edge.coordinator.rounds import Phase, start_round
from reft_edge.errors import FederationError, PlanError
from reft_edge.wire.messages import Close

LOOK_S = 0.2
"""While waiting for devices: how often at least to look at the clock."""

MAX_REASONS = 5
"""Devices that one error message explains."""

_log = logging.getLogger(__name__)


class Session:
    """One process's work on a run's rounds."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._collector = Collector(parts)
        self._conductor = Conductor(parts, self._collector)
        self._planner = Planner(parts)
        self._settled = False
        """Whether this process has given the fleet time to announce itself."""

    def play_rounds(self) -> None:
        """All rounds that are not closed yet. Raises `FederationError` when one fails for good."""
        parts = self._parts
        history = parts.store.rounds(parts.run)
        if history:
            self._clean_up_after(history[-1])
        self._review()
        while (key := self._next_key(parts.store.rounds(parts.run))) is not None:
            current = self._resume(key) or self._plan(key)
            self._play(current)
            self._review()

    def close_devices(self, run: str) -> None:
        """Tell every device of a run that it has ended."""
        parts = self._parts
        close = Close(run=run, sequence=parts.store.next_sequence(parts.clock()))
        for device in sorted({assignment.device for assignment in parts.store.history(run)}):
            parts.network.send_task(device, close)

    # Which round.

    def _next_key(self, history: list[RoundRecord]) -> RoundKey | None:
        """The round to work on: the last if it is open, another attempt if it failed, the next, or None."""
        run = self._parts.run
        if not history:
            return RoundKey(run=run, number=1)
        last = history[-1]
        if last.phase == Phase.FAILED.value:
            return RoundKey(run=run, number=last.key.number, attempt=last.key.attempt + 1)
        if last.phase != Phase.CLOSED.value:
            return last.key
        following = RoundKey(run=run, number=last.key.number + 1)
        return following if following.number <= self._parts.settings.rounds else None

    def _resume(self, key: RoundKey) -> OpenRound | None:
        """A round that a process before this one began; None when there is none."""
        parts = self._parts
        record = next((record for record in parts.store.rounds(parts.run) if record.key == key), None)
        if record is None:
            return None
        _log.info("going on with round %d, which was %s", key.number, record.phase)
        assignments = parts.store.assignments(key)
        return OpenRound(
            key=key,
            state=parts.store.load_round(record, parts.settings.round_rules),
            assignments={assignment.device: assignment for assignment in assignments},
            variants={item.variant: parts.catalogue.named(item.variant) for item in assignments},
            started_at=self._first_planned_at(record),
            resumed=True,
        )

    def _clean_up_after(self, last: RoundRecord) -> None:
        """What a killed process may have left at the broker for a round that is over."""
        if last.phase in (Phase.CLOSED.value, Phase.FAILED.value):
            clear_leftovers(self._parts, self._parts.store.assignments(last.key))

    # Planning and playing.

    def _plan(self, key: RoundKey) -> OpenRound:
        """Decide who trains what, and store it. Raises `PlanError` when no device can train anything."""
        parts = self._parts
        finished = frozenset(record.device for record in left_over(parts, key) if is_finished(record))
        self._await_devices(finished, later=key.number > 1)
        plan = self._planner.plan(key, parts.fleet.ready(), left_over(parts, key))
        self._tell_planned(key, plan)
        if not plan.assignments:
            reasons = "; ".join(f"{item.device}: {item.reason}" for item in plan.excluded[:MAX_REASONS])
            raise PlanError(f"no device can take part in round {key.number}: {reasons}")
        devices = [assignment.device for assignment in plan.assignments]
        state = start_round(devices, parts.settings.round_rules, begun=participants(plan.assignments))
        record = RoundRecord(key=key, phase=state.phase.value, started_at=parts.clock())
        parts.store.plan_round(record, plan.assignments)
        return OpenRound(
            key=key,
            state=state,
            assignments={assignment.device: assignment for assignment in plan.assignments},
            variants={item.variant: parts.catalogue.named(item.variant) for item in plan.assignments},
            started_at=self._first_planned_at(record),
        )

    def _first_planned_at(self, record: RoundRecord) -> float:
        """When the first attempt of this round was planned."""
        history = self._parts.store.rounds(self._parts.run)
        return min(item.started_at for item in [*history, record] if item.key.number == record.key.number)

    def _play(self, current: OpenRound) -> None:
        """Raises `FederationError` when the round failed and has no attempt left."""
        parts = self._parts
        if self._conductor.play(current) is Phase.CLOSED:
            return
        key, reason = current.key, current.state.reason
        parts.listener(events.RoundFailed(round=key.number, attempt=key.attempt, reason=reason))
        if key.attempt % parts.settings.max_attempts == 0:  # a restart by a person grants as many again
            raise FederationError(f"round {key.number} failed {parts.settings.max_attempts} times; last: {reason}")

    def _review(self) -> None:
        """Put devices whose updates are rejected again and again into quarantine. Again changes nothing."""
        parts = self._parts
        limit = parts.settings.rejection.quarantine_after
        for device, reasons in parts.store.rejections_in_a_row().items() if limit else ():
            if len(reasons) < limit:
                continue
            reason = f"the updates of {len(reasons)} tasks in a row were rejected; the last: {reasons[-1]}"
            record = QuarantineRecord(device=device, since=parts.clock(), reason=reason, by="rejections")
            if parts.store.quarantine(record):
                parts.listener(events.Quarantined(device=device, reason=reason))

    def _await_devices(self, finished: frozenset[str], *, later: bool) -> None:
        """Listen until enough devices are ready. Raises `FederationError` when they do not come.

        Those in quarantine count, so that a fleet whose size is `min_devices` goes on without them; but not alone.
        `finished` have done their part, and count wherever they are. `later`: this is not the run's first round.
        """
        parts, settings = self._parts, self._parts.settings
        n_needed = math.ceil(settings.min_devices * settings.quorum - 1e-9) if later else settings.min_devices
        deadline = parts.clock() + settings.enrol_wait_s
        enough_since: float | None = None
        told: int | None = None
        while True:
            self._conductor.drain()
            (n_ready, n_free), now = self._count_ready(finished), parts.clock()
            if n_ready >= n_needed and n_free:
                enough_since = now if enough_since is None else enough_since
                everybody = self._settled or (later and n_ready >= settings.min_devices)
                if everybody or now >= enough_since + settings.settle_s:
                    self._settled = True
                    return
            else:
                enough_since = None
                if n_ready != told:
                    parts.listener(events.Waiting(devices=n_ready, needed=n_needed))
                    told = n_ready
                if now >= deadline:
                    raise FederationError(self._shortage(n_ready, n_needed))
            self._conductor.listen(timeout_s=LOOK_S)

    def _count_ready(self, finished: frozenset[str]) -> tuple[int, int]:
        """Devices that are there with data or have `finished`, and those of them that are not in quarantine.

        A device without training samples only serves; it is not waited for.
        """
        ready = {device.device for device in self._parts.fleet.ready() if _has_data(device)} | finished
        return len(ready), len(ready - {record.device for record in self._parts.store.quarantined()})

    def _shortage(self, n_ready: int, n_needed: int) -> str:
        settings = self._parts.settings
        if n_ready >= n_needed:
            return (
                f"all {n_ready} devices that are there are in quarantine; `reft-edge quarantine FEDERATION_TOML` "
                "tells why, and --lift DEVICE ends it"
            )
        idle = sum(not _has_data(device) for device in self._parts.fleet.ready())
        others = f", {idle} more have no samples to train on" if idle else ""
        return (
            f"{n_ready} of {n_needed} devices announced themselves within {settings.enrol_wait_s:g} s{others}; start "
            f"their agents with federation = {settings.federation!r} and the broker {settings.broker.address}"
        )

    def _tell_planned(self, key: RoundKey, plan: Plan) -> None:
        self._parts.listener(
            events.Planned(round=key.number, attempt=key.attempt, devices=plan.devices, excluded=plan.excluded)
        )


def _has_data(device: Device) -> bool:
    return device.announcement is not None and device.announcement.training_samples > 0
