"""The section of RESULTS.md, from the benchmark's JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from reft_edge.agent.serving.latency import percentile
from reft_edge.simulation.dashboard.records import DashboardRun, DashboardSettings, PageLoad
from reft_edge.simulation.results.markdown import Goal, goals, table
from reft_edge.simulation.results.results_file import ResultsFile

PAINT_GOAL_MS = 1000.0
"""Until a person thinks that nothing happens."""

UPDATE_GOAL_MS = 500.0
"""95th percentile: what happens on a device reaches the coordinator about as fast."""

QUIET_GOAL = 0.02
"""Of one core, with a page open."""


def section(path: Path) -> str:
    """Markdown, from the heading on. Raises `ConfigError` when `path` holds something else."""
    results = ResultsFile.read(path, DashboardSettings, DashboardRun)
    settings, runs = results.settings, results.runs
    if not runs:
        return "## Dashboard\n\nNothing was run.\n"
    rate = "once" if settings.reports_per_s == 1 else f"{settings.reports_per_s:g} times"
    introduction = (
        f"`reft-edge dashboard` over a written run of {settings.devices} devices with {settings.closed_rounds} closed "
        "rounds and an open one, in a headless Chromium on the same machine. *Complete*: the last row, or the chart, "
        f"is in the page. Medians of {settings.loads} loads with an empty cache (*first visit*) and with what the "
        "browser kept (*again*). Processor time is that of the dashboard's process as a share of one core, with the "
        "page open: *quiet* while nothing happens, *busy* while every device reports "
        f"{rate} a second; *browser* is the page's main thread meanwhile.\n"
    )
    title = f"## Dashboard with {settings.devices} devices\n"
    return "\n".join([title, introduction, _table(runs), goals(_goals(runs))])


def _table(runs: Sequence[DashboardRun]) -> str:
    first, again = ("first visit: paint", "complete", "kB", "requests"), ("again: paint", "complete")
    header = ("page", *first, *again, "quiet", "busy", "browser", "MiB")
    rows = [
        (
            run.page,
            f"{_median(run.cold, 'first_paint_ms'):.0f} ms",
            f"{_median(run.cold, 'complete_ms'):.0f} ms",
            f"{_median(run.cold, 'transferred_bytes') / 1e3:.0f}",
            f"{_median(run.cold, 'requests'):.0f}",
            f"{_median(run.warm, 'first_paint_ms'):.0f} ms",
            f"{_median(run.warm, 'complete_ms'):.0f} ms",
            f"{run.quiet_cpu:.1%}",
            f"{run.busy_cpu:.1%}",
            f"{run.busy_page_cpu:.1%}",
            f"{run.resident_bytes / 2**20:.0f}",
        )
        for run in runs
    ]
    return table(header, rows)


def _goals(runs: Sequence[DashboardRun]) -> list[Goal]:
    slowest = max(_median(run.cold, "first_paint_ms") for run in runs)
    quiet = max(run.quiet_cpu for run in runs)
    found = [
        Goal(
            what="first paint of the slowest page, empty cache",
            wanted=f"at most {PAINT_GOAL_MS:.0f} ms",
            measured=f"{slowest:.0f} ms",
            met=slowest <= PAINT_GOAL_MS,
        ),
        Goal(
            what="processor while nothing happens",
            wanted=f"at most {QUIET_GOAL:.0%}",
            measured=f"{quiet:.1%}",
            met=quiet <= QUIET_GOAL,
        ),
    ]
    for run in runs:
        for what, times in (("alone", run.update_ms), ("while every device reports", run.update_busy_ms)):
            if times:
                late = percentile(sorted(times), 0.95)
                found.append(
                    Goal(
                        what=f"from an event to the page, {what}, 95th percentile of {len(times)}",
                        wanted=f"at most {UPDATE_GOAL_MS:.0f} ms",
                        measured=f"{late:.0f} ms (median {statistics.median(times):.0f} ms)",
                        met=late <= UPDATE_GOAL_MS,
                    )
                )
    return found


def _median(loads: Sequence[PageLoad], field: str) -> float:
    return float(statistics.median(getattr(load, field) for load in loads))
