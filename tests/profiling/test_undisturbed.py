"""The clock that others cannot stop, against the kernel's own count and with real neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reft_edge.profiling import undisturbed
from reft_edge.profiling.undisturbed import UndisturbedClock, own_clock

SPIN = "while True: pass"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this kernel does not count how long threads wait"
)


def compute_until(processor_s: float) -> None:
    end = time.thread_time() + processor_s
    while time.thread_time() < end:
        pass


def test_a_neighbour_on_the_same_core_takes_wall_time_but_none_of_ours() -> None:
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    # Four of them, so that we get a fifth of the core at most, whatever else runs.
    neighbours = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(4)]
    try:
        with UndisturbedClock(threads=1) as clock:
            # Until they really compete with us: the kernel has made us wait for as long as we then compute.
            waited = time.perf_counter() - clock()
            while time.perf_counter() - clock() < waited + 0.3:
                compute_until(0.05)
            start, wall, cpu = clock(), time.perf_counter(), time.thread_time()
            compute_until(0.3)
            own, wall, cpu = clock() - start, time.perf_counter() - wall, time.thread_time() - cpu
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
        os.sched_setaffinity(0, before)
    assert own < 0.6 * wall
    assert own == pytest.approx(cpu, rel=0.15)


def test_what_we_sleep_is_ours() -> None:
    woken = threading.Event()
    with UndisturbedClock(threads=1) as clock:
        start, wall = clock(), time.perf_counter()
        woken.wait(0.05)
        assert clock() - start <= time.perf_counter() - wall
        assert clock() - start > 0


def test_under_a_quota_and_where_nothing_is_told_time_is_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(undisturbed, "cpu_quota", lambda: 0.5)
    with own_clock(threads=1) as clock:
        assert clock is time.perf_counter
    monkeypatch.setattr(undisturbed, "_TASKS", tmp_path / "missing")
    with UndisturbedClock(threads=1) as clock:
        before = time.perf_counter()
        assert before <= clock() <= time.perf_counter()
