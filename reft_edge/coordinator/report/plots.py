"""The report's plots as SVG text to put into a page.

Ink is `currentColor`, so plots follow the page's light or dark colours; the series' colours are readable on both. Text
stays text, in the page's font. The same report gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reft_edge.coordinator.report.record import DeviceFigures, RunReport

INK = "#010203"
"""Drawn by matplotlib, then replaced by `currentColor`: no other part of a plot has this colour."""

COLOURS = ("#2f81f7", "#e0823d", "#3fa34d", "#b667d9", "#d14c68", "#1aa3a3", "#9a7d0a", "#7f7f7f")
"""Mid-tones, with a contrast of at least 3 to 1 on white and on near-black."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _styled(plot: Callable[[RunReport], str]) -> Callable[[RunReport], str]:
    """Draw with our style, whatever the process has set for itself."""

    @functools.wraps(plot)
    def styled(report: RunReport) -> str:
        with mpl.rc_context(_STYLE):
            return plot(report)

    return styled


@_styled
def metric_by_round(report: RunReport) -> str:
    """The metric on test data after the mean, after merging and after distilling, by round, and the central model's."""
    figure, axes = _figure(6.4, 3.4)
    numbers = [one.round for one in report.rounds]
    stages = (
        ("weighted mean", [one.averaged for one in report.rounds], COLOURS[7], ":"),
        ("merged", [one.merged for one in report.rounds], COLOURS[1], "-"),
        ("distilled", [one.distilled for one in report.rounds], COLOURS[0], "-"),
    )
    for label, values, colour, line in stages:
        if any(value is not None for value in values):
            axes.plot(numbers, [_number(v) for v in values], marker="o", ms=4, color=colour, ls=line, label=label)
    if report.central is not None:
        axes.axhline(report.central.value, color=COLOURS[2], ls="--", label="central training")
    axes.set_xlabel("round")
    axes.set_ylabel(f"{report.metric} on test data")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if report.metric == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    _legend(axes, loc="best")
    return _svg(figure, "metric", f"{report.metric} by round")


@_styled
def bytes_by_device(report: RunReport) -> str:
    """Bytes down and up of each device, beside what the unpruned float32 model would take each way."""
    figure, axes = _figure(6.4, _height(report))
    kib = 1024.0
    down = [one.down_bytes / kib for one in report.devices]
    up = [one.up_bytes / kib for one in report.devices]
    full = [report.unpruned_bytes / kib for _ in report.devices]
    _grouped(
        axes,
        report.devices,
        (("down", down, COLOURS[0]), ("up", up, COLOURS[1]), ("unpruned float32, each way", full, COLOURS[7])),
    )
    axes.set_xlabel("KiB in all rounds")
    return _svg(figure, "bytes", "bytes by device")


@_styled
def time_by_device(report: RunReport) -> str:
    """Measured against predicted seconds of download, start and training; a point is one device in one round."""
    figure, axes = _figure(6.4, 3.8)
    largest = 0.0
    for colour, device in zip(_cycle(len(report.devices)), report.devices, strict=True):
        points = [(one.predicted_s, one.measured_s) for one in device.rounds if one.measured_s is not None]
        if points:
            largest = max(largest, *(max(point) for point in points))
            predicted, measured = zip(*points, strict=True)
            axes.scatter(predicted, measured, s=26, color=colour, alpha=0.8, label=device.device)
    largest = largest * 1.08 or 1.0
    axes.plot([0, largest], [0, largest], color=INK, lw=1, ls="--", alpha=0.6)
    axes.set_xlim(0, largest)
    axes.set_ylim(0, largest)
    axes.set_xlabel("predicted seconds")
    axes.set_ylabel("measured seconds")
    _legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "time", "predicted and measured time")


@_styled
def share_by_device(report: RunReport) -> str:
    """Each device's part of the global model's parameters."""
    figure, axes = _figure(6.4, _height(report))
    names = [one.device for one in report.devices]
    bars = axes.barh(names, [one.share for one in report.devices], color=COLOURS[0], height=0.6)
    labels = [f"{one.share:.0%} ({one.parameters:,})" for one in report.devices]
    axes.bar_label(bars, labels=labels, padding=4, color=INK)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.invert_yaxis()
    axes.set_xlabel("share of the global model's parameters")
    return _svg(figure, "share", "share of the model by device")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of `width` by `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.grid(visible=True, color=INK, alpha=0.15, lw=0.7)
    return figure, axes


def _svg(figure: Figure, name: str, title: str) -> str:
    """`figure` as an SVG element; `name` makes its ids differ from other plots' of the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', rf'\1role="img" aria-label="{title}"', text)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)


def _grouped(axes: Axes, devices: Sequence[DeviceFigures], series: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """Horizontal bars, a group a device and a bar a series."""
    thickness = 0.8 / len(series)
    for index, (label, values, colour) in enumerate(series):
        places = [row + (index - (len(series) - 1) / 2) * thickness for row in range(len(devices))]
        axes.barh(places, values, height=thickness * 0.9, color=colour, label=label)
    axes.set_yticks(range(len(devices)), [one.device for one in devices])
    axes.invert_yaxis()
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))


def _legend(axes: Axes, **options: Any) -> None:
    """A legend, unless there is nothing to explain: a run without rounds has empty plots."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def _height(report: RunReport) -> float:
    """Inches for a row of bars a device."""
    return 1.4 + 0.6 * max(1, len(report.devices))


def _cycle(n: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(n)]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
