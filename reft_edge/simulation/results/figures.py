"""Plots as SVG files: the same figures give the same bytes, and a reader without colours loses nothing.

Lines differ by marker and dash, bars by hatching, beside their colours, whose lightness differs as well. The ground is
white, since a page that shows the file may be dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Dash: TypeAlias = str | tuple[int, tuple[int, ...]]
"""As matplotlib takes it: a name, or an offset and lengths of dashes and gaps in points."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """How one series looks."""

    colour: str
    marker: str
    dash: Dash
    hatch: str

    @property
    def line(self) -> dict[str, Any]:
        """Options for `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}

    @property
    def points(self) -> dict[str, Any]:
        """Options for `Axes.scatter`."""
        return {"color": self.colour, "marker": self.marker}

    @property
    def bars(self) -> dict[str, Any]:
        """Options for `Axes.bar` and `Axes.barh`."""
        return {"facecolor": self.colour, "edgecolor": "white", "hatch": self.hatch}


_LOOKS: tuple[tuple[str, str, Dash, str], ...] = (
    ("#08306b", "o", "-", ""),
    ("#d95f02", "s", "--", "//"),
    ("#1b9e77", "^", "-.", "\\\\"),
    ("#7a0177", "D", ":", "xx"),
    ("#e6ab02", "v", (0, (5, 1)), ".."),
    ("#a6cee3", "P", (0, (3, 1, 1, 1)), "++"),
    ("#737373", "X", (0, (1, 1)), "oo"),
    ("#f768a1", "*", (0, (7, 2, 2, 2)), "--"),
)

SERIES = tuple(Series(colour=colour, marker=marker, dash=dash, hatch=hatch) for colour, marker, dash, hatch in _LOOKS)
"""In the order in which a plot uses them."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reft-edge",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.markersize": 5,
    "legend.frameon": False,
}


@contextmanager
def drawing(path: Path, *, columns: int = 1, width: float = 6.4, height: float = 4.0) -> Iterator[list[Axes]]:
    """Axes side by side to draw in, `width` by `height` inches each; written to `path` (.svg) at the end.

    Nothing is written when drawing raises.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # not what the user has in matplotlibrc
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        yield [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
