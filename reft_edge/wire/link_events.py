"""What an `MqttLink` tells its owner, through a queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The link is up and subscriptions are on their way. Announce yourself again: the will may have been sent."""

    session_present: bool
    """Whether the broker remembers us; False after it lost its memory, retained messages included."""
    mqtt_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedAway:
    """An attempt to connect came as far as the broker, which does not let us in. The link tries again."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    topic: str
    payload: bytes
    retained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The broker refused a message or a subscription, or something of no use arrived. For the log."""

    reason: str


Event: TypeAlias = Connected | Disconnected | TurnedAway | Received | Rejected
