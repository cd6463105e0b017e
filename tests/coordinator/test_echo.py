"""The coordinator notices that it has gone deaf, and connects again."""

from __future__ import annotations

import queue

import pytest

from reft_edge.coordinator import echo
from reft_edge.coordinator.echo import COMES_WITHIN_S, SAY_EVERY_S, Echo
from reft_edge.coordinator.network import Network
from reft_edge.coordinator.network_events import LinkDown, LinkUp
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.mqtt import MqttLink, Received
from reft_edge.wire.topics import echo_topic
from tests.coordinator.points import ONE_KIND, address


def test_silence_after_a_word_is_noticed_and_any_word_ends_it():
    ear = Echo()
    assert not ear.is_due(0.0)
    ear.connected(100.0)
    assert ear.is_due(100.0)
    assert not ear.is_due(100.0 + SAY_EVERY_S / 2)
    assert ear.is_due(100.0 + SAY_EVERY_S)
    assert not ear.is_lost(100.0 + COMES_WITHIN_S)
    assert ear.is_lost(101.0 + COMES_WITHIN_S)
    ear.heard()
    assert not ear.is_lost(101.0 + COMES_WITHIN_S)
    assert ear.is_due(1000.0)
    ear.disconnected()
    assert not ear.is_lost(9999.0)
    assert ear.due_at is None


@ONE_KIND
def test_a_deaf_coordinator_connects_again_and_one_that_hears_does_not(own_broker, federation, tmp_path, monkeypatch):
    monkeypatch.setattr(echo, "SAY_EVERY_S", 0.05)
    monkeypatch.setattr(echo, "COMES_WITHIN_S", 1.5)  # a busy machine may be slow, and is not deaf
    monkeypatch.setattr("reft_edge.wire.mqtt.MIN_RECONNECT_S", 0.01)
    events = queue.SimpleQueue()
    listener = MqttLink(
        address(own_broker), client_id="listener", events=events, subscriptions=[(echo_topic(federation), 1)]
    )
    listener.start(wait_s=20)
    network = Network(
        address(own_broker), federation=federation, blobs=BlobStore(tmp_path / "blobs"), max_parallel_uploads=1
    )
    network.start(wait_s=20)
    assert isinstance(network.inbox.get(20.0), LinkUp)
    n_words = 0
    while n_words < 40:  # longer than it takes to be thought deaf
        n_words += isinstance(events.get(timeout=20), Received)
    with pytest.raises(queue.Empty):
        network.inbox.get(0.0)
    monkeypatch.setattr(Echo, "heard", lambda _: None)
    lost = network.inbox.get(20.0)
    assert isinstance(lost, LinkDown)
    assert "does not bring what we subscribed to" in lost.reason
    assert isinstance(network.inbox.get(20.0), LinkUp)
    network.stop()
    listener.stop()
