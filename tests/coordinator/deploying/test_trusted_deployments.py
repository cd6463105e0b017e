"""Only devices that prove who they are are asked, heard and kept."""

from __future__ import annotations

import queue

import pytest

from reft_edge.coordinator.network_events import Disowned, FromDevice
from reft_edge.errors import ConfigError, FederationError
from reft_edge.wire import messages, mqtt, topics
from reft_edge.wire.deployment import Condition, PredictionCounts
from reft_edge.wire.signing import seal, unseal, verify
from tests.coordinator.deploying.fleet import states
from tests.coordinator.deploying.serving_device import ServingDevice
from tests.coordinator.device import profile
from tests.trusted import TrustedSite, signing_key

pytestmark = [pytest.mark.mosquitto, pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)]

ANNOUNCEMENT = messages.ProfileAnnouncement(profile=profile("board"), training_samples=1)


def condition(n_predictions):
    return Condition(counts=PredictionCounts(version="v", predictions=n_predictions))


@pytest.fixture
def trusted(tmp_path):
    return TrustedSite(tmp_path / "keys")


class Voice:
    """Somebody at the broker who says what a test wants."""

    def __init__(self, fleet, name):
        self._fleet = fleet
        self._name = name
        events: queue.SimpleQueue[mqtt.Event] = queue.SimpleQueue()
        self._link = mqtt.MqttLink(fleet.broker.settings, client_id=f"voice-{name}", events=events, subscriptions=[])

    def __enter__(self):
        self._link.start(wait_s=20)
        return self

    def __exit__(self, *_):
        self._link.stop()

    def say(self, kind, message, key=None, certificate=""):
        topic = topics.device_topic(self._fleet.federation, self._name, kind)
        self._link.publish(topic, seal(topic, messages.encode(message), key, certificate=certificate), retain=True)


def heard(site, kind, device):
    """Listen until a device's message of this kind, or its disowning, has come."""
    while True:
        event = site.listen(10)
        assert event is not None, f"no {kind} of {device} came"
        if isinstance(event, Disowned) or (isinstance(event, FromDevice) and isinstance(event.message, kind)):
            assert event.device == device
            return event


def test_what_a_device_is_told_is_signed_by_the_coordinator(fleet, trusted):
    fleet.configure(more=trusted.federation_table())
    with ServingDevice("a", identity=trusted.device("a"), **fleet.place):
        assert states(fleet.deploy("run-1")) == {"a": "serving"}
    events: queue.SimpleQueue[mqtt.Event] = queue.SimpleQueue()
    topic = topics.device_topic(fleet.federation, "a", "deployment")
    link = mqtt.MqttLink(fleet.broker.settings, client_id="reader", events=events, subscriptions=[(topic, 1)])
    link.start(wait_s=20)
    try:
        while not isinstance(event := events.get(timeout=10), mqtt.Received):
            pass
        verify(topic, unseal(topic, event.payload), trusted.coordinator_key.public)
    finally:
        link.stop()


def test_a_condition_that_another_signed_is_not_kept(fleet, trusted):
    fleet.configure(more=trusted.federation_table())
    mine, certificate = signing_key(trusted.device("a")), trusted.device("a").certificate_pem.decode()
    with Voice(fleet, "a") as voice, fleet.site() as site:
        voice.say("profile", ANNOUNCEMENT, mine, certificate)
        voice.say("condition", condition(1), mine)
        heard(site, Condition, "a")
        voice.say("condition", condition(2), signing_key(trusted.device("b")))
        voice.say("condition", condition(3))
        voice.say("condition", condition(4), mine)
        kept = heard(site, Condition, "a").message
        assert kept == condition(4)
    assert fleet.conditions() == [kept]


def test_a_condition_that_comes_before_its_certificate_waits_for_it(fleet, trusted):
    fleet.configure(more=trusted.federation_table())
    mine, certificate = signing_key(trusted.device("a")), trusted.device("a").certificate_pem.decode()
    with fleet.site() as site, Voice(fleet, "a") as voice:
        voice.say("condition", condition(1), signing_key(trusted.device("b")))
        voice.say("condition", condition(2), mine)
        voice.say("profile", ANNOUNCEMENT, mine, certificate)
        assert heard(site, Condition, "a").message == condition(2)


def test_a_device_that_was_revoked_is_neither_heard_nor_asked(fleet, trusted):
    fleet.configure(more=trusted.federation_table(), settle_s=0.5)
    mine, certificate = signing_key(trusted.device("a")), trusted.device("a").certificate_pem.decode()
    with Voice(fleet, "a") as voice:
        with fleet.site() as site:
            voice.say("status", messages.Status(online=True))
            voice.say("profile", ANNOUNCEMENT, mine, certificate)
            voice.say("condition", condition(1), mine)
            heard(site, Condition, "a")
            trusted.authority.revoke(trusted.device("a"))
            voice.say("condition", condition(2), mine)
            assert isinstance(heard(site, Condition, "a"), Disowned)
        assert fleet.conditions() == [condition(1)]
        with pytest.raises(FederationError, match="no device to deploy to: a: its certificate is not accepted"):
            fleet.deploy("run-1")
        with pytest.raises(ConfigError, match="'a' cannot be deployed to: its certificate"):
            fleet.deploy("run-1", devices=("a",))
