"""Options of the charts, as Apache ECharts takes them. Pure: a report in, a dictionary out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reft_edge.coordinator.report.plots import COLOURS

if TYPE_CHECKING:
    from reft_edge.coordinator.report.record import RunReport

Options = dict[str, Any]

MAX_LEAVES = 12
"""Devices of one variant that the tree names; more are counted."""

INK = "#757b83"
"""Of axes and words: 4.3 to 1 on white, 4.4 to 1 on the dark page."""


def metric_by_round(report: RunReport) -> Options:
    """The global model on test data after each stage; accuracy in per cent."""
    scale = 100 if report.metric == "accuracy" else 1
    stages = {"weighted mean": "averaged", "merged": "merged", "distilled": "distilled"}
    lines = {name: [_scaled(getattr(one, field), scale) for one in report.rounds] for name, field in stages.items()}
    unit = "%" if report.metric == "accuracy" else ""
    return _lines([str(one.round) for one in report.rounds], lines, axis=f"{report.metric} {unit}".strip())


def bytes_by_round(report: RunReport) -> Options:
    """KiB that all devices' links carried, down and up, stacked."""
    numbers = [one.round for one in report.rounds]
    sums = {
        direction: [
            sum(getattr(part, field) for device in report.devices for part in device.rounds if part.round == number)
            / 1024
            for number in numbers
        ]
        for direction, field in (("down", "down_bytes"), ("up", "up_bytes"))
    }
    options = _lines([str(number) for number in numbers], sums, axis="KiB, all devices")
    for series in options["series"]:
        series |= {"type": "bar", "stack": "bytes"}
    return options


def predicted_against_measured(report: RunReport) -> Options:
    """A point for each device and round: seconds without the upload. On the line the planner was right."""
    points = [
        {"name": f"{device.device}, round {one.round}", "value": [one.predicted_s, one.measured_s]}
        for device in report.devices
        for one in device.rounds
        if one.measured_s is not None
    ]
    longest = max((max(point["value"]) for point in points), default=1.0)  # type: ignore[type-var]  # no None above
    axis = {"type": "value", "min": 0, "axisLabel": {"color": INK}, "splitLine": {"show": False}}
    return {
        "animation": False,
        "grid": {"left": 8, "right": 16, "top": 24, "bottom": 32, "containLabel": True},
        "tooltip": {"trigger": "item", "formatter": "{b}"},
        "xAxis": {
            **axis,
            "name": "predicted s",
            "nameLocation": "middle",
            "nameGap": 24,
            "nameTextStyle": {"color": INK},
        },
        "yAxis": {**axis, "name": "measured s", "nameTextStyle": {"color": INK, "align": "left"}},
        "series": [
            {"type": "scatter", "symbolSize": 9, "itemStyle": {"color": COLOURS[0]}, "data": points},
            {
                "type": "line",
                "symbol": "none",
                "silent": True,
                "lineStyle": {"type": "dashed", "color": INK, "opacity": 0.5},
                "data": [[0, 0], [longest, longest]],
            },
        ],
    }


def family_tree(report: RunReport) -> Options:
    """The run, its variants with their devices, and the exported files."""
    variants: dict[str, set[str]] = {}
    for device in report.devices:
        for one in device.rounds:
            variants.setdefault(one.variant, set()).add(device.device)
    children = [
        {"name": "whole model" if not float(name) else f"pruned by {name}", "children": _leaves(devices)}
        for name, devices in sorted(variants.items(), key=lambda item: float(item[0]))
    ]
    if report.exports:
        children.append({"name": "exported", "children": [{"name": f"{one.name}.onnx"} for one in report.exports]})
    label = {"color": INK, "fontSize": 12}
    return {
        "animation": False,
        "series": [
            {
                "type": "tree",
                "data": [{"name": report.model or report.federation, "children": children}],
                "left": 60,
                "right": 160,
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


def _leaves(devices: set[str]) -> list[Options]:
    if len(devices) > MAX_LEAVES:
        return [{"name": f"{len(devices)} devices"}]
    return [{"name": device} for device in sorted(devices)]


def _lines(categories: list[str], lines: dict[str, list[Any]], *, axis: str) -> Options:
    shown = {name: values for name, values in lines.items() if any(value is not None for value in values)}
    quiet = {"axisLabel": {"color": INK}, "nameTextStyle": {"color": INK, "align": "left"}}
    return {
        "animation": False,
        "color": list(COLOURS),
        "grid": {"left": 8, "right": 16, "top": 56, "bottom": 32, "containLabel": True},
        "legend": {"top": 0, "textStyle": {"color": INK}},
        "tooltip": {"trigger": "axis"},
        "xAxis": {
            "type": "category",
            "data": categories,
            "name": "round",
            "nameLocation": "middle",
            "nameGap": 24,
            **quiet,
        },
        "yAxis": {"type": "value", "scale": True, "name": axis, "splitLine": {"lineStyle": {"opacity": 0.2}}, **quiet},
        "series": [
            {"type": "line", "name": name, "data": values, "symbolSize": 7, "connectNulls": True}
            for name, values in shown.items()
        ],
    }


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else round(value * scale, 4)
