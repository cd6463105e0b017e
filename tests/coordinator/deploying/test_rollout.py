"""The state machine of a deployment: what holds in any order of events, and what each event does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.coordinator.deploying.answers import word_for
from reft_edge.coordinator.deploying.rollout import (
    ENDED,
    MOVES,
    Absent,
    Heard,
    Phase,
    Present,
    Resumed,
    RolloutRules,
    Stopped,
    Tick,
    advance,
    resume_rollout,
    start_rollout,
)
from reft_edge.coordinator.records import DeployedDevice, DeploymentRecord
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.deployment import Attempt, Condition, Health, PredictionCounts, Served

RULES = RolloutRules(soak_s=10, timeout_s=100, max_failed_canaries=0.0, max_failed=0.5, absent_s=20)
STRICT = msgspec.structs.replace(RULES, max_failed=0.0)
NAME = "d-1"
CANARIES, REST = ("c1", "c2"), ("r1", "r2", "r3", "r4")
HEALTH = Health(precision="int8", latency_p50_s=1, latency_p95_s=2, latency_p99_s=3, peak_memory_bytes=4, metric=0.5)


def part(device, wave="rest", **changes):
    return DeployedDevice(deployment=NAME, device=device, model="large", smaller="small", wave=wave, **changes)


def parts():
    return [*(part(name, "canary") for name in CANARIES), *(part(name) for name in REST)]


def begin(rules=RULES, online=(*CANARIES, *REST), now=0.0):
    return start_rollout(parts(), online=online, rules=rules, now=now)


def served(deployment=NAME, model="large"):
    return Served(deployment=deployment, version="v", model=model, precision="int8", sha256="0" * 64)


def serves(device, now, *, model="large", errors=0):
    attempt = Attempt(deployment=NAME, model=model, state="serving", health=(HEALTH,))
    counts = PredictionCounts(version="v", errors=errors)
    return heard(device, now, serving=served(model=model), attempt=attempt, counts=counts)


def tries(device, now, state, *, model="large", **details):
    return heard(device, now, attempt=Attempt(deployment=NAME, model=model, state=state, **details))


def heard(device, now, **told):
    return Heard(device=device, now=now, condition=Condition(**told))


def play(state, *happened):
    for event in happened:
        state = advance(state, event)
    return state


def soaked(rules=RULES):
    """Everybody of the rest is asked at 10."""
    return play(begin(rules), *(serves(name, 0) for name in CANARIES), Tick(now=10))


def states(state, names=(*CANARIES, *REST)):
    return [state.parts[name].state for name in names]


# What holds whatever happens.

conditions = st.builds(
    Condition,
    serving=st.sampled_from([None, served(), served(model="small"), served("older")]),
    attempt=st.none()
    | st.builds(
        Attempt,
        deployment=st.sampled_from([NAME, "older"]),
        model=st.sampled_from(["", "large", "small"]),
        state=st.sampled_from(["fetching", "checking", "serving", "refused", "failed", "rolled_back"]),
        kind=st.sampled_from(["", "accuracy", "latency", "memory", "crashed"]),
    ),
    counts=st.none() | st.builds(PredictionCounts, version=st.just("v"), errors=st.integers(0, 1)),
)
devices = st.sampled_from([*CANARIES, *REST, "stranger"])
kinds = st.one_of(
    st.builds(lambda device, told: ("heard", device, told), devices, conditions),
    st.builds(lambda device: ("absent", device, None), devices),
    st.builds(lambda device: ("present", device, None), devices),
    st.just(("tick", "", None)),
)
happenings = st.lists(st.tuples(kinds, st.floats(0, 40)), max_size=40)


def events_of(happened):
    now = 0.0
    for (kind, device, told), later in happened:
        now += later
        match kind:
            case "heard":
                yield Heard(device=device, now=now, condition=told)
            case "absent":
                yield Absent(device=device, now=now)
            case "present":
                yield Present(device=device, now=now)
            case _:
                yield Tick(now=now)


@given(happened=happenings)
def test_nobody_of_the_rest_is_asked_before_all_canaries_have_served(happened):
    state, have_served = begin(), set()
    for event in events_of(happened):
        state = advance(state, event)
        have_served |= {name for name in CANARIES if state.parts[name].state == "serving"}
        if any(state.parts[name].asked_at is not None for name in REST):
            assert have_served == set(CANARIES)


@given(happened=happenings)
def test_who_was_asked_is_told_to_go_back_when_it_is_rolled_back_and_nobody_else(happened):
    state, asked = begin(STRICT), set(CANARIES)
    for event in events_of(happened):
        before, state = state, advance(state, event)
        asked |= {name for name, one in state.parts.items() if one.asked_at is not None}
        assert state.phase is before.phase or state.phase in MOVES[before.phase] or before.phase not in ENDED
        words = {name: word_for(one) for name, one in state.parts.items()}
        back = state.phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK)
        assert words == {name: ("rollback" if back else "deploy") if name in asked else None for name in words}
        assert not back or state.reason


@given(happened=happenings, online=st.lists(st.sampled_from(REST), unique=True))
def test_it_always_ends_and_then_nobody_is_waited_for(happened, online):
    state, now = begin(online=(*CANARIES, *online)), 0.0
    for event in events_of(happened):
        state, now = advance(state, event), event.now
    for _ in range(50):
        if (due := state.next_deadline) is None:
            break
        now = max(now, due)
        state = advance(state, Tick(now=now))
    assert state.phase in ENDED
    assert not state.pending
    assert now <= 40 * 40 + 5 * (RULES.soak_s + RULES.timeout_s)


@given(happened=happenings)
def test_what_is_done_is_served_by_all_but_those_that_are_named_with_a_reason(happened):
    state = begin()
    for event in events_of(happened):
        state = advance(state, event)
        if state.phase is Phase.DONE:
            break
    if state.phase is Phase.DONE:
        for one in state.parts.values():
            assert one.state == "serving" or one.state in ("refused", "failed", "late", "away")
            assert one.state in ("serving", "refused", "failed") or one.reason


@given(happened=happenings, cut=st.integers(0, 40))
def test_a_process_that_comes_back_goes_on_with_the_same_devices_and_words(happened, cut):
    state, now = begin(), 0.0
    for event in list(events_of(happened))[:cut]:
        state, now = advance(state, event), event.now
    record = DeploymentRecord(
        deployment=NAME, federation="f", version="v", state=state.phase.value, started_at=0, since=state.since
    )
    again = resume_rollout(
        record, state.parts.values(), online=state.parts.keys() - state.absent_since.keys(), rules=RULES, now=now
    )
    again = advance(again, Resumed(now=now))
    if state.phase in (Phase.DONE, Phase.ROLLING_BACK, Phase.ROLLED_BACK):
        assert again.phase in (state.phase, Phase.ROLLED_BACK)
        assert {n: word_for(p) for n, p in again.parts.items()} == {n: word_for(p) for n, p in state.parts.items()}
    asked = {name for name, one in state.parts.items() if one.asked_at is not None}
    assert asked <= {name for name, one in again.parts.items() if one.asked_at is not None}


# One event at a time.


def test_the_rest_is_asked_when_the_canaries_have_soaked():
    state = begin()
    assert states(state) == ["asked"] * 2 + ["waiting"] * 4
    state = play(state, serves("c1", 1), serves("c2", 2))
    assert (state.phase, state.next_deadline) == (Phase.SOAKING, 12)
    assert advance(state, Tick(now=11.9)).phase is Phase.SOAKING
    state = advance(state, Tick(now=12))
    assert state.phase is Phase.ROLLING_OUT
    assert states(state, REST) == ["asked"] * 4
    state = play(state, *(serves(name, 13) for name in REST))
    assert (state.phase, state.since) == (Phase.DONE, 13)
    assert {one.precision for one in state.parts.values()} == {"int8"}
    assert {one.measured for one in state.parts.values()} == {HEALTH}


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (tries("c1", 3, "refused", kind="accuracy", reason="accuracy 10%"), "c1: accuracy 10%"),
        (tries("c1", 3, "failed", kind="crashed"), "c1: crashed"),
        (tries("c1", 3, "rolled_back"), "c1: it went back by itself"),
        (serves("c1", 3, errors=2), "c1: it counted 2 errors"),
        (Tick(now=100), "c1: no answer after 100 s"),
    ],
)
def test_a_canary_that_does_not_serve_it_undoes_it(event, words):
    state = play(begin(), serves("c2", 1), event)
    assert state.phase is Phase.ROLLING_BACK
    assert words in state.reason
    assert [word_for(state.parts[name]) for name in ("c1", "c2", "r1")] == ["rollback", "rollback", None]


def test_a_canary_that_errs_is_told_to_go_back_and_waited_for():
    state = play(begin(), serves("c1", 1), serves("c2", 1), serves("c2", 5, errors=1))
    assert state.phase is Phase.ROLLING_BACK
    assert "c2: it counted 1 error " in state.reason
    state = advance(state, heard("c1", 6, serving=served("older")))
    assert (state.phase, states(state, ["c2"])) == (Phase.ROLLING_BACK, ["asked"])
    state = advance(state, heard("c2", 7, serving=served("older")))
    assert (state.phase, states(state, CANARIES)) == (Phase.ROLLED_BACK, ["rolled_back"] * 2)


def test_a_canary_that_turns_back_while_it_is_watched_undoes_it():
    state = play(begin(), serves("c1", 1), serves("c2", 1), heard("c2", 2, serving=served("older")))
    assert state.phase is Phase.ROLLING_BACK
    assert "c2: it went back and serves version v" in state.reason


def test_a_canary_that_goes_away_while_it_is_watched_is_waited_for_and_then_undoes_it():
    state = play(begin(), serves("c1", 0), serves("c2", 0), Absent(device="c2", now=5), Tick(now=50))
    assert state.phase is Phase.SOAKING
    assert advance(state, Present(device="c2", now=60)).phase is Phase.ROLLING_OUT
    state = advance(state, Tick(now=110))
    assert state.phase is Phase.ROLLING_BACK
    assert "c2: it went away" in state.reason


def test_a_canary_that_falls_silent_counts_even_if_it_is_offline():
    state = play(begin(), serves("c1", 0), Absent(device="c2", now=1), Tick(now=99))
    assert state.phase is Phase.CANARY
    assert "c2: it is offline" in advance(state, Tick(now=100)).reason


def test_so_many_canaries_may_fail_as_the_settings_say_but_not_all():
    patient = msgspec.structs.replace(RULES, max_failed_canaries=1.0)
    state = play(begin(patient), tries("c1", 1, "refused"), serves("c2", 2))
    assert state.phase is Phase.SOAKING
    state = play(begin(patient), tries("c1", 1, "refused"), tries("c2", 2, "refused"))
    assert state.phase is Phase.ROLLED_BACK  # at once: neither serves it


def test_too_many_of_the_rest_that_refuse_undo_it_for_everybody():
    state = play(soaked(), serves("r1", 11), tries("r2", 11, "refused"), tries("r3", 11, "failed"))
    assert state.phase is Phase.ROLLING_OUT
    state = advance(state, tries("r4", 12, "refused", kind="accuracy"))
    assert state.phase is Phase.ROLLING_BACK
    assert "3 of 4 devices failed: r2" in state.reason
    assert states(state) == ["asked", "asked", "asked", "refused", "failed", "refused"]


def test_devices_of_the_rest_that_fall_silent_are_not_held_against_it():
    state = play(soaked(STRICT), Absent(device="r1", now=11), *(serves(name, 12) for name in ("r2", "r3")))
    assert states(advance(state, Tick(now=30)), ["r1"]) == ["asked"]
    state = advance(state, Tick(now=31))
    assert states(state, ["r1"]) == ["away"]
    state = advance(state, Tick(now=110))
    assert (state.phase, states(state, ["r4"])) == (Phase.DONE, ["late"])


def test_a_device_that_was_away_is_waited_for_as_soon_as_it_is_there():
    state = begin(online=(*CANARIES, "r1"))
    state = play(state, *(serves(name, 0) for name in CANARIES), Tick(now=10))
    assert states(state, REST) == ["asked", "away", "away", "away"]
    state = play(state, Present(device="r2", now=11), serves("r1", 12))
    assert (state.phase, states(state, ["r2"])) == (Phase.ROLLING_OUT, ["asked"])
    assert advance(state, serves("r2", 13)).phase is Phase.DONE


def test_who_is_late_is_heard_nevertheless():
    state = play(soaked(), *(serves(name, 11) for name in ("r1", "r2")), tries("r3", 11, "checking"))
    state = advance(state, Tick(now=110))
    assert [(state.parts[n].state, state.parts[n].reason) for n in ("r3", "r4")] == [
        ("late", "still checking after 100 s"),
        ("late", "no answer after 100 s"),
    ]
    assert states(advance(state, serves("r3", 120)), ["r3"]) == ["serving"]


def test_a_refusal_for_latency_or_memory_gets_the_smaller_model_once():
    state = advance(begin(), tries("c1", 1, "refused", kind="latency", reason="90 ms"))
    one = state.parts["c1"]
    assert (one.model, one.smaller, one.state, one.asked_at) == ("small", "", "asked", 1)
    assert one.reason == "large: 90 ms"
    again = advance(state, tries("c1", 2, "refused", kind="latency"))
    assert again.parts["c1"] == one  # still about the larger
    assert advance(state, serves("c1", 3, model="small")).parts["c1"].state == "serving"
    state = advance(state, tries("c1", 3, "refused", model="small", kind="memory"))
    assert state.phase is Phase.ROLLING_BACK


def test_a_rollback_ends_when_nobody_serves_it_any_more():
    state = play(soaked(), serves("r1", 11), Stopped(now=12, reason="a person"))
    assert (state.phase, state.reason) == (Phase.ROLLING_BACK, "a person")
    state = play(state, *(heard(name, 13, serving=served("older")) for name in (*CANARIES, "r1")))
    assert state.phase is Phase.ROLLING_BACK
    state = advance(state, tries("r2", 13, "fetching"))
    assert states(state, ["r2"]) == ["asked"]
    state = play(state, *(tries(name, 14, "rolled_back") for name in REST[1:]))
    assert state.phase is Phase.ROLLED_BACK
    assert set(states(state)) == {"rolled_back"}


def test_a_rollback_does_not_wait_for_ever():
    state = play(soaked(), Absent(device="r1", now=11), Stopped(now=12, reason="a person"))
    assert states(state, ["r1"]) == ["away"]
    state = advance(state, Tick(now=112))
    assert state.phase is Phase.ROLLED_BACK
    assert set(states(state)) == {"late", "away"}
    again = play(state, Present(device="r1", now=120), Stopped(now=121, reason="a person"))
    assert states(again, ["r1"]) == ["asked"]


def test_a_done_deployment_may_be_undone_and_one_that_was_interrupted_goes_on():
    done = play(soaked(), *(serves(name, 11) for name in REST))
    assert advance(done, Stopped(now=12, reason="a person")).phase is Phase.ROLLING_BACK
    record = DeploymentRecord(deployment=NAME, federation="f", version="v", state="interrupted", started_at=0, since=5)
    halfway = resume_rollout(record, soaked().parts.values(), online=(*CANARIES, *REST), rules=RULES, now=500)
    halfway = advance(halfway, Resumed(now=500))
    assert (halfway.phase, set(states(halfway, REST))) == (Phase.ROLLING_OUT, {"asked"})
    early = play(begin(), serves("c1", 1), serves("c2", 1))
    early = resume_rollout(record, early.parts.values(), online=(*CANARIES, *REST), rules=RULES, now=500)
    early = advance(early, Resumed(now=500))
    assert (early.phase, early.since) == (Phase.SOAKING, 500)


def test_devices_that_serve_it_already_are_not_asked():
    state = start_rollout([part("r1", state="serving")], online=["r1"], rules=RULES, now=0)
    assert (state.phase, word_for(state.parts["r1"])) == (Phase.SOAKING, None)
    assert advance(state, Tick(now=10)).phase is Phase.DONE


def test_a_deployment_without_canaries_or_with_one_that_is_away_is_our_mistake():
    with pytest.raises(LocalProtocolError, match="at least one canary"):
        start_rollout([part("r1")], online=["r1"], rules=RULES, now=0)
    with pytest.raises(LocalProtocolError, match="must be online"):
        start_rollout(parts(), online=REST, rules=RULES, now=0)


def test_pending_devices_are_those_that_may_still_answer():
    state = play(soaked(), tries("r1", 11, "fetching"), tries("r2", 11, "checking"))
    assert {one.device for one in state.pending} == set(REST)
