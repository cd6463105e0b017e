"""What a deployment goes on needing when nobody rolls it out: devices that were away come for it days later.

A coordinator that trains, a deployment of another version, a roll-back and a monitor all have the broker and the store
to themselves while they are at work, so each of them keeps this up: devices may fetch what they were offered, what
several may still want lies at the broker, who has not answered is told again when the broker may have forgotten it, and
files that are needed stay on the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from reft_edge.coordinator.deploying.rollout import after_condition
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

UNANSWERED = frozenset({"asked", "fetching", "checking", "late", "away"})
"""Devices in these states may still do what they were told last."""

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


def needed_blobs(record: DeploymentRecord) -> set[str]:
    """SHA-256 of the files that must stay on the disk."""
    if record.state in ("rolling_back", "rolled_back"):
        return set()
    return {file.blob.sha256 for model in record.models for file in model.files}


def kept_blobs(store: Store, federation: str) -> set[str]:
    """The same of the federation's latest deployment, for whoever clears the disk."""
    latest = store.latest_deployment(federation)
    return set() if latest is None else needed_blobs(latest)


def offer(
    record: DeploymentRecord, parts: Sequence[DeployedDevice], *, store: Store, network: Network, blobs: BlobStore
) -> None:
    """Let devices fetch what they were offered; of what they may still want, what is small enough lies at the broker.

    What lay there before and is not wanted any more is cleared. `parts`: of all devices.
    """
    if lost := [sha256 for sha256 in needed_blobs(record) if not blobs.has(sha256)]:
        _log.warning("version %s: %d of its files are lost; deploy it again", record.version, len(lost))
    for part in parts:
        network.serve_models(part.device, [ref.sha256 for ref in _given(record, part)])
    _lay_at_broker(_wanted_at_broker(record, parts, blobs), store=store, network=network)


def _given(record: DeploymentRecord, part: DeployedDevice) -> list[BlobRef]:
    """What a device was offered."""
    if part.asked_at is None or part.undone:
        return []
    return [file.blob for file in record.model(part.model).files]


def _wanted_at_broker(record: DeploymentRecord, parts: Iterable[DeployedDevice], blobs: BlobStore) -> list[BlobRef]:
    wanted: dict[str, BlobRef] = {}
    for part in parts:
        if part.state in UNANSWERED:
            wanted.update((ref.sha256, ref) for ref in _given(record, part))
    return [ref for ref in wanted.values() if may_broadcast(ref) and blobs.has(ref.sha256)]


def _forget_cleared(wanted: Sequence[BlobRef], *, store: Store) -> None:
    """What was to be cleared is: the broker has acknowledged all that was said."""
    store.forget_seeded([ref for ref in store.seeded() if ref not in wanted])


def _lay_at_broker(wanted: Sequence[BlobRef], *, store: Store, network: Network) -> None:
    """Exactly these models. Remembered before it is done: a later process clears what this one could not."""
    before = store.seeded()
    if new := [ref for ref in wanted if ref not in before]:
        store.remember_seeded(new)
    network.broadcast_models(wanted)
    for ref in before:
        if ref not in wanted:
            network.clear_broadcast(ref.sha256, count_blocks(ref.size_bytes))


class StandingDeployment:
    """The federation's latest deployment, for a process that does something else. Times are Unix seconds."""

    def __init__(self, *, store: Store, network: Network, blobs: BlobStore, federation: str) -> None:
        self._store = store
        self._network = network
        self._blobs = blobs
        self._federation = federation

    def offer(self) -> None:
        """Let devices have what they were offered. Call it before the network starts: one that asks too early would be
        told that its files are gone, and give up."""
        self._offered()

    def keep_up(self, now: float) -> None:
        """Offer it, and say again what was not answered. Call it whenever the broker was found."""
        record, parts = self._offered()
        unanswered = [part for part in parts if part.asked_at is not None and part.state in UNANSWERED]
        if record is None or not unanswered:
            return
        sequence = self._store.next_sequence(now)
        for part in unanswered:
            self._network.send_deployment(part.device, message_for(record, part, sequence=sequence))

    def _offered(self) -> tuple[DeploymentRecord | None, list[DeployedDevice]]:
        record = self._store.latest_deployment(self._federation)
        if record is None:
            return None, []
        parts = self._store.deployed_devices(record.deployment)
        offer(record, parts, store=self._store, network=self._network, blobs=self._blobs)
        return record, parts

    def hear(self, device: str, condition: Condition, now: float) -> None:
        """What became of it on a device that comes for it now."""
        record = self._store.latest_deployment(self._federation)
        part = None if record is None else self._store.deployed_device(record.deployment, device)
        if part is not None and (after := after_condition(part, condition, now)) != part:
            self._store.save_deployed_device(after)
            self._offered()  # perhaps nobody wants some file any more

    def conclude(self, timeout_s: float) -> None:
        """Before the network stops: leave at the broker only what devices may still come for.

        Waits until the broker has acknowledged that; where it does not in time, the next process clears it.
        """
        record, parts = self._offered()
        if record is None:
            return
        if self._network.wait_until_said(timeout_s):
            _forget_cleared(_wanted_at_broker(record, parts, self._blobs), store=self._store)
        else:
            _log.warning("the broker is away; what it holds of version %s is cleared next time", record.version)
