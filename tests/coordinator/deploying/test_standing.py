"""A deployment that nobody rolls out any more: who was away comes for it, whoever is at work then."""

from __future__ import annotations

import queue
from contextlib import closing

import pytest

from reft_edge.coordinator.deploying import standing
from reft_edge.coordinator.deploying.monitor import Monitor
from reft_edge.coordinator.deploying.operations import deploy, prepare_deployment, roll_back
from reft_edge.coordinator.deploying.planning import Wishes
from reft_edge.coordinator.deploying.releases import choose_run, release_run
from reft_edge.coordinator.deploying.site import open_site
from reft_edge.coordinator.network import Network
from reft_edge.coordinator.preparation import prepare
from reft_edge.coordinator.server import Coordinator
from reft_edge.coordinator.settings import load_federation
from reft_edge.coordinator.store import Store
from reft_edge.wire import mqtt, topics
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import transfer_name
from reft_edge.wire.deployment import Deploy, Rollback
from tests.coordinator.deploying.fleet import ignore, states
from tests.coordinator.deploying.serving_device import ServingDevice
from tests.coordinator.device import Device
from tests.coordinator.points import points, write_federation

pytestmark = [pytest.mark.mosquitto, pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)]


@pytest.fixture
def asked_while_away(fleet):
    """`away` was offline when `run-1` was deployed, which `here` serves."""
    with ServingDevice("away", **fleet.place), fleet.site() as site:
        site.settle()
    fleet.device("here")
    assert states(fleet.deploy("run-1")) == {"away": "away", "here": "serving"}
    return fleet


def test_who_was_away_takes_it_from_the_broker_though_nobody_is_at_work(asked_while_away):
    back = asked_while_away.device("away")
    assert isinstance(back.said.get(timeout=10), Deploy)
    assert back.serves.wait(10)


def test_a_monitor_serves_what_is_too_large_for_the_broker_and_notes_who_came(asked_while_away, monkeypatch):
    fleet = asked_while_away
    monkeypatch.setattr(standing, "may_broadcast", lambda _ref: False)
    lines = []
    with fleet.site() as site:
        back = fleet.device("away")

        def has_come():
            part = site.store.standing_part(fleet.federation, "away")
            return part.state == "serving" and any("away serves" in line for line in lines)

        Monitor(site, tell=lines.append).watch(stop=has_come)
    with closing(Store(fleet.results)) as store:
        assert {one.device: one.online for one in store.presence()} == {"away": True, "here": True}
        assert {one.device for one in store.conditions()} == {"away", "here"}
        assert store.seeded() == []
    assert back.serving.version == "run-1"
    assert "away serves version run-1, global int8" in lines


def watch_until_served(fleet, deployment):
    """Let a monitor be at work until `away` has come for a deployment."""
    with fleet.site() as site:

        def has_come():
            part = site.store.standing_part(fleet.federation, "away")
            return part is not None and (part.deployment, part.state) == (deployment, "serving")

        Monitor(site, tell=ignore).watch(stop=has_come)


def test_who_missed_a_version_and_one_that_was_undone_after_it_is_given_the_first(asked_while_away):
    fleet = asked_while_away
    fleet.finish_run("run-2", seed=2)
    first = fleet.deployment().deployment
    assert states(fleet.deploy("run-2")) == {"away": "away", "here": "serving"}
    second = fleet.deployment().deployment
    fleet.roll_back()
    assert fleet.devices["here"].serving.version == "run-1"
    back = fleet.device("away")
    watch_until_served(fleet, first)
    words = list(dict.fromkeys((type(message), message.deployment) for message in reversed(back.heard)))
    assert words[:2] == [(Deploy, first), (Rollback, second)]
    assert back.serving.version == "run-1"
    with fleet.site() as site:
        site.settle()
        release = release_run(site.store, site.blobs, "run-1", site.settings.model)
        assert not prepare_deployment(site, release, Wishes()).plan.is_needed


def test_who_was_away_and_finds_it_too_slow_is_offered_the_next_smaller(asked_while_away):
    fleet = asked_while_away
    back = fleet.device("away", "too_slow")
    watch_until_served(fleet, fleet.deployment().deployment)
    assert list(dict.fromkeys(message.model for message in back.heard)) == ["global", "small"]
    assert back.serving.model == "small"


def test_who_was_away_when_it_was_undone_goes_back_when_it_returns(asked_while_away):
    fleet = asked_while_away
    back = fleet.device("away")
    assert back.serves.wait(10)
    fleet.devices["away"].__exit__()
    (outcome,) = fleet.roll_back()
    assert states(outcome) == {"away": "away", "here": "rolled_back"}
    again = ServingDevice("away", **fleet.place)
    again.serving = back.serving
    with again:
        assert isinstance(again.said.get(timeout=10), Rollback)
    (outcome,) = fleet.roll_back()
    assert outcome.record.state == "rolled_back"


def test_one_that_trains_keeps_the_files_and_serves_them(tmp_path, broker, federation, monkeypatch):
    path = write_federation(tmp_path, broker, federation, 1, rounds=1, epochs=0, ratios=(0.0,))
    settings = load_federation(path)
    place = {"broker": broker.settings, "federation": federation, "directory": tmp_path / "devices"}
    with Device("trainer", points(60, 10), **place), ServingDevice("here", **place):
        with ServingDevice("away", **place):
            Coordinator(prepare(settings, tmp_path)).run()
        with open_site(settings, tmp_path) as site:
            site.settle()
            run = choose_run(site.store, federation, None).run
            release = release_run(site.store, site.blobs, run, settings.model)
            prepared = prepare_deployment(site, release, Wishes(devices=("here", "away")))
            assert states(deploy(site, prepared, listener=ignore)) == {"away": "away", "here": "serving"}
        monkeypatch.setattr(standing, "may_broadcast", lambda _ref: False)
        with ServingDevice("away", **place) as back:
            Coordinator(prepare(settings, tmp_path), new_run=True).run()
            assert back.serves.wait(10)
            assert back.serving.version == run
    with closing(Store(tmp_path / "federation")) as store:
        (record,) = store.deployments(federation)
        assert {part.device: part.state for part in store.deployed_devices(record.deployment)} == {
            "away": "serving",
            "here": "serving",
        }
    blobs = {one.name for one in (tmp_path / "federation/blobs").iterdir()}
    assert standing.blobs_of(record) <= blobs


def test_a_rollback_finds_what_the_other_devices_may_still_want_untouched(asked_while_away):
    fleet = asked_while_away
    with fleet.site() as site:
        site.settle()
        lying = site.store.seeded()
        assert lying
        roll_back(site, ("here",), listener=ignore)
        assert site.store.seeded() == lying
    back = fleet.device("away")
    assert back.serves.wait(10)


def test_a_rounds_broadcasts_leave_models_where_they_lie(tmp_path, broker, federation):
    blobs = BlobStore(tmp_path / "blobs")
    model, weights = blobs.put(b"a model"), blobs.put(b"a round's weights")
    network = Network(broker.settings, federation=federation, blobs=blobs, max_parallel_uploads=1)
    network.start(wait_s=20)
    try:
        network.broadcast_models([model])
        network.broadcast([weights])
        assert network.wait_until_said(20)
        assert lying(broker, federation) == {transfer_name(model.sha256), transfer_name(weights.sha256)}
        network.broadcast([])
        assert network.wait_until_said(20)
        assert lying(broker, federation) == {transfer_name(model.sha256)}
        network.broadcast_models([])
        assert network.wait_until_said(20)
        assert lying(broker, federation) == set()
    finally:
        network.stop()


def lying(broker, federation):
    """Transfers whose blocks the broker holds: they come in one go, before what is said after subscribing."""
    events = queue.SimpleQueue()
    echo = f"{topics.PROBE_PREFIX}/{federation}"
    subscriptions = [(topics.blob_topic(federation, "+", "+"), 1), (echo, 1)]
    link = mqtt.MqttLink(broker.settings, client_id="reader", events=events, subscriptions=subscriptions)
    link.start(wait_s=20)
    link.publish(echo, b"all?", qos=1)
    found = set()
    try:
        while True:
            event = events.get(timeout=20)
            if isinstance(event, mqtt.Received) and event.topic == echo:
                return found
            if isinstance(event, mqtt.Received):  # empty: it was cleared while this reader was away
                (found.add if event.payload else found.discard)(event.topic.split("/")[-2])
    finally:
        link.stop()
