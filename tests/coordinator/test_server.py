"""The coordinator against devices that speak the protocol over a real broker and train for real."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from msgspec.structs import replace as replace_struct

from reft_edge.coordinator import events
from reft_edge.coordinator.preparation import prepare
from reft_edge.coordinator.server import Coordinator
from reft_edge.coordinator.settings import load_federation
from reft_edge.coordinator.store import Store
from reft_edge.data.dataset import Dataset
from reft_edge.errors import ConfigError, FederationError
from reft_edge.wire.codec_names import TopK
from reft_edge.wire.compensation_names import EControlOptions, EF21Options
from tests.coordinator.device import Device
from tests.coordinator.points import ONE_KIND, address, points, write_federation


@pytest.fixture
def broker(own_broker):
    """One that a test may kill."""
    return own_broker


@pytest.fixture
def write(tmp_path, broker, federation):
    """Write federation.toml and its data; returns the coordinator's preparation."""

    def write(n_devices, **settings):
        path = write_federation(tmp_path, broker, federation, n_devices, **settings)
        return prepare(load_federation(path), tmp_path)

    return write


@pytest.fixture
def fleet(tmp_path, broker, federation):
    """Start devices by behaviour: `fleet("good", "silent")`."""
    with contextlib.ExitStack() as stack:

        def start(*behaviours, names="abcdef"):
            devices = []
            for index, behaviour in enumerate(behaviours):
                device = Device(
                    f"device-{names[index]}-{federation}",
                    points(60, 10 + index),
                    broker=address(broker),
                    federation=federation,
                    directory=tmp_path / "devices",
                    behaviour=behaviour,
                )
                devices.append(stack.enter_context(device))
            return devices

        yield start


def run(preparation, **kwargs):
    seen: list[events.Event] = []
    summary = Coordinator(preparation, listener=seen.append, **kwargs).run()
    return summary, seen


def of_kind(seen, kind):
    return [event for event in seen if isinstance(event, kind)]


@ONE_KIND
def test_a_federation_runs_from_profile_to_exported_models(write, fleet):
    preparation = write(3)
    devices = fleet("good", "good", "good")
    summary, seen = run(preparation)
    assert summary.updates == {"merged": 6}
    assert summary.final("accuracy") > 0.9
    stages = [(metric.round, metric.stage) for metric in summary.metrics if metric.name == "accuracy"]
    every = ("merged", "batch_norm", "distilled")
    assert stages == [(0, "initial"), *((number, stage) for number in (1, 2) for stage in every)]
    assert [export.name for export in summary.exports] == ["global", "global.int8"]
    assert all(device.closed.wait(10) for device in devices)
    first, second = (event.traffic for event in of_kind(seen, events.RoundClosed))
    assert all(0 < item.up_bytes < item.down_bytes < item.full_model_bytes for item in first)
    assert all(0 < item.down_bytes < 0.7 * before.down_bytes for before, item in zip(first, second, strict=True))
    for device in devices:
        one, two = device.tasks
        assert one.delta is None
        assert two.delta is not None
        assert two.delta.base == one.weights.blob.sha256
        assert device.fetched(two.delta.blob)
        assert not device.fetched(two.weights.blob)

    again, seen = run(preparation)
    assert again.already_finished
    assert again.metrics == summary.metrics
    assert [type(event) for event in seen] == [events.Finished]
    other, _ = run(preparation, new_run=True)
    assert other.run != summary.run


@ONE_KIND
def test_limits_hold_for_every_device_and_the_global_model_stays_whole(write, fleet):
    preparation = write(2, rounds=1, planning="limits = { parameters = 4000 }")
    whole = sum(parameter.numel() for parameter in preparation.model.parameters())
    fleet("good", "good")
    summary, seen = run(preparation)
    assert summary.updates == {"merged": 2}
    (planned,) = of_kind(seen, events.Planned)
    assert all(3000 < device.parameters <= 4000 < whole for device in planned.devices)
    sizes = {export.name: export.values["size_bytes"] for export in summary.exports}
    variants = {name: size for name, size in sizes.items() if "variant" in name and "int8" not in name}
    assert sizes["global"] > 4 * whole
    assert [size < 4 * 4000 + 8000 for size in variants.values()] == [True]
    files = {export.name: export.path for export in summary.exports}
    meta = ort.InferenceSession(files["global"], providers=["CPUExecutionProvider"]).get_modelmeta()
    assert meta.custom_metadata_map["run"] == summary.run


class ForwardClock:
    """The time of day, and a way to move it on: a deadline passes when everything that should come has come."""

    def __init__(self):
        self._offset = 0.0

    def __call__(self):
        return time.time() + self._offset

    def move_on(self, seconds):
        self._offset += seconds


@ONE_KIND
def test_every_kind_of_bad_device_costs_its_own_update_only(write, fleet):
    behaviours = ("good", "refuses", "garbage", "diverges", "again", "huge", "late")
    preparation = write(len(behaviours), rounds=2, deadline_s=500, quorum=0.2, extra="max_parallel_uploads = 1")
    fleet(*behaviours, names=behaviours)
    clock, fates = ForwardClock(), []

    def listener(event):
        seen.append(event)
        if isinstance(event, events.UpdateSeen | events.DeviceProgress) and event.state not in (
            "accepted",
            "uploading",
        ):
            fates.append((event.round, event.device.split("-")[1], event.state))
            if sum(fate[0] == event.round and fate[2] != "late" for fate in fates) == 7:
                clock.move_on(510)

    seen: list[events.Event] = []
    summary = Coordinator(preparation, listener=listener, clock=clock).run()
    expected = {
        ("good", "received"),
        ("again", "received"),
        ("again", "duplicate"),
        ("garbage", "rejected"),
        ("diverges", "rejected"),
        ("huge", "rejected"),
        ("refuses", "refused"),
    }
    assert {fate for fate in fates if fate[2] != "late"} == {(number, *fate) for number in (1, 2) for fate in expected}
    assert (1, "late", "late") in fates  # the second round's comes when the run has ended, or just before
    assert [(closed.counted, closed.asked) for closed in of_kind(seen, events.RoundClosed)] == [(2, 7), (2, 7)]
    collected = of_kind(seen, events.RoundCollected)
    assert [(event.counted, [name.split("-")[1] for name in event.late]) for event in collected] == [(2, ["late"])] * 2
    assert all(plan.training_flops > 0 for event in of_kind(seen, events.Planned) for plan in event.devices)
    reasons = {event.device.split("-")[1]: event.reason for event in of_kind(seen, events.UpdateSeen)}
    assert "norm" in reasons["diverges"]
    assert "1000000000 bytes" in reasons["huge"]
    assert {state: summary.updates[state] for state in ("merged", "rejected", "duplicate")} == {
        "merged": 4,
        "rejected": 6,
        "duplicate": 2,
    }


@ONE_KIND
def test_a_device_that_ran_out_of_memory_gets_a_smaller_variant(write, fleet):
    preparation = write(2, rounds=2)
    fleet("good", "out_of_memory")
    summary, seen = run(preparation)
    ratios = [
        {item.device.split("-")[1]: item.ratio for item in event.devices} for event in of_kind(seen, events.Planned)
    ]
    assert ratios == [{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.5}]
    assert summary.updates == {"merged": 3}
    assert {"variant-0.5", "variant-0.5.int8"} <= {export.name for export in summary.exports}


@ONE_KIND
def test_a_round_without_quorum_is_planned_again_and_then_fails_the_run(write, fleet):
    preparation = write(1, rounds=1, extra="max_attempts = 2")
    fleet("refuses")
    with pytest.raises(FederationError, match=r"round 1 failed 2 times.*on battery"):
        run(preparation)


@ONE_KIND
def test_too_few_devices_are_an_error_that_says_what_to_do(write):
    with pytest.raises(FederationError, match=r"0 of 2 devices announced themselves .* start their agents"):
        run(write(2, enrol_wait_s=0.2))


@ONE_KIND
def test_a_device_whose_data_do_not_fit_is_told_apart(write, fleet, tmp_path, broker, federation):
    preparation = write(2, rounds=1)
    fleet("good")
    odd = Dataset(inputs=np.zeros((9, 7), np.float32), targets=np.zeros(9, np.int64))
    with Device(f"odd-{federation}", odd, broker=address(broker), federation=federation, directory=tmp_path / "odd"):
        _, seen = run(preparation)
    (planned,) = of_kind(seen, events.Planned)
    (excluded,) = planned.excluded
    assert "samples have shape (7,), the model takes (6,)" in excluded.reason


@ONE_KIND
def test_a_device_that_only_serves_is_not_waited_for(write, fleet, tmp_path, broker, federation):
    preparation = write(1, rounds=1)
    nothing = Dataset(inputs=np.zeros((0, 6), np.float32), targets=np.zeros(0, np.int64))
    name = f"serves-{federation}"
    seen: list[events.Event] = []

    def listener(event):
        seen.append(event)
        if isinstance(event, events.DeviceSeen) and event.device == name and event.profile and not trainers:
            trainers.extend(fleet("good"))

    trainers: list[Device] = []
    with Device(name, nothing, broker=address(broker), federation=federation, directory=tmp_path / "serves"):
        Coordinator(preparation, listener=listener).run()
    (planned,) = of_kind(seen, events.Planned)
    assert [one.device for one in planned.devices] == [trainers[0].name]
    assert [(one.device, one.reason) for one in planned.excluded] == [(name, "it has no training samples")]


INTERRUPTIONS = [
    events.Waiting,
    events.Planned,
    events.RoundStarted,
    events.UpdateSeen,
    events.RoundMerged,
    events.Distilling,
    events.RoundDistilled,
    events.RoundClosed,
    events.Exported,
]


class InterruptedTestError(Exception):
    pass


@ONE_KIND
def test_a_run_goes_on_after_an_interruption_at_any_moment(write, fleet):
    preparation = write(2, quorum=1.0)
    waiting = list(INTERRUPTIONS)
    runs = set()

    def listener(event):
        if isinstance(event, events.Started):
            runs.add(event.run)
        if waiting and isinstance(event, waiting[0]):
            del waiting[0]
            raise InterruptedTestError

    with pytest.raises(InterruptedTestError):  # before there are devices
        Coordinator(preparation, listener=listener).run()
    devices = fleet("good", "good")
    for _ in INTERRUPTIONS[1:]:
        with pytest.raises(InterruptedTestError):
            Coordinator(preparation, listener=listener).run()
    summary = Coordinator(preparation, listener=listener).run()
    assert runs == {summary.run}
    assert summary.updates == {"merged": 4}
    assert summary.final("accuracy") > 0.9
    assert all(len({task.task for task in device.tasks}) == 2 for device in devices)


@ONE_KIND
@pytest.mark.parametrize("method", [EF21Options(), EControlOptions()])
def test_both_sides_remember_the_same_whatever_interrupts_them(write, fleet, method):
    """The second device's first update goes wrong, another's is announced twice: only what is merged is remembered."""
    preparation = write(3, rounds=3, quorum=0.6)
    training = replace_struct(preparation.settings.training, update_codec=TopK(fraction=0.2), compensation=method)
    preparation = replace(preparation, settings=replace_struct(preparation.settings, training=training))
    good, broken, again = fleet("good", "diverges", "again")
    waiting = [events.UpdateSeen, events.RoundMerged, events.RoundDistilled, events.RoundClosed, events.UpdateSeen]

    def listener(event):
        if waiting and isinstance(event, waiting[0]):
            del waiting[0]
            raise InterruptedTestError

    while waiting:
        with pytest.raises(InterruptedTestError):
            Coordinator(preparation, listener=listener).run()
    summary = Coordinator(preparation, listener=listener).run()
    assert summary.updates["merged"] == 6
    assert summary.final("accuracy") > 0.9

    def named_to(device):
        """Memories by task: a coordinator that has come back says an open task again."""
        return list({task.task: task.memory for task in device.tasks}.values())

    assert named_to(broken) == [None] * 3
    with contextlib.closing(Store(preparation.directory)) as store:
        merged = {
            device.name: [record.manifest for record in store.updates(summary.run, state="merged")
                          if record.device == device.name]
            for device in (good, again)
        }  # fmt: skip
        memories = {memory.device: memory.remembered for memory in store.memories(summary.run)}
    assert memories.keys() == {good.name, again.name}
    for device in (good, again):
        named = named_to(device)
        assert named == [None, *(update.blob.sha256 for update in merged[device.name][:-1])]
        assert [update.memory for update in merged[device.name]] == named
        assert memories[device.name].update == merged[device.name][-1].blob.sha256


@pytest.mark.slow
def test_a_broker_that_dies_with_all_it_knew_costs_no_update(write, fleet, broker):
    preparation = write(3, quorum=1.0)
    fleet("good", "good", "good")
    deaths = [events.RoundStarted, events.UpdateSeen]

    def listener(event):
        if deaths and isinstance(event, deaths[0]):
            del deaths[0]
            broker.kill()
            broker.start()

    summary = Coordinator(preparation, listener=listener).run()
    assert not deaths
    assert summary.updates == {"merged": 6}


class StoreDiedError(Exception):
    pass


@ONE_KIND
def test_a_run_survives_a_death_at_any_transaction(write, fleet, monkeypatch):
    """Every process may do a little more than the one before, and dies just before or just after a commit."""
    preparation = write(2, quorum=1.0)
    fleet("good", "good")
    transaction = Store._transaction
    left = 0

    @contextlib.contextmanager
    def mortal(store):
        nonlocal left
        left -= 1
        if left == 0 and n_allowed % 2:
            raise StoreDiedError
        with transaction(store) as connection:
            yield connection
        if left == 0:
            raise StoreDiedError

    monkeypatch.setattr(Store, "_transaction", mortal)
    for n_allowed in range(3, 200, 3):
        left = n_allowed
        try:
            summary = Coordinator(preparation).run()
            break
        except StoreDiedError:
            continue
    assert n_allowed > 30
    assert summary.updates == {"merged": 4}
    assert summary.final("accuracy") > 0.9


@ONE_KIND
def test_another_model_needs_a_new_run(write, fleet):
    preparation = write(1, rounds=1)
    fleet("good")
    run(preparation)
    with pytest.raises(ConfigError, match="--new-run"):
        run(write(1, rounds=1, extra="seed = 7"))
