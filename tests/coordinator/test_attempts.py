"""A round that is planned anew: nobody trains twice for it, and no finished update is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import msgspec
import pytest

from reft_edge.coordinator import events
from reft_edge.coordinator.attempts import participants, take_over
from reft_edge.coordinator.preparation import prepare
from reft_edge.coordinator.records import AssignmentRecord, Prediction, RoundKey
from reft_edge.coordinator.rounds import Participant, Standing
from reft_edge.coordinator.server import Coordinator
from reft_edge.coordinator.settings import load_federation
from reft_edge.coordinator.store import Store
from reft_edge.wire.codec_names import TopK
from reft_edge.wire.compensation_names import EF21Options
from reft_edge.wire.messages import TrainingPlan
from tests.coordinator.device import Device
from tests.coordinator.points import ONE_KIND, address, points, write_federation

FIRST, SECOND = (RoundKey(run="r", number=1, attempt=attempt) for attempt in (1, 2))
PLAN = TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.1, seed=3)


def part(device, key, standing="asked", *, variant="1.00", plan=PLAN):
    update = "a" * 64 if standing in ("updated", "offered") else None
    return AssignmentRecord(
        task=key.task(device),
        device=device,
        variant=variant,
        ratio=0.0,
        prediction=Prediction(),
        plan=plan,
        standing=standing,
        update=update,
    )


def tasks_of(planned, left):
    taken = take_over(planned, left, lambda _: PLAN)
    assert [record.device for record in taken] == sorted(record.device for record in taken)
    return {record.device: record.task for record in taken}


@pytest.mark.parametrize("standing", ["asked", "accepted", "offered", "updated"])
def test_who_is_asked_for_the_same_keeps_its_task(standing):
    (taken,) = take_over([part("a", SECOND)], [part("a", FIRST, standing)], lambda _: PLAN)
    assert taken.task == FIRST.task("a")
    finished = standing in ("offered", "updated")
    assert participants([taken]) == {
        "a": Participant(standing=Standing(standing), update="a" * 64) if finished else Participant()
    }


@pytest.mark.parametrize("standing", ["offered", "updated"])
def test_who_has_finished_keeps_its_variant_and_need_not_be_there(standing):
    finished = [part("a", FIRST, standing, variant="1.00"), part("away", FIRST, standing)]
    assert tasks_of([part("a", SECOND, variant="0.50"), part("b", SECOND)], finished) == {
        "a": FIRST.task("a"),
        "away": FIRST.task("away"),
        "b": SECOND.task("b"),
    }


@pytest.mark.parametrize("standing", ["asked", "accepted"])
def test_who_has_not_finished_is_given_what_it_would_be_given_now(standing):
    left = [part("a", FIRST, standing), part("away", FIRST, standing)]
    assert tasks_of([part("a", SECOND, variant="0.50")], left) == {"a": SECOND.task("a")}


@pytest.mark.parametrize("standing", ["asked", "accepted", "offered", "updated"])
def test_a_training_that_was_asked_for_otherwise_is_asked_for_anew(standing):
    other = msgspec.structs.replace(PLAN, learning_rate=0.5)
    assert tasks_of([part("a", SECOND)], [part("a", FIRST, standing, plan=other)]) == {"a": SECOND.task("a")}


# With real devices


class Attempts:
    """A federation in which every device is needed and no deadline is extended."""

    def __init__(self, directory, broker, federation, stack):
        self._directory, self._broker, self._federation, self._stack = directory, broker, federation, stack
        self.output = directory / "federation"

    def start(self, *behaviours):
        """Devices by behaviour, which is their name, too."""
        started = []
        for seed, behaviour in enumerate(behaviours):
            device = Device(
                behaviour,
                points(60, 10 + seed),
                broker=address(self._broker),
                federation=self._federation,
                directory=self._directory / "devices",
                behaviour=behaviour.split("-")[0],
            )
            started.append(self._stack.enter_context(device))
        return started

    def prepare(self, n_devices, *, extra="", **settings):
        strict = {"quorum": 1.0, "ratios": (0.0,), "epochs": 1, **settings}
        extra = f'on_missed_quorum = "fail"\n{extra}'
        path = write_federation(self._directory, self._broker, self._federation, n_devices, extra=extra, **strict)
        return prepare(load_federation(path), self._directory)


@pytest.fixture
def attempts(tmp_path, own_broker, federation):
    with contextlib.ExitStack() as stack:
        yield Attempts(tmp_path, own_broker, federation, stack)


class StoppedError(Exception):
    pass


def n_tasks(device):
    """Tasks by round, however often each was said."""
    return [len({task.task for task in device.tasks if task.round == number}) for number in (1, 2)]


@ONE_KIND
def test_a_finished_update_counts_in_the_next_attempt_whatever_interrupts_it(attempts):
    """Also where updates go on from what both sides remember of the one before."""
    preparation = attempts.prepare(3, rounds=2)
    training = msgspec.structs.replace(
        preparation.settings.training, update_codec=TopK(fraction=0.2), compensation=EF21Options()
    )
    settings = msgspec.structs.replace(preparation.settings, training=training)
    preparation = dataclasses.replace(preparation, settings=settings)
    devices = attempts.start("good-1", "good-2", "hesitates")
    stops = [
        (events.RoundFailed, 1, 1),
        (events.Planned, 1, 2),
        (events.RoundStarted, 1, 2),
        (events.RoundFailed, 2, 1),
    ]
    seen = []

    def listener(event):
        seen.append(event)
        if stops and isinstance(event, stops[0][0]) and (event.round, event.attempt) == stops[0][1:]:
            del stops[0]
            raise StoppedError

    while stops:
        with pytest.raises(StoppedError):
            Coordinator(preparation, listener=listener).run()
    summary = Coordinator(preparation, listener=listener).run()
    assert summary.updates == {"merged": 6}
    assert [n_tasks(device) for device in devices] == [[1, 1], [1, 1], [2, 2]]
    told = [(event.round, event.device) for event in seen if isinstance(event, events.UpdateSeen)]
    assert len(told) == len(set(told)) == 6
    with contextlib.closing(Store(attempts.output)) as store:
        keys = [record.key for record in store.rounds(summary.run)]
        assert {key.attempt for key in keys for record in store.assignments(key) if record.update} == {2}
        merged = {(record.device, record.round): record.manifest for record in store.updates(summary.run)}
    for device in devices:
        assert merged[device.name, 2].memory == merged[device.name, 1].blob.sha256


@ONE_KIND
def test_a_device_that_has_gone_for_good_after_its_update_is_merged_all_the_same(attempts):
    preparation = attempts.prepare(2, rounds=1)
    (gone,), _ = attempts.start("good"), attempts.start("hesitates")

    def listener(event):
        if isinstance(event, events.RoundFailed):
            gone.stop()
        if isinstance(event, events.DeviceSeen) and not event.online:
            left.append(event.device)

    left = []
    summary = Coordinator(preparation, listener=listener).run()
    assert left == ["good"]
    assert summary.updates == {"merged": 2}


@ONE_KIND
def test_an_update_that_was_announced_between_two_attempts_is_taken_by_the_second(attempts):
    """The slow one is told its own task again, and does not train twice."""
    preparation = attempts.prepare(2, rounds=1, deadline_s=500)
    good, late = attempts.start("good", "late")
    seen = []

    def clock():
        """The first deadline passes when both have trained."""
        counted = any(isinstance(event, events.UpdateSeen) for event in seen)
        return time.time() + (510 if counted and late.has_trained else 0)

    summary = Coordinator(preparation, listener=seen.append, clock=clock).run()
    (failed,) = [event for event in seen if isinstance(event, events.RoundFailed)]
    assert "1 of the 2 updates needed came in before the deadline" in failed.reason
    assert summary.updates == {"merged": 2}
    assert [n_tasks(device)[0] for device in (good, late)] == [1, 1]
