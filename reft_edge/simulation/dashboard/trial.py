"""One page of a large fleet: loaded again and again, followed event by event, and left open."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reft_edge.coordinator import events
from reft_edge.coordinator.event_log import EventLog
from reft_edge.dashboard.live_table import ROWS_AT_FIRST
from reft_edge.simulation.dashboard.fleet import RUN, names, progress, write_fleet
from reft_edge.simulation.dashboard.looking import Browser, RunningDashboard, browser, dashboard
from reft_edge.simulation.dashboard.records import DashboardRun, DashboardSettings, PageLoad

PAGES = {"fleet": "/", "round": "/round", "curves": "/curves"}

FOLLOWED = "round"
"""The page on which each event shows."""

SETTLE_S = 1.0
"""After the dashboard has started, and before processor time is counted."""

PAUSES_S = (0.11, 0.17, 0.23, 0.31)
"""Between events that are timed: not in step with how often anybody looks."""

SLICES = 20
"""A second in which all devices report is divided so often, so that they do not report at once."""


def missing(runs: Sequence[DashboardRun]) -> list[str]:
    """Pages that are not measured yet, in order."""
    return [page for page in PAGES if page not in {run.page for run in runs}]


def run_trial(page: str, settings: DashboardSettings, *, tell: Callable[[str], None]) -> DashboardRun:
    """`tell` hears of each step that takes time."""
    with tempfile.TemporaryDirectory() as name:
        path = write_fleet(Path(name), settings.devices, settings.closed_rounds)
        with (
            dashboard(path) as served,
            browser() as looking,
            EventLog(path.parent / "federation" / RUN, events.ignore) as write,
        ):
            time.sleep(SETTLE_S)
            return _Trial(page, settings, served, looking, write, tell).run()


class _Trial:
    def __init__(
        self,
        page: str,
        settings: DashboardSettings,
        served: RunningDashboard,
        looking: Browser,
        write: Callable[[events.Event], None],
        tell: Callable[[str], None],
    ) -> None:
        self._page, self._settings, self._served = page, settings, served
        self._looking, self._write, self._tell = looking, write, tell
        self._devices = names(settings.devices)
        self._round = settings.closed_rounds + 1
        self._n_timed = 0

    def run(self) -> DashboardRun:
        self._tell(f"{self._page}: loading")
        cold = tuple(self._load(cold=True) for _ in range(self._settings.loads))
        warm = tuple(self._load(cold=False) for _ in range(self._settings.loads))
        self._tell(f"{self._page}: quiet for {self._settings.quiet_s:g} s")
        time.sleep(SETTLE_S)
        quiet_cpu = self._cpu_while(lambda: time.sleep(self._settings.quiet_s))
        followed = self._page == FOLLOWED
        update_ms = self._follow(self._settings.updates) if followed else ()
        self._tell(f"{self._page}: {self._settings.devices} devices report for {self._settings.busy_s:g} s")
        update_busy_ms: tuple[float, ...] = ()
        busy_s, began = self._looking.busy_s, time.monotonic()
        with self._everybody_reports():
            busy_cpu = self._cpu_while(lambda: time.sleep(self._settings.busy_s))
            busy_page_cpu = (self._looking.busy_s - busy_s) / (time.monotonic() - began)
            if followed:
                update_busy_ms = self._follow(self._settings.updates // 2)
        return DashboardRun(
            page=self._page,
            cold=cold,
            warm=warm,
            update_ms=update_ms,
            update_busy_ms=update_busy_ms,
            quiet_cpu=quiet_cpu,
            busy_cpu=busy_cpu,
            busy_page_cpu=busy_page_cpu,
            resident_bytes=self._served.resident_bytes,
        )

    def _load(self, *, cold: bool) -> PageLoad:
        last = self._devices[min(len(self._devices), ROWS_AT_FIRST) - 1]
        wait_for = "chart" if self._page == "curves" else last
        address = self._served.address + PAGES[self._page]
        paint, complete, transferred, requests = self._looking.load(address, wait_for=wait_for, cold=cold)
        return PageLoad(first_paint_ms=paint, complete_ms=complete, transferred_bytes=transferred, requests=requests)

    def _follow(self, n_events: int) -> tuple[float, ...]:
        """Milliseconds from an event to the page, for devices near the top of the table, where a person looks."""
        self._tell(f"{self._page}: timing {n_events} events")
        times = []
        for number in range(n_events):
            loss = 1000 + self._n_timed / 1000  # no device that only reports has such a loss
            self._n_timed += 1
            device = self._devices[number % min(10, len(self._devices))]
            event = progress(device, self._round, step=number, loss=loss)
            at_ms = time.time() * 1000
            self._write(event)
            times.append(self._looking.shown(f"{loss:.3f}") - at_ms)
            time.sleep(PAUSES_S[number % len(PAUSES_S)])
        return tuple(times)

    def _cpu_while(self, action: Callable[[], None]) -> float:
        cpu_s, began = self._served.cpu_s, time.monotonic()
        action()
        return (self._served.cpu_s - cpu_s) / (time.monotonic() - began)

    @contextmanager
    def _everybody_reports(self) -> Iterator[None]:
        """Every device reports, but those whose events are timed, one after another over each second."""
        stop = threading.Event()
        rest = self._devices[10:] or self._devices

        def report() -> None:
            step = 0
            pause_s = 1 / self._settings.reports_per_s / SLICES
            due = time.monotonic()
            while not stop.is_set():
                for device in rest[step % SLICES :: SLICES]:
                    self._write(progress(device, self._round, step=2 + step // SLICES, loss=2 + (step % 997) / 1000))
                step += 1
                due += pause_s
                stop.wait(max(0.0, due - time.monotonic()))

        reporter = threading.Thread(target=report)
        reporter.start()
        try:
            yield
        finally:
            stop.set()
            reporter.join()
