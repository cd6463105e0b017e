"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

The page follows the reader's light or dark setting. Everything that came from devices or settings is escaped.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from reft_edge.coordinator.report import plots
from reft_edge.coordinator.report.figures import bytes_text, metric_text, seconds_text

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
