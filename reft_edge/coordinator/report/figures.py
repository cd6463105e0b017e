"""Figures as people read them. Apart from the page, whose plots take a second to import."""

from __future__ import annotations


def metric_text(value: float | None, metric: str) -> str:
    """An accuracy in per cent, another metric with four digits, a hyphen for what is unknown."""
    if value is None:
        return "-"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def bytes_text(n_bytes: float) -> str:
    """In B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def seconds_text(seconds: float | None) -> str:
    """With two digits after the point below ten seconds, a hyphen for what is unknown."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
