"""The link to a broker is measured with the broker's own service, and nothing is left behind."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_edge.agent.link_probe import measure_link
from reft_edge.errors import BrokerError
from reft_edge.simulation.brokers import RunningBroker, find_mosquitto, start_broker
from reft_edge.wire.mqtt import BrokerSettings, Event, MqttLink, Received


@pytest.fixture(
    params=[
        "embedded",
        pytest.param(
            "mosquitto",
            marks=[
                pytest.mark.mosquitto,
                pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
            ],
        ),
    ]
)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    with start_broker(request.param, directory=tmp_path) as running:
        yield running


def test_figures_are_there_and_the_blocks_are_gone(broker: RunningBroker) -> None:
    speed = measure_link(broker.settings, budget_s=0.2)
    assert 0 < speed.round_trip_s < 5
    assert speed.up_bytes_per_s > 1e4
    assert speed.down_bytes_per_s > 1e4

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    link = MqttLink(broker.settings, client_id="after", events=events, subscriptions=[("#", 0)], persistent=False)
    link.start(wait_s=10)
    link.publish("last", b"", qos=1)
    seen = []
    while not seen or seen[-1] != "last":
        event = events.get(timeout=10)
        if isinstance(event, Received) and (event.payload or event.topic == "last"):  # amqtt repeats the clearing
            seen.append(event.topic)
    link.stop()
    assert seen == ["last"]


def test_a_broker_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(BrokerError, match="localhost:9"):
        measure_link(BrokerSettings(port=9), connect_s=0.3)
