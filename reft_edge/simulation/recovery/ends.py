"""What the two ends of a measured transfer are told and say, as JSON lines between processes."""

from __future__ import annotations

import os
import sys
from typing import TypeAlias

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.wire.endpoint import BrokerSettings


class DeviceOrders(msgspec.Struct, frozen=True, kw_only=True):
    """For `device_end`: devices that fetch `wanted` and serve whatever lies in their stores, `<directory>/<device>`."""

    broker: BrokerSettings
    federation: str
    directory: str
    devices: tuple[str, ...]
    wanted: tuple[BlobRef, ...] = ()
    broadcast: bool = False


class CoordinatorOrders(msgspec.Struct, frozen=True, kw_only=True):
    """For `coordinator_end`: serve or broadcast `served`, and pull `pulled` (device -> blob)."""

    broker: BrokerSettings
    federation: str
    directory: str
    served: tuple[BlobRef, ...] = ()
    devices: tuple[str, ...] = ()
    broadcast: bool = False
    pulled: dict[str, BlobRef] = {}
    max_parallel_uploads: int = 4
    own_broker: bool = False
    """Start a broker first, in `<directory>/broker`, where `broker` says."""


class Up(msgspec.Struct, frozen=True, kw_only=True, tag="up"):
    """Connected, for the first time or again. Times are of the system's monotonic clock."""

    device: str
    at: float


class Down(msgspec.Struct, frozen=True, kw_only=True, tag="down"):
    device: str
    at: float
    reason: str


class Arrived(msgspec.Struct, frozen=True, kw_only=True, tag="arrived"):
    """A blob is whole. `blocks` and `duplicates` are of this process."""

    device: str
    at: float
    sha256: str
    blocks: int = 0
    duplicates: int = 0


class Delivered(msgspec.Struct, frozen=True, kw_only=True, tag="delivered"):
    """The other side has given a receipt."""

    device: str
    at: float
    sha256: str


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """A transfer has ended without the blob."""

    device: str
    at: float
    reason: str


Word: TypeAlias = Up | Down | Arrived | Delivered | Gone


def say(word: Word) -> None:
    """To standard output, at once, and whole whichever thread says it."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(word) + b"\n")


def parse(line: bytes) -> Word:
    return _decoder.decode(line)


_decoder: msgspec.json.Decoder[Word] = msgspec.json.Decoder(Word)
