"""A lasting link to the broker: one thread that connects, reconnects, sends and receives.

The link outlives its connections. Subscriptions are renewed on every connect; QoS 1 messages are kept while offline and
sent again until the broker has acknowledged them; QoS 0 messages (blocks) are dropped while offline, because their
receiver asks again. An acknowledged message can still be lost with the broker, so nothing above relies on delivery.

What arrives is put into a queue as events; the owner handles them in its own thread. When the owner does not keep up,
the link stops reading and TCP slows the broker down, so memory stays bounded.
"""

from __future__ import annotations

import logging
import queue
import random
import select
import socket
import threading
import time
from collections.abc import Sequence

from reft_edge.errors import BrokerError, LocalProtocolError
from reft_edge.wire.connection_errors import BrokerConnectionError
from reft_edge.wire.endpoint import BrokerSettings, parse_broker
from reft_edge.wire.link_events import Connected, Disconnected, Event, Received, Rejected, TurnedAway
from reft_edge.wire.outbox import Outbox, Outgoing
from reft_edge.wire.paho_connection import (
    MAX_PACKET_BYTES,
    MqttVersion,
    PahoConnection,
    topic_matches,
)

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "BrokerSettings",
    "Connected",
    "Disconnected",
    "Event",
    "MqttLink",
    "Received",
    "Rejected",
    "TurnedAway",
    "parse_broker",
]

MAX_PAYLOAD_BYTES = MAX_PACKET_BYTES - 1024
"""What `publish` takes: the packet limit less room for topic and properties. A larger one would reconnect for ever."""

MAX_IN_FLIGHT = 8
"""QoS 1 messages without acknowledgement, also right after a reconnect."""

ACKNOWLEDGED_WITHIN_S = 60.0
"""Without any acknowledgement for this long, while one is due, the broker has lost it, and we connect again to say it
again. Mosquitto 2.0.11 drops acknowledgements, too, when 500 packets wait for a client, which one device that floods
its topics can bring about; after `MAX_IN_FLIGHT` of them nothing would be said any more. A block needs half a minute at
20 kbit/s."""

MAX_UNREAD_EVENTS = 256
"""Beyond this many unhandled events the link stops reading."""

MIN_RECONNECT_S = 1.0
MAX_RECONNECT_S = 30.0
"""Reconnect delays are drawn at random up to a bound that doubles, so that a fleet does not come back all at once."""

_FIRST_RETRY_S = 0.2
"""While somebody waits in `start`, a broker that is just starting is tried again this soon."""

_HANG_UPS_BEFORE_OTHER_VERSION = 3
"""A broker that worked and now hangs up without a word is probably restarting, not downgraded."""

_TRIAL_TIMEOUT_S = 2.0
"""amqtt misreads the properties of MQTT 5's first packet and never answers; all it costs is MQTT 3.1.1 instead of 5."""

_UNREAD_POLL_S = 0.05
_STOP_PATIENCE_S = 3.0

_log = logging.getLogger(__name__)


class MqttLink:
    """One client of the broker. Methods may be called from any thread.

    `will` is (topic, payload), published retained at QoS 1 by the broker when we vanish. `persistent=False` is for
    short-lived commands: the broker forgets them at once.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        client_id: str,
        events: queue.SimpleQueue[Event],
        will: tuple[str, bytes] | None = None,
        subscriptions: Sequence[tuple[str, int]] = (),
        persistent: bool = True,
        max_queued_bytes: int = 8 * 2**20,
    ) -> None:
        self._settings = settings
        self._client_id = client_id
        self._events = events
        self._will = will
        self._persistent = persistent
        self._lock = threading.Lock()
        self._outbox = Outbox(max_bulk_bytes=max_queued_bytes)
        self._subscriptions: dict[str, int] = dict(subscriptions)
        self._changed_topics: dict[str, None] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._flush_until = 0.0
        self._useless = ""
        """Why the owner wants another connection."""
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None
        self._up = False
        self._all_said = False
        self._outcome = threading.Condition()
        self._failure: BrokerConnectionError | None = None
        self._someone_waits = False
        self._version: MqttVersion = "3.1.1" if settings.mqtt_version == "3.1.1" else "5"
        self._version_worked = False
        self._hang_ups = 0
        self.sent_bytes = 0
        """Payloads that were taken to be sent, since the start; so `received_bytes` of those that came for us."""
        self.received_bytes = 0

    @property
    def connected(self) -> bool:
        return self._up

    @property
    def turned_away(self) -> bool:
        """Whether the last attempt to connect came as far as the broker, which did not let us in."""
        return self._failure is not None and self._failure.turned_away

    @property
    def all_said(self) -> bool:
        """Whether we are connected and the broker has acknowledged everything that it should."""
        with self._lock:
            return self._up and self._all_said

    @property
    def queued_bytes(self) -> int:
        """Bytes of large messages that wait to be sent; a bulk sender pauses while this is high."""
        return self._outbox.bulk_bytes

    def start(self, *, wait_s: float | None = None) -> None:
        """Start the network thread. Without `wait_s` it tries for ever, and failures are only logged.

        With `wait_s`, returns when the broker has accepted us. Raises `BrokerError` after `wait_s`, or at once when
        trying again cannot help (unknown host, wrong credentials or certificate); the link is stopped then. Raises
        `ConfigError` for credential files that cannot be read.
        """
        if self._thread is not None or self._stopping:
            raise LocalProtocolError("a link is started once; make a new one")
        self._settings.password()
        self._settings.tls_context()
        self._wake_sockets = socket.socketpair()
        for sock in self._wake_sockets:
            sock.setblocking(False)
        self._someone_waits = wait_s is not None
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self._client_id}", daemon=True)
        self._thread.start()
        if wait_s is None:
            return
        with self._outcome:
            self._outcome.wait_for(lambda: self._up or bool(self._failure and self._failure.permanent), wait_s)
            self._someone_waits = False
            failure = None if self._up else self._failure or BrokerConnectionError(_no_answer(self._settings, wait_s))
        if failure is not None:
            self.stop(flush_s=0.0)
            raise BrokerError(str(failure)) from failure

    def stop(self, *, flush_s: float = 2.0) -> None:
        """Send what waits, for at most `flush_s`, disconnect (the will is not sent), end the thread. Idempotent."""
        self._flush_until = time.monotonic() + flush_s
        self._stopping = True
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            # A connect to an address that swallows packets blocks for its whole timeout; that thread ends by itself.
            self._thread.join(flush_s + _STOP_PATIENCE_S)
        for sock in self._wake_sockets or ():
            sock.close()

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expires_s: float | None = None
    ) -> bool:
        """Queue a message; whether it was taken.

        False: QoS 0 while offline, a full queue, or a stopped link. A retained QoS 1 message replaces a waiting one on
        its topic. `expires_s`: neither we nor a broker with MQTT 5 keep it longer. Raises `LocalProtocolError` for
        more than `MAX_PAYLOAD_BYTES`.
        """
        if len(payload) > MAX_PAYLOAD_BYTES or len(topic) > 512 or qos not in (0, 1):
            raise LocalProtocolError(
                f"cannot publish {len(payload)} bytes at QoS {qos} on {topic[:80]!r}; "
                f"at most {MAX_PAYLOAD_BYTES} bytes at QoS 0 or 1"
            )
        expires_at = None if expires_s is None else time.monotonic() + expires_s
        message = Outgoing(topic=topic, payload=payload, qos=qos, retain=retain, expires_at=expires_at)
        with self._lock:
            taken = not self._stopping and (qos > 0 or self._up) and self._outbox.put(message)
            self._all_said = self._all_said and not taken
            self.sent_bytes += len(payload) if taken else 0
        if taken:
            self._wake()
        return taken

    def reconnect(self, reason: str) -> None:
        """End this connection, which is of no use, and make another. What was not acknowledged is said again."""
        self._useless = reason
        self._wake()

    def waiting_topics(self) -> set[str]:
        """Topics of messages that wait to be sent; after `stop`, also of those that nobody acknowledged."""
        with self._lock:
            return self._outbox.topics()

    def subscribe(self, topic: str, qos: int = 0) -> None:
        """Subscribe now if connected, and again on every connect."""
        with self._lock:
            self._subscriptions[topic] = qos
            self._changed_topics[topic] = None
        self._wake()

    def unsubscribe(self, topic: str) -> None:
        with self._lock:
            if self._subscriptions.pop(topic, None) is not None:
                self._changed_topics[topic] = None
        self._wake()

    def _wake(self) -> None:
        """Interrupt the network thread's poll."""
        if self._wake_sockets is None:
            return
        try:
            self._wake_sockets[0].send(b"\0")
        except OSError:
            return  # a wake-up is pending already, or the link is stopped

    def _run(self) -> None:
        delay_bound = 2 * MIN_RECONNECT_S
        connected_at = 0.0
        while not self._stopping:
            connection, graceful = None, False
            try:
                connection = self._connect()
                connected_at = time.monotonic()
                self._serve(connection)
                graceful = True
            except BrokerConnectionError as exc:
                self._report_failure(exc)
            except Exception as exc:  # noqa: BLE001 - the thread's outermost loop: the client library raises anything
                self._report_failure(
                    BrokerConnectionError(f"broker {self._settings.address}: {type(exc).__name__}: {exc}")
                )
                _log.debug("connection failed", exc_info=True)
            finally:
                self._close(connection, graceful=graceful)
            if connection is not None and time.monotonic() - connected_at > delay_bound:
                delay_bound = 2 * MIN_RECONNECT_S  # it was worth more than the wait for it
            if not self._stopping:
                self._pause(delay_bound)
                delay_bound = min(MAX_RECONNECT_S, 2 * delay_bound)

    def _connect(self) -> PahoConnection:
        """A connection that the broker has accepted, with another version of MQTT if it refuses the first.

        Raises `BrokerConnectionError`.
        """
        try:
            connection = self._attempt()
        except BrokerConnectionError as exc:
            if not self._should_change_version(exc):
                raise
            self._version = "3.1.1" if self._version == "5" else "5"
            connection = self._attempt()
        self._version_worked = True
        self._hang_ups = 0
        return connection

    def _should_change_version(self, exc: BrokerConnectionError) -> bool:
        if self._stopping or self._settings.mqtt_version != "auto" or not (exc.version_refused or exc.hung_up):
            return False
        self._hang_ups += 1
        return exc.version_refused or not self._version_worked or self._hang_ups % _HANG_UPS_BEFORE_OTHER_VERSION == 0

    def _attempt(self) -> PahoConnection:
        connection = PahoConnection(
            self._settings,
            client_id=self._client_id,
            version=self._version,
            will=self._will,
            persistent=self._persistent,
            on_message=self._on_message,
            on_refused=self._on_refused,
        )
        try:
            connection.open()
            timeout_s = self._answer_timeout_s()
            give_up_at = time.monotonic() + timeout_s
            while not connection.accepted:
                self._poll(connection, timeout_s=0.2)
                if self._stopping or time.monotonic() > give_up_at:
                    raise BrokerConnectionError(_no_answer(self._settings, timeout_s), hung_up=True)
        except BrokerConnectionError:
            connection.close(graceful=False)
            raise
        return connection

    def _answer_timeout_s(self) -> float:
        """How long to wait for CONNACK. A broker without MQTT 5 may wait for bytes that never come."""
        is_trial = self._version == "5" and self._settings.mqtt_version == "auto" and not self._version_worked
        return min(self._settings.connect_timeout_s, _TRIAL_TIMEOUT_S if is_trial else float("inf"))

    def _serve(self, connection: PahoConnection) -> None:
        """Exchange messages until the connection ends (raises `BrokerConnectionError`) or the link is stopped."""
        with self._lock:
            topics = list(self._subscriptions.items())
            self._changed_topics.clear()
            self._useless = ""
        # Some brokers take few topics in one packet; the packet must stay within the limit, too.
        for first in range(0, len(topics), 16):
            connection.subscribe(topics[first : first + 16])
        self._report_connected(connection)
        while True:
            self._send_waiting(connection)
            with self._lock:
                self._all_said = _is_idle(self._outbox, connection)
            if self._stopping and self._is_flushed(connection):
                return
            self._poll(connection, timeout_s=0.2 if self._stopping else self._settings.keepalive_s / 4)
            if self._useless:
                raise BrokerConnectionError(f"broker {self._settings.address} {self._useless}")
            waits_since = connection.waits_since
            if waits_since is not None and time.monotonic() - waits_since > ACKNOWLEDGED_WITHIN_S:
                raise BrokerConnectionError(
                    f"broker {self._settings.address} has acknowledged nothing for {ACKNOWLEDGED_WITHIN_S:g} s"
                )

    def _send_waiting(self, connection: PahoConnection) -> None:
        """Give the connection work while its socket takes it, one message at a time."""
        with self._lock:
            changed = {topic: self._subscriptions.get(topic) for topic in self._changed_topics}
            self._changed_topics.clear()
        for topic, qos in changed.items():
            if qos is None:
                connection.unsubscribe(topic)
            else:
                connection.subscribe([(topic, qos)])
        while not connection.wants_write:
            now = time.monotonic()
            with self._lock:
                message = self._outbox.take(now, allow_qos1=connection.n_unacknowledged < MAX_IN_FLIGHT)
            if message is None:
                return
            connection.publish(message, now)
            connection.step(readable=False, writable=True)

    def _is_flushed(self, connection: PahoConnection) -> bool:
        return _is_idle(self._outbox, connection) or time.monotonic() >= self._flush_until

    def _poll(self, connection: PahoConnection, *, timeout_s: float) -> None:
        """Wait for the socket or a wake-up, then read and write what is possible. Raises `BrokerConnectionError`."""
        crowded = self._events.qsize() > MAX_UNREAD_EVENTS
        if crowded:
            timeout_s = min(timeout_s, _UNREAD_POLL_S)
        poll = select.poll()  # not select: descriptors above 1023 occur in simulations of many devices
        wake = self._wake_descriptor()
        poll.register(wake, select.POLLIN)
        poll.register(
            connection.fileno(),
            (0 if crowded else select.POLLIN) | (select.POLLOUT if connection.wants_write else 0),
        )
        buffered = connection.has_buffered_input and not crowded
        ready = dict(poll.poll(0 if buffered else int(timeout_s * 1000)))
        if wake in ready:
            self._drain_wakeups()
        flags = ready.get(connection.fileno(), 0)
        broken = bool(flags & (select.POLLERR | select.POLLHUP | select.POLLNVAL))
        readable = buffered or bool(flags & select.POLLIN) or broken
        connection.step(readable=readable, writable=bool(flags & select.POLLOUT))

    def _wake_descriptor(self) -> int:
        return -1 if self._wake_sockets is None else self._wake_sockets[1].fileno()

    def _drain_wakeups(self) -> None:
        try:
            while self._wake_sockets is not None and self._wake_sockets[1].recv(4096):
                pass
        except BlockingIOError:
            return

    def _pause(self, delay_bound: float) -> None:
        """Wait before the next attempt; `stop` ends the wait."""
        delay = _FIRST_RETRY_S if self._someone_waits else random.uniform(MIN_RECONNECT_S, delay_bound)
        end = time.monotonic() + delay
        poll = select.poll()
        poll.register(self._wake_descriptor(), select.POLLIN)
        while not self._stopping and (remaining := end - time.monotonic()) > 0:
            poll.poll(int(remaining * 1000) + 1)
            self._drain_wakeups()

    def _close(self, connection: PahoConnection | None, *, graceful: bool) -> None:
        """Forget a connection: what it did not get acknowledged waits for the next one."""
        if connection is None:
            return
        with self._lock:
            self._up = self._all_said = False
            self._outbox.drop_qos0()
            self._outbox.restore(connection.unacknowledged())
        connection.close(graceful=graceful)

    def _report_connected(self, connection: PahoConnection) -> None:
        _log.info("connected to broker %s with MQTT %s", self._settings.address, self._version)
        with self._lock:
            self._up = True
        self._events.put(Connected(session_present=connection.session_present, mqtt_version=self._version))
        with self._outcome:
            self._failure = None
            self._outcome.notify_all()

    def _report_failure(self, exc: BrokerConnectionError) -> None:
        was_up = self._up
        self._up = False
        if not self._stopping:
            raised = exc.permanent and self._someone_waits  # by `start`
            refused_anew = exc.turned_away and str(exc) != str(self._failure)
            is_news = was_up or self._failure is None or refused_anew
            level = logging.WARNING if is_news and not raised else logging.DEBUG
            _log.log(level, "%s; trying again", exc)
        if was_up:
            self._events.put(Disconnected(reason=str(exc)))
        elif exc.turned_away and not self._someone_waits:
            self._events.put(TurnedAway(reason=str(exc)))
        with self._outcome:
            self._failure = exc
            self._outcome.notify_all()

    def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        """Enqueue what we subscribed to.

        A session may hold subscriptions of an earlier process, whose messages cost bandwidth for ever: they are undone.
        amqtt sends a new client what others subscribed to.
        """
        with self._lock:
            wanted = topic in self._subscriptions or any(topic_matches(each, topic) for each in self._subscriptions)
            if not wanted:
                self._changed_topics[topic] = None
        if wanted:
            self.received_bytes += len(payload)
            self._events.put(Received(topic=topic, payload=payload, retained=retained))

    def _on_refused(self, reason: str) -> None:
        self._events.put(Rejected(reason=reason))


def _is_idle(outbox: Outbox, connection: PahoConnection) -> bool:
    """Whether nothing waits, and nothing that was sent waits for its acknowledgement."""
    return len(outbox) == 0 and connection.n_unacknowledged == 0 and not connection.wants_write


def _no_answer(settings: BrokerSettings, seconds: float) -> str:
    return f"broker {settings.address} does not answer within {seconds:g} s; check that an MQTT broker listens there"
