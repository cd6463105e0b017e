"""Moments as people read them."""

from __future__ import annotations

import time


def time_text(at: float | None) -> str:
    """Unix seconds as local time, a hyphen for what is unknown."""
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def age_text(at: float | None, now: float) -> str:
    """How long before `now` something was, in its largest unit; Unix seconds."""
    if at is None:
        return "-"
    seconds = max(0.0, now - at)
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
