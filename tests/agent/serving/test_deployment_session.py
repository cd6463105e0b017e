"""The state machine of deployments: idempotent, resumable, undone exactly, and closed to what makes no sense."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.agent.serving import deployment_words as w
from reft_edge.agent.serving.deployment_session import MAX_ATTEMPTS, DeploymentSession
from reft_edge.agent.session_words import BlobFetched, BlobLost, Fetch, Mark, Sweep
from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.deployment import Attempt, Deploy, Health, ModelFile, Rollback

HEALTH = (
    Health(precision="int8", latency_p50_s=0.001, latency_p95_s=0.002, latency_p99_s=0.003, peak_memory_bytes=2**25),
)


def ref(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size_bytes=number)


def deploy(name: str = "d1", model: str = "global", blobs: Sequence[int] = (1, 2)) -> Deploy:
    first, *rest = blobs
    files = [ModelFile(blob=ref(first), size_bytes=10, precision="float32")]
    files += [ModelFile(blob=ref(number), size_bytes=5, precision="int8") for number in rest]
    return Deploy(deployment=name, version=f"v-{name}", model=model, files=tuple(files), broadcast=True)


def arrived(offer: Deploy, **other: object) -> w.DeployArrived:
    return w.DeployArrived(deploy=offer, **other)  # type: ignore[arg-type]


def undo(name: str = "d1") -> w.RollbackArrived:
    return w.RollbackArrived(rollback=Rollback(deployment=name, reason="for a reason"))


def passed(offer: Deploy) -> w.CheckPassed:
    return w.CheckPassed(deployment=offer.deployment, model=offer.model, health=HEALTH)


def not_passed(offer: Deploy, **other: object) -> w.CheckNotPassed:
    about: dict[str, object] = {"refused": True, "kind": "accuracy", "reason": "too low", **other}
    return w.CheckNotPassed(deployment=offer.deployment, model=offer.model, **about)  # type: ignore[arg-type]


def kinds(actions: w.DeploymentActions) -> list[type]:
    return [type(action) for action in actions]


def session_in(stage: w.Stage, offer: Deploy | None = None) -> DeploymentSession:
    """A session that has come to `stage` with one deployment; SETTLED: which serves."""
    offer = offer or deploy()
    session = DeploymentSession()
    events: list[w.DeploymentEvent] = [arrived(offer)]
    if stage is not w.Stage.FETCHING:
        events += [BlobFetched(sha256=file.blob.sha256) for file in offer.files]
    if stage in (w.Stage.SWITCHING, w.Stage.SETTLED, w.Stage.RETURNING):
        events += [w.CheckBegan(), passed(offer)]
    if stage in (w.Stage.SETTLED, w.Stage.RETURNING):
        events.append(w.Switched())
    if stage is w.Stage.RETURNING:
        events.append(undo(offer.deployment))
    for event in events:
        session.handle(event)
    assert session.state.stage is stage
    return session


def end_of(session: DeploymentSession) -> Attempt:
    assert session.state.stage is w.Stage.SETTLED
    assert session.state.attempt is not None
    return session.state.attempt


def test_a_model_is_fetched_checked_switched_to_and_told_of() -> None:
    session, offer = DeploymentSession(), deploy()
    actions = session.handle(arrived(offer))
    assert actions == (Sweep(), Fetch(ref=ref(1), broadcast=True), Fetch(ref=ref(2), broadcast=True))
    assert session.needed_blobs() == {ref(1).sha256, ref(2).sha256}
    assert session.handle(BlobFetched(sha256=ref(1).sha256)) == ()
    assert session.handle(BlobFetched(sha256=ref(1).sha256)) == ()
    assert session.handle(BlobFetched(sha256=ref(7).sha256)) == ()
    assert session.state.attempt == Attempt(deployment="d1", model="global", state="fetching")
    assert session.handle(BlobFetched(sha256=ref(2).sha256)) == (w.StartCheck(deploy=offer),)
    assert session.state.attempt == Attempt(deployment="d1", model="global", state="checking")
    session.handle(w.CheckBegan())
    assert session.handle(passed(offer)) == (w.Switch(deploy=offer),)
    assert session.handle(w.Switched()) == (Sweep(),)
    assert end_of(session) == Attempt(deployment="d1", model="global", state="serving", health=HEALTH)
    assert session.needed_blobs() == frozenset()


@pytest.mark.parametrize("stage", w.Stage)
def test_the_same_offer_again_changes_nothing_and_is_answered(stage: w.Stage) -> None:
    session = session_in(stage)
    before = session.state
    assert session.handle(arrived(deploy())) == (w.Tell(),)
    assert session.state == before


def test_a_refusal_and_a_failure_are_remembered_and_repeated() -> None:
    for refused, state in [(True, "refused"), (False, "failed")]:
        session = session_in(w.Stage.CHECKING)
        assert session.handle(not_passed(deploy(), refused=refused, health=HEALTH)) == (Sweep(),)
        assert end_of(session) == Attempt(
            deployment="d1", model="global", state=state, kind="accuracy", reason="too low", health=HEALTH
        )
        assert session.handle(arrived(deploy())) == (w.Tell(),)
        # The next smaller model of the same deployment is another offer.
        assert kinds(session.handle(arrived(deploy(model="small", blobs=(5,))))) == [Sweep, Fetch]


@pytest.mark.parametrize("stage", w.Stage)
def test_a_newer_deployment_replaces_any_other_at_any_moment(stage: w.Stage) -> None:
    session = session_in(stage)
    actions = session.handle(arrived(deploy("d2", blobs=(2, 3))))
    first = {w.Stage.CHECKING: [w.StopCheck], w.Stage.RETURNING: [w.Return]}.get(stage, [])
    assert kinds(actions) == [*first, Sweep, Fetch, Fetch]
    assert session.needed_blobs() == {ref(2).sha256, ref(3).sha256}
    # What is left of the first has no say any more.
    session.handle(BlobFetched(sha256=ref(1).sha256))
    session.handle(BlobFetched(sha256=ref(2).sha256))
    session.handle(BlobFetched(sha256=ref(3).sha256))
    for event in (passed(deploy()), not_passed(deploy()), w.FilesDamaged(deployment="d1", model="global", reason="")):
        assert session.handle(event) == ()
    assert session.state.stage is w.Stage.CHECKING


@pytest.mark.parametrize("stage", w.Stage)
def test_a_roll_back_undoes_its_deployment_wherever_that_is(stage: w.Stage) -> None:
    session = session_in(stage)
    actions = session.handle(undo())
    assert actions[-1] == w.Return(deployment="d1")
    assert (w.StopCheck() in actions) == (stage is w.Stage.CHECKING)
    assert session.needed_blobs() == frozenset()
    assert session.handle(w.Returned()) == (Sweep(),)
    attempt = end_of(session)
    assert (attempt.deployment, attempt.state, attempt.reason) == ("d1", "rolled_back", "for a reason")
    assert session.handle(undo()) == (w.Tell(),)
    assert session.handle(arrived(deploy())) == (w.Tell(),)  # an old one, played again
    assert session.handle(arrived(deploy(model="small"))) == (w.Tell(),)


@pytest.mark.parametrize("stage", [w.Stage.FETCHING, w.Stage.CHECKING])
def test_what_serves_is_undone_while_another_is_under_way(stage: w.Stage) -> None:
    session = session_in(stage)
    before = session.state
    assert session.handle(undo("d0")) == (w.Return(deployment="d0"),)
    session.handle(w.Returned())
    assert session.state == before


def test_what_nobody_heard_of_is_said_to_be_undone() -> None:
    session = DeploymentSession()
    assert session.handle(undo("d9")) == (w.Return(deployment="d9"),)
    session.handle(w.Returned())
    assert end_of(session).state == "rolled_back"


def test_a_roll_back_that_the_disk_refuses_is_told_and_tried_again() -> None:
    session = session_in(w.Stage.RETURNING)
    session.handle(w.ReturnRefused(reason="full"))
    attempt = end_of(session)
    assert (attempt.state, attempt.kind, attempt.reason) == ("failed", "storage", "it cannot be undone: full")
    assert session.handle(undo()) == (w.Return(deployment="d1"),)


def test_what_cannot_be_had_or_stored_is_a_failure_and_what_serves_stays() -> None:
    for no_room, kind in [(False, "bundle"), (True, "storage")]:
        session = session_in(w.Stage.FETCHING)
        assert session.handle(BlobLost(sha256=ref(9).sha256, reason="not ours")) == ()
        assert session.handle(BlobLost(sha256=ref(2).sha256, reason="gone", no_room=no_room)) == (Sweep(),)
        assert (end_of(session).state, end_of(session).kind, end_of(session).reason) == ("failed", kind, "gone")
    session = session_in(w.Stage.SWITCHING)
    session.handle(w.SwitchRefused(reason="read-only"))
    assert (end_of(session).state, end_of(session).kind) == ("failed", "storage")


def test_what_is_too_large_is_refused_unfetched_and_what_serves_is_not_fetched() -> None:
    session = session_in(w.Stage.CHECKING)
    assert session.handle(arrived(deploy("d2"), objection="too large")) == (w.StopCheck(), Sweep())
    assert (end_of(session).state, end_of(session).kind, end_of(session).reason) == ("refused", "memory", "too large")
    assert session.handle(arrived(deploy("d3"), serves=True)) == (Sweep(),)
    assert end_of(session) == Attempt(deployment="d3", model="global", state="serving")


@pytest.mark.parametrize("stage", w.Stage)
def test_a_restart_goes_on_where_it_was(stage: w.Stage) -> None:
    killed = session_in(stage)
    kept = msgspec.json.decode(msgspec.json.encode(killed.state), type=w.DeploymentState)
    session = DeploymentSession(kept)
    actions = session.resume()
    expected: dict[w.Stage, list[type]] = {
        w.Stage.SETTLED: [],
        w.Stage.FETCHING: [Sweep, Fetch, Fetch],
        w.Stage.CHECKING: [Sweep, Fetch, Fetch],
        w.Stage.SWITCHING: [w.Switch],
        w.Stage.RETURNING: [w.Return],
    }
    assert kinds(actions) == expected[stage]
    assert session.needed_blobs() == killed.needed_blobs()


def test_what_was_installed_and_is_gone_is_fetched_again() -> None:
    session = session_in(w.Stage.SWITCHING)
    session.resume()
    assert kinds(session.handle(w.NotInstalled())) == [Sweep, Fetch, Fetch]
    assert session.state.attempts == 1


def test_a_model_whose_check_takes_the_device_down_is_given_up() -> None:
    session = session_in(w.Stage.CHECKING)
    for _ in range(MAX_ATTEMPTS):
        session.handle(w.CheckBegan())
        actions = session.resume()
        for file in deploy().files:
            session.handle(BlobFetched(sha256=file.blob.sha256))
    assert actions == (Sweep(),)
    attempt = end_of(session)
    assert (attempt.state, attempt.kind) == ("failed", "crashed")
    assert "begun 3 times" in attempt.reason
    assert session.handle(arrived(deploy())) == (w.Tell(),)


def test_restarts_while_the_check_waits_in_line_and_clean_stops_do_not_count() -> None:
    session = session_in(w.Stage.CHECKING)
    for _ in range(2 * MAX_ATTEMPTS):
        session.handle(w.CheckBegan())
        session.note_clean_stop()
        session.resume()
        for file in deploy().files:
            session.handle(BlobFetched(sha256=file.blob.sha256))
        session.resume()
        for file in deploy().files:
            session.handle(BlobFetched(sha256=file.blob.sha256))
    assert session.state.stage is w.Stage.CHECKING


def test_blobs_that_a_disk_spoils_are_fetched_again_a_few_times() -> None:
    session, damaged = session_in(w.Stage.CHECKING), w.FilesDamaged(deployment="d1", model="global", reason="damaged")
    for _ in range(MAX_ATTEMPTS - 1):
        session.handle(w.CheckBegan())
        assert kinds(session.handle(damaged)) == [Sweep, Fetch, Fetch]
        for file in deploy().files:
            session.handle(BlobFetched(sha256=file.blob.sha256))
    session.handle(w.CheckBegan())
    session.handle(damaged)
    assert (end_of(session).state, end_of(session).kind, end_of(session).reason) == ("failed", "storage", "damaged")


def test_what_serves_and_is_damaged_is_told() -> None:
    session = session_in(w.Stage.SETTLED)
    session.handle(w.ServedDamaged(reason="slot b is damaged"))
    assert (end_of(session).state, end_of(session).reason) == ("failed", "slot b is damaged")
    fetching = session_in(w.Stage.FETCHING)
    before = fetching.state
    fetching.handle(w.ServedDamaged(reason="slot b is damaged"))
    assert fetching.state == before


def test_the_mark_outlives_deployments_and_another_signers_words_are_forgotten() -> None:
    mark = Mark(signer="us", sequence=7)
    session = DeploymentSession()
    session.handle(arrived(deploy(), mark=mark))
    session.handle(w.RollbackArrived(rollback=Rollback(deployment="d1"), mark=Mark(signer="us", sequence=9)))
    session.handle(w.Returned())
    assert session.state.mark == Mark(signer="us", sequence=9)
    session.handle(arrived(deploy("d2")))
    assert session.state.mark == Mark(signer="us", sequence=9)
    assert not session.obey_only("us")
    assert session.obey_only("others")
    assert session.state == w.DeploymentState()


def test_what_makes_no_sense_raises_and_changes_nothing() -> None:
    for stage, event in [
        (w.Stage.SETTLED, w.Switched()),
        (w.Stage.FETCHING, w.CheckBegan()),
        (w.Stage.CHECKING, w.NotInstalled()),
    ]:
        session = session_in(stage)
        before = session.state
        with pytest.raises(LocalProtocolError, match="cannot happen while"):
            session.handle(event)
        assert session.state is before


class World:
    """What the daemon does for a session, in a few lines: slots, transfers and a worker, each at its own pace."""

    def __init__(self) -> None:
        self.session = DeploymentSession()
        self.saved = self.session.state
        self.slots: list[str] = []
        """Deployments that serve or served, the present one last."""
        self.installed = ""
        self.wanted: set[str] = set()
        self.line: deque[Deploy] = deque()
        self.running: Deploy | None = None

    def feed(self, event: w.DeploymentEvent) -> None:
        waiting = deque([event])
        while waiting:
            actions = self.session.handle(waiting.popleft())
            self.saved = self.session.state
            waiting += [answer for action in actions if (answer := self.do(action)) is not None]

    def do(self, action: w.DeploymentAction) -> w.DeploymentEvent | None:
        match action:
            case Sweep():
                self.wanted &= self.session.needed_blobs()
            case Fetch(ref=blob):
                self.wanted.add(blob.sha256)
            case w.StartCheck(deploy=offer):
                self.line.append(offer)
            case w.StopCheck():
                self.line.clear()
                self.running = None
            case w.Switch(deploy=offer):
                if self.slots[-1:] == [offer.deployment]:
                    return w.Switched()
                if self.installed != offer.deployment:
                    return w.NotInstalled()
                self.slots.append(offer.deployment)
                return w.Switched()
            case w.Return(deployment=name):
                while self.slots[-1:] == [name]:
                    self.slots.pop()
                return w.Returned()
        return None

    def restart(self) -> None:
        self.session = DeploymentSession(msgspec.json.decode(msgspec.json.encode(self.saved), type=w.DeploymentState))
        self.wanted.clear()
        self.line.clear()
        self.running = None
        actions = self.session.resume()
        self.saved = self.session.state
        for answer in [self.do(action) for action in actions]:
            if answer is not None:
                self.feed(answer)

    def work(self) -> None:
        """Let what is under way go one step on."""
        if self.wanted:
            self.feed(BlobFetched(sha256=self.wanted.pop()))
        elif self.running is not None:
            offer, self.running = self.running, None
            self.installed = offer.deployment
            self.feed(passed(offer))
        elif self.line:
            self.running = self.line.popleft()
            self.feed(w.CheckBegan())


STEPS = st.one_of(
    st.tuples(st.just("deploy"), st.integers(1, 4)),
    st.tuples(st.just("undo"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["work", "work", "work", "restart"]), st.just(0)),
)


@given(st.lists(STEPS, max_size=40))
def test_in_any_order_of_events_the_last_word_is_obeyed_in_the_end(steps: list[tuple[str, int]]) -> None:
    world = World()
    last: tuple[str, str] | None = None
    undone: set[str] = set()
    for what, number in steps:
        name = f"d{number}"
        if what == "deploy":
            world.feed(arrived(deploy(name, blobs=(number, number + 1)), serves=world.slots[-1:] == [name]))
            last = (what, name)
        elif what == "undo":
            world.feed(undo(name))
            undone.add(name)
            last = (what, name)
        elif what == "restart":
            world.restart()
        else:
            world.work()
    for _ in range(10):
        world.work()
    assert not world.wanted
    assert not world.line
    if last is None:
        assert (world.slots, world.session.state) == ([], w.DeploymentState())
        return
    serving, attempt = world.slots[-1:], end_of(world.session)
    if last[0] == "undo":
        assert serving != [last[1]]
    elif attempt.state == "serving":
        assert serving == [last[1]]
    elif attempt.state == "rolled_back":
        assert last[1] in undone
        assert serving != [last[1]]
    else:
        assert (attempt.deployment, attempt.kind) == (last[1], "crashed")
        assert steps.count(("restart", 0)) >= MAX_ATTEMPTS
