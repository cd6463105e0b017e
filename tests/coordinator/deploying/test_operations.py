"""Deploying and undoing, over a real broker, to devices that fetch and run nothing."""

from __future__ import annotations

import pytest

from reft_edge.coordinator.deploying.operations import prepare_deployment
from reft_edge.coordinator.deploying.planning import Wishes
from reft_edge.coordinator.deploying.releases import release_run
from reft_edge.coordinator.records import QuarantineRecord
from reft_edge.errors import ConfigError, FederationError
from reft_edge.wire.deployment import Deploy, Rollback
from tests.coordinator.deploying.fleet import states
from tests.coordinator.deploying.serving_device import ServingDevice

pytestmark = [pytest.mark.mosquitto, pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)]
"""tests/coordinator/deploying/test_every_broker.py has the other kind, too."""


def test_nobody_of_the_rest_is_asked_before_the_canary_serves(fleet):
    for name in "abcd":
        fleet.device(name)
    asked = []

    def note(progress):
        canary = next(part for part in progress.devices if part.wave == "canary")
        rest = [part for part in progress.devices if part.wave == "rest"]
        asked.append((canary.state, {part.state for part in rest}))

    fleet.deploy("run-1", note)
    assert asked[0] == ("asked", {"waiting"})
    assert all(rest == {"waiting"} for canary, rest in asked if canary != "serving")


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("refuses", "accuracy 10.0%"), ("fails", "ran out of memory"), ("dies", "it is offline")],
)
def test_a_version_that_its_canary_does_not_serve_goes_no_further(fleet, behaviour, words):
    for name in "abc":
        fleet.device(name, behaviour)
    if behaviour == "dies":
        fleet.configure(timeout_s=0.5)
    outcome = fleet.deploy("run-1")
    assert outcome.record.state == "rolled_back"
    assert words in outcome.record.reason
    told = {name: [type(message) for message in device.heard] for name, device in fleet.devices.items()}
    assert sorted(told.values(), key=len) == [[], [], [Deploy, Rollback]] or behaviour == "dies"
    assert all(device.serving is None for device in fleet.devices.values())


def test_errors_that_a_canary_counts_while_it_is_watched_undo_it(fleet):
    canary = fleet.device("a")
    fleet.configure(soak_s=20)
    outcome = fleet.deploy("run-1", lambda progress: progress.record.state == "soaking" and canary.err())
    assert outcome.record.state == "rolled_back"
    assert "a: it counted 3 errors while it served it" in outcome.record.reason
    assert states(outcome) == {"a": "rolled_back"}
    assert fleet.devices["a"].serving is None


def test_a_device_that_finds_it_too_slow_is_offered_the_next_smaller(fleet):
    fleet.device("a", "too_slow")
    outcome = fleet.deploy("run-1")
    (part,) = outcome.devices
    assert (part.model, part.state) == ("small", "serving")
    assert [message.model for message in fleet.devices["a"].heard] == ["global", "small"]


def test_a_device_that_was_away_takes_it_when_it_comes_back_though_nobody_is_at_work(fleet):
    with ServingDevice("away", **fleet.place), fleet.site() as site:
        site.settle()
    fleet.device("here")
    outcome = fleet.deploy("run-1")
    assert states(outcome) == {"away": "away", "here": "serving"}
    back = fleet.device("away")
    message = back.said.get(timeout=10)
    assert isinstance(message, Deploy)
    with fleet.site() as site:
        while back.serving is None:
            assert site.listen(10) is not None
        assert back.serving.version == "run-1"


def test_one_device_goes_back_and_the_others_serve_on(fleet):
    for name in "ab":
        fleet.device(name)
    fleet.deploy("run-1")
    (outcome,) = fleet.roll_back("b")
    assert states(outcome) == {"b": "rolled_back"}
    assert fleet.devices["a"].serving.version == "run-1"
    assert fleet.devices["b"].serving is None
    with fleet.site() as site:
        assert site.store.latest_deployment(fleet.federation).state == "done"


def test_an_operator_goes_back_from_what_is_served_by_its_name(fleet):
    for name in "ab":
        fleet.device(name)
    for number in (1, 2, 3):
        fleet.finish_run(f"run-{number + 1}", seed=number + 1)
        fleet.deploy(f"run-{number}")
    fleet.roll_back()
    (again,) = fleet.roll_back()
    assert (again.record.version, again.changed) == ("run-3", ())
    assert {device.serving.version for device in fleet.devices.values()} == {"run-2"}
    (outcome,) = fleet.roll_back("a", version="run-2")
    assert (outcome.record.state, states(outcome)) == ("done", {"a": "rolled_back"})
    (outcome,) = fleet.roll_back(version="run-2")
    assert outcome.record.state == "rolled_back"
    assert all(device.serving is None for device in fleet.devices.values())
    with pytest.raises(ConfigError, match="no device goes by version 'run-3'; did you mean 'run-1'"):
        fleet.roll_back(version="run-3")
    with pytest.raises(ConfigError, match="device 'c' does not go by version 'run-1'"):
        fleet.roll_back("c", version="run-1")


def test_what_everybody_serves_is_not_asked_for_again(fleet):
    fleet.device("a")
    fleet.deploy("run-1")
    with fleet.site() as site:
        site.settle()
        release = release_run(site.store, site.blobs, "run-1", site.settings.model)
        assert not prepare_deployment(site, release, Wishes()).plan.is_needed


def test_the_broker_and_the_disk_hold_only_what_somebody_may_still_want(fleet):
    for name in "ab":
        fleet.device(name)
    fleet.deploy("run-1")
    with fleet.site() as site:
        assert site.store.seeded() == []
        first = {path.name for path in site.blobs.root.iterdir()}
    fleet.finish_run("run-2", seed=2)
    fleet.deploy("run-2")
    with fleet.site() as site:
        assert not first & {path.name for path in site.blobs.root.iterdir()}
    fleet.roll_back()
    with fleet.site() as site:
        assert not list(site.blobs.root.iterdir())


def test_who_is_away_is_asked_for_what_the_others_serve_already_and_once_is_enough(fleet):
    with ServingDevice("away", **fleet.place), fleet.site() as site:
        site.settle()
    fleet.device("here")
    assert states(fleet.deploy("run-1", devices=("here",))) == {"here": "serving"}
    assert states(fleet.deploy("run-1")) == {"away": "away", "here": "serving"}
    assert len(fleet.devices["here"].heard) == 1
    with fleet.site() as site:
        site.settle()
        release = release_run(site.store, site.blobs, "run-1", site.settings.model)
        assert not prepare_deployment(site, release, Wishes()).plan.is_needed


def test_who_is_in_quarantine_is_left_out_and_said(fleet):
    fleet.device("a")
    fleet.device("b")
    with fleet.site() as site:
        site.settle()
        site.store.quarantine(QuarantineRecord(device="b", since=1.0, reason="it lies", by="person"))
    outcome = fleet.deploy("run-1")
    assert states(outcome) == {"a": "serving"}
    assert fleet.devices["b"].heard == []
    with pytest.raises(ConfigError, match="'b' cannot be deployed to: it is in quarantine: it lies"):
        fleet.deploy("run-1", devices=("b",))


def test_errors_say_what_is_missing(fleet):
    fleet.configure(settle_s=0.3)
    with pytest.raises(FederationError, match="no device was ever heard of"):
        fleet.deploy("run-1")
    with pytest.raises(FederationError, match="nothing was ever deployed"):
        fleet.roll_back()
    with fleet.site() as site, ServingDevice("gone", **fleet.place):
        site.settle()
    with pytest.raises(FederationError, match=r"no device is online \(gone\)"):
        fleet.deploy("run-1")
    with pytest.raises(ConfigError, match="did you mean 'gone'"):
        fleet.deploy("run-1", devices=("gon",))
    with fleet.site(), pytest.raises(FederationError, match="another coordinator is at work"), fleet.site():
        pass


def test_sequence_numbers_rise_with_every_word(fleet):
    fleet.device("a")
    fleet.deploy("run-1")
    fleet.roll_back()
    numbers = [message.sequence for message in fleet.devices["a"].heard]
    assert numbers == sorted(set(numbers))
    assert fleet.devices["a"].heard[-1].reason == "a person rolled it back"
