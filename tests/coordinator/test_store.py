"""The store: what was committed is there after a kill, and what comes twice is there once."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import rounds
from reft_edge.coordinator.records import (
    AssignmentRecord,
    DeviceRecord,
    ExportRecord,
    MetricRecord,
    Prediction,
    QuarantineRecord,
    Remembered,
    RoundKey,
    RoundRecord,
    RunRecord,
    TaskOwner,
    UpdateRecord,
    VariantRecord,
)
from reft_edge.coordinator.store import Store
from reft_edge.errors import FederationError, ResourceError
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.compensation_names import EF21Options
from reft_edge.wire.messages import Measured, ProfileAnnouncement, TrainingPlan, UpdateManifest, WeightsRef

RULES = rounds.RoundRules(deadline_s=60, quorum=0.5)
KEY = RoundKey(run="run1", number=1)
PLAN = TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.1, seed=3)


def ref(letter):
    return BlobRef(sha256=letter * 64, size_bytes=7)


def assignment(device, key=KEY):
    return AssignmentRecord(
        task=key.task(device), device=device, variant="0.50", ratio=0.5, prediction=Prediction(training_s=2), plan=PLAN
    )


def update_record(device, sha="a", state="offered", key=KEY):
    return UpdateRecord(
        task=key.task(device),
        device=device,
        round=key.number,
        manifest=UpdateManifest(blob=ref(sha), codec=Int8(), training_samples=5),
        measured=Measured(download_s=1, start_s=1, training_s=1, steps=3, peak_memory_bytes=9),
        state=state,
        at=5.0,
    )


def start(store, devices=("d1", "d2")):
    """A run with a round that is collecting; returns the round's state."""
    store.create_run(RunRecord(run="run1", federation="f", settings_digest="x", created_at=1.0))
    state = rounds.start_round(list(devices), RULES)
    record = RoundRecord(key=KEY, phase=state.phase.value, started_at=2.0)
    store.plan_round(record, [assignment(device) for device in devices])
    for event in (rounds.Published(), rounds.Opened(now=10.0)):
        state = rounds.advance(state, event).round
        store.save_round(KEY, state)
    return state


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def test_a_round_comes_back_as_it_was(store, tmp_path):
    state = start(store)
    state = rounds.advance(state, rounds.Received(device="d1", now=11, sha256="a" * 64)).round
    state = rounds.advance(state, rounds.Failed(device="d2", now=12, reason="killed")).round
    store.save_round(KEY, state, devices=["d1", "d2"], updates=[update_record("d1", state="received")])
    store.save_failure(KEY.task("d2"), "out_of_memory")
    store.close()
    again = Store(tmp_path)
    (record,) = again.rounds("run1")
    assert again.load_round(record, RULES) == state
    assert [a.failure for a in again.assignments(KEY)] == ["", "out_of_memory"]
    assert again.assignments(KEY)[0].prediction == Prediction(training_s=2)
    again.close()


def test_a_task_that_a_later_attempt_takes_over_moves_there_with_its_update(store):
    state = start(store)
    state = rounds.advance(state, rounds.Received(device="d1", now=11.0, sha256="a" * 64)).round
    store.save_round(KEY, state, devices=["d1"], updates=[update_record("d1", state="received")])
    later = RoundKey(run="run1", number=1, attempt=2)
    (taken,) = [record for record in store.assignments(KEY) if record.device == "d1"]
    store.plan_round(RoundRecord(key=later, phase="planned", started_at=50.0), [taken, assignment("d2", later)])
    assert [record.device for record in store.assignments(KEY)] == ["d2"]
    again = store.load_round(store.rounds("run1")[1], RULES)
    assert again.counted == {"d1": "a" * 64}
    # It may have been worked on since the round was planned first; that of the second attempt may, too.
    assert store.task_owner(taken.task) == TaskOwner(device="d1", round=1, phase="planned", started_at=2.0)
    assert store.task_owner(KEY.task("d2")) == TaskOwner(device="d2", round=1, phase="collecting", started_at=2.0)
    merging = msgspec.structs.replace(again, phase=rounds.Phase.MERGING)
    store.save_round(later, rounds.advance(merging, rounds.Merged()).round, merged=ref("c"))
    assert store.count_updates("run1") == {"merged": 1}


def test_what_was_committed_survives_a_kill(tmp_path):
    script = """
        import os, signal, sys
        from pathlib import Path
        from tests.coordinator.test_store import start, update_record
        from reft_edge.coordinator.store import Store
        store = Store(Path(sys.argv[1]))
        start(store)
        store.save_update(update_record("d1"))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    store = Store(tmp_path)  # the kernel has released the lock
    (record,) = store.rounds("run1")
    assert (record.phase, record.deadline) == ("collecting", 70.0)
    assert store.updates("run1") == [update_record("d1")]
    store.close()


def test_merging_changes_weights_phase_and_updates_together(store):
    state = start(store)
    for device, sha in (("d1", "a"), ("d2", "b")):
        store.save_update(update_record(device, sha, "received"))
        state = rounds.advance(state, rounds.Received(device=device, now=11, sha256=sha * 64)).round
    state = rounds.advance(rounds.advance(state, rounds.Screened()).round, rounds.Merged()).round
    store.save_round(
        KEY, state, merged=ref("c"), metrics=[MetricRecord(round=1, stage="merged", name="accuracy", value=0.5)]
    )
    assert store.count_updates("run1") == {"merged": 2}
    state = rounds.advance(state, rounds.Distilled()).round
    store.save_round(KEY, state, distilled=ref("d"))
    assert (store.rounds("run1")[0].merged, store.rounds("run1")[0].distilled) == (ref("c"), ref("d"))
    assert store.latest_run("f").weights == ref("d")


def test_what_is_remembered_of_a_device_moves_with_a_merge_and_with_nothing_else(store):
    store.create_run(RunRecord(run="run1", federation="f", settings_digest="x", created_at=1.0))
    ef21 = msgspec.structs.replace(PLAN, compensation=EF21Options())

    def collect(number, **updates):
        """A round in which these devices' updates came; each has the state that is given with its letter."""
        key = RoundKey(run="run1", number=number)
        state = rounds.start_round(list(updates), RULES)
        given = [msgspec.structs.replace(assignment(device, key), plan=ef21) for device in updates]
        store.plan_round(RoundRecord(key=key, phase=state.phase.value, started_at=2.0), given)
        for event in (rounds.Published(), rounds.Opened(now=10.0)):
            state = rounds.advance(state, event).round
        for device, (sha, fate) in updates.items():
            store.save_update(update_record(device, sha, fate, key))
            happened = rounds.Received if fate == "received" else rounds.Rejected
            extra = {} if fate == "received" else {"reason": "useless"}
            state = rounds.advance(state, happened(device=device, now=11, sha256=sha * 64, **extra)).round
        return key, rounds.advance(rounds.advance(state, rounds.Screened()).round, rounds.Merged()).round

    def remembered():
        return {memory.device: memory.remembered for memory in store.memories("run1")}

    key, state = collect(1, d1=("a", "received"), d2=("b", "received"))
    assert remembered() == {}
    store.save_round(key, state, merged=ref("c"), memories={"d1": ref("1"), "d2": ref("2")})
    first = {"d1": Remembered(update="a" * 64, tensors=ref("1")), "d2": Remembered(update="b" * 64, tensors=ref("2"))}
    assert remembered() == first
    key, state = collect(2, d1=("d", "received"), d2=("e", "rejected"))
    assert remembered() == first
    store.save_round(key, state, merged=ref("f"), memories={"d1": ref("3")})
    store.save_update(update_record("d1", "7", "late", key))
    assert remembered() == {**first, "d1": Remembered(update="d" * 64, tensors=ref("3"))}
    assert {memory.round for memory in store.memories("run1")} == {1, 2}
    assert {memory.method for memory in store.memories("run1")} == {EF21Options()}
    assert store.memories("another") == []


def test_saving_twice_is_saving_once(store):
    start(store)
    for _ in range(2):
        store.save_update(update_record("d1"))
        store.save_metrics("run1", [MetricRecord(round=1, stage="merged", name="loss", value=1.0)])
        store.save_export("run1", ExportRecord(name="global", path="g.onnx", values={"accuracy": 0.5}))
        store.save_variant("run1", VariantRecord(variant="0.50", ratio=0.5, manifest=ref("a"), channels=ref("b")))
    assert len(store.updates("run1")) == len(store.metrics("run1")) == len(store.exports("run1")) == 1
    assert len(store.variants("run1")) == 1
    assert store.update(KEY.task("d1"), "a" * 64) == update_record("d1")
    assert store.update(KEY.task("d1"), "b" * 64) is None
    assert store.task_owner(KEY.task("d1")) == TaskOwner(device="d1", round=1, phase="collecting", started_at=2.0)
    assert store.task_owner("nobody's") is None


def test_a_device_is_remembered_as_it_last_was(store):
    def announced(samples):
        profile = DeviceProfile(
            name="board",
            **{
                f: Quantity(value=4, basis="specified")
                for f in ("cores", "clock_hz", "flops_per_cycle", "memory_total_bytes")
            },
        )
        return DeviceRecord(
            device="d1",
            announcement=ProfileAnnouncement(profile=profile, training_samples=samples),
            seen_at=float(samples),
        )

    store.save_device(announced(10))
    store.save_device(announced(20))
    assert store.devices() == [announced(20)]


@pytest.mark.usefixtures("store")
def test_two_coordinators_cannot_share_a_store(tmp_path):
    with pytest.raises(FederationError, match="another coordinator is at work"):
        Store(tmp_path)


def test_a_full_disk_is_one_clear_error_before_anything_is_done(tmp_path):
    (tmp_path / "coordinator.lock").symlink_to("/dev/full")
    for _ in range(2):  # the lock is given back
        with pytest.raises(ResourceError, match="cannot be written"):
            Store(tmp_path)


def test_a_store_of_another_version_is_refused(tmp_path):
    first = Store(tmp_path)
    with first._transaction() as connection:
        connection.exec_driver_sql("PRAGMA user_version = 99")
    first.close()
    with pytest.raises(FederationError, match="schema 99"):
        Store(tmp_path)


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path):
    (tmp_path / "coordinator.sqlite").write_bytes(b"not a database at all" * 50)
    with pytest.raises(ResourceError, match="store cannot be used"):
        Store(tmp_path)


def test_task_ids_are_unique_and_fit_a_topic():
    ids = {
        RoundKey(run=r, number=n, attempt=a).task(d)
        for r in ("x", "y")
        for n in (1, 2)
        for a in (1, 2)
        for d in ("d", "e" * 64)
    }
    assert len(ids) == 16
    assert all(len(task) <= 64 for task in ids)


def test_sequences_rise_over_restarts_and_clocks_that_go_back(tmp_path):
    first = Store(tmp_path)
    numbers = [first.next_sequence(1000.0), first.next_sequence(1000.0), first.next_sequence(900.0)]
    first.close()
    second = Store(tmp_path)
    numbers += [second.next_sequence(1000.0005), second.next_sequence(2000.0)]
    second.close()
    assert numbers == [1_000_000, 1_000_001, 1_000_002, 1_000_003, 2_000_000]


def quarantine_record(device, since=1.0):
    return QuarantineRecord(device=device, since=since, reason="odd", by="person")


def play_updates(store, states, *, first=1):
    """One round after another in which `d1` sends an update that comes to each of `states`."""
    for number, state in enumerate(states, start=first):
        key = RoundKey(run="run1", number=number)
        store.plan_round(RoundRecord(key=key, phase="collecting", started_at=1.0), [assignment("d1", key)])
        record = update_record("d1", state=state, key=key)
        store.save_update(msgspec.structs.replace(record, at=float(number), reason=f"reason {number}"))


@pytest.mark.parametrize(
    ("states", "counted"),
    [
        (["rejected", "rejected"], [1, 2]),
        (["rejected", "merged", "rejected"], [3]),
        (["rejected", "rejected", "merged"], []),
        (["rejected", "late", "duplicate", "damaged", "received", "rejected"], [1, 6]),
        (["merged"], []),
    ],
)
def test_rejections_count_in_a_row_and_only_a_merged_update_ends_the_row(store, states, counted):
    store.create_run(RunRecord(run="run1", federation="f", settings_digest="x", created_at=1.0))
    play_updates(store, states)
    expected = {"d1": [f"reason {number}" for number in counted]} if counted else {}
    assert store.rejections_in_a_row() == expected


def test_two_useless_updates_for_one_task_count_once(store):
    start(store)
    for sha, at in (("a", 1.0), ("b", 2.0)):
        record = update_record("d1", sha, "rejected")
        store.save_update(msgspec.structs.replace(record, at=at, reason=sha))
    assert store.rejections_in_a_row() == {"d1": ["b"]}


def test_lifting_forgives_what_was_rejected_before(store):
    store.create_run(RunRecord(run="run1", federation="f", settings_digest="x", created_at=1.0))
    play_updates(store, ["rejected", "rejected"])
    store.quarantine(quarantine_record("d1", since=2.5))
    assert store.lift("d1", now=3.5)
    assert store.rejections_in_a_row() == {}
    play_updates(store, ["rejected"], first=4)
    assert store.rejections_in_a_row() == {"d1": ["reason 4"]}


def test_a_device_is_in_quarantine_once_and_until_it_is_lifted(store, tmp_path):
    assert store.quarantine(quarantine_record("d1"))
    assert not store.quarantine(quarantine_record("d1", since=2.0))
    store.quarantine(quarantine_record("b", since=2.0))
    store.close()
    again = Store(tmp_path)
    assert again.quarantined() == [quarantine_record("b", since=2.0), quarantine_record("d1")]
    assert again.lift("d1", now=3.0)
    assert not again.lift("d1", now=4.0)
    assert again.quarantine(quarantine_record("d1", since=5.0))
    assert [record.since for record in again.quarantined()] == [2.0, 5.0]
    again.close()


def test_the_quarantine_can_be_changed_beside_the_owner(store, tmp_path):
    beside = Store(tmp_path, shared=True)
    beside.quarantine(quarantine_record("d1"))
    assert [record.device for record in store.quarantined()] == ["d1"]
    assert beside.lift("d1", now=2.0)
    assert store.quarantined() == []
    beside.close()
    with pytest.raises(FederationError, match="another coordinator"):  # closing the shared one freed no lock
        Store(tmp_path)


def test_a_shared_store_is_not_made(tmp_path):
    with pytest.raises(FederationError, match="has no store yet"):
        Store(tmp_path, shared=True)
    assert list(tmp_path.iterdir()) == []


def test_the_bases_of_deltas_are_of_the_last_closed_round_that_used_the_variant(store):
    store.create_run(RunRecord(run="run1", federation="f", settings_digest="x", created_at=1.0))

    def play(number, attempt, phase, **weights):
        """A round in which device `d<variant>` got weights with this letter."""
        key = RoundKey(run="run1", number=number, attempt=attempt)
        given = [
            msgspec.structs.replace(
                assignment(f"d{letter}{number}", key), variant=variant, weights=WeightsRef(blob=ref(letter))
            )
            for variant, letter in weights.items()
        ]
        store.plan_round(RoundRecord(key=key, phase=phase, started_at=2.0), given)

    assert store.bases("run1") == {}
    play(1, 1, "failed", whole="9")
    assert store.bases("run1") == {}
    play(1, 2, "closed", whole="a", half="b")
    play(2, 1, "closed", whole="c")
    play(3, 1, "failed", whole="d", half="e")
    play(3, 2, "collecting", whole="f", third="0")
    assert {variant: weights.blob for variant, weights in store.bases("run1").items()} == {
        "whole": ref("c"),
        "half": ref("b"),
    }
    assert store.bases("another") == {}
