"""The coordinator's network thread: messages in, tasks out, blocks both ways, whatever the main thread computes.

Devices ask for blocks while a merge or a distillation takes minutes, so serving them must not wait for it. This thread
owns the link to the broker, one `Courier` a device, and the `Broadcaster`. It decodes what arrives, drops what breaks
the protocol, and hands the rest to the main thread through a queue. It decides nothing about rounds and never touches
the database.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from reft_edge import logs
from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator.echo import Echo
from reft_edge.coordinator.inbox import Inbox
from reft_edge.coordinator.network_events import (
    Arrived,
    Broken,
    Disowned,
    FromDevice,
    FromNetwork,
    LinkDown,
    LinkUp,
    NotArrived,
)
from reft_edge.errors import BundleError, RemoteProtocolError, one_line
from reft_edge.wire import mqtt, topics
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import is_block
from reft_edge.wire.broadcast import Broadcaster
from reft_edge.wire.deployment import Condition, DeploymentMessage, decode_condition
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.messages import (
    Close,
    ProfileAnnouncement,
    Status,
    Task,
    decode_profile,
    decode_report,
    decode_status,
    encode,
)
from reft_edge.wire.patience import Patience, for_complaints
from reft_edge.wire.signing import seal, unseal
from reft_edge.wire.transfer import Courier, Delivered, Fetched, Lost, PullLimiter, TransferEvent

if TYPE_CHECKING:
    from reft_edge.coordinator.trust import DeviceKeys

MAX_DEVICES = 100_000
"""Device ids come from topics; beyond this many somebody invents them."""

MAX_EARLY = 1000
"""Conditions that wait for their device's profile, which proves whose they are. Brokers bring the profile first, by the
order of our subscriptions, so there are few."""

MAX_TALK_AT_ONCE = 100
MAX_TALK_PER_S = 10.0
"""Status, profile, condition and reports of one device, each of which may be a transaction and a line of the events'
log. An agent says four things when it connects and its progress every two seconds; one that floods us must not crowd
out others."""

MAX_ASKED_AT_ONCE = 1000
MAX_ASKED_PER_S = 500.0
"""Transfer control of one device, each of which may cost us a window of blocks. At 100 MB/s a device asks 400 times."""

MAX_BROADCAST_QUEUE_BYTES = 2**20
"""Blocks are seeded while less than this waits to be sent, so that control messages do not wait behind them."""

_BROADCAST_STEP = 8
_SEED_POLL_S = 0.02
"""While seeding: how often to see whether the send queue has room."""

_SAID_POLL_S = 0.02

_log = logging.getLogger(__name__)


_Order: TypeAlias = Callable[[float], None]
"""Work for the network thread; takes the time."""


class Network:
    """Start it, send through it, read `inbox`. Methods may be called from any thread.

    With `keys`, tasks are signed, and profiles and reports that are not signed by their device are dropped.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        federation: str,
        blobs: BlobStore,
        max_parallel_uploads: int,
        keys: DeviceKeys | None = None,
    ) -> None:
        self.inbox: Inbox[FromNetwork] = Inbox()
        self._federation = federation
        self._keys = keys
        self._own_key = None if keys is None else keys.own
        self._blobs = blobs
        self._limiter = PullLimiter(max_parallel_uploads)
        self._couriers: dict[str, Courier] = {}
        self._pulling: set[str] = set()
        """Devices whose courier fetches something: only these need the clock."""
        self._online: set[str] = set()
        self._served: dict[str, frozenset[str]] = {}
        self._standing: dict[str, frozenset[str]] = {}
        """As `_served`, for what is deployed."""
        self._seeded: tuple[dict[str, BlobRef], dict[str, BlobRef]] = ({}, {})
        """What shall lie at the broker: for the open round, and of what is deployed."""
        self._early: dict[str, mqtt.Received] = {}
        """By device: its last condition, where its certificate is not known yet."""
        self._patience = Patience(burst=MAX_TALK_AT_ONCE, per_s=MAX_TALK_PER_S)
        self._asked = Patience(burst=MAX_ASKED_AT_ONCE, per_s=MAX_ASKED_PER_S)
        self._complaints = for_complaints()
        self._echo = Echo()
        self._echo_topic = topics.echo_topic(federation)
        self._events: queue.SimpleQueue[mqtt.Event] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._link = mqtt.MqttLink(
            settings,
            client_id=f"reft-coordinator-{federation}",
            events=self._events,
            subscriptions=[
                (self._echo_topic, 1),
                *(
                    (topics.all_devices_filter(federation, topic), 0 if topic == "up" else 1)
                    for topic in topics.UP_TOPICS
                ),
            ],
        )
        self._broadcaster = Broadcaster(blobs, self._publish_block)
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._stopping = False

    def start(self, *, wait_s: float | None) -> None:
        """Connect. Raises `BrokerError` when the broker does not accept us within `wait_s`; None: tries for ever."""
        self._link.start(wait_s=wait_s)
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._link.connected

    def wait_until_said(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged all that was ordered, for at most `timeout_s`; whether it has."""
        end = time.monotonic() + timeout_s
        carried_out = threading.Event()
        self._order(lambda _: carried_out.set())
        while not (carried_out.is_set() and self._broadcaster.idle and self._link.all_said):
            if time.monotonic() >= end or not self._thread.is_alive():
                return False
            time.sleep(_SAID_POLL_S)
        return True

    def stop(self, *, flush_s: float = 5.0) -> None:
        """Send what waits, for at most `flush_s`, and end. Idempotent."""
        self._order(self._stop_thread)
        if self._thread.is_alive():
            self._thread.join()
        self._link.stop(flush_s=flush_s)

    # Orders of the main thread.

    def send_task(self, device: str, message: Task | Close, *, expires_s: float | None = None) -> None:
        """Retain a task, or the end of the run, for a device. It replaces the device's task before."""
        topic = self._topic(device, "task")
        self._link.publish(topic, seal(topic, encode(message), self._own_key), qos=1, retain=True, expires_s=expires_s)

    def clear_task(self, device: str) -> None:
        """The device has nothing to do."""
        self._link.publish(self._topic(device, "task"), b"", qos=1, retain=True)

    def send_deployment(self, device: str, message: DeploymentMessage) -> None:
        """Retain a deployment, or the end of one, for a device. It replaces what it was told before.

        After all orders before it, so that what it names is served by then: a device that is refused a blob gives up.
        """
        topic = self._topic(device, "deployment")
        payload = seal(topic, encode(message), self._own_key)
        self._order(lambda _: void(self._link.publish(topic, payload, qos=1, retain=True)))

    def serve(self, device: str, blobs: Iterable[str]) -> None:
        """The blobs (SHA-256) that a device may ask for from now on; but for models, nothing else is given to it."""
        served = frozenset(blobs)
        self._order(lambda _: self._served.update({device: served}))

    def serve_models(self, device: str, blobs: Iterable[str]) -> None:
        """The same of models that are deployed, whatever a round does."""
        served = frozenset(blobs)
        self._order(lambda _: self._standing.update({device: served}))

    def pull(self, device: str, blob: BlobRef) -> None:
        """Fetch a blob from a device when its turn comes; `Arrived` or `NotArrived` follows. Asking twice is fine."""
        self._order(lambda now: self._fetch(device, blob, now))

    def give_up(self, device: str, sha256: str) -> None:
        """Stop pulling a blob, and tell the device that it may forget it."""
        self._order(lambda _: self._forget(device, sha256))

    def acknowledge(self, device: str, sha256: str) -> None:
        """Tell a device that it may forget an update, whatever became of it."""
        self._order(lambda _: self._courier(device).acknowledge(sha256))

    def broadcast(self, blobs: Iterable[BlobRef]) -> None:
        """Of a round, exactly these blobs shall lie at the broker; what was seeded before and is not among them is
        cleared."""
        wanted = {blob.sha256: blob for blob in blobs}
        self._order(lambda _: self._set_broadcast(wanted, self._seeded[1]))

    def broadcast_models(self, blobs: Iterable[BlobRef]) -> None:
        """The same of models that are deployed, whatever a round does."""
        wanted = {blob.sha256: blob for blob in blobs}
        self._order(lambda _: self._set_broadcast(self._seeded[0], wanted))

    def clear_broadcast(self, sha256: str, n_blocks: int) -> None:
        """Clear what an earlier process seeded."""
        self._order(lambda _: self._broadcaster.clear(sha256, n_blocks))

    # The network thread.

    def _order(self, order: _Order) -> None:
        self._orders.put(order)
        # An event that means nothing wakes the thread; orders have a queue of their own to keep their order.
        self._events.put(mqtt.Rejected(reason=""))

    def _run(self) -> None:
        try:
            while not self._stopping:
                event = self._next_event()
                now = time.monotonic()
                if event is not None:
                    self._handle(event, now)
                self._carry_out(now)
                self._tick(now)
        except Exception as exc:  # noqa: BLE001 - the thread's outermost loop: the main thread raises it again
            _log.debug("network thread failed", exc_info=True)
            self.inbox.put(Broken(error=exc))

    def _next_event(self) -> mqtt.Event | None:
        now = time.monotonic()
        times = [due for device in self._pulling if (due := self._couriers[device].next_wakeup(now)) is not None]
        if not self._broadcaster.idle:
            times.append(now + _SEED_POLL_S)
        if self._echo.due_at is not None:
            times.append(self._echo.due_at)
        try:
            return self._events.get(timeout=max(0.0, min(times) - now) if times else None)
        except queue.Empty:
            return None

    def _carry_out(self, now: float) -> None:
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order(now)

    def _tick(self, now: float) -> None:
        for device in list(self._pulling):
            self._tell(device, self._couriers[device].tick(now))
        self._pulling = {device for device in self._pulling if self._couriers[device].fetching}
        if self._link.connected and self._link.queued_bytes < MAX_BROADCAST_QUEUE_BYTES:
            self._broadcaster.step(_BROADCAST_STEP)
        if self._echo.is_due(now):
            if self._echo.is_lost(now):
                self._link.reconnect("does not bring what we subscribed to")
            else:
                self._link.publish(self._echo_topic, b"do we still hear?")

    def _handle(self, event: mqtt.Event, now: float) -> None:
        match event:
            case mqtt.Received():
                with logs.about(device=self._speaker(event.topic)):
                    self._receive_or_complain(event, now)
            case mqtt.Connected(session_present=present):
                if not present:
                    self._broadcaster.seed_again()  # here, before anything is seeded over this connection
                self.inbox.put(LinkUp(session_present=present))
                self._echo.connected(now)
                self._broadcaster.clear_again()
                self._set_all_connected(now)
            case mqtt.Disconnected(reason=reason):
                self.inbox.put(LinkDown(reason=reason))
                self._echo.disconnected()
                self._set_all_connected(now)
            case mqtt.Rejected(reason=reason) if reason:
                _log.warning("%s", reason)

    def _speaker(self, topic: str) -> str:
        """Whose topic it is; empty where it is nobody's."""
        try:
            return topics.parse_device_topic(self._federation, topic).device
        except RemoteProtocolError:
            return ""

    def _receive_or_complain(self, event: mqtt.Received, now: float) -> None:
        try:
            self._receive(event, now)
        except (RemoteProtocolError, BundleError) as exc:
            if self._complaints.takes(event.topic, now):
                _log.warning("%s: dropped: %s", one_line(event.topic[:200]), exc)

    def _receive(self, event: mqtt.Received, now: float) -> None:
        """Raises `RemoteProtocolError` for what is of no use."""
        if event.topic == self._echo_topic:
            self._echo.heard()
            return
        device, topic = topics.parse_device_topic(self._federation, event.topic)
        if not event.payload:  # a cleared retained message
            return
        if topic != "up":
            self._echo.heard()
        self._have_patience(device, topic, event.payload, now)
        courier = self._courier(device)  # first of all: it bounds how many devices the main thread hears of
        match topic:
            case "up":
                self._tell(device, courier.handle(event.payload, now))
            case "status":
                status = decode_status(event.payload)
                self._set_online(device, status.online, now)
                self.inbox.put_latest((device, Status), FromDevice(device=device, message=status))
            case "profile":
                self._hear_profile(device, event)
            case "condition":
                self._hear_condition(device, event)
            case "report":
                self._hear_report(device, event)
            case _:
                return

    def _have_patience(self, device: str, topic: topics.DeviceTopic, payload: bytes, now: float) -> None:
        """Raises `RemoteProtocolError` for more than a device has to say. Blocks are what we asked it for."""
        if topic != "up":
            if not self._patience.takes(device, now):
                raise RemoteProtocolError(f"more than {MAX_TALK_PER_S:g} messages a second; they are not heard")
        elif not is_block(payload) and not self._asked.takes(device, now):
            raise RemoteProtocolError(f"more than {MAX_ASKED_PER_S:g} requests a second; they are not heard")

    def _hear_profile(self, device: str, event: mqtt.Received) -> None:
        """Raises `RemoteProtocolError` for one that is not the device's own."""
        sealed = unseal(event.topic, event.payload)
        if self._keys is not None:
            try:
                self._keys.check_profile(device, event.topic, sealed)
            except RemoteProtocolError:
                self._disown_if_ended(self._keys, device)
                raise
        certificate = "" if self._keys is None else sealed.certificate
        announcement = decode_profile(sealed.message)
        heard = FromDevice(device=device, message=announcement, certificate=certificate)
        self.inbox.put_latest((device, ProfileAnnouncement), heard)
        if (early := self._early.pop(device, None)) is not None:
            self._hear_condition(device, early)

    def _hear_condition(self, device: str, event: mqtt.Received) -> None:
        """Raises `RemoteProtocolError` for one that is not the device's own."""
        if self._keys is not None and not self._keys.knows(device):  # it is retained, so it is not said again
            if device in self._early or len(self._early) < MAX_EARLY:
                self._early[device] = event
            return
        condition = decode_condition(self._checked(device, event))
        self.inbox.put_latest((device, Condition), FromDevice(device=device, message=condition))

    def _hear_report(self, device: str, event: mqtt.Received) -> None:
        """Raises `RemoteProtocolError` for one that is not the device's own."""
        if self._keys is not None and not self._keys.knows(device):  # it says what matters again
            _log.debug("%s: dropped: its certificate is not known yet", event.topic)
            return
        self.inbox.put_report(FromDevice(device=device, message=decode_report(self._checked(device, event))))

    def _checked(self, device: str, event: mqtt.Received) -> bytes:
        """What a device whose certificate is known has said. Raises `RemoteProtocolError` when another said it."""
        sealed = unseal(event.topic, event.payload)
        if self._keys is not None:
            try:
                self._keys.check_report(device, event.topic, sealed)
            except RemoteProtocolError:
                self._disown_if_ended(self._keys, device)
                raise
        return sealed.message

    def _disown_if_ended(self, keys: DeviceKeys, device: str) -> None:
        """A device that nobody will believe must not be waited for; its status is no word of its own."""
        if keys.forget_if_ended(device):
            self.inbox.put_latest((device, ProfileAnnouncement), Disowned(device=device))

    def _set_online(self, device: str, online: bool, now: float) -> None:
        (self._online.add if online else self._online.discard)(device)
        self._tell(device, self._courier(device).set_connected(online and self._link.connected, now))

    def _set_all_connected(self, now: float) -> None:
        for device, courier in self._couriers.items():
            self._tell(device, courier.set_connected(self._link.connected and device in self._online, now))

    def _tell(self, device: str, events: Iterable[TransferEvent]) -> None:
        for event in events:
            match event:
                case Fetched(sha256):
                    self.inbox.put(Arrived(device=device, sha256=sha256))
                case Lost(sha256, reason):
                    self.inbox.put(NotArrived(device=device, sha256=sha256, reason=reason))
                case Delivered(sha256):
                    _log.debug("%s has %s", device, sha256[:12])

    def _courier(self, device: str) -> Courier:
        """Raises `RemoteProtocolError` beyond `MAX_DEVICES`."""
        if device not in self._couriers:
            if len(self._couriers) >= MAX_DEVICES:
                raise RemoteProtocolError(f"more than {MAX_DEVICES} devices")
            topic = self._topic(device, "down")
            self._couriers[device] = Courier(
                self._blobs,
                lambda payload: void(self._link.publish(topic, payload, qos=0)),
                may_serve=lambda sha256: self._may_serve(device, sha256),
                limiter=self._limiter,
            )
        return self._couriers[device]

    def _may_serve(self, device: str, sha256: str) -> bool:
        return any(sha256 in granted.get(device, frozenset()) for granted in (self._served, self._standing))

    def _fetch(self, device: str, blob: BlobRef, now: float) -> None:
        self._pulling.add(device)
        self._tell(device, self._courier(device).fetch(blob, now))

    def _forget(self, device: str, sha256: str) -> None:
        courier = self._courier(device)
        courier.cancel(sha256)
        courier.acknowledge(sha256)

    def _set_broadcast(self, of_round: dict[str, BlobRef], models: dict[str, BlobRef]) -> None:
        self._seeded = (of_round, models)
        wanted = of_round | models
        for sha256 in self._broadcaster.held - wanted.keys():
            self._broadcaster.clear(sha256)
        for blob in wanted.values():
            self._broadcaster.seed(blob)

    def _publish_block(self, transfer: str, name: str, payload: bytes) -> bool:
        topic = topics.blob_topic(self._federation, transfer, name)
        return self._link.publish(topic, payload, qos=1, retain=True)

    def _stop_thread(self, _now: float) -> None:
        self._stopping = True
        for courier in self._couriers.values():
            courier.close()

    def _topic(self, device: str, kind: topics.DeviceTopic) -> str:
        return topics.device_topic(self._federation, device, kind)


def void(_result: object) -> None:
    """Make a function that returns something one that returns nothing."""
