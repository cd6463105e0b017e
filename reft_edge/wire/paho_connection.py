"""The one file that knows paho-mqtt: a single connection to the broker, from TCP connect to its end.

paho is used as a codec and session keeper only. Its threads, its reconnecting, its offline queue and its in-flight
window are all left unused, because each behaves in a way that loses or repeats messages after a reconnect; `wire.mqtt`
does these. A new paho client is made for every connection, so nothing of an earlier one lingers.

Everything here runs in one thread, driven by the owner's poll loop. Callbacks only record what happened and call the
owner's `on_message`, which only enqueues: nothing in them can raise, because an exception would end the thread.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from reft_edge.errors import one_line
from reft_edge.wire.connection_errors import (
    REFUSED_LOGIN,
    BrokerConnectionError,
    explain_alert,
    explain_failure,
    explain_refused_login,
    explain_silence,
    is_alert,
)
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.outbox import Outgoing

RECEIVE_MAXIMUM = 8
"""QoS 1 messages the broker may have on the way to us: 8 blocks of 64 KiB are half a megabyte of memory."""

MAX_PACKET_BYTES = 128 * 1024
"""The packet limit of our broker configuration: one block, or one control message, with its topic and header."""

MAX_READ_BYTES = 4 * 2**20
"""A larger packet ends the connection before it is in memory. Far above `MAX_PACKET_BYTES`, because a broker without
MQTT 5 may pass on what a stranger has published, and dropping that costs less than reconnecting for ever."""

_READ_BYTES = 64 * 1024
"""One block; a hundred of them are 6 MiB."""

_UNSENT_BYTES = 64 * 1024
"""One block may wait in the kernel; without this the kernel takes megabytes and control messages wait behind them."""

_GOODBYE_TIMEOUT_S = 0.5
"""How long a broker may take to accept our farewell before we just go."""

_FAILURE = 0x80
"""MQTT: reason codes from here on are errors."""

MqttVersion: TypeAlias = Literal["5", "3.1.1"]
_PROTOCOLS: Mapping[MqttVersion, Any] = {"5": paho.MQTTv5, "3.1.1": paho.MQTTv311}

_REFUSED_VERSION = ("Unsupported protocol version",)


class PahoConnection:
    """One connection. `open` it, then call `step` whenever the socket is ready and at least every few seconds.

    `on_message(topic, payload, retained)` is called for each message, `on_refused(reason)` when the broker refuses a
    publish or a subscription. `accepted` becomes True with the broker's CONNACK.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        client_id: str,
        version: MqttVersion,
        will: tuple[str, bytes] | None,
        persistent: bool,
        on_message: Callable[[str, bytes, bool], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._client_id = client_id
        self._version = version
        self._persistent = persistent
        self._on_message = on_message
        self._on_refused = on_refused
        self._refusal: BrokerConnectionError | None = None
        self._lost_reason = ""
        self._unacknowledged: dict[int, Outgoing] = {}
        self.waits_since: float | None = None
        """Monotonic clock of the last acknowledgement, or of what has waited for the first since; None: none is due."""
        self._max_packet_bytes = MAX_PACKET_BYTES
        self._socket: socket.socket | None = None
        self.accepted = False
        self.session_present = False
        self._client = self._make_client(client_id, will)

    def _make_client(self, client_id: str, will: tuple[str, bytes] | None) -> paho.Client:
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if self._version == "5" else not self._persistent,
            protocol=_PROTOCOLS[self._version],
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._settings.connect_timeout_s
        if self._settings.username is not None:
            client.username_pw_set(self._settings.username, self._settings.password())
        if (context := self._settings.tls_context()) is not None:
            context.sslsocket_class = _TidySocket
            client.tls_set_context(context)
        if will is not None:
            client.will_set(will[0], will[1], qos=1, retain=True)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_subscribe = self._subscribed
        client.on_socket_open = self._opened
        # With a write callback set, paho leaves all writing to our loop, where it belongs.
        client.on_socket_register_write = _ignore
        return client

    def open(self) -> None:
        """Connect the socket and send CONNECT; blocks up to the connect timeout. Raises `BrokerConnectionError`."""
        host, port, keepalive = self._settings.host, self._settings.port, self._settings.keepalive_s
        try:
            if self._version == "5":
                properties = _properties(PacketTypes.CONNECT)
                properties.ReceiveMaximum = RECEIVE_MAXIMUM
                properties.MaximumPacketSize = MAX_PACKET_BYTES
                if self._persistent:
                    properties.SessionExpiryInterval = self._settings.session_expiry_s
                self._client.connect(host, port, keepalive, clean_start=not self._persistent, properties=properties)
            else:
                self._client.connect(host, port, keepalive)
        except (OSError, ValueError) as exc:
            raise explain_failure(exc, self._settings) from exc

    def fileno(self) -> int:
        """The socket's descriptor; -1 when the connection has ended."""
        sock = self._client.socket()
        return -1 if sock is None else sock.fileno()

    @property
    def wants_write(self) -> bool:
        return self._client.want_write()

    @property
    def has_buffered_input(self) -> bool:
        """Whether TLS has decrypted bytes that no poll will report."""
        sock = self._client.socket()
        return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0

    @property
    def n_unacknowledged(self) -> int:
        return len(self._unacknowledged)

    def unacknowledged(self) -> list[Outgoing]:
        """QoS 1 messages without PUBACK, in the order of sending."""
        return list(self._unacknowledged.values())

    def step(self, *, readable: bool, writable: bool) -> None:
        """Read and write what is possible and keep alive. Raises `BrokerConnectionError` once it has ended."""
        if readable:
            self._client.loop_read()
            self._refuse_hoarding()
        if writable or self._client.want_write():
            self._client.loop_write()
        self._client.loop_misc()
        if self._refusal is not None:
            raise self._refusal
        if self._client.socket() is None:
            raise self._ended()

    def _refuse_hoarding(self) -> None:
        """Raise `BrokerConnectionError` for what a broker that was taken over may fill our memory with.

        paho takes packets of up to 256 MiB, and keeps what comes at QoS 2, never asked for, until it is released. It
        offers no limit for either; these two attributes are where it keeps them. `_Client` sees to it that we get here.
        """
        n_bytes = self._client._in_packet["remaining_length"]
        if n_bytes > MAX_READ_BYTES:
            raise BrokerConnectionError(
                f"broker {self._settings.address} sends a packet of {n_bytes} bytes; at most {MAX_READ_BYTES} are read"
            )
        if self._client._in_messages:
            raise BrokerConnectionError(f"broker {self._settings.address} sends at QoS 2, which nobody asked for")

    def publish(self, message: Outgoing, now: float) -> None:
        """Hand one message to the socket. A message beyond the broker's packet limit is refused here."""
        n_bytes = len(message.payload) + len(message.topic) + 32
        if n_bytes > self._max_packet_bytes:
            self._on_refused(f"{message.topic}: {n_bytes} bytes; the broker takes {self._max_packet_bytes}")
            return
        properties = None
        if message.expires_at is not None and self._version == "5":
            properties = _properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = max(1, min(2**32 - 1, int(message.expires_at - now)))
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        if message.qos > 0:
            self.waits_since = now if self.waits_since is None else self.waits_since
            self._unacknowledged[info.mid] = message

    def subscribe(self, topics: list[tuple[str, int]]) -> None:
        if topics:
            self._client.subscribe(topics)

    def unsubscribe(self, topic: str) -> None:
        self._client.unsubscribe(topic)

    def close(self, *, graceful: bool) -> None:
        """End the connection; gracefully means that the broker discards the will."""
        if self._socket is None:
            return
        self._client.on_disconnect = None
        if graceful and self.accepted and self._client.socket() is not None:
            self._say_goodbye(self._socket)
        self._socket.close()

    def _say_goodbye(self, sock: socket.socket) -> None:
        """Send DISCONNECT, then read until the broker closes.

        Closing a socket with unread input resets the connection, and the broker may see a crash and send the will.
        """
        try:
            sock.settimeout(_GOODBYE_TIMEOUT_S)
            if isinstance(sock, ssl.SSLSocket):  # cannot be duplicated
                self._client.disconnect()
                self._client.loop_write()
                return
            with sock.dup() as twin:  # paho closes its own at once
                self._client.disconnect()
                self._client.loop_write()
                end = time.monotonic() + _GOODBYE_TIMEOUT_S
                while twin.recv(_READ_BYTES) and time.monotonic() < end:
                    pass
        except OSError:
            return  # gone already

    def _opened(self, _client: object, _data: object, sock: Any) -> None:
        """Small packets leave at once (0.4 ms instead of 44 for a round trip), and few bytes pile up in the kernel."""
        self._socket = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    def _connected(
        self,
        _client: object,
        _data: object,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if not reason.is_failure:
            self.accepted = True
            self.session_present = flags.session_present
            limit = getattr(properties, "MaximumPacketSize", None)
            self._max_packet_bytes = min(MAX_PACKET_BYTES, limit or MAX_PACKET_BYTES)
            return
        name = str(reason)
        if name in REFUSED_LOGIN:
            self._refusal = explain_refused_login(name, self._settings)
            return
        self._refusal = BrokerConnectionError(
            f"broker {self._settings.address} refuses the connection: {name}; see the broker's log",
            version_refused=name in _REFUSED_VERSION,
        )

    def _disconnected(
        self, _client: object, _data: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        # paho says "Unspecified error" where the peer just closed: a killed broker does, and Mosquitto does it to the
        # older of two clients with one name.
        closed = f"closed by the broker: it stopped, or another client took the name {self._client_id!r}"
        self._lost_reason = closed if reason.value == _FAILURE else str(reason)

    def _received(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._on_refused("a message on a topic that is not UTF-8 was dropped")
            return
        if len(message.payload) > MAX_PACKET_BYTES:
            self._on_refused(f"{one_line(topic[:200])}: a message of {len(message.payload)} bytes was dropped")
            return
        self._on_message(topic, bytes(message.payload), bool(message.retain))

    def _published(self, _client: object, _data: object, mid: int, reason: ReasonCode, _properties: object) -> None:
        message = self._unacknowledged.pop(mid, None)
        if message is None:
            return  # at QoS 0 paho calls this when it has written the message
        self.waits_since = time.monotonic() if self._unacknowledged else None
        if reason.value >= _FAILURE:
            self._on_refused(f"the broker refuses to take {message.topic}: {reason}; check its access rules")

    def _subscribed(
        self, _client: object, _data: object, _mid: int, reasons: list[ReasonCode], _properties: object
    ) -> None:
        for reason in reasons:
            if reason.value >= _FAILURE:
                self._on_refused(f"the broker refuses a subscription: {reason}; check its access rules")

    def _ended(self) -> BrokerConnectionError:
        address = self._settings.address
        if self.accepted:
            return BrokerConnectionError(f"connection to broker {address} ended: {self._lost_reason or 'no answer'}")
        if isinstance(self._socket, _TidySocket) and self._socket.alert:
            return explain_alert(self._socket.alert, self._settings)
        return explain_silence(self._settings)


class _Client(paho.Client):
    """Reads in small pieces: paho asks its socket for all of a packet at once, a hundred times before it returns."""

    def _sock_recv(self, bufsize: int) -> bytes:
        return super()._sock_recv(min(bufsize, _READ_BYTES))


class _TidySocket(ssl.SSLSocket):
    """Closes itself when the handshake fails (paho forgets it then, open), and remembers why the peer ended TLS.

    With TLS 1.3 our side of the handshake is done before the broker has looked at our certificate. Its refusal comes
    with the first read, where paho takes the alert for an ordinary end.
    """

    alert = ""
    """OpenSSL's name for the peer's alert, such as `SSLV3_ALERT_CERTIFICATE_REVOKED`."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as exc:
            if is_alert(exc):
                self.alert = exc.reason
            raise

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to `topic_filter` covers `topic`."""
    return paho.topic_matches_sub(topic_filter, topic)


def _properties(packet: int) -> Properties:
    return Properties(packet)  # type: ignore[no-untyped-call]  # paho leaves this one constructor untyped


def _ignore(*_arguments: object) -> None:
    """A callback whose presence changes what paho does."""
