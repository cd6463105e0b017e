"""One round from its plan to its end: does what each phase asks for, and saves before it goes on.

Each phase is a method that needs nothing but what the store and the blobs hold, so a round is resumed by entering the
phase it was in. Between the heavy steps, and all the time while collecting, messages of devices are handled.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from reft_edge import logs
from reft_edge.coordinator import events, rounds
from reft_edge.coordinator.collecting import Collector
from reft_edge.coordinator.contributions import Contribution, ContributionError, update_length
from reft_edge.coordinator.deploying.standing import kept_blobs
from reft_edge.coordinator.holdings import download, what_is_held
from reft_edge.coordinator.learning import Outcome, metric_records
from reft_edge.coordinator.memories import recall, remember, within_limit
from reft_edge.coordinator.network_events import Broken, FromDevice, FromNetwork, LinkDown, LinkUp
from reft_edge.coordinator.open_round import OpenRound
from reft_edge.coordinator.publishing import blobs_of, broadcast_blobs, make_task
from reft_edge.coordinator.records import AssignmentRecord, MetricRecord, RoundKey, RoundRecord
from reft_edge.coordinator.round_weights import mend, model_is_lost, starting_model, write_weights
from reft_edge.coordinator.rounds import Phase
from reft_edge.coordinator.screening import UpdateLength, outliers
from reft_edge.errors import BundleError
from reft_edge.wire.blocks import count_blocks
from reft_edge.wire.messages import Report

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import BlobRef
    from reft_edge.coordinator.evaluation import Metrics
    from reft_edge.coordinator.parts import RunParts

_log = logging.getLogger(__name__)

KEPT_EPOCH = "kept_epoch"
"""Name of the stored metric: which epoch of distilling the round's weights are from; 0 is the merged model."""

TEACHERS = "teachers"
"""Name of the stored metric: how many devices' variants taught; fewer than were merged if our disk has lost some."""

MAX_WAIT_S = 1.0
"""How long at most to wait for a message before the clock is looked at again."""


class Conductor:
    """Plays the rounds of one run."""

    def __init__(self, parts: RunParts, collector: Collector) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._run = parts.run
        self._store = parts.store
        self._blobs = parts.blobs
        self._catalogue = parts.catalogue
        self._learner = parts.learner
        self._network = parts.network
        self._standing = parts.standing
        self._collector = collector
        self._listener = parts.listener
        self._clock = parts.clock
        self._mended: set[tuple[RoundKey, str]] = set()
        self._steps: dict[Phase, Callable[[OpenRound], None]] = {
            Phase.PLANNED: self._publish,
            Phase.PUBLISHED: self._send,
            Phase.COLLECTING: self._collect,
            Phase.SCREENING: self._screen,
            Phase.MERGING: self._merge,
            Phase.DISTILLING: self._distil,
            Phase.EVALUATING: self._evaluate,
        }

    def play(self, current: OpenRound) -> Phase:
        """Bring a round to its end, from whatever phase it is in; returns `CLOSED` or `FAILED`."""
        with logs.about(round=current.key.number):
            return self._play(current)

    def _play(self, current: OpenRound) -> Phase:
        self._collector.round = current
        self._serve(current)
        if current.resumed and current.state.phase is Phase.COLLECTING:
            self._tell_started(current)
            self._collector.resume(self._clock())
        while (step := self._steps.get(current.state.phase)) is not None:
            step(current)
            self.drain()
        self._collector.round = None
        self._network.broadcast([])
        for device in current.assignments:
            self._network.clear_task(device)
        return current.state.phase

    def drain(self) -> None:
        """Handle what has come in."""
        while self.listen(timeout_s=0.0):
            pass

    def listen(self, *, timeout_s: float) -> bool:
        """Wait for one event of the network and handle it; False when none came. Raises what broke the network."""
        try:
            event = self._network.inbox.get(timeout_s)
        except queue.Empty:
            return False
        match event:
            case Broken(error=error):
                raise error
            case LinkUp():
                self._publish_again()
                self._standing.keep_up(self._clock())
            case LinkDown(reason=reason):
                _log.warning("%s; trying again", reason)
            case _:
                with logs.about(device=event.device, task=_task(event)):
                    self._collector.handle(event, self._clock())
        return True

    # Phases.

    def _publish(self, current: OpenRound) -> None:
        """Put this round's weights into the blob store. Tasks of an attempt before keep those that they name."""
        published = write_weights(current, self._parts)
        published = recall(published, within_limit(self._store.memories(self._run)), self._blobs)
        published = [item for item in published if current.assignments[item.device].weights is None]
        self._store.save_assignments(published)
        current.assignments |= {assignment.device: assignment for assignment in published}
        self._advance(current, rounds.Published())

    def _kept_for_the_next(self) -> set[str]:
        """SHA-256 of what later rounds go on from: weights that deltas start from, and memories."""
        deltas = self._settings.training.delta_encoding is not None
        kept = {weights.blob.sha256 for weights in self._store.bases(self._run).values()} if deltas else set()
        memories = within_limit(self._store.memories(self._run))
        return kept | {memory.remembered.tensors.sha256 for memory in memories.values()}

    def _send(self, current: OpenRound) -> None:
        """Start the clock and give out the tasks. A kill in between is no harm: collecting sends them again."""
        self._serve(current)
        self._advance(current, rounds.Opened(now=self._clock()))
        self._tell_started(current)

    def _collect(self, current: OpenRound) -> None:
        """Send the tasks, then listen until the state machine says that collecting has ended."""
        self._collector.take_up(self._clock())
        self._send_tasks(current)
        self._collector.note_absent(self._clock())
        deadline = current.state.deadline
        while current.state.phase is Phase.COLLECTING:
            due = current.state.next_deadline
            wait_s = MAX_WAIT_S if due is None else min(MAX_WAIT_S, max(0.0, due - self._clock()))
            self.listen(timeout_s=wait_s)
            self._collector.tick(self._clock())
            if current.state.deadline != deadline and current.state.phase is Phase.COLLECTING:
                deadline = current.state.deadline
                _log.warning("round %d: no quorum yet; the deadline is extended", current.key.number)
                self._listener(events.RoundExtended(round=current.key.number, deadline=deadline or 0.0))
                self._send_tasks(current)
        self._tell_collected(current)

    def _screen(self, current: OpenRound) -> None:
        """Compare the updates with each other; what stands out, or has been damaged on our disk, is taken back."""
        lengths: dict[str, UpdateLength] = {}
        damaged: dict[str, str] = {}
        for contribution in self._collector.close(self._clock()):
            try:
                lengths[contribution.device] = update_length(contribution, self._blobs)
            except BundleError as exc:
                damaged[contribution.device] = str(exc)
        rejected = outliers(lengths)
        if rejected or damaged:
            _log.warning("round %d: updates of %s are taken back", current.key.number, sorted({*rejected, *damaged}))
        self._collector.take_back(rejected, damaged, self._clock())

    def _merge(self, current: OpenRound) -> None:
        contributions = self._collector.close(self._clock())
        number = current.key.number
        try:
            outcome = self._learner.merge(starting_model(self._parts), contributions)
            memories = remember(contributions, self._blobs)
        except ContributionError as exc:
            if not self._mend(current, _of(exc.device, contributions)):
                _log.warning("round %d: the update of %s is lost: %s", number, exc.device, exc)
                self._collector.take_back_damaged({exc.device: str(exc)}, self._clock())
            return  # the phase is the same, unless nothing is left
        metrics = metric_records(outcome.measured, round_number=number)
        state = rounds.advance(current.state, rounds.Merged()).round
        self._store.save_round(current.key, state, merged=outcome.weights, memories=memories, metrics=metrics)
        current.state = state
        measured = dict(outcome.measured)
        mean, final = measured.get("merged"), measured.get("batch_norm", measured.get("merged"))
        self._listener(
            events.RoundMerged(
                round=number,
                updates=len(contributions),
                accuracy_before_batch_norm=mean.accuracy if mean else None,
                **_values(final),
            )
        )

    def _distil(self, current: OpenRound) -> None:
        merged = self._record(current).merged
        if merged is None:
            raise ValueError(f"round {current.key!r} is distilling without merged weights")
        try:
            self._blobs.read(merged)
        except BundleError as exc:
            _log.warning("round %d is merged again: %s", current.key.number, exc)
            self._merge_again(merged)
        self._teach(current, merged, rounds.advance(current.state, rounds.Distilled()).round)

    def _merge_again(self, merged: BlobRef) -> None:
        """Raises `FederationError` when an update has been lost as well: the model would be another."""
        try:
            again = self._learner.merge(starting_model(self._parts), self._collector.close(self._clock()))
        except ContributionError as exc:
            raise model_is_lost(merged, self._parts) from exc
        if again.weights != merged:
            raise model_is_lost(merged, self._parts)

    def _teach(self, current: OpenRound, merged: BlobRef, after: rounds.Round) -> None:
        """Distil from everybody whose contribution can be read; then the round's state is `after`."""
        number = current.key.number
        teachers = {contribution.device: contribution for contribution in self._collector.close(self._clock())}
        outcome = Outcome(weights=merged)
        while teachers:
            try:
                outcome = self._learner.distil(
                    merged, list(teachers.values()), round_number=number, listener=self._listener
                )
                break
            except ContributionError as exc:
                if not self._mend(current, teachers[exc.device]):
                    _log.warning("round %d: %s does not teach: %s", number, exc.device, exc)
                    del teachers[exc.device]
        notes = {} if outcome.kept_epoch is None else {KEPT_EPOCH: outcome.kept_epoch, TEACHERS: len(teachers)}
        metrics = [
            MetricRecord(round=number, stage="distilled", name=name, value=float(value))
            for name, value in notes.items()
        ]
        self._store.save_round(current.key, after, distilled=outcome.weights, metrics=metrics)
        current.state = after

    def _mend(self, current: OpenRound, contribution: Contribution) -> bool:
        """Once in a round and device: what a disk loses again is lost."""
        known = (current.key, contribution.device)
        if known in self._mended:
            return False
        self._mended.add(known)
        return mend(current, contribution, self._parts)

    def _evaluate(self, current: OpenRound) -> None:
        record = self._record(current)
        if record.distilled is None or record.merged is None:
            raise ValueError(f"round {current.key!r} is evaluating without weights")
        try:
            self._learner.load(record.distilled)
        except BundleError as exc:
            _log.warning("round %d is distilled again: %s", current.key.number, exc)
            if not self._blobs.has(record.merged.sha256):
                raise model_is_lost(record.distilled, self._parts) from exc
            self._teach(current, record.merged, current.state)
            return  # the phase is the same
        measured = self._learner.evaluate("distilled")
        now = self._clock()
        number = current.key.number
        state = rounds.advance(current.state, rounds.Evaluated()).round
        self._store.save_round(current.key, state, metrics=metric_records(measured, round_number=number), closed_at=now)
        current.state = state
        values = _values(measured[-1][1] if measured else None)
        kept, teachers = self._noted(number, KEPT_EPOCH), self._noted(number, TEACHERS)
        if kept is not None and teachers is not None:
            self._listener(events.RoundDistilled(round=number, teachers=teachers, kept_epoch=kept, **values))
        self._listener(
            events.RoundClosed(
                round=number,
                seconds=now - record.started_at,
                counted=len(state.counted),
                asked=len(state.devices),
                traffic=self._traffic(current),
                accuracy=values["accuracy"],
                mse=values["mse"],
            )
        )
        deployed = kept_blobs(self._store, self._settings.federation)
        self._blobs.sweep(self._catalogue.blobs | {record.distilled.sha256} | self._kept_for_the_next() | deployed)

    # Sending.

    def _serve(self, current: OpenRound) -> None:
        """Let each device fetch the blobs of its task, and lay at the broker what several need."""
        for device, assignment in current.assignments.items():
            refs = blobs_of(assignment, current.variants[assignment.variant])
            self._network.serve(device, (ref.sha256 for ref in refs))
        self._network.broadcast(broadcast_blobs(list(current.assignments.values()), current.variants))

    def _send_tasks(self, current: OpenRound) -> None:
        """To everybody whose update is not here."""
        deadline = current.state.deadline
        if deadline is None:
            raise ValueError("tasks are sent when the deadline is known")
        sequence = self._store.next_sequence(self._clock())
        classes = self._settings.model.classes
        for device, assignment in current.assignments.items():
            if current.state.devices[device].standing is rounds.Standing.UPDATED:
                continue
            task = make_task(assignment, current.key, deadline=deadline, classes=classes, sequence=sequence)
            self._network.send_task(device, task, expires_s=max(1.0, deadline - self._clock()))

    def _publish_again(self) -> None:
        """The broker may have lost what was retained, or hold what it wrote to its disk long before it was killed.

        That it still knows our session says nothing about what came after. Blocks that are missing are asked for, and
        the network seeds them again, but nobody asks for a task.
        """
        current = self._collector.round
        if current is not None and current.state.phase is Phase.COLLECTING:
            self._send_tasks(current)

    # Saving and telling.

    def _record(self, current: OpenRound) -> RoundRecord:
        return next(record for record in self._store.rounds(self._run) if record.key == current.key)

    def _advance(self, current: OpenRound, event: rounds.Event) -> None:
        state = rounds.advance(current.state, event).round
        self._store.save_round(current.key, state)
        current.state = state

    def _noted(self, number: int, name: str) -> int | None:
        """What was noted about distilling in a round; None when nothing was distilled."""
        metrics = self._store.metrics(self._run)
        values = [item.value for item in metrics if (item.round, item.stage, item.name) == (number, "distilled", name)]
        return int(values[0]) if values else None

    def _tell_started(self, current: OpenRound) -> None:
        self._listener(
            events.RoundStarted(
                round=current.key.number,
                attempt=current.key.attempt,
                devices=sorted(current.assignments),
                deadline=current.state.deadline or 0.0,
                resumed=current.resumed,
            )
        )
        for device in current.state.counted:  # by a process, or in an attempt, before this one
            self._listener(events.DeviceProgress(round=current.key.number, device=device, state="done"))

    def _tell_collected(self, current: OpenRound) -> None:
        devices = current.state.devices
        late = [device for device, part in sorted(devices.items()) if part.standing not in rounds.ANSWERED]
        counted = len(current.state.counted)
        self._listener(events.RoundCollected(round=current.key.number, counted=counted, asked=len(devices), late=late))

    def _traffic(self, current: OpenRound) -> list[events.DeviceBytes]:
        """Bytes of blobs that each device fetched, by its own word or as far as is known, and sent."""
        tasks = {assignment.task for assignment in current.assignments.values()}
        held = what_is_held(item for item in self._store.history(self._run) if item.task not in tasks)
        updates = {(record.device, record.manifest.blob.sha256): record for record in self._store.updates(self._run)}
        traffic = []
        for device, assignment in sorted(current.assignments.items()):
            variant = current.variants[assignment.variant]
            down_bytes = sum(ref.size_bytes for ref in download(assignment, variant, held.get(device)))
            record = updates.get((device, current.state.devices[device].update or ""))
            if record is not None and record.measured.down_bytes:
                at_most = sum(ref.size_bytes for ref in blobs_of(assignment, variant))
                down_bytes = min(record.measured.down_bytes, at_most)
            traffic.append(
                events.DeviceBytes(
                    device=device,
                    down_bytes=down_bytes,
                    up_bytes=0 if record is None else record.manifest.blob.size_bytes,
                    full_model_bytes=self._learner.n_bytes,
                )
            )
        return traffic


def clear_leftovers(parts: RunParts, assignments: list[AssignmentRecord]) -> None:
    """Clear broadcast blobs that a process before this one may have left at the broker for a round that is over."""
    variants = {item.variant: parts.catalogue.named(item.variant) for item in assignments}
    for ref in broadcast_blobs(assignments, variants):
        parts.network.clear_broadcast(ref.sha256, count_blocks(ref.size_bytes))


def _of(device: str, contributions: Iterable[Contribution]) -> Contribution:
    return next(contribution for contribution in contributions if contribution.device == device)


def _task(event: FromNetwork) -> str:
    """The task that a device's report is about; empty for all that is no report."""
    return event.message.task if isinstance(event, FromDevice) and isinstance(event.message, Report) else ""


def _values(metrics: Metrics | None) -> dict[str, float | None]:
    if metrics is None:
        return {"accuracy": None, "loss": None, "mse": None}
    return {"accuracy": metrics.accuracy, "loss": metrics.loss, "mse": metrics.mse}
