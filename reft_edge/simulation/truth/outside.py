"""A worker seen from outside: its memory every hundredth of a second, its processor time before and after."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

from reft_edge.profiling.load import read_load

LOOK_EVERY_S = 0.01


class Outside:
    """Watches process `pid` within a `with` block; figures stand after it."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="outside", daemon=True)
        self.peak_bytes = 0
        self.cpu_s = 0.0
        self.others_share = 0.0

    def __enter__(self) -> Outside:
        self._load, self._cpu_before = read_load(), self._cpu_s()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if kind is not None:
            return
        self.cpu_s = self._cpu_s() - self._cpu_before
        now = read_load()
        total_s = now.total_s - self._load.total_s
        ours_s = (now.own_s - self._load.own_s) + self.cpu_s
        busy_s = now.busy_s - self._load.busy_s
        self.others_share = min(1.0, max(0.0, (busy_s - ours_s) / total_s)) if total_s > 0 else 0.0

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            try:
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            except psutil.Error:
                return
