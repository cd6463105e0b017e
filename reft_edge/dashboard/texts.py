"""How figures and states are worded and coloured on every page."""

from __future__ import annotations

import time

STATE_COLOURS = {
    "training": "primary",
    "fetching": "primary",
    "uploading": "primary",
    "accepted": "primary",
    "asked": "primary",
    "done": "positive",
    "ready": "positive",
    "late": "warning",
    "left out": "warning",
    "offline": "grey",
    "waiting": "grey",
    "refused": "negative",
    "failed": "negative",
    "rejected": "negative",
    "damaged": "negative",
    "quarantine": "negative",
}
"""Colours of Quasar, the page's toolkit; words say the same, for those who do not see colours."""


def ago(at: float | None, now: float) -> str:
    """How long ago `at` was, in its largest unit; Unix seconds."""
    if at is None:
        return "-"
    seconds = max(0.0, now - at)
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def clock(at: float | None) -> str:
    """Local time of day with the date, a hyphen for what is unknown."""
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
