"""How a broker turns a client away, on a machine that may be busy."""

from __future__ import annotations

import queue

import pytest

from reft_edge.errors import BrokerError
from reft_edge.wire.connection_errors import BrokerConnectionError
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.mqtt import MqttLink

TRIES_S = (0.5, 5.0, 30.0)
"""What time may heal is tried again until the end, so the first try is short; the others are for a busy machine."""


def refusal(settings: BrokerSettings, client_id: str = "device") -> BrokerConnectionError:
    """Why connecting fails. That nobody has answered yet is no reason."""
    for wait_s in TRIES_S:
        link = MqttLink(settings, client_id=client_id, events=queue.SimpleQueue(), persistent=False)
        with pytest.raises(BrokerError) as caught:
            link.start(wait_s=wait_s)
        cause = caught.value.__cause__
        assert isinstance(cause, BrokerConnectionError)
        if "does not answer within" not in str(cause):
            break
    return cause
