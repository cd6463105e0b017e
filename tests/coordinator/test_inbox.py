"""The queue between the coordinator's threads."""

from __future__ import annotations

import queue
import threading

import pytest

from reft_edge.coordinator.inbox import Inbox


def drained(inbox):
    items = []
    while True:
        try:
            items.append(inbox.get(0.0))
        except queue.Empty:
            return items


def test_a_device_that_flickers_while_nobody_looks_takes_one_place():
    inbox = Inbox()
    for number in range(1000):
        inbox.put_latest(("a", "status"), f"a {number}")
        inbox.put_latest(("a", "profile"), f"profile {number}")
    inbox.put_latest(("b", "status"), "b")
    assert drained(inbox) == ["a 999", "profile 999", "b"]
    inbox.put_latest(("a", "status"), "again")
    assert drained(inbox) == ["again"]


def test_reports_are_dropped_when_too_many_wait_and_nothing_else_is():
    inbox = Inbox(max_reports=3)
    for number in range(5):
        inbox.put_report(f"report {number}")
    inbox.put("arrived")
    inbox.put_latest("key", "status")
    assert drained(inbox) == ["report 0", "report 1", "report 2", "arrived", "status"]


def test_whoever_waits_is_woken():
    inbox = Inbox()
    speaker = threading.Thread(target=lambda: inbox.put("word"))
    speaker.start()
    assert inbox.get(20.0) == "word"
    speaker.join()
    with pytest.raises(queue.Empty):
        inbox.get(0.001)
