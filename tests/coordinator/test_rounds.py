"""The round state machine: what ends collecting, what counts, and that nothing a device says can break it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.coordinator import rounds
from reft_edge.coordinator.rounds import Phase, RoundRules, Standing, Verdict, advance, start_round
from reft_edge.errors import LocalProtocolError

RULES = RoundRules(deadline_s=100, quorum=0.5, grace_s=10, absent_s=50, on_missed_quorum="extend", max_extensions=2)
A, B, C = "aa", "bb", "cc"


def collecting(devices=("d1", "d2"), rules=RULES):
    state = start_round(list(devices), rules)
    state = advance(state, rounds.Published()).round
    return advance(state, rounds.Opened(now=0)).round


def play(state, *events):
    verdict = None
    for event in events:
        state, verdict = advance(state, event)
    return state, verdict


def accepted(device, now=1):
    return rounds.Accepted(device=device, now=now)


def offered(device, sha=A, now=2):
    return rounds.Offered(device=device, sha256=sha, now=now)


def received(device, sha=A, now=3):
    return rounds.Received(device=device, sha256=sha, now=now)


def refused(device, now=3):
    return rounds.Refused(device=device, now=now, reason="no memory")


def tick(now):
    return rounds.Tick(now=now)


FAIL = RoundRules(deadline_s=100, quorum=1.0, grace_s=10, on_missed_quorum="fail")


def absent(device, now=5):
    return rounds.Absent(device=device, now=now)


CASES = {
    "with quorum, who is gone for long is not waited for": (
        RULES,
        [received("d1"), absent("d2"), tick(55)],
        Phase.SCREENING,
    ),
    "who is gone for a moment is waited for": (RULES, [received("d1"), absent("d2"), tick(54)], Phase.COLLECTING),
    "who comes back is waited for": (
        RULES,
        [received("d1"), absent("d2"), rounds.Present(device="d2", now=30), tick(99)],
        Phase.COLLECTING,
    ),
    "what it says shows that it is back": (
        RULES,
        [received("d1"), absent("d2"), accepted("d2", 30), tick(99)],
        Phase.COLLECTING,
    ),
    "gone is counted from the first moment": (
        RULES,
        [received("d1"), absent("d2"), absent("d2", now=50), tick(55)],
        Phase.SCREENING,
    ),
    "without quorum, who is gone is waited for": (RULES, [absent("d1"), absent("d2"), tick(99)], Phase.COLLECTING),
    "all updates end collecting": (RULES, [received("d1"), received("d2")], Phase.SCREENING),
    "a refusal is an answer": (RULES, [received("d1"), refused("d2")], Phase.SCREENING),
    "a failure is an answer": (RULES, [received("d1"), rounds.Failed(device="d2", now=3)], Phase.SCREENING),
    "a useless update is an answer": (
        RULES,
        [received("d1"), rounds.Rejected(device="d2", now=3, sha256=B, reason="not finite")],
        Phase.SCREENING,
    ),
    "a device may change its mind": (RULES, [refused("d1"), accepted("d1"), refused("d2")], Phase.COLLECTING),
    "all refused is a failed round at once": (RULES, [refused("d1"), refused("d2")], Phase.FAILED),
    "before the deadline it waits for the quorum's rest": (RULES, [received("d1"), tick(99.9)], Phase.COLLECTING),
    "deadline with quorum": (RULES, [received("d1"), tick(100)], Phase.SCREENING),
    "an announced update has the grace": (RULES, [received("d1"), offered("d2"), tick(105)], Phase.COLLECTING),
    "the grace ends": (RULES, [received("d1"), offered("d2"), tick(110)], Phase.SCREENING),
    "a lost update has no grace": (
        RULES,
        [received("d1"), offered("d2"), rounds.Lost(device="d2", now=5), tick(100)],
        Phase.SCREENING,
    ),
    "deadline without quorum extends": (RULES, [tick(100)], Phase.COLLECTING),
    "extensions are limited": (RULES, [tick(100), tick(200), tick(300)], Phase.FAILED),
    "a long sleep uses up the extensions at once": (RULES, [tick(1e6)], Phase.FAILED),
    "deadline without quorum can fail at once": (FAIL, [received("d1"), tick(100)], Phase.FAILED),
    "a coordinator that slept gives time to report": (
        RULES,
        [rounds.Resumed(now=1e6), tick(1e6 + 9)],
        Phase.COLLECTING,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_collecting_ends_when_it_should(name):
    rules, events, phase = CASES[name]
    state, _ = play(collecting(rules=rules), *events)
    assert state.phase is phase
    assert (phase is Phase.FAILED) == bool(state.reason)


VERDICTS = {
    "first good update": ([received("d1")], Verdict.COUNTED),
    "the same again": ([received("d1"), received("d1")], Verdict.DUPLICATE),
    "another after the first": ([received("d1"), received("d1", B)], Verdict.DUPLICATE),
    "announced again": ([received("d1"), offered("d1")], Verdict.DUPLICATE),
    "after the deadline": ([received("d1"), received("d2", now=101)], Verdict.LATE),
    "announced after the deadline": ([received("d1"), offered("d2", now=101)], Verdict.LATE),
    "announced in time, arrives in the grace": (
        [received("d1"), offered("d2"), received("d2", now=109)],
        Verdict.COUNTED,
    ),
    "arrives after the grace": ([received("d1"), offered("d2"), received("d2", now=111)], Verdict.LATE),
    "in the extension": ([tick(100), received("d1", now=150)], Verdict.COUNTED),
    "a stranger's": ([received("stranger")], Verdict.UNEXPECTED),
    "a rejected one again": (
        [rounds.Rejected(device="d1", now=3, sha256=B, reason="x"), offered("d1", B)],
        Verdict.DUPLICATE,
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_updates_are_told_apart(name):
    events, verdict = VERDICTS[name]
    assert play(collecting(), *events)[1] is verdict


def test_a_round_goes_through_every_phase_in_order():
    state = collecting()
    state, _ = play(state, received("d1"), received("d2"))
    seen = [state.phase]
    for event in (rounds.Screened(), rounds.Merged(), rounds.Distilled(), rounds.Evaluated()):
        state, _ = advance(state, event)
        seen.append(state.phase)
    assert seen == [Phase.SCREENING, Phase.MERGING, Phase.DISTILLING, Phase.EVALUATING, Phase.CLOSED]


def test_an_illegal_own_event_raises_and_changes_nothing():
    state = collecting()
    with pytest.raises(LocalProtocolError, match="Merged is not legal in phase 'collecting'"):
        advance(state, rounds.Merged())
    assert state == collecting()


def test_a_late_accepted_does_not_take_back_an_announcement():
    state, _ = play(collecting(), offered("d1"), accepted("d1"))
    assert state.devices["d1"].standing is Standing.OFFERED


@pytest.mark.parametrize(
    ("quorum", "n_devices", "needed"), [(0.5, 4, 2), (0.5, 5, 3), (0.01, 4, 1), (1.0, 3, 3), (0.7, 10, 7)]
)
def test_quorum_is_rounded_up(quorum, n_devices, needed):
    rules = RoundRules(deadline_s=1, quorum=quorum)
    assert start_round([f"d{i}" for i in range(n_devices)], rules).n_needed == needed


devices_st = st.sampled_from(["d1", "d2", "d3", "stranger"])
now_st = st.floats(min_value=0, max_value=1000)
sha_st = st.sampled_from([A, B, C])
event_st = st.one_of(
    st.builds(rounds.Accepted, device=devices_st, now=now_st),
    st.builds(rounds.Refused, device=devices_st, now=now_st),
    st.builds(rounds.Failed, device=devices_st, now=now_st),
    st.builds(rounds.Lost, device=devices_st, now=now_st),
    st.builds(rounds.Offered, device=devices_st, now=now_st, sha256=sha_st),
    st.builds(rounds.Received, device=devices_st, now=now_st, sha256=sha_st),
    st.builds(rounds.Rejected, device=devices_st, now=now_st, sha256=sha_st, reason=st.just("x")),
    st.builds(rounds.Absent, device=devices_st, now=now_st),
    st.builds(rounds.Present, device=devices_st, now=now_st),
    st.builds(rounds.Tick, now=now_st),
)


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(event_st, max_size=40),
    quorum=st.sampled_from([0.3, 0.6, 1.0]),
    extend=st.sampled_from(["extend", "fail"]),
)
def test_any_order_of_reports_counts_each_device_once_and_ends_by_the_clock(events, quorum, extend):
    rules = RoundRules(deadline_s=100, quorum=quorum, grace_s=10, on_missed_quorum=extend, max_extensions=2)
    state = collecting(("d1", "d2", "d3"), rules)
    counted: dict[str, str] = {}
    for event in events:
        before = state
        state, verdict = advance(state, event)
        if verdict is Verdict.COUNTED:
            assert event.device not in counted
            counted[event.device] = event.sha256
        if before.phase is not Phase.COLLECTING:
            assert state == before  # what counts is fixed when collecting has ended
    assert state.counted == counted
    assert "stranger" not in state.devices
    state = advance(state, tick(100 * 3 + 10)).round
    assert state.phase is (Phase.SCREENING if len(counted) >= state.n_needed else Phase.FAILED)


def test_screening_takes_updates_back_and_the_others_are_merged():
    state, _ = play(collecting(), received("d1"), received("d2", B))
    after = advance(state, rounds.Screened(taken_back={"d1": "too long"})).round
    assert (after.phase, after.counted) == (Phase.MERGING, {"d2": B})
    assert (after.devices["d1"].standing, after.devices["d1"].reason) == (Standing.REJECTED, "too long")
    assert after.devices["d1"].update == A


def test_a_round_with_nothing_left_fails_and_says_why():
    state, _ = play(collecting(), received("d1"), refused("d2"))
    after = advance(state, rounds.Screened(taken_back={"d1": "too long"})).round
    assert (after.phase, after.counted) == (Phase.FAILED, {})
    assert after.reason == "no update is left to merge (d1: too long; d2: no memory)"


def test_only_what_counts_can_be_taken_back():
    state, _ = play(collecting(), received("d1"), refused("d2"))
    for stranger in ("d2", "nobody"):
        with pytest.raises(LocalProtocolError, match=f"{stranger}.*does not count"):
            advance(state, rounds.Screened(taken_back={stranger: "x"}))


@settings(max_examples=200, deadline=None)
@given(
    answers=st.dictionaries(st.sampled_from(["d1", "d2", "d3", "d4"]), sha_st, min_size=1),
    chosen=st.sets(st.sampled_from(["d1", "d2", "d3", "d4"])),
    later=st.lists(event_st, max_size=20),
)
def test_screening_happens_once_and_what_it_leaves_is_what_is_merged(answers, chosen, later):
    rules = RoundRules(deadline_s=100, quorum=0.2)
    state, _ = play(collecting(("d1", "d2", "d3", "d4"), rules), *(received(*answer) for answer in answers.items()))
    state = advance(state, tick(200)).round
    taken_back = dict.fromkeys(chosen & state.counted.keys(), "odd")
    screened = advance(state, rounds.Screened(taken_back=taken_back)).round
    left = {device: sha for device, sha in answers.items() if device not in chosen}
    assert screened.counted == left
    assert screened.phase is (Phase.MERGING if left else Phase.FAILED)
    assert play(screened, *later)[0] == screened  # nothing a device says changes what counts
    with pytest.raises(LocalProtocolError):
        advance(screened, rounds.Screened())
