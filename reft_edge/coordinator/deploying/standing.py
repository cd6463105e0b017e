"""What a deployment goes on needing when nobody rolls it out: devices that were away come for it days later.

A coordinator that trains, a deployment of another version, a roll-back and a monitor all have the broker and the store
to themselves while they are at work, so each of them keeps this up: devices may fetch what they were offered, what
several may still want lies at the broker, who has not answered is told again when the broker may have forgotten it, and
files that are needed stay on the disk.

Whoever has gone back from a deployment goes by the one before. Mostly that is what it serves then; a device that was
away when the others got it, and away when they got the next, is offered it now.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from reft_edge.coordinator.deploying.answers import UNANSWERED, after_condition
from reft_edge.coordinator.records import DeployedDevice, DeploymentRecord
from reft_edge.wire.blocks import count_blocks
from reft_edge.wire.broadcast import may_broadcast
from reft_edge.wire.deployment import Deploy, DeploymentMessage, Rollback

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import BlobRef
    from reft_edge.coordinator.network import Network
    from reft_edge.coordinator.store import Store
    from reft_edge.wire.blobs import BlobStore
    from reft_edge.wire.deployment import Condition

_log = logging.getLogger(__name__)


def message_for(record: DeploymentRecord, part: DeployedDevice, *, sequence: int) -> DeploymentMessage:
    """What a device that was asked is told now. `sequence` is above that of all messages before."""
    if part.undone:
        return Rollback(deployment=record.deployment, reason=record.reason, sequence=sequence)
    files = record.model(part.model).files
    return Deploy(
        deployment=record.deployment,
        version=record.version,
        model=part.model,
        files=files,
        rules=record.rules,
        classes=record.classes,
        broadcast=any(may_broadcast(file.blob) for file in files),
        sequence=sequence,
    )


def kept_blobs(store: Store, federation: str) -> set[str]:
    """SHA-256 of the files that must stay on the disk: of every deployment that some device goes by, or has not taken
    yet and will go by if that is undone."""
    going_by = {part.deployment for part in store.standing_parts(federation) if not part.undone}
    before = [part for part in store.parts_before(federation) if part.state in UNANSWERED]
    going_by |= {part.deployment for part in before if not part.undone}
    records = [record for record in store.deployments(federation) if record.deployment in going_by]
    return {sha256 for record in records for sha256 in blobs_of(record)}


def forget_files(store: Store, blobs: BlobStore, federation: str) -> None:
    """Remove the files of all deployments that no device goes by any more."""
    every = {sha256 for record in store.deployments(federation) for sha256 in blobs_of(record)}
    for sha256 in every - kept_blobs(store, federation):
        blobs.remove(sha256)


def blobs_of(record: DeploymentRecord) -> set[str]:
    return {file.blob.sha256 for model in record.models for file in model.files}


class StandingDeployments:
    """What each of a federation's devices goes by: mostly one deployment, more where one was for some of them.

    For whatever process has the network and the store. Times are Unix seconds.
    """

    def __init__(self, *, store: Store, network: Network, blobs: BlobStore, federation: str) -> None:
        self._store = store
        self._network = network
        self._blobs = blobs
        self._federation = federation
        self._served: set[str] = set()
        """Devices that may fetch something."""
        self._cleared: set[str] = set()
        """By this process. Clearing twice does no harm, but it is a message a block."""

    def offer(self) -> None:
        """Let devices fetch what they were offered; of what they may still want, the smaller files lie at the broker.

        What lay there before and is not wanted any more is cleared. Call it before the network starts: a device that
        asks too early would be told that its files are gone, and give up.
        """
        given = {part.device: [ref.sha256 for ref in _given(record, part)] for record, part in self._standing()}
        for device in self._served - given.keys():
            self._network.serve_models(device, [])
        for device, blobs in given.items():
            self._network.serve_models(device, blobs)
        self._served = set(given)
        self._lay_at_broker()

    def keep_up(self, now: float) -> None:
        """Offer it, and say again what was not answered. Call it whenever the broker was found."""
        self.offer()
        self._say([(record, part) for record, part in self._standing() if part.state in UNANSWERED], now)

    def hear(self, device: str, condition: Condition, now: float) -> None:
        """What became of it on a device that comes for it now, and what it is told because of that."""
        part = self._store.standing_part(self._federation, device)
        if part is None or (after := after_condition(part, condition, now)) == part:
            return
        self._store.save_deployed_device(after)
        follows = self._store.standing_part(self._federation, device)
        if follows is not None and follows.state in UNANSWERED and _offer(follows) != _offer(part):
            self.offer()
            self._say([(self._record(follows), follows)], now)
        else:
            self._lay_at_broker()  # perhaps nobody wants some file any more

    def conclude(self, timeout_s: float) -> None:
        """Before the network stops: leave at the broker only what devices may still come for.

        Waits until the broker has acknowledged that; where it does not in time, the next process clears it.
        """
        if not self._store.seeded():
            return
        wanted = self._lay_at_broker()
        if self._network.wait_until_said(timeout_s):
            self._store.forget_seeded([ref for ref in self._store.seeded() if ref not in wanted])
        else:
            _log.warning("the broker is away; what it holds of models that were deployed is cleared next time")

    def _say(self, unanswered: list[tuple[DeploymentRecord, DeployedDevice]], now: float) -> None:
        """What can be done: a device that is offered what our disk has lost would give up."""
        sequence = self._store.next_sequence(now) if unanswered else 0
        for record, part in unanswered:
            if all(self._blobs.has(ref.sha256) for ref in _given(record, part)):
                self._network.send_deployment(part.device, message_for(record, part, sequence=sequence))

    def _standing(self) -> list[tuple[DeploymentRecord, DeployedDevice]]:
        records = {record.deployment: record for record in self._store.deployments(self._federation)}
        return [(records[part.deployment], part) for part in self._store.standing_parts(self._federation)]

    def _record(self, part: DeployedDevice) -> DeploymentRecord:
        records = self._store.deployments(self._federation)
        return next(record for record in records if record.deployment == part.deployment)

    def _lay_at_broker(self) -> list[BlobRef]:
        """Exactly what somebody may want lies there. What is new is remembered before: a later process clears it."""
        wanted, before = self._wanted_at_broker(), self._store.seeded()
        if new := [ref for ref in wanted if ref not in before]:
            self._store.remember_seeded(new)
        self._cleared -= {ref.sha256 for ref in wanted}
        self._network.broadcast_models(wanted)
        for ref in before:
            if ref not in wanted and ref.sha256 not in self._cleared:
                self._cleared.add(ref.sha256)
                self._network.clear_broadcast(ref.sha256, count_blocks(ref.size_bytes))
        return wanted

    def _wanted_at_broker(self) -> list[BlobRef]:
        unanswered = [(record, part) for record, part in self._standing() if part.state in UNANSWERED]
        wanted = {ref.sha256: ref for record, part in unanswered for ref in _given(record, part)}
        lost = [ref for ref in wanted.values() if not self._blobs.has(ref.sha256)]
        if lost:
            _log.warning("%d files of models that were deployed are lost; deploy them again", len(lost))
        return [ref for ref in wanted.values() if may_broadcast(ref) and ref not in lost]


def _given(record: DeploymentRecord, part: DeployedDevice) -> list[BlobRef]:
    """What a device was offered."""
    return [] if part.undone else [file.blob for file in record.model(part.model).files]


def _offer(part: DeployedDevice) -> tuple[str, str, bool]:
    """What tells two words to a device apart."""
    return part.deployment, part.model, part.undone
