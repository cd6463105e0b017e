"""Options of the charts, as Apache ECharts takes them. Pure: a report in, a dictionary out."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

from reft_edge.coordinator.report.plots import COLOURS
from reft_edge.wire.deployment import CONFIDENCE_BINS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reft_edge.coordinator.overview import DeviceOverview
    from reft_edge.coordinator.records import ConditionRecord
    from reft_edge.coordinator.report.record import RunReport
    from reft_edge.wire.deployment import PredictionCounts, Served

Options: TypeAlias = dict[str, Any]
OfDevice: TypeAlias = "Callable[[Sequence[ConditionRecord], str, Sequence[str]], Options]"
"""Draws what a device predicts: of all devices' conditions, its name, and the names of the classes."""

MAX_LEAVES = 12
"""Devices of one variant that the tree names; more are counted."""

MAX_POINTS = 2000
"""Of a chart: more are one cloud, and all of them travel each time that one comes."""

SYMBOLS = ("circle", "rect", "triangle", "diamond")
"""Of lines, for those who do not see colours."""

INK = "#757b83"
"""Of lines: 4 to 1 and more on both grounds."""

WORDS: Options = {":color": "getComputedStyle(document.body).getPropertyValue('--faint')"}
"""Colour of words: the page's own, asked for in the browser, which knows whether it is light or dark."""


def metric_by_round(report: RunReport) -> Options:
    """The global model on test data after each stage; accuracy in per cent."""
    scale = 100 if report.metric == "accuracy" else 1
    stages = {"weighted mean": "averaged", "merged": "merged", "distilled": "distilled"}
    lines = {name: [_scaled(getattr(one, field), scale) for one in report.rounds] for name, field in stages.items()}
    unit = "%" if report.metric == "accuracy" else ""
    return _lines([str(one.round) for one in report.rounds], lines, axis=f"{report.metric} {unit}".strip())


def bytes_by_round(report: RunReport) -> Options:
    """KiB that all devices' links carried, down and up, stacked."""
    down_bytes, up_bytes = Counter[int](), Counter[int]()
    for device in report.devices:
        for part in device.rounds:
            down_bytes[part.round] += part.down_bytes
            up_bytes[part.round] += part.up_bytes
    numbers = [one.round for one in report.rounds]
    sums = {
        direction: [found[number] / 1024 for number in numbers]
        for direction, found in (("down", down_bytes), ("up", up_bytes))
    }
    options = _lines([str(number) for number in numbers], sums, axis="KiB, all devices")
    for series in options["series"]:
        series |= {"type": "bar", "stack": "bytes"}
    return options


def predicted_against_measured(report: RunReport) -> Options:
    """A point for each device and round: seconds without the upload. On the line the planner was right.

    Of more than `MAX_POINTS` the latest.
    """
    measured = [
        (one, device.device) for device in report.devices for one in device.rounds if one.measured_s is not None
    ]
    measured.sort(key=lambda found: found[0].round)
    points = [
        {"name": f"{device}, round {one.round}", "value": [one.predicted_s, one.measured_s]}
        for one, device in measured[-MAX_POINTS:]
    ]
    longest = max((max(point["value"]) for point in points), default=1.0)  # type: ignore[type-var]  # no None above
    axis = {"type": "value", "min": 0, "axisLabel": WORDS, "splitLine": {"show": False}}
    return {
        "animation": False,
        "grid": {"left": 8, "right": 16, "top": 24, "bottom": 32, "containLabel": True},
        "tooltip": {"trigger": "item", "formatter": "{b}"},
        "xAxis": {
            **axis,
            "name": "predicted s",
            "nameLocation": "middle",
            "nameGap": 24,
            "nameTextStyle": WORDS,
        },
        "yAxis": {**axis, "name": "measured s", "nameTextStyle": {**WORDS, "align": "left"}},
        "series": [
            {"type": "scatter", "symbolSize": 9, "itemStyle": {"color": COLOURS[0]}, "data": points},
            {
                "type": "line",
                "symbol": "none",
                "silent": True,
                "lineStyle": {"type": "dashed", "color": INK, "opacity": 0.5},
                "data": [[0, 0], [longest, longest]] if points else [],
            },
        ],
    }


def family_tree(report: RunReport, devices: Sequence[DeviceOverview] = ()) -> Options:
    """The run, its variants with their devices, and the exported files with who serves them."""
    if not report.devices and not report.exports:
        return {"series": [{"type": "tree", "data": []}]}
    variants: dict[str, set[str]] = {}
    for device in report.devices:
        for one in device.rounds:
            variants.setdefault(one.variant, set()).add(device.device)
    children = [
        {"name": "whole model" if not float(name) else f"pruned by {name}", "children": _leaves(devices)}
        for name, devices in sorted(variants.items(), key=lambda item: float(item[0]))
    ]
    if report.exports:
        serving = Counter(_file_of(one.serving) for one in devices if one.serving and one.serving.version == report.run)
        files = [{"name": _with_count(one.name, serving[one.name])} for one in report.exports]
        children.append({"name": "exported", "children": files})
    label = {**WORDS, "fontSize": 12}
    return {
        "animation": False,
        "series": [
            {
                "type": "tree",
                "data": [{"name": report.model or report.federation, "children": children}],
                "left": 45,
                "right": 140,
                "top": 8,
                "bottom": 8,
                "initialTreeDepth": -1,
                "expandAndCollapse": False,
                "lineStyle": {"color": INK, "opacity": 0.4},
                "itemStyle": {"color": COLOURS[0]},
                "label": {**label, "position": "top", "align": "center"},
                "leaves": {"label": {**label, "position": "right", "align": "left"}},
            }
        ],
    }


def classes(conditions: Sequence[ConditionRecord], device: str, names: Sequence[str]) -> Options:
    """How often each class is predicted, beside the others that serve the same version. `names`: of the classes."""
    return _beside_rest(conditions, device, lambda counts: counts.classes, names, by="class")


def confidence(conditions: Sequence[ConditionRecord], device: str, _: Sequence[str]) -> Options:
    """How often the most likely class had a probability in each bin."""
    names = [f"{100 * place // CONFIDENCE_BINS} %" for place in range(CONFIDENCE_BINS)]
    return _beside_rest(conditions, device, lambda counts: counts.confidence, names, by="confidence, from")


def _beside_rest(
    conditions: Sequence[ConditionRecord],
    device: str,
    part: Callable[[PredictionCounts], Sequence[int]],
    names: Sequence[str],
    *,
    by: str,
) -> Options:
    """Per cent of a device's predictions in each entry, and the mean of the others', each counting alike."""
    told = {one.device: one.condition.counts for one in conditions if one.condition.counts is not None}
    own = told.pop(device, None)
    same = [one for one in told.values() if own is not None and one.version == own.version]
    others = [counts for counts in map(part, same) if sum(counts)]
    mine = [] if own is None else part(own)
    n_entries = max((len(one) for one in (mine, *others, names)), default=0)
    shown = [*names, *(str(place) for place in range(len(names), n_entries))]
    rest = [_percent(one, n_entries) for one in others]
    lines = {device: _percent(mine, n_entries)} if sum(mine) else {}
    if lines and rest:
        lines["the others"] = [round(sum(column) / len(rest), 2) for column in zip(*rest, strict=True)]
    options = _lines(shown, lines, axis="% of predictions", by=by)
    for series in options["series"]:
        series["type"] = "bar"
    return options


def _percent(counts: Sequence[int], n_entries: int) -> list[float]:
    """As many as there are entries; a device may leave out those at the end that it never predicted."""
    total = sum(counts) or 1
    return [round(100 * one / total, 2) for one in [*counts, *[0] * (n_entries - len(counts))]]


def _file_of(served: Served) -> str:
    """As exports are called."""
    return f"{served.model}{'.int8' if served.precision == 'int8' else ''}"


def _with_count(name: str, n_devices: int) -> str:
    return f"{name}: {n_devices} serve" if n_devices else name


def _leaves(devices: set[str]) -> list[Options]:
    if len(devices) > MAX_LEAVES:
        return [{"name": f"{len(devices)} devices"}]
    return [{"name": device} for device in sorted(devices)]


def _lines(categories: list[str], lines: dict[str, list[Any]], *, axis: str, by: str = "round") -> Options:
    shown = {name: values for name, values in lines.items() if any(value is not None for value in values)}
    quiet = {"axisLabel": WORDS, "nameTextStyle": {**WORDS, "align": "left"}}
    return {
        "animation": False,
        "color": list(COLOURS),
        "grid": {"left": 8, "right": 16, "top": 56, "bottom": 32, "containLabel": True},
        "legend": {"top": 0, "textStyle": WORDS},
        "tooltip": {"trigger": "axis"},
        "xAxis": {
            "type": "category",
            "data": categories,
            "name": by,
            "nameLocation": "middle",
            "nameGap": 24,
            **quiet,
        },
        "yAxis": {"type": "value", "scale": True, "name": axis, "splitLine": {"lineStyle": {"opacity": 0.2}}, **quiet},
        "series": [
            {"type": "line", "name": name, "data": values, "symbol": symbol, "symbolSize": 8, "connectNulls": True}
            for symbol, (name, values) in zip(itertools.cycle(SYMBOLS), shown.items())
        ],
    }


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else round(value * scale, 4)
