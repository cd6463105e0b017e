"""What the dashboard benchmark runs, and what it keeps."""

from __future__ import annotations

import msgspec

BENCHMARK = "dashboard"


class DashboardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The same for all runs of a file."""

    devices: int = 200
    closed_rounds: int = 5
    """Rounds that lie behind the one that is open."""
    loads: int = 5
    """How often each page is loaded with an empty cache, and again with what the browser kept."""
    updates: int = 200
    """Events whose way to the page is timed, one after another."""
    quiet_s: float = 20.0
    """For which nothing happens while a page is open."""
    busy_s: float = 20.0
    """For which every device reports `reports_per_s` times a second."""
    reports_per_s: float = 1.0


class PageLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One load of one page. Milliseconds since the browser was told to go there."""

    first_paint_ms: float
    """The browser's first contentful paint."""
    complete_ms: float
    """Until the last row of the page's table, or its chart, was there."""
    transferred_bytes: int
    """Of the page and all that was asked for until it was complete, as it travelled."""
    requests: int


class DashboardRun(msgspec.Struct, frozen=True, kw_only=True):
    """One page."""

    page: str
    cold: tuple[PageLoad, ...]
    warm: tuple[PageLoad, ...]
    update_ms: tuple[float, ...] = ()
    """From an event in the log to the page showing it; only of the round's page."""
    update_busy_ms: tuple[float, ...] = ()
    """The same while every device reports."""
    quiet_cpu: float = 0.0
    """Processor seconds of the dashboard's process for each second, with this page open."""
    busy_cpu: float = 0.0
    busy_page_cpu: float = 0.0
    """Of the page's main thread while every device reports."""
    resident_bytes: int = 0
    """Of the dashboard's process at the end."""
