"""What the network thread hands to the main thread. Value objects only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from reft_edge.wire.deployment import Condition
from reft_edge.wire.messages import ProfileAnnouncement, Report, Status


@dataclass(frozen=True, kw_only=True)
class FromDevice:
    """A decoded message. What is signed has been checked, but for a status, which anybody may have said."""

    device: str
    message: Status | ProfileAnnouncement | Condition | Report
    certificate: str = ""
    """PEM, beside a signed profile."""


@dataclass(frozen=True, kw_only=True)
class Disowned:
    """The certificate that a device has shown is good no more: revoked, or ended. It needs another one."""

    device: str


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A blob that was pulled is in our store."""

    device: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class NotArrived:
    """A blob that was pulled cannot be had."""

    device: str
    sha256: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LinkUp:
    """Connected. Without `session_present` the broker has lost its memory; with it, perhaps the last of it."""

    session_present: bool


@dataclass(frozen=True, kw_only=True)
class LinkDown:
    reason: str


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The network thread has ended with an error; the main thread raises it."""

    error: BaseException


FromNetwork: TypeAlias = FromDevice | Disowned | Arrived | NotArrived | LinkUp | LinkDown | Broken
