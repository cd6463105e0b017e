"""Read a coordinator's events back from JSON lines: what `reft-edge coordinator` prints for programs.

A reader may be older than the coordinator: unknown events and fields are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from reft_edge.coordinator.events import Event
from reft_edge.errors import RemoteProtocolError

_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    str(kind.__struct_config__.tag): msgspec.json.Decoder(kind) for kind in Event.__subclasses__()
}


class _Head(msgspec.Struct, frozen=True):
    event: str


_head = msgspec.json.Decoder(_Head)


def read_event(line: bytes) -> Event | None:
    """The event on one line; None for an empty line and for an event that is not known here.

    Raises `RemoteProtocolError` when the line is no event at all.
    """
    if not line.strip():
        return None
    try:
        decoder = _DECODERS.get(_head.decode(line).event)
        event: Event | None = decoder.decode(line) if decoder is not None else None
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise RemoteProtocolError(f"not an event of a coordinator: {line[:80]!r} ({exc})") from exc
    return event


def read_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """All known events of a stream or file."""
    for line in lines:
        event = read_event(line)
        if event is not None:
            yield event
