"""A deployment goes on where it was, whenever its process ends."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack

import pytest

from reft_edge.coordinator.deploying.deployer import Deployer
from reft_edge.coordinator.deploying.operations import finish_rollback, roll_back
from tests.coordinator.deploying.fleet import Fleet, ignore, states

MOSQUITTO = pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)
pytestmark = pytest.mark.mosquitto


class Killed(BaseException):
    """As a kill, it goes through everything."""


@MOSQUITTO
@pytest.mark.parametrize("transaction", range(1, 12, 2))
def test_a_deployment_that_was_killed_goes_on_where_it_was(fleet, transaction, monkeypatch):
    for name in "abc":
        fleet.device(name)
    saved = iter(range(1, 1000))
    save = Deployer._save

    def mortal(self, changed):
        save(self, changed)
        if next(saved) == transaction:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Deployer, "_save", mortal)
        with contextlib.suppress(Killed):
            fleet.deploy("run-1")
    outcome = fleet.deploy("run-1") if fleet.deployment().ended_at is None else None
    with fleet.site() as site:
        (record,) = site.store.deployments(fleet.federation)
        assert record.state == "done"
        assert {part.state for part in site.store.deployed_devices(record.deployment)} == {"serving"}
    for device in fleet.devices.values():
        assert device.serving.version == "run-1"
        assert device.previous is None
    assert outcome is None or outcome.record == record


@MOSQUITTO
def test_one_that_was_killed_before_anybody_was_told_still_begins_with_its_canary(fleet, monkeypatch):
    for name in "abc":
        fleet.device(name)

    def die(_self):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Deployer, "play", die)
        with contextlib.suppress(Killed):
            fleet.deploy("run-1")
    seen = []
    outcome = fleet.deploy("run-1", lambda progress: seen.append({part.wave: part.state for part in progress.devices}))
    assert outcome.record.state == "done"
    before = [told for told in seen if told["canary"] != "serving"]
    assert before
    assert {told["rest"] for told in before} == {"waiting"}


@MOSQUITTO
def test_a_clock_that_was_set_back_does_not_change_which_deployment_is_the_last(fleet):
    fleet.device("a")
    fleet.finish_run("run-2", seed=2)
    fleet.deploy("run-1", clock=lambda: 2e9)
    fleet.deploy("run-2", clock=lambda: 1.5e9)
    assert fleet.deployment().version == "run-2"
    (outcome,) = fleet.roll_back()
    assert outcome.record.version == "run-2"
    assert fleet.devices["a"].serving.version == "run-1"


@MOSQUITTO
def test_a_person_may_stop_it_and_undo_it(fleet):
    for name in "abc":
        fleet.device(name)

    def interrupt(progress):
        if progress.record.state == "rolling_out":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet.deploy("run-1", interrupt)
    assert fleet.deployment().state == "interrupted"
    (outcome,) = fleet.roll_back()
    assert outcome.record.state == "rolled_back"
    assert all(device.serving is None for device in fleet.devices.values())


@MOSQUITTO
def test_a_rollback_that_was_killed_is_finished_first(fleet):
    for name in "ab":
        fleet.device(name)
    fleet.deploy("run-1")

    def kill(progress):
        if progress.record.state == "rolling_back":
            raise Killed

    with fleet.site() as site:
        site.settle()
        with pytest.raises(Killed):
            roll_back(site, (), listener=kill)
    with fleet.site() as site:
        site.settle()
        record = site.store.latest_deployment(fleet.federation)
        outcome = finish_rollback(site, record, listener=ignore)
    assert outcome.record.state == "rolled_back"
    assert all(device.serving is None for device in fleet.devices.values())


@pytest.mark.parametrize("own_broker", ["mosquitto"], indirect=True)
def test_a_broker_that_is_killed_and_forgets_everything_makes_nobody_late(tmp_path, federation, own_broker):
    with ExitStack() as stack:
        fleet = Fleet(tmp_path, federation, own_broker, stack)
        fleet.finish_run("run-1", seed=1)
        fleet.configure(timeout_s=20)
        for name in "abc":
            fleet.device(name)
        killed = []

        def kill(progress):
            if progress.record.state == "rolling_out" and not killed:
                killed.append(own_broker.kill())
                own_broker.start()

        outcome = fleet.deploy("run-1", kill)
        assert killed
        assert outcome.record.state == "done"
        assert states(outcome) == dict.fromkeys("abc", "serving")
