"""MQTT's framing, as much of it as a proxy needs: where packets begin and end, and what a PUBLISH says of itself.

The same for 3.1.1 and 5: what differs lies behind the fields that are read here. See MQTT 5.0, sections 2.1 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from reft_edge.errors import RemoteProtocolError

MAX_PACKET_BYTES = 2**20
"""Eight times what this project's brokers take. More is not MQTT, or not ours."""

_DUPLICATE_FLAG = 0x08


class PacketKind(IntEnum):
    """Those that a proxy treats differently from the rest."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    DISCONNECT = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One control packet as it stood on the wire."""

    kind: int
    raw: bytes
    topic: str = ""
    qos: int = 0
    packet_id: int | None = None
    """Of a PUBLISH at QoS 1 or 2, and of a PUBACK."""

    def repeated(self) -> bytes:
        """A PUBLISH as its sender would repeat it: at QoS 1 and 2 the flag says so, at QoS 0 it must not."""
        if self.qos == 0:
            return self.raw
        return bytes([self.raw[0] | _DUPLICATE_FLAG]) + self.raw[1:]


class PacketReader:
    """Bytes in, packets out. Raises `RemoteProtocolError` for what is no MQTT."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that are whole now."""
        self._buffer += data
        packets = []
        while (frame := _first_frame(self._buffer)) is not None:
            header_bytes, n_bytes = frame
            packets.append(_parse(bytes(self._buffer[:n_bytes]), header_bytes))
            del self._buffer[:n_bytes]
        return packets


def _first_frame(data: bytearray) -> tuple[int, int] | None:
    """Bytes of the fixed header and of the whole first packet; None while it is not whole."""
    length = 0
    for position in range(1, 5):
        if position >= len(data):
            return None
        length |= (data[position] & 0x7F) << (7 * (position - 1))
        if data[position] < 0x80:
            n_bytes = position + 1 + length
            if n_bytes > MAX_PACKET_BYTES:
                raise RemoteProtocolError(
                    f"an MQTT packet of {n_bytes} bytes; at most {MAX_PACKET_BYTES} are passed on"
                )
            return (position + 1, n_bytes) if len(data) >= n_bytes else None
    raise RemoteProtocolError("this is not MQTT: a packet's length takes more than four bytes")


def _parse(raw: bytes, start: int) -> Packet:
    kind = raw[0] >> 4
    if kind == PacketKind.PUBACK:
        return Packet(kind=kind, raw=raw, packet_id=_integer(raw, start))
    if kind != PacketKind.PUBLISH:
        return Packet(kind=kind, raw=raw)
    qos = raw[0] >> 1 & 0x03
    end = start + 2 + _integer(raw, start)
    if end > len(raw):
        raise RemoteProtocolError("an MQTT packet is shorter than its fields")
    if end == start + 2:
        raise RemoteProtocolError("a PUBLISH without a topic: topic aliases are not supported here")
    topic = raw[start + 2 : end].decode("utf-8", errors="replace")
    return Packet(kind=kind, raw=raw, topic=topic, qos=qos, packet_id=_integer(raw, end) if qos else None)


def _integer(raw: bytes, at: int) -> int:
    """Two bytes, big end first."""
    if at + 2 > len(raw):
        raise RemoteProtocolError("an MQTT packet is shorter than its fields")
    return int.from_bytes(raw[at : at + 2], "big")
