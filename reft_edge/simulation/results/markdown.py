"""Figures as Markdown text. The same values give the same text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One goal of a benchmark, and what became of it."""

    what: str
    wanted: str
    measured: str
    met: bool | None
    """None: nothing measured says so, for example in the quick form."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text and the others are numbers, aligned to the right."""
    lines = [_row(header), "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)} columns: {row!r}")
        lines.append(_row(row))
    return "\n".join(lines) + "\n"


def goals(wanted: Sequence[Goal]) -> str:
    """The goals with what was measured, met or missed."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    lines = ["| goal | wanted | measured | |", "|---|---:|---:|---|"]
    lines += [_row((goal.what, goal.wanted, goal.measured, words[goal.met])) for goal in wanted]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], *, digits: int = 1, scale: float = 1.0) -> str:
    """Mean and sample standard deviation, `97.1 ± 0.4`; one value stands alone.

    `scale` multiplies first: 100 makes percent of shares.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    scaled = [value * scale for value in values]
    mean = f"{statistics.fmean(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
