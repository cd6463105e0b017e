"""The coordinator's place between runs: its store, its blobs and its connection to the broker, without a model.

Whoever takes it (a deployment, a roll-back, a monitor) is the only one at work, as the store's lock sees to, and hears
and keeps what devices say of themselves. Nothing here loads torch.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.coordinator.deploying.standing import StandingDeployments
from reft_edge.coordinator.fleet import Fleet
from reft_edge.coordinator.fleet_records import FleetRecords
from reft_edge.coordinator.network import Network
from reft_edge.coordinator.network_events import Broken, Disowned, FromDevice, FromNetwork, LinkDown
from reft_edge.coordinator.run_files import BLOBS
from reft_edge.coordinator.store import Store
from reft_edge.coordinator.trust import DeviceKeys, Trust
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.deployment import Condition
from reft_edge.wire.messages import ProfileAnnouncement, Status

if TYPE_CHECKING:
    from reft_edge.coordinator.settings import FederationSettings

CONNECT_TIMEOUT_S = 10.0
"""A wrong address should not take longer to be told."""

QUIET_S = 0.3
"""What devices have retained at the broker comes in one go: when nothing came for so long, that was all."""

MAX_WAITING = 1000
"""Records of what was heard that are written together: some hundred milliseconds of work."""

MAX_SETTLE_S = 60.0
"""Somebody who never falls silent is not listened to for longer before anything is done."""

FAREWELL_S = 5.0
"""For the broker to acknowledge what was said last."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Everything that works on the fleet between runs. `clock` gives Unix time in seconds."""

    settings: FederationSettings
    store: Store
    blobs: BlobStore
    network: Network
    fleet: Fleet
    records: FleetRecords
    standing: StandingDeployments
    conditions: dict[str, Condition]
    """By device, as they were heard since this process began."""
    clock: Callable[[], float]

    def listen(self, timeout_s: float) -> FromNetwork | None:
        """Wait for one event, and keep what a device says of itself; None when none came. Raises what broke the
        network."""
        if self.records.n_waiting >= MAX_WAITING:
            self.records.flush()
        try:
            event = self.network.inbox.get(0.0 if self.records.n_waiting else timeout_s)
        except queue.Empty:
            if not self.records.n_waiting:
                return None
            self.records.flush()  # nothing else is to be done just now
            return self.listen(timeout_s)
        match event:
            case Broken(error=error):
                raise error
            case LinkDown(reason=reason):
                _log.warning("%s; trying again", reason)
            case Disowned(device=device):
                self.fleet.disown(device)
                self.conditions.pop(device, None)
            case FromDevice():
                self._keep(event)
        return event

    def settle(self) -> None:
        """Hear who is there: until it is quiet, and where nobody is there for as long as devices are waited for.

        Raises what broke the network.
        """
        begun = time.monotonic()
        while (waited_s := time.monotonic() - begun) < MAX_SETTLE_S:
            quiet = self.listen(QUIET_S) is None
            if quiet and (self.fleet.ready() or waited_s >= self.settings.settle_s):
                return

    def present(self) -> set[str]:
        """Devices that are there and are believed."""
        return {device.device for device in self.fleet.ready()}

    def _keep(self, event: FromDevice) -> None:
        now = self.clock()
        match event.message:
            case Status() as status:
                self.records.hear_status(event.device, status, now)
            case ProfileAnnouncement() as announcement:
                self.records.hear_profile(event.device, announcement, event.certificate, now)
            case Condition() as condition:
                self.conditions[event.device] = condition
                self.records.hear_condition(event.device, condition, now)
            case _:  # about a task: the coordinator is not at work, and devices say it again when it is
                pass


@contextmanager
def open_site(
    settings: FederationSettings, base_dir: Path, *, clock: Callable[[], float] = time.time
) -> Iterator[Site]:
    """Take the coordinator's place and connect. Raises `ConfigError` or `BrokerError`, and `FederationError` while
    another is at work.

    `base_dir`: the folder of federation.toml.
    """
    directory = base_dir / settings.output.directory
    keys = None
    if settings.trust is not None:
        keys = DeviceKeys(Trust.read(settings.trust.resolved_in(base_dir), now=datetime.now(UTC)), clock=clock)
    elif not settings.broker.is_on_this_machine:
        address = settings.broker.address
        _log.warning("no [trust] in the settings: whoever reaches broker %s can speak for devices", address)
    with ExitStack() as stack:
        store = stack.enter_context(closing(Store(directory, holder="operator")))
        blobs = BlobStore(directory / BLOBS)
        network = Network(
            settings.broker.resolved_in(base_dir),
            federation=settings.federation,
            blobs=blobs,
            max_parallel_uploads=settings.max_parallel_uploads,
            keys=keys,
        )
        fleet = Fleet(device for device in store.devices() if keys is None or keys.recall(device))
        standing = StandingDeployments(store=store, network=network, blobs=blobs, federation=settings.federation)
        standing.offer()
        network.start(wait_s=CONNECT_TIMEOUT_S)
        stack.callback(network.stop)
        stack.callback(standing.conclude, FAREWELL_S)
        records = FleetRecords(store, fleet)
        stack.callback(records.flush)
        yield Site(
            settings=settings,
            store=store,
            blobs=blobs,
            network=network,
            fleet=fleet,
            records=records,
            standing=standing,
            conditions={},
            clock=clock,
        )
