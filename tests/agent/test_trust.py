from __future__ import annotations

import pytest

from reft_edge.agent.trust import open_task
from reft_edge.errors import RemoteProtocolError
from reft_edge.wire.messages import Close, encode

TOPIC = "reft/v1/birds/device/pi/task"


def close(run: str, sequence: int) -> bytes:
    return encode(Close(run=run, sequence=sequence))


def test_an_unsigned_message_older_than_the_last_one_of_its_run_is_refused() -> None:
    _, mark = open_task(TOPIC, close("a", 7), coordinator=None, mark=None)
    again, _ = open_task(TOPIC, close("a", 7), coordinator=None, mark=mark)
    assert again.sequence == 7
    with pytest.raises(RemoteProtocolError, match="its sequence is 6, and 7 was obeyed"):
        open_task(TOPIC, close("a", 6), coordinator=None, mark=mark)


def test_another_unsigned_run_counts_anew() -> None:
    _, mark = open_task(TOPIC, close("a", 7), coordinator=None, mark=None)
    message, mark = open_task(TOPIC, close("b", 1), coordinator=None, mark=mark)
    assert (message.run, mark.sequence) == ("b", 1)
