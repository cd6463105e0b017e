"""What others took of the processor is what all took less what we took."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.profiling.load import Load, read_load

Plant = Callable[[dict[str, str]], Path]


def test_own_time_is_not_others() -> None:
    before = Load(total_s=100, busy_s=40, own_s=5)
    assert Load(total_s=120, busy_s=58, own_s=20).others_since(before) == pytest.approx(3 / 20)
    assert Load(total_s=120, busy_s=50, own_s=20).others_since(before) == 0  # counters are read one after the other
    assert before.others_since(before) == 0


def test_idle_and_waiting_for_the_disk_are_not_busy(plant: Plant) -> None:
    plant({"proc/stat": "cpu  1000 0 500 8000 300 0 100 100 70 0\ncpu0 1 1 1 1\nintr 1\n"})
    load = read_load()
    assert load.busy_s / load.total_s == pytest.approx(1700 / 10_000)


def test_what_this_process_computes_is_its_own() -> None:
    before, until = read_load(), os.times().user + 0.05
    while os.times().user < until:
        sum(range(10_000))
    after = read_load()
    assert after.own_s - before.own_s > 0.04  # counted in ticks of 10 ms
    assert after.busy_s > before.busy_s
