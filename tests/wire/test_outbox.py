"""The send queue: urgency, bounds, and what survives a lost connection."""

from __future__ import annotations

from reft_edge.wire.outbox import MAX_ANSWERS_PER_TOPIC, MAX_BLOCKS_PER_TOPIC, SMALL_BYTES, Outbox, Outgoing

BULK = SMALL_BYTES + 1


def message(text: str, *, qos: int = 1, size: int = 1, topic: str = "t", **options: object) -> Outgoing:
    payload = text.encode().ljust(size, b".")
    return Outgoing(topic=topic, payload=payload, qos=qos, **{"retain": False, **options})  # type: ignore[arg-type]


def drain(outbox: Outbox, *, now: float = 0.0, allow_qos1: bool = True) -> str:
    taken = ""
    while (found := outbox.take(now, allow_qos1=allow_qos1)) is not None:
        taken += found.payload[:1].decode()
    return taken


def test_small_before_large_and_each_in_order() -> None:
    outbox = Outbox(max_bulk_bytes=10 * BULK)
    for text, qos, size in [("a", 1, BULK), ("b", 0, BULK), ("c", 0, 1), ("d", 1, 1), ("e", 0, BULK), ("f", 1, 1)]:
        assert outbox.put(message(text, qos=qos, size=size))
    assert drain(outbox) == "dfcbea"
    assert (len(outbox), outbox.bulk_bytes) == (0, 0)


def test_without_room_for_acknowledgements_only_qos_0_goes() -> None:
    outbox = Outbox(max_bulk_bytes=10 * BULK)
    for text, qos in [("a", 1), ("b", 0), ("c", 1), ("d", 0)]:
        outbox.put(message(text, qos=qos))
    assert drain(outbox, allow_qos1=False) == "bd"
    assert drain(outbox) == "ac"


def test_blocks_never_crowd_out_small_messages_and_both_are_bounded() -> None:
    outbox = Outbox(max_bulk_bytes=2 * BULK, max_small_messages=2)
    assert [outbox.put(message(text, qos=0, size=BULK)) for text in "abc"] == [True, True, False]
    assert [outbox.put(message(text)) for text in "def"] == [True, True, False]
    assert drain(outbox) == "deab"


def test_a_peer_that_asks_without_end_leaves_room_for_others() -> None:
    outbox = Outbox(max_bulk_bytes=100 * BULK)
    for text, size, most in (("b", BULK, MAX_BLOCKS_PER_TOPIC), ("a", 1, MAX_ANSWERS_PER_TOPIC)):
        taken = [outbox.put(message(text, qos=0, size=size, topic="greedy")) for _ in range(200)]
        assert taken == [True] * most + [False] * (200 - most)
        assert outbox.put(message(text.upper(), qos=0, size=size, topic="modest"))
    assert outbox.put(message("t", topic="greedy"))
    assert outbox.take(0.0, allow_qos1=False) is not None
    assert outbox.put(message("a", qos=0, topic="greedy"))
    assert drain(outbox) == "t" + "a" * (MAX_ANSWERS_PER_TOPIC - 1) + "Aa" + "b" * MAX_BLOCKS_PER_TOPIC + "B"
    for _ in range(MAX_BLOCKS_PER_TOPIC):
        assert outbox.put(message("b", qos=0, size=BULK, topic="greedy"))
    outbox.drop_qos0()
    assert outbox.put(message("b", qos=0, size=BULK, topic="greedy"))


def test_a_retained_message_replaces_the_one_that_waits_on_its_topic() -> None:
    outbox = Outbox(max_bulk_bytes=10 * BULK)
    for text in ("a", "b"):
        outbox.put(message(text, retain=True))
        outbox.put(message(text, topic="u"))
    assert drain(outbox) == "bab"


def test_after_a_lost_connection_unacknowledged_go_first_and_newer_retained_ones_win() -> None:
    outbox = Outbox(max_bulk_bytes=10 * BULK)
    sent = [message("a"), message("b", retain=True), message("c", size=BULK)]
    for waiting in (message("d"), message("e", qos=0), message("f", retain=True), message("g", qos=0, size=BULK)):
        outbox.put(waiting)
    assert outbox.drop_qos0() == 2
    outbox.restore(sent)
    assert outbox.bulk_bytes == BULK
    assert drain(outbox) == "afdc"


def test_what_has_expired_is_not_sent() -> None:
    outbox = Outbox(max_bulk_bytes=10 * BULK)
    outbox.put(message("a", expires_at=5.0))
    outbox.put(message("b", expires_at=15.0))
    assert drain(outbox, now=10.0) == "b"
