"""Devices that send useless, foreign and hostile updates over a real broker, and what a person can do about them."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path

import pytest

from reft_edge.bundle.manifest import Manifest
from reft_edge.cli.main import main
from reft_edge.coordinator import events
from reft_edge.coordinator.collecting import MAX_ANNOUNCED
from reft_edge.coordinator.preparation import prepare
from reft_edge.coordinator.report.page import to_html
from reft_edge.coordinator.report.record import gather
from reft_edge.coordinator.round_weights import mend
from reft_edge.coordinator.rounds import Phase
from reft_edge.coordinator.run_files import BLOBS
from reft_edge.coordinator.server import Coordinator
from reft_edge.coordinator.settings import load_federation
from reft_edge.coordinator.store import Store
from reft_edge.errors import FederationError
from tests.coordinator.device import N_FLOODS, Device
from tests.coordinator.points import ONE_KIND, address, points, write_federation
from tests.coordinator.test_server import of_kind

pytestmark = ONE_KIND


class Federation:
    """A folder with federation.toml and its data, and devices by behaviour."""

    def __init__(self, directory, broker, name, stack):
        self.directory = directory
        self.path = directory / "federation.toml"
        self.output = directory / "federation"
        self.broker = broker
        self.name = name
        self._stack = stack

    def write(self, n_devices, **settings):
        few = {"deadline_s": 60, "quorum": 0.2, "ratios": (0.0,), "epochs": 1}
        write_federation(self.directory, self.broker, self.name, n_devices, **few, **settings)

    def start(self, *devices, victim=""):
        """Each is `behaviour` or `behaviour-2` and so on, which is the device's name, too."""
        started = []
        for index, name in enumerate(devices):
            device = Device(
                name,
                points(60, 10 + index),
                broker=address(self.broker),
                federation=self.name,
                directory=self.directory / "devices",
                behaviour=name.split("-")[0],
                victim=victim,
            )
            started.append(self._stack.enter_context(device))
        return started

    def run(self, *, listener=None, new_run=False, clock=time.time):
        """The summary and all events."""
        seen = []

        def both(event):
            seen.append(event)
            if listener is not None:
                listener(event)

        preparation = prepare(load_federation(self.path), self.directory)
        summary = Coordinator(preparation, listener=both, new_run=new_run, clock=clock).run()
        return summary, seen

    def quarantine(self, *options):
        """`reft-edge quarantine`; returns its exit code."""
        return main(["quarantine", str(self.path), *options])

    @contextlib.contextmanager
    def store(self):
        with contextlib.closing(Store(self.output, shared=True)) as store:
            yield store


@pytest.fixture
def hostile(tmp_path, own_broker, federation):
    with contextlib.ExitStack() as stack:
        yield Federation(tmp_path, own_broker, federation, stack)


GOOD = ("good-1", "good-2", "good-3", "good-4")
USELESS = {
    "garbage": "container|decompress|damaged|zstd|frame",
    "nan": "not finite",
    "shapes": "expected|bit planes have",
    "lazy": "changes no parameter",
    "diverges": "norm .* is above",
    "huge": "1000000000 bytes",
    "loud": "times as long as the median of 6 updates",
}


def test_useless_updates_are_kept_with_their_reasons_and_the_third_makes_the_quarantine(hostile, capsys):
    bad = tuple(USELESS)
    everybody = (*GOOD, *bad, "thief")
    hostile.write(len(everybody), rounds=5)
    hostile.start(*everybody, victim="good-1")
    lifted = []

    def lift_one(event):
        """A person lifts a device while the coordinator is at work."""
        if isinstance(event, events.Planned) and event.round == 4:
            assert hostile.quarantine("--lift", "nan") == 0
            lifted.append(event.round)

    summary, seen = hostile.run(listener=lift_one)
    capsys.readouterr()

    # Honest devices were merged in every round, the thief's own updates too, and nobody else's.
    assert summary.rounds == 5
    assert summary.updates == {"merged": 5 * 5, "rejected": 3 * len(bad) + 1}
    assert summary.final("accuracy") > 0.9
    with hostile.store() as store:
        updates = store.updates(summary.run)
        assert {item.device for item in updates if item.state == "merged"} == {*GOOD, "thief"}
        assert {item.device for item in updates if item.state == "rejected"} == set(bad)
        assert all(item.measured.training_s < 100 for item in updates)  # nobody believes the lazy one's years
        assert store.count_updates(summary.run) == summary.updates

    # Reasons are told, kept beside the update, and shown.
    for device, reason in USELESS.items():
        rejected = [
            event for event in of_kind(seen, events.UpdateSeen) if (event.device, event.state) == (device, "rejected")
        ]
        assert [event.round for event in rejected] == ([1, 2, 3, 5] if device == "nan" else [1, 2, 3])
        for event in rejected:
            assert_matches(reason, event.reason)
            note = json.loads(Path(event.kept).read_text())
            assert (note["device"], note["round"], note["reason"]) == (device, event.round, event.reason)
            blob = Path(event.kept).with_suffix(".update")
            assert (blob.stat().st_size if blob.exists() else None) == (
                None if device == "huge" else note["size_bytes"]
            )
    assert {item.device for item in summary.rejected} == set(bad)
    assert all(item.kept for item in summary.rejected)
    page = to_html(gather(seen))
    assert "<h2>Rejected</h2>" in page
    assert "<h2>Quarantine</h2>" in page

    # The third in a row makes the quarantine; the plans say so; the lifted one is asked again.
    assert {event.device for event in of_kind(seen, events.Quarantined)} == set(bad)
    excluded = [{one.device: one.reason for one in event.excluded} for event in of_kind(seen, events.Planned)]
    assert [plan.keys() for plan in excluded] == [set(), set(), set(), set(bad), set(bad) - {"nan"}]
    assert_matches(
        "in quarantine: the updates of 3 tasks in a row were rejected; the last: .*not finite", excluded[3]["nan"]
    )
    assert lifted == [4]
    assert {record.device for record in summary.quarantined} == set(bad) - {"nan"}


def assert_matches(pattern, text):
    assert re.search(pattern, text), text


def test_the_quarantine_survives_restarts_until_a_person_lifts_it(hostile, capsys):
    hostile.write(2, rounds=1, extra="rejection.quarantine_after = 1")
    hostile.start("good", "diverges")
    summary, _ = hostile.run()
    assert [record.device for record in summary.quarantined] == ["diverges"]

    capsys.readouterr()
    assert hostile.quarantine("--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["device"], listed["by"]) == ("diverges", "rejections")
    assert hostile.quarantine("--add", "good", "--reason", "its camera is broken") == 0
    assert "good: since" in capsys.readouterr().out

    there = set()

    def listener(event):
        if isinstance(event, events.DeviceSeen) and event.online and event.profile:
            there.add(event.device)

    def clock():
        """The patience ends when both are there."""
        return time.time() + (60 if len(there) == 2 else 0)

    with pytest.raises(FederationError, match="all 2 devices that are there are in quarantine"):
        hostile.run(listener=listener, new_run=True, clock=clock)
    assert hostile.quarantine("--lift", "good") == 0
    _, seen = hostile.run(new_run=True)
    (planned,) = of_kind(seen, events.Planned)
    assert ([one.device for one in planned.devices], [one.device for one in planned.excluded]) == (
        ["good"],
        ["diverges"],
    )

    capsys.readouterr()
    assert hostile.quarantine("--lift", "good") == 2
    assert "'good' is not in quarantine; there is: diverges" in capsys.readouterr().err
    assert hostile.quarantine("--add", "diverges", "--reason", "x") == 2
    assert hostile.quarantine("--add", "a/b", "--reason", "x") == 2
    assert hostile.quarantine("--add", "x") == 2


def test_a_device_that_never_ends_announcing_is_heard_a_few_times_only(hostile):
    hostile.write(3, rounds=1, extra="rejection.quarantine_after = 0")
    (_, flood, _) = hostile.start("good", "flood", "late")  # the late one keeps the round open

    def clock():
        """The deadline passes when everything has been announced."""
        return time.time() + (70 if flood.flooded.is_set() else 0)

    summary, _ = hostile.run(clock=clock)
    with hostile.store() as store:
        announced = [item for item in store.updates(summary.run) if item.device == "flood"]
    assert len(announced) == MAX_ANNOUNCED < N_FLOODS
    assert {item.state for item in announced} <= {"rejected", "offered"}  # superseded before it was pulled
    assert summary.updates["merged"] == 1
    assert summary.quarantined == []


class DiedError(Exception):
    pass


def test_deaths_in_screening_lead_to_the_same_model(hostile, monkeypatch):
    """Just before what was taken back is committed, and just after."""
    devices = (*GOOD, "loud")
    hostile.write(len(devices), rounds=1)
    hostile.start(*devices)
    save_round = Store.save_round
    deaths = ["before", "after"]

    def mortal(store, key, state, **kwargs):
        death = deaths.pop(0) if state.phase is Phase.MERGING and deaths else None
        if death != "before":
            save_round(store, key, state, **kwargs)
        if death is not None:
            raise DiedError

    monkeypatch.setattr(Store, "save_round", mortal)
    for _ in ("before", "after"):
        with pytest.raises(DiedError):
            hostile.run()
    disturbed, _ = hostile.run()
    undisturbed, _ = hostile.run(new_run=True)
    assert disturbed.updates == undisturbed.updates == {"merged": 4, "rejected": 1}
    assert [item.reason for item in disturbed.rejected] == [item.reason for item in undisturbed.rejected]
    assert all(item.kept for item in disturbed.rejected)
    with hostile.store() as store:
        assert store.weights(disturbed.run) == store.weights(undisturbed.run)


def test_weights_that_our_own_disk_lost_are_no_devices_fault_and_the_round_is_repeated(hostile):
    """No update can be checked without them; they are written anew with the next plan."""
    hostile.write(1, rounds=1, extra="rejection.quarantine_after = 1")
    hostile.start("good")
    lost = []

    def lose(event):
        if isinstance(event, events.DeviceProgress) and event.state == "uploading" and not lost:
            with hostile.store() as store:
                (assignment,) = store.history(store.latest_run(hostile.name).run)
            lost.append(hostile.output / BLOBS / assignment.weights.blob.sha256)
            lost[0].unlink()

    summary, _ = hostile.run(listener=lose)
    assert summary.updates == {"damaged": 1, "merged": 1}
    assert summary.quarantined == []


def test_updates_that_our_own_disk_lost_are_no_devices_fault_and_the_round_is_repeated(hostile):
    hostile.write(1, rounds=1, extra="rejection.quarantine_after = 1")
    hostile.start("good")
    damaged = []

    def damage(event):
        """The only update's blob is overwritten as soon as it counts."""
        if isinstance(event, events.UpdateSeen) and event.state == "received" and not damaged:
            with hostile.store() as store:
                (record,) = store.updates(store.latest_run(hostile.name).run)
            (hostile.output / BLOBS / record.manifest.blob.sha256).write_bytes(b"bits rot")
            damaged.append(record)

    summary, seen = hostile.run(listener=damage)
    (failed,) = of_kind(seen, events.RoundFailed)
    assert "no update is left to merge" in failed.reason
    assert summary.updates == {"damaged": 1, "merged": 1}
    assert summary.quarantined == []


def damage_after(monkeypatch, hostile, damages):
    """Overwrite blobs as soon as the round has come to a phase: `damages` gives their hashes by phase, each once."""
    save_round, left = Store.save_round, dict(damages)

    def save_and_damage(store, key, state, **kwargs):
        save_round(store, key, state, **kwargs)
        choose = left.pop(state.phase, None)
        for ref in choose(store, key) if choose is not None else ():
            (hostile.output / BLOBS / ref.sha256).write_bytes(b"bits rot")

    monkeypatch.setattr(Store, "save_round", save_and_damage)


def counted_update(device):
    def choose(store, key):
        (part,) = [record for record in store.assignments(key) if record.device == device]
        return [store.update(part.task, part.update).manifest.blob]

    return choose


def test_an_update_that_our_own_disk_lost_late_costs_itself_and_not_the_run(hostile, monkeypatch, caplog):
    """While merging it is not merged; while distilling it does not teach."""
    hostile.write(4, rounds=1, extra="rejection.quarantine_after = 1")
    hostile.start(*GOOD)
    losses = {Phase.MERGING: counted_update("good-2"), Phase.DISTILLING: counted_update("good-3")}
    damage_after(monkeypatch, hostile, losses)
    summary, seen = hostile.run()
    assert summary.updates == {"damaged": 1, "merged": 3}
    assert summary.quarantined == []
    assert [event.teachers for event in of_kind(seen, events.RoundDistilled)] == [2]
    assert not of_kind(seen, events.RoundFailed)
    told = [record.getMessage() for record in caplog.records]
    for words in ("the update of good-2 is lost: blob .* is damaged", "good-3 does not teach: blob .* is damaged"):
        assert any(re.search(words, line) for line in told)


def test_what_our_own_disk_lost_is_derived_again_where_it_follows_from_something_else(hostile, monkeypatch):
    hostile.write(2, rounds=1)
    hostile.start("good-1", "good-2")

    def weights(store, key):
        return [store.assignments(key)[0].weights.blob]

    def merged_and_graph(store, key):
        (record,), (variant,) = store.rounds(key.run), store.variants(key.run)
        manifest = Manifest.from_json((hostile.output / BLOBS / variant.manifest.sha256).read_bytes())
        return [record.merged, manifest.inference_graph, *weights(store, key)]

    def distilled(store, key):
        return [store.rounds(key.run)[0].distilled]

    undisturbed, _ = hostile.run()
    losses = {Phase.MERGING: weights, Phase.DISTILLING: merged_and_graph, Phase.EVALUATING: distilled}
    damage_after(monkeypatch, hostile, losses)
    disturbed, seen = hostile.run(new_run=True)
    assert disturbed.updates == undisturbed.updates == {"merged": 2}
    assert [event.teachers for event in of_kind(seen, events.RoundDistilled)] == [2]
    with hostile.store() as store:
        assert store.weights(disturbed.run) == store.weights(undisturbed.run)


def test_what_our_own_disk_loses_again_is_not_derived_without_end(hostile, monkeypatch):
    hostile.write(2, rounds=1)
    hostile.start("good-1", "good-2")
    rotten = []

    def mend_in_vain(current, contribution, parts):
        assert mend(current, contribution, parts)
        rotten.append((current.key, contribution.device))
        (hostile.output / BLOBS / contribution.weights.blob.sha256).write_bytes(b"bits rot")
        return True

    monkeypatch.setattr("reft_edge.coordinator.conductor.mend", mend_in_vain)
    damage_after(monkeypatch, hostile, {Phase.MERGING: lambda store, key: [store.assignments(key)[0].weights.blob]})
    summary, seen = hostile.run()
    assert len(rotten) == len(set(rotten)) == 2
    assert summary.updates == {"merged": 2}, "they are merged without it, and do not teach"
    assert not of_kind(seen, events.RoundDistilled)


def test_a_lost_global_model_is_an_error_that_says_what_to_do(hostile, monkeypatch):
    hostile.write(1, rounds=1)
    hostile.start("good")
    damage_after(monkeypatch, hostile, {Phase.MERGING: lambda store, key: [store.weights(key.run)]})
    for _ in ("as it is found", "as it is started again"):
        with pytest.raises(FederationError, match=r"lost the global model, .*blobs/[0-9a-f]{64}: bring .* --new-run"):
            hostile.run()
