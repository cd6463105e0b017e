"""Every MQTT topic of the protocol, written once.

    reft/v1/<federation>/device/<id>/status    up    retained, QoS 1, last will
    reft/v1/<federation>/device/<id>/profile   up    retained, QoS 1
    reft/v1/<federation>/device/<id>/task      down  retained, QoS 1
    reft/v1/<federation>/device/<id>/deployment   down  retained, QoS 1, which model it is to serve
    reft/v1/<federation>/device/<id>/condition   up    retained, QoS 1, what it serves, and how it is
    reft/v1/<federation>/device/<id>/certificate   down  retained, QoS 1, its renewed certificate
    reft/v1/<federation>/device/<id>/report    up    QoS 1
    reft/v1/<federation>/device/<id>/down      down  QoS 0, blocks and transfer control
    reft/v1/<federation>/device/<id>/up        up    QoS 0, blocks and transfer control
    reft/v1/<federation>/blob/<transfer>/<index>   down  retained, QoS 1, blocks that many devices want
    reft/v1/<federation>/blob/<transfer>/offer     down  retained, QoS 1, how that blob is cut

    reft/v1/<federation>/echo                  the coordinator, to itself: whether it still hears

    reft/probe/<user name>/echo, .../block     a device that measures its link talks to itself here; outside reft/v1/,
                                               where the next level is a federation's name

Names that could break out of their level (`/`, `+`, `#`, spaces) are refused where they come in.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

from reft_edge.errors import ConfigError, RemoteProtocolError

PREFIX = "reft/v1"
PROBE_PREFIX = "reft/probe"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

DeviceTopic: TypeAlias = Literal[
    "status", "profile", "task", "deployment", "condition", "certificate", "report", "down", "up"
]
UP_TOPICS: tuple[DeviceTopic, ...] = ("status", "profile", "condition", "report", "up")
"""What a device publishes and the coordinator reads."""
DOWN_TOPICS: tuple[DeviceTopic, ...] = ("task", "deployment", "certificate", "down")
"""What the coordinator publishes (`certificate`: whoever runs the authority) and one device reads."""


class DeviceAddress(NamedTuple):
    """A parsed device topic."""

    device: str
    topic: DeviceTopic


def check_name(name: str, what: str) -> str:
    """Return `name` if it may stand in a topic and be an MQTT client id; raises `ConfigError` otherwise."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what} {name!r} must be 1 to 64 letters, digits, '_' or '-'")
    return name


def device_topic(federation: str, device: str, topic: DeviceTopic) -> str:
    return f"{PREFIX}/{federation}/device/{device}/{topic}"


def all_devices_filter(federation: str, topic: DeviceTopic) -> str:
    """Subscription filter for one kind of topic of every device."""
    return device_topic(federation, "+", topic)


def blob_topic(federation: str, transfer: str, index: int | str) -> str:
    return f"{PREFIX}/{federation}/blob/{transfer}/{index}"


def echo_topic(federation: str) -> str:
    """Where the coordinator talks to itself; devices may neither read nor write there."""
    return f"{PREFIX}/{federation}/echo"


def is_blob_topic(federation: str, topic: str) -> bool:
    """Whether what arrived is part of a broadcast, and so belongs to the courier."""
    return topic.startswith(f"{PREFIX}/{federation}/blob/")


def probe_topics(username: str | None, client_id: str) -> str:
    """What the probe topics of a client begin with; broker_config/reft-edge.acl grants them by user name.

    Where users have no names, the client's keeps probes apart.
    """
    return f"{PROBE_PREFIX}/{re.sub('[/+#]', '_', username or client_id)}"


def parse_device_topic(federation: str, topic: str) -> DeviceAddress:
    """The device and kind of a topic that the coordinator received; raises `RemoteProtocolError` for any other."""
    start = f"{PREFIX}/{federation}/device/"
    device, _, kind = topic.removeprefix(start).partition("/")
    if topic.startswith(start) and _NAME.fullmatch(device):
        for known in (*UP_TOPICS, *DOWN_TOPICS):
            if kind == known:
                return DeviceAddress(device, known)
    raise RemoteProtocolError(f"topic {topic[:200]!r} is not one of federation {federation!r}")
