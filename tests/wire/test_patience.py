"""What one peer may say: a burst, then a rate; others are not touched."""

from __future__ import annotations

from reft_edge.wire.patience import Patience


def test_a_peer_is_heard_in_a_burst_and_then_at_a_rate() -> None:
    patience = Patience(burst=3, per_s=2.0)
    assert [patience.takes("a", 10.0) for _ in range(5)] == [True, True, True, False, False]
    assert patience.takes("b", 10.0), "another peer has its own"
    assert [patience.takes("a", 10.5), patience.takes("a", 10.5)] == [True, False]
    heard = sum(patience.takes("a", 11.0 + step / 100) for step in range(1000))
    assert 19 <= heard <= 21


def test_a_quiet_peer_saves_no_more_than_a_burst_and_a_clock_that_stands_still_gives_nothing() -> None:
    patience = Patience(burst=3, per_s=1.0)
    assert sum(patience.takes("a", 1000.0) for _ in range(9)) == 3
    assert not patience.takes("a", 999.0)


def test_memory_does_not_grow_with_invented_peers() -> None:
    patience = Patience(burst=1, per_s=0.001, max_peers=10)
    assert all(patience.takes(number, 0.0) for number in range(10))
    assert not patience.takes(9, 0.0)
    assert patience.takes("new", 0.0)
    assert not patience.takes(9, 0.0), "those that talk stay known"
    assert patience.takes(0, 0.0), "the one that was silent for longest was forgotten"
