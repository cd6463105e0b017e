"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

The page follows the reader's light or dark setting. Everything that came from devices or settings is escaped.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from reft_edge.coordinator.report import plots

if TYPE_CHECKING:
    from reft_edge.coordinator.report.record import RunReport

TEMPLATE = "report.html"


def to_html(report: RunReport) -> str:
    """The page for `report`, the same for equal reports."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"metric": metric_text, "bytes": bytes_text, "seconds": seconds_text}
    source = resources.files("reft_edge.coordinator.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # Our own SVG: names from the network that stand in it as text were escaped when it was written.
    drawn = {
        "metric": Markup(plots.metric_by_round(report)),  # noqa: S704
        "bytes": Markup(plots.bytes_by_device(report)),  # noqa: S704
        "time": Markup(plots.time_by_device(report)),  # noqa: S704
        "share": Markup(plots.share_by_device(report)),  # noqa: S704
    }
    return environment.from_string(source).render(report=report, plots=drawn)


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
