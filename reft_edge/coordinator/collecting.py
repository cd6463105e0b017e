"""Reports and updates of devices, turned into the round's state, in the right order with the store.

`Collector` handles everything the network thread hands over, also between rounds and while no round is open. It decides
an update's fate: recorded as offered before it is pulled, checked when it has arrived, counted once, or
recorded as late, rejected or duplicate. What is rejected is kept apart before that is recorded, so that no kill loses
it. It does not wait: the server calls it with events and with the time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, assert_never

import msgspec

from reft_edge.coordinator import events, rounds
from reft_edge.coordinator.contributions import Contribution, check_update, unwanted_reason
from reft_edge.coordinator.fleet_records import FleetRecords
from reft_edge.coordinator.network_events import Arrived, Disowned, FromDevice, NotArrived
from reft_edge.coordinator.open_round import OpenRound
from reft_edge.coordinator.prediction import believable
from reft_edge.coordinator.records import (
    TaskOwner,
    UpdateRecord,
    UpdateState,
)
from reft_edge.coordinator.rejected import RejectedNote
from reft_edge.errors import BundleError
from reft_edge.wire.deployment import Condition
from reft_edge.wire.messages import (
    Accepted,
    Done,
    Failed,
    ProfileAnnouncement,
    Progress,
    Refused,
    Report,
    Status,
)
from reft_edge.wire.patience import for_complaints

if TYPE_CHECKING:
    from reft_edge.coordinator.parts import RunParts

_log = logging.getLogger(__name__)

MAX_REASON = 500
"""Characters of a reason that are stored and shown."""

MAX_ANNOUNCED = 8
"""Different updates that a device may announce for one task. A device trains a task again when it has lost its update;
one that goes on inventing others fills our disk and database, so more are not heard."""

_FATES: dict[rounds.Verdict, UpdateState] = {
    rounds.Verdict.COUNTED: "received",
    rounds.Verdict.DUPLICATE: "duplicate",
    rounds.Verdict.LATE: "late",
    rounds.Verdict.UNEXPECTED: "rejected",
}


class Collector:
    """Feeds the store, the fleet and the open round. `round` is set by the server."""

    def __init__(self, parts: RunParts) -> None:
        self.round: OpenRound | None = None
        self._store = parts.store
        self._blobs = parts.blobs
        self._network = parts.network
        self._fleet = parts.fleet
        self._records = FleetRecords(parts.store, parts.fleet)
        self._standing = parts.standing
        self._rejected = parts.rejected
        self._listener = parts.listener
        self._complaints = for_complaints()

    def handle(self, event: FromDevice | Disowned | Arrived | NotArrived, now: float) -> None:
        """`now` is Unix time."""
        match event:
            case FromDevice(device=device, message=Status() as status):
                came_or_went = self._records.hear_status(device, status, now)
                self._records.flush()
                self._note_presence(device, now)
                if came_or_went:
                    self._tell_device(device)
            case FromDevice(device=device, message=ProfileAnnouncement() as announcement, certificate=certificate):
                if self._records.hear_profile(device, announcement, certificate, now):
                    self._records.flush()
                    self._tell_device(device)
            case FromDevice(device=device, message=Condition() as condition):
                self._records.hear_condition(device, condition, now)
                self._records.flush()
                self._standing.hear(device, condition, now)
            case FromDevice(device=device, message=Accepted() | Refused() | Failed() | Progress() | Done() as report):
                self._hear_report(device, report, now)
            case Disowned(device=device):
                self._disowned(device, now)
            case Arrived(device=device, sha256=sha256):
                self._arrived(device, sha256, now)
            case NotArrived(device=device, sha256=sha256, reason=reason):
                self._not_arrived(device, sha256, reason, now)
            case _:
                raise TypeError(f"unexpected event {event!r}")

    def tick(self, now: float) -> None:
        """Let the clock act on the open round."""
        if self.round is not None:
            self._advance(self.round, rounds.Tick(now=now))

    def note_absent(self, now: float) -> None:
        """Tell the round, as collecting begins, who is not there."""
        for device in self._open().assignments:
            self._note_presence(device, now)

    def resume(self, now: float) -> None:
        """Go on with a round that was collecting when the process before this one ended."""
        self._advance(self._open(), rounds.Resumed(now=now))

    def take_up(self, now: float) -> None:
        """As collecting begins: go on with what was announced to the process, or in the attempt, before this one."""
        current = self._open()
        for record in self._store.updates(current.key.run, state="offered"):
            if not current.has_task(record.device, record.task):
                continue
            if self._blobs.has(record.manifest.blob.sha256):
                self._network.acknowledge(record.device, record.manifest.blob.sha256)
                self._arrived(record.device, record.manifest.blob.sha256, now)
            else:
                self._network.pull(record.device, record.manifest.blob)

    def close(self, now: float) -> list[Contribution]:
        """The updates that count, when collecting has ended. Those still on their way are late."""
        current = self._open()
        contributions: list[Contribution] = []
        for device, part in current.state.devices.items():
            if part.update is None:
                continue
            record = self._store.update(current.assignments[device].task, part.update)
            if record is None:
                continue
            if part.standing is rounds.Standing.UPDATED:
                contributions.append(current.contribution(record))
            elif part.standing is rounds.Standing.OFFERED and record.state == "offered":
                self._settle_update(record, "late", "it was still on its way when the round ended", now)
                self._network.give_up(device, part.update)
        return contributions

    def take_back(self, rejected: Mapping[str, str], damaged: Mapping[str, str], now: float) -> None:
        """End screening: the updates of these devices, with reasons, count no more.

        `rejected` are of no use beside the others. `damaged` are lost by ourselves, which is not held against a device.
        """
        self._take_back(rounds.Screened(taken_back={**rejected, **damaged}), rejected, now)

    def take_back_damaged(self, damaged: Mapping[str, str], now: float) -> None:
        """While merging: the updates of these devices, with reasons, cannot be read any more."""
        self._take_back(rounds.Damaged(taken_back=dict(damaged)), {}, now)

    def _take_back(self, event: rounds.Screened | rounds.Damaged, rejected: Mapping[str, str], now: float) -> None:
        current = self._open()
        reasons = event.taken_back
        records = []
        for device, sha256 in current.state.counted.items():
            record = self._store.update(current.assignments[device].task, sha256)
            if record is not None and device in reasons:
                fate: UpdateState = "rejected" if device in rejected else "damaged"
                records.append(self._with_state(record, fate, reasons[device], now))
        kept = {record.device: self._keep(current, record) for record in records if record.state == "rejected"}
        state = rounds.advance(current.state, event).round
        self._store.save_round(current.key, state, devices=reasons, updates=records)
        current.state = state
        for record in records:
            self._tell_update(record, kept=kept.get(record.device, ""))

    def _disowned(self, device: str, now: float) -> None:
        """The device's words count no more, so nobody waits for any. What has counted before stays."""
        self._fleet.disown(device)
        current = self.round
        if current is not None and device in current.assignments:
            reason = "its certificate is no longer accepted"
            self._tell_progress(current, device, "failed", reason)
            self._advance(current, rounds.Failed(device=device, now=now, reason=reason))

    # Reports.

    def _hear_report(self, device: str, report: Report, now: float) -> None:
        current = self.round
        if current is not None and self._is_early(current) and current.has_task(device, report.task):
            return  # it has the task from an attempt before, and is told it again as collecting begins
        if current is None or not current.has_task(device, report.task):
            if isinstance(report, Done):
                self._hear_of_the_past(device, report, now)
            elif isinstance(report, Failed) and self._past_task(device, report.task) is not None:
                self._store.save_failure(report.task, report.kind)
            return
        match report:
            case Accepted():
                self._tell_progress(current, device, "accepted")
                self._advance(current, rounds.Accepted(device=device, now=now))
            case Refused():
                reason = report.reason[:MAX_REASON]
                self._tell_progress(current, device, "refused", reason)
                self._advance(current, rounds.Refused(device=device, now=now, reason=reason))
            case Failed(kind=kind):
                text = f"{kind}: {report.reason[:MAX_REASON]}"
                self._tell_progress(current, device, "failed", text)
                self._advance(current, rounds.Failed(device=device, now=now, reason=text))
                self._store.save_failure(report.task, kind)
            case Progress():
                self._listener(
                    events.DeviceProgress(
                        round=current.key.number,
                        device=device,
                        state=report.state,
                        steps_done=report.steps_done,
                        steps_total=report.steps_total,
                        loss=report.loss,
                    )
                )
            case Done():
                self._offered(current, device, report, now)
            case _:
                assert_never(report)

    def _hear_of_the_past(self, device: str, report: Done, now: float) -> None:
        """An update for a round that is over, or of a run that nobody knows: say that it may be forgotten.

        Between two attempts of its round it is not heard: the device says it again, and the next attempt may want it.
        """
        sha256 = report.update.blob.sha256
        past = self._past_task(device, report.task)
        if past is not None and past.phase == rounds.Phase.FAILED.value and self.round is None:
            return
        self._network.acknowledge(device, sha256)
        if past is None:
            self._complain(device, f"announced an update for task {report.task}, which it never had", now)
        elif self._store.update(report.task, sha256) is None and not self._announced_too_many(device, report, now):
            record = self._record(device, report, past.round, elapsed_s=now - past.started_at, now=now)
            self._settle_update(record, "late", "its round is over", now)

    def _past_task(self, device: str, task: str) -> TaskOwner | None:
        """What is known of a task that was this device's; None otherwise: nobody is believed about others' tasks."""
        owner = self._store.task_owner(task)
        return owner if owner is not None and owner.device == device else None

    def _announced_too_many(self, device: str, report: Done, now: float) -> bool:
        if self._store.count_announced(report.task) < MAX_ANNOUNCED:
            return False
        self._complain(device, f"announces more than {MAX_ANNOUNCED} updates for task {report.task}; not heard", now)
        return True

    def _complain(self, device: str, text: str, now: float) -> None:
        """A line in the log, unless the device has caused too many."""
        if self._complaints.takes(device, now):
            _log.warning("%s %s", device, text)

    def _offered(self, current: OpenRound, device: str, report: Done, now: float) -> None:
        sha256 = report.update.blob.sha256
        before = current.state.devices[device]
        if before.update == sha256 and before.standing is rounds.Standing.OFFERED:
            self._network.pull(device, report.update.blob)  # said again; a pull that runs is left alone
            return
        known = self._store.update(report.task, sha256)
        if known is not None and known.state != "offered":  # its fate is decided, but our word did not arrive
            self._network.acknowledge(device, sha256)
            return
        if known is None and self._announced_too_many(device, report, now):
            self._network.acknowledge(device, sha256)
            return
        record = self._record(device, report, current.key.number, elapsed_s=now - current.started_at, now=now)
        reason = self._unwanted(current, device, report)
        if reason:
            self._reject(current, record, reason, now)
            self._network.acknowledge(device, sha256)
            return
        verdict = self._advance(current, rounds.Offered(device=device, now=now, sha256=sha256), update=record)
        if verdict is not None:
            self._settle_update(record, _FATES[verdict], "", now)
            self._network.acknowledge(device, sha256)
            return
        if before.update is not None:
            self._network.give_up(device, before.update)
        self._tell_progress(current, device, "uploading")
        self._network.pull(device, report.update.blob)

    def _unwanted(self, current: OpenRound, device: str, report: Done) -> str:
        assignment = current.assignments[device]
        manifest = current.variants[assignment.variant].manifest
        memory = None if assignment.memory is None else assignment.memory.update
        return unwanted_reason(report.update, manifest, assignment.plan.update_codec, memory=memory)

    # Updates.

    def _arrived(self, device: str, sha256: str, now: float) -> None:
        current = self.round
        if current is None or self._is_early(current) or device not in current.assignments:
            return  # when it comes between two attempts, `take_up` finds it
        record = self._store.update(current.assignments[device].task, sha256)
        if record is None or record.state != "offered":
            return
        contribution = current.contribution(record)
        try:
            check_update(contribution, self._blobs, max_steps=current.max_steps(record))
        except BundleError as exc:
            # What our own disk has lost is not held against the device; a damaged blob is gone when it has been read.
            needed = (contribution.update.blob, contribution.weights.blob, contribution.memory)
            ours = not all(self._blobs.has(ref.sha256) for ref in needed if ref is not None)
            reason = str(exc)[:MAX_REASON]  # may quote names out of the update
            self._reject(current, record, reason, now, fate="damaged" if ours else "rejected")
            return
        received = rounds.Received(device=device, now=now, sha256=sha256)
        self._decide(current, received, self._with_state(record, "received", "", now), now)

    def _reject(
        self,
        current: OpenRound,
        record: UpdateRecord,
        reason: str,
        now: float,
        *,
        fate: Literal["rejected", "damaged"] = "rejected",
    ) -> None:
        sha256 = record.manifest.blob.sha256
        rejected = rounds.Rejected(device=record.device, now=now, sha256=sha256, reason=reason)
        record = self._with_state(record, fate, reason, now)
        self._decide(current, rejected, record, now, kept=self._keep(current, record) if fate == "rejected" else "")

    def _keep(self, current: OpenRound, record: UpdateRecord) -> str:
        """Put a rejected update apart; where its note is, or nothing."""
        note = RejectedNote.of(record, run=current.key.run, variant=current.assignments[record.device].variant)
        return self._rejected.keep(note, self._blobs)

    def _decide(
        self, current: OpenRound, event: rounds.Event, record: UpdateRecord, now: float, *, kept: str = ""
    ) -> None:
        """Let the round judge an update; `record` has the state that it gets if the round has a use for it."""
        verdict = self._advance(current, event, update=record)
        if verdict in (rounds.Verdict.COUNTED, None):
            self._tell_update(record, kept=kept)
        else:
            self._settle_update(record, _FATES[verdict], record.reason, now)

    def _not_arrived(self, device: str, sha256: str, reason: str, now: float) -> None:
        current = self.round
        if current is None or current.state.devices.get(device, rounds.Participant()).update != sha256:
            return
        _log.warning("%s: update %s cannot be had: %s", device, sha256[:12], reason)
        self._advance(current, rounds.Lost(device=device, now=now))

    def _record(self, device: str, report: Done, round_number: int, *, elapsed_s: float, now: float) -> UpdateRecord:
        """`elapsed_s`: since the round was planned; nothing that the device did for it can have taken longer."""
        return UpdateRecord(
            task=report.task,
            device=device,
            round=round_number,
            manifest=report.update,
            measured=believable(report.measured, elapsed_s=elapsed_s),
            state="offered",
            at=now,
        )

    def _with_state(self, record: UpdateRecord, state: UpdateState, reason: str, now: float) -> UpdateRecord:
        return msgspec.structs.replace(record, state=state, reason=reason, at=now)

    def _settle_update(self, record: UpdateRecord, state: UpdateState, reason: str, now: float) -> None:
        settled = self._with_state(record, state, reason, now)
        self._store.save_update(settled)
        self._tell_update(settled)

    # The round.

    def _is_early(self, current: OpenRound) -> bool:
        return current.state.phase in rounds.NOT_YET_COLLECTING

    def _note_presence(self, device: str, now: float) -> None:
        current = self.round
        if current is not None and device in current.assignments:
            seen = rounds.Present if self._fleet[device].online else rounds.Absent
            self._advance(current, seen(device=device, now=now))

    def _advance(
        self,
        current: OpenRound,
        event: rounds.Event,
        *,
        update: UpdateRecord | None = None,
    ) -> rounds.Verdict | None:
        """Apply an event and save what it changed, `update` too if the event took effect, in one transaction."""
        before = current.state
        state, verdict = rounds.advance(before, event)
        took_effect = verdict in (None, rounds.Verdict.COUNTED)
        if state != before or (update is not None and took_effect):
            changed = [device for device, part in state.devices.items() if part != before.devices[device]]
            records = [update] if update is not None and took_effect else []
            self._store.save_round(current.key, state, devices=changed, updates=records)
        current.state = state
        return verdict

    def _open(self) -> OpenRound:
        if self.round is None:
            raise ValueError("no round is open")
        return self.round

    # Telling.

    def _tell_device(self, device: str) -> None:
        known = self._fleet[device]
        announcement = known.announcement
        self._listener(
            events.DeviceSeen(
                device=device,
                online=known.online,
                state=known.state,
                profile=announcement.profile.name if announcement else "",
                training_samples=announcement.training_samples if announcement else 0,
            )
        )

    def _tell_progress(self, current: OpenRound, device: str, state: str, reason: str = "") -> None:
        self._listener(events.DeviceProgress(round=current.key.number, device=device, state=state, reason=reason))

    def _tell_update(self, record: UpdateRecord, *, kept: str = "") -> None:
        manifest = record.manifest
        self._listener(
            events.UpdateSeen(
                round=record.round,
                device=record.device,
                state=record.state,
                reason=record.reason,
                kept=kept,
                up_bytes=manifest.blob.size_bytes,
                training_samples=manifest.training_samples,
                loss_first=manifest.loss_first,
                loss_last=manifest.loss_last,
                holdout_metric_before=manifest.holdout_metric_before,
                holdout_metric_after=manifest.holdout_metric_after,
                measured=record.measured,
            )
        )
