"""The device's state machine: idempotent, resumable, and closed to what makes no sense."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.agent import session_words as s
from reft_edge.agent.admission import weights_parts
from reft_edge.agent.session import MAX_ATTEMPTS, Session
from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.compensation_names import EF21Options
from reft_edge.wire.messages import (
    Accepted,
    Done,
    Failed,
    Measured,
    Refused,
    Task,
    TrainingPlan,
    UpdateManifest,
    WeightsDelta,
    WeightsRef,
)


def ref(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size_bytes=number)


def task(name: str = "t1", round_: int = 1) -> Task:
    return Task(
        task=name,
        round=round_,
        run="r",
        bundle=ref(1),
        weights=WeightsRef(blob=ref(100 + round_)),
        plan=TrainingPlan(local_epochs=1, batch_size=2, learning_rate=0.1, seed=0),
        deadline=0.0,
    )


PARTS = (ref(2), ref(3))


def update_of(name: str) -> BlobRef:
    return ref(1000 + sum(name.encode()))


def finished(name: str = "t1") -> s.TrainingFinished:
    return s.TrainingFinished(
        task=name,
        update=UpdateManifest(blob=update_of(name), codec=Int8(), training_samples=5),
        measured=Measured(download_s=0, start_s=1, training_s=2, steps=3, peak_memory_bytes=4),
        residual=s.Residual(name=f"{name}.zst", key="k"),
    )


def fed(*events: s.SessionEvent) -> Session:
    session = Session()
    for now, event in enumerate(events):
        session.handle(event, float(now))
    return session


ARRIVED = s.TaskArrived(task=task())
READING = (ARRIVED,)
FETCHING = (*READING, s.BlobFetched(sha256=ref(1).sha256), s.ManifestAccepted(parts=PARTS))
TRAINING = (*FETCHING, *(s.BlobFetched(sha256=part.sha256) for part in PARTS))
UPLOADING = (*TRAINING, finished())
DELIVERED = (*UPLOADING, s.BlobDelivered(sha256=update_of("t1").sha256))
REFUSED = (*READING, s.ManifestRefused(reason="too large"))
FAILED = (*TRAINING, s.TrainingFailed(task="t1", kind="crashed", reason="died"))
HISTORIES = {
    "idle": (),
    "reading": READING,
    "fetching": FETCHING,
    "training": TRAINING,
    "uploading": UPLOADING,
    "delivered": DELIVERED,
    "refused": REFUSED,
    "failed": FAILED,
}


def reports(actions: s.Actions) -> list[object]:
    return [action.report for action in actions if isinstance(action, s.Say)]


def test_a_task_goes_from_manifest_to_receipt() -> None:
    session = Session()
    actions = [action for now, event in enumerate(DELIVERED) for action in session.handle(event, float(now))]
    assert [a.ref for a in actions if isinstance(a, s.Fetch)] == [ref(1), *PARTS]
    assert [a.task for a in actions if isinstance(a, s.StartTraining)] == [task()]
    assert [type(r) for r in reports(tuple(actions))][1:] == [Accepted, Done]
    assert session.state.phase is s.Phase.IDLE
    outcome = session.state.outcome
    assert isinstance(outcome, Done)
    assert outcome.measured.download_s == 4.0  # from the task at 0 to the last part at 4
    assert update_of("t1").sha256 in session.needed_blobs()


@pytest.mark.parametrize("name", HISTORIES)
def test_the_same_task_again_starts_nothing_and_is_answered_with_where_we_are(name: str) -> None:
    session = fed(*HISTORIES[name])
    before = session.state
    if name == "idle":
        return
    actions = session.handle(ARRIVED, 9.0)
    assert session.state == before
    assert all(isinstance(action, s.Say) for action in actions)
    expected = {
        "fetching": Accepted,
        "training": Accepted,
        "uploading": Done,
        "delivered": Done,
        "refused": Refused,
        "failed": Failed,
    }
    assert [type(r) for r in reports(actions)] == ([expected[name]] if name in expected else [])


@pytest.mark.parametrize("name", HISTORIES)
def test_another_task_replaces_the_present_one(name: str) -> None:
    session = fed(*HISTORIES[name])
    residual = session.state.residual
    actions = session.handle(s.TaskArrived(task=task("t2", 2)), 9.0)
    assert session.state.phase is s.Phase.READING
    assert session.state.residual == residual
    assert update_of("t1").sha256 not in session.needed_blobs()
    assert any(isinstance(action, s.StopTraining) for action in actions) == (name == "training")
    assert not reports(session.handle(finished("t1"), 10.0))


@pytest.mark.parametrize("name", HISTORIES)
def test_a_closed_run_leaves_nothing(name: str) -> None:
    session = fed(*HISTORIES[name])
    actions = session.handle(s.RunClosed(), 9.0)
    assert session.state == s.SessionState()
    assert session.needed_blobs() == frozenset()
    assert {s.ReleaseWorker, s.Sweep} <= {type(action) for action in actions}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("update_is_here", [True, False])
def test_a_restart_goes_on_from_the_written_state(name: str, update_is_here: bool) -> None:
    written = msgspec.json.encode(fed(*HISTORIES[name]).state)
    session = Session(msgspec.json.decode(written, type=s.SessionState))
    actions = session.resume(update_is_here=update_is_here, now=50.0)
    again = name in ("reading", "fetching", "training") or (name == "uploading" and not update_is_here)
    assert [a.ref for a in actions if isinstance(a, s.Fetch)] == ([ref(1)] if again else [])
    if name == "uploading" and update_is_here:
        assert [type(r) for r in reports(session.handle(s.LinkUp(), 51.0))] == [Done]
        assert [type(r) for r in reports(session.handle(s.ReminderDue(), 52.0))] == [Done]


def test_a_task_that_takes_the_agent_down_each_time_is_given_up() -> None:
    state = s.SessionState()
    for _ in range(MAX_ATTEMPTS):
        session = Session(state)
        session.handle(ARRIVED, 0.0) if state.task is None else session.resume(update_is_here=False, now=0.0)
        for event in TRAINING[1:]:
            session.handle(event, 0.0)
        state = session.state
    actions = Session(state).resume(update_is_here=False, now=0.0)
    assert [r.kind for r in reports(actions) if isinstance(r, Failed)] == ["crashed"]
    stopped = Session(state)
    stopped.note_clean_stop()
    assert not reports(stopped.resume(update_is_here=False, now=0.0))[1:]


@pytest.mark.parametrize(
    ("history", "event"),
    [
        (READING, s.BlobLost(sha256=ref(1).sha256, reason="gone")),
        (FETCHING, s.BlobLost(sha256=ref(3).sha256, reason="gone")),
    ],
)
def test_a_blob_that_is_gone_fails_the_task(history: tuple[s.SessionEvent, ...], event: s.BlobLost) -> None:
    session = fed(*history)
    assert not session.handle(s.BlobLost(sha256=ref(77).sha256, reason="another"), 5.0)
    (failed,) = reports(session.handle(event, 6.0))
    assert isinstance(failed, Failed)
    assert failed.kind == "bundle"


@pytest.mark.parametrize("whole", [False, True])
def test_a_disk_without_room_is_no_fault_of_the_bundle(whole: bool) -> None:
    """Nor are whole weights asked for where a delta had no room."""
    session = fed(*BY_DELTA, *([s.BlobLost(sha256=DELTA.sha256, reason="gone")] if whole else []))
    lost = WHOLE if whole else DELTA
    actions = session.handle(s.BlobLost(sha256=lost.sha256, reason="no room for a blob of 9 bytes", no_room=True), 6.0)
    assert reports(actions) == [Failed(task="t1", kind="storage", reason="no room for a blob of 9 bytes")]
    assert not fetches(actions)


def test_an_impossible_event_raises_and_changes_nothing() -> None:
    for history in (HISTORIES["idle"], TRAINING, UPLOADING):
        session = fed(*history)
        before = session.state
        with pytest.raises(LocalProtocolError):
            session.handle(s.ManifestAccepted(parts=PARTS), 0.0)
        assert session.state is before


BASE, DELTA = ref(100), ref(500)
CHANGED = msgspec.structs.replace(
    task(),
    delta=WeightsDelta(blob=DELTA, codec=Int8(), base=BASE.sha256, values="0" * 64, broadcast=False),
    broadcast=True,
)
BY_DELTA = (
    s.TaskArrived(task=CHANGED),
    s.BlobFetched(sha256=ref(1).sha256),
    s.ManifestAccepted(parts=(*PARTS, DELTA)),
)
DELTA_HERE = (*BY_DELTA, *(s.BlobFetched(sha256=part.sha256) for part in (*PARTS, DELTA)))
WHOLE = CHANGED.weights.blob


def fetches(actions: s.Actions) -> list[tuple[BlobRef, bool]]:
    return [(action.ref, action.broadcast) for action in actions if isinstance(action, s.Fetch)]


def test_the_base_of_a_delta_is_kept_until_training_has_ended_and_the_weights_until_the_next_task() -> None:
    session = fed(*DELTA_HERE)
    assert {BASE.sha256, WHOLE.sha256, DELTA.sha256} <= session.needed_blobs()
    session.handle(finished(), 9.0)
    assert BASE.sha256 not in session.needed_blobs()
    assert WHOLE.sha256 in session.needed_blobs()
    following = msgspec.structs.replace(
        task("t2", 2), delta=WeightsDelta(blob=ref(600), codec=Int8(), base=WHOLE.sha256, values="1" * 64)
    )
    session.handle(s.TaskArrived(task=following), 10.0)
    assert WHOLE.sha256 in session.needed_blobs()
    session.handle(s.TaskArrived(task=task("t3", 3)), 11.0)  # without a delta nothing is kept for one
    assert WHOLE.sha256 not in session.needed_blobs()


def test_what_is_for_few_devices_is_not_looked_for_at_the_broker() -> None:
    session = fed(*BY_DELTA[:2])
    assert fetches(session.handle(BY_DELTA[2], 2.0)) == [*((part, True) for part in PARTS), (DELTA, False)]
    lost = session.handle(s.BlobLost(sha256=DELTA.sha256, reason="gone"), 3.0)
    assert fetches(lost) == [(WHOLE, True)]


@pytest.mark.parametrize("history", [BY_DELTA, DELTA_HERE[:-1]])
def test_a_delta_that_is_gone_costs_no_more_than_the_whole_weights(history: tuple[s.SessionEvent, ...]) -> None:
    session = fed(*history)
    actions = session.handle(s.BlobLost(sha256=DELTA.sha256, reason="gone"), 5.0)
    assert not reports(actions)
    assert [ref for ref, _ in fetches(actions)] == [WHOLE]
    assert not {BASE.sha256, DELTA.sha256} & session.needed_blobs()
    for sha256 in session.state.missing:
        actions = session.handle(s.BlobFetched(sha256=sha256), 6.0)
    assert [type(action) for action in actions] == [s.StartTraining]


def test_weights_that_cannot_be_put_together_are_fetched_whole_once_and_count_as_no_attempt() -> None:
    session = fed(*DELTA_HERE)
    assert session.state.attempts == 1
    useless = s.DeltaUseless(task="t1", reason="not what the coordinator has")
    assert not session.handle(s.DeltaUseless(task="t0", reason="of another task"), 7.0)
    actions = session.handle(useless, 7.0)
    assert [ref for ref, _ in fetches(actions)] == [WHOLE]
    assert (session.state.phase, session.state.attempts) == (s.Phase.FETCHING, 0)
    assert BASE.sha256 not in session.needed_blobs()

    written = msgspec.json.encode(session.state)  # a restart does not try the delta again
    again = Session(msgspec.json.decode(written, type=s.SessionState))
    again.resume(update_is_here=False, now=8.0)
    (read,) = again.handle(s.BlobFetched(sha256=ref(1).sha256, was_here=True), 9.0)
    assert read == s.ReadManifest(task=CHANGED, whole=True)

    (start,) = session.handle(s.BlobFetched(sha256=WHOLE.sha256), 9.0)
    assert isinstance(start, s.StartTraining)
    before = session.state
    session.handle(finished(), 11.0)
    assert session.state.phase is s.Phase.UPLOADING
    session.handle(s.TaskArrived(task=task("t2", 2)), 12.0)
    assert not session.state.whole
    # Whole weights that vanish as well end the task: it does not go in circles, and nobody waits for ever.
    (failed,) = reports(Session(before).handle(useless, 10.0))
    assert isinstance(failed, Failed)
    assert failed.kind == "bundle"


def test_whole_weights_that_are_gone_fail_the_task_although_a_delta_was_tried() -> None:
    session = fed(*DELTA_HERE, s.DeltaUseless(task="t1", reason="no base"))
    (failed,) = reports(session.handle(s.BlobLost(sha256=WHOLE.sha256, reason="gone"), 8.0))
    assert isinstance(failed, Failed)


def test_what_was_fetched_is_told_and_what_was_here_is_not() -> None:
    here = s.BlobFetched(sha256=PARTS[0].sha256, was_here=True)
    session = fed(*BY_DELTA, here, *(s.BlobFetched(sha256=part.sha256) for part in (PARTS[1], DELTA)))
    session.handle(finished(), 9.0)
    outcome = session.state.outcome
    assert isinstance(outcome, Done)
    assert outcome.measured.down_bytes == ref(1).size_bytes + PARTS[1].size_bytes + DELTA.size_bytes


def shared(name: str, round_: int, memory: str | None) -> s.TaskArrived:
    """A task whose compensation has a memory on both sides; `memory` is the update that it names."""
    plan = msgspec.structs.replace(task().plan, compensation=EF21Options())
    return s.TaskArrived(task=msgspec.structs.replace(task(name, round_), plan=plan, memory=memory))


def trained(session: Session, arrived: s.TaskArrived) -> s.Residual | None:
    """Bring a session to the end of a training; what the worker was told to go on from."""
    for event in (arrived, *TRAINING[1:]):
        actions = session.handle(event, 0.0)
    (start,) = (action for action in actions if isinstance(action, s.StartTraining))
    name = arrived.task.task
    left = s.Residual(name=f"{name}.zst", key="k", update=update_of(name).sha256)
    session.handle(replace(finished(name), residual=left), 1.0)
    return start.residual


def test_a_shared_memory_goes_on_from_what_the_coordinator_names_and_from_nothing_else() -> None:
    one, two = update_of("t1").sha256, update_of("t22").sha256
    session = Session()
    assert trained(session, shared("t1", 1, None)) is None
    first = session.state.residual
    assert first is not None
    assert trained(session, shared("t22", 2, one)) == first
    # The second update was late: the coordinator still remembers the first, and so does the device.
    assert session.needed_residuals() == {"t1.zst", "t22.zst"}
    assert trained(session, shared("t333", 3, one)) == first
    assert session.needed_residuals() == {"t1.zst", "t333.zst"}
    # What it does not remember, or the coordinator does not, is nothing.
    assert trained(session, shared("t4444", 4, two)) is None
    assert session.needed_residuals() == {"t4444.zst"}
    assert trained(session, shared("t55555", 5, None)) is None
    session.handle(s.RunClosed(), 9.0)
    assert session.needed_residuals() == frozenset()


def test_training_again_after_the_update_was_lost_goes_on_from_the_same() -> None:
    session = Session()
    trained(session, shared("t1", 1, None))
    first = session.state.residual
    arrived = shared("t22", 2, update_of("t1").sha256)
    trained(session, arrived)
    again = Session(msgspec.json.decode(msgspec.json.encode(session.state), type=s.SessionState))
    again.resume(update_is_here=False, now=5.0)
    for event in TRAINING[1:]:
        actions = again.handle(event, 6.0)
    assert actions == (s.StartTraining(task=arrived.task, residual=first),)


class Device:
    """Carries out a session's actions at once, and can be killed between any two events."""

    def __init__(self) -> None:
        self.session = Session()
        self.queue: deque[s.SessionEvent] = deque()
        self.done: list[Done] = []
        self.failed = False
        self.trainings_cut = 0

    def feed(self, event: s.SessionEvent) -> None:
        self.apply(self.session.handle(event, 0.0))

    def apply(self, actions: s.Actions) -> None:
        for action in actions:
            match action:
                case s.Fetch(ref=wanted):
                    self.queue.append(s.BlobFetched(sha256=wanted.sha256))
                case s.ReadManifest():
                    self.queue.append(s.ManifestAccepted(parts=PARTS))
                case s.StartTraining(task=started):
                    self.queue.append(finished(started.task))
                case s.Say(report=Done() as done):
                    self.done.append(done)
                case s.Say(report=Failed()):
                    self.failed = True

    def work(self) -> None:
        if self.queue:
            self.feed(self.queue.popleft())

    def kill(self) -> None:
        self.trainings_cut += self.session.state.phase is s.Phase.TRAINING
        written = msgspec.json.encode(self.session.state)
        self.queue.clear()
        self.session = Session(msgspec.json.decode(written, type=s.SessionState))
        self.apply(self.session.resume(update_is_here=True, now=0.0))


@given(st.lists(st.sampled_from(["work", "work", "kill", "task", "link", "remind"]), max_size=40))
def test_whatever_is_killed_or_repeated_a_task_ends_in_one_update(steps: list[str]) -> None:
    device = Device()
    moves: dict[str, Callable[[], None]] = {
        "work": device.work,
        "kill": device.kill,
        "task": lambda: device.feed(ARRIVED),
        "link": lambda: device.feed(s.LinkUp()),
        "remind": lambda: device.feed(s.ReminderDue()),
    }
    device.feed(ARRIVED)
    for step in steps:
        moves[step]()
    while device.queue:
        device.work()
    if device.trainings_cut >= MAX_ATTEMPTS:
        assert device.failed or device.done
    else:
        assert device.session.state.phase is s.Phase.UPLOADING
        assert {done.update.blob for done in device.done} == {update_of("t1")}


def with_delta(number: int) -> Task:
    """The task of a round whose weights follow from those of the round before."""
    base = WeightsDelta(blob=ref(700 + number), codec=Int8(), base=ref(100 + number - 1).sha256, values="0" * 64)
    return msgspec.structs.replace(task(f"t{number}", number), delta=base if number > 1 else None)


class Forgetful(Device):
    """A device with a spool that may lose anything, at a coordinator that may have lost a delta."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[str] = set()
        self.gone: set[str] = set()

    def apply(self, actions: s.Actions) -> None:
        for action in actions:
            match action:
                case s.Sweep():
                    self.held &= self.session.needed_blobs()
                case s.Fetch(ref=wanted) if wanted.sha256 in self.gone and wanted.sha256 not in self.held:
                    self.queue.append(s.BlobLost(sha256=wanted.sha256, reason="gone"))
                case s.Fetch(ref=wanted):
                    if not any(isinstance(e, s.BlobFetched) and e.sha256 == wanted.sha256 for e in self.queue):
                        self.queue.append(s.BlobFetched(sha256=wanted.sha256, was_here=wanted.sha256 in self.held))
                    self.held.add(wanted.sha256)
                case s.ReadManifest(task=read, whole=whole):
                    parts = weights_parts(read, self.held.__contains__, whole=whole)
                    self.queue.appendleft(s.ManifestAccepted(parts=(*PARTS, *parts)))
                case s.StartTraining(task=started):
                    self.queue.append(self.train(started))
                case _:
                    super().apply((action,))

    def train(self, started: Task) -> s.SessionEvent:
        weights, delta = started.weights.blob.sha256, started.delta
        if weights not in self.held:
            if delta is None:
                return s.TrainingFailed(task=started.task, kind="bundle", reason="the weights are not here")
            if not {delta.base, delta.blob.sha256} <= self.held:
                return s.DeltaUseless(task=started.task, reason="something is not here")
            self.held.add(weights)
        return finished(started.task)

    def lose(self) -> None:
        """Weights and deltas vanish from the spool."""
        self.held -= {ref(100 + number).sha256 for number in range(4)} | {ref(702).sha256, ref(703).sha256}


@given(st.lists(st.sampled_from(["work", "work", "work", "kill", "next", "again", "lose", "gone"]), max_size=60))
def test_whatever_a_delta_misses_each_task_ends_and_most_in_an_update(steps: list[str]) -> None:
    device = Forgetful()
    number = 1
    device.feed(s.TaskArrived(task=with_delta(number)))
    for step in steps:
        match step:
            case "next" if number < 3:
                number += 1
                device.trainings_cut = 0
                device.feed(s.TaskArrived(task=with_delta(number)))
            case "again" | "next":
                device.feed(s.TaskArrived(task=with_delta(number)))
            case "gone":
                device.gone = {ref(702).sha256, ref(703).sha256}
            case "work" | "kill" | "lose":
                {"work": device.work, "kill": device.kill, "lose": device.lose}[step]()
    for _ in range(50):
        device.work()
    assert not device.queue, "it goes in circles"
    assert device.session.state.phase in (s.Phase.UPLOADING, s.Phase.IDLE), "nobody waits for ever"
    if device.trainings_cut < MAX_ATTEMPTS and "lose" not in steps:
        assert device.session.state.phase is s.Phase.UPLOADING
        assert device.done[-1].task == f"t{number}"
