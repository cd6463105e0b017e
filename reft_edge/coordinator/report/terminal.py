"""The report as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from reft_edge.coordinator.report.figures import bytes_text, metric_text, seconds_text

if TYPE_CHECKING:
    from reft_edge.coordinator.report.record import DeviceFigures, RunReport


def print_report(report: RunReport, console: Console) -> None:
    """Rounds, devices, what was rejected, exported and deployed, and the final figure beside central training."""
    console.print(rounds_table(report))
    console.print(_devices(report))
    for rejected in report.rejected:
        console.print(
            f"Rejected in round {rejected.round}, {rejected.device}: {rejected.reason}", markup=False, soft_wrap=True
        )
    for device in report.quarantined:
        console.print(f"In quarantine, {device.device}: {device.reason}", markup=False, soft_wrap=True)
    if report.exports:
        console.print(_exports(report))
    if report.deployed:
        console.print(_deployed(report))
    ours = metric_text(report.value, report.metric)
    line = f"Federation: {report.metric} [bold]{ours}[/bold] on test data"
    if report.central is not None:
        theirs = metric_text(report.central.value, report.metric)
        line += f"; the same net trained centrally on the pooled data: [bold]{theirs}[/bold]"
        if report.value is not None and report.metric == "accuracy":
            line += f" ({100 * (report.value - report.central.value):+.1f} points)"
    console.print(line, soft_wrap=True)


def rounds_table(report: RunReport) -> Table:
    """A row a round; bytes are those of all devices together."""
    table = new_table(f"{report.federation}: {report.metric} on test data", "round")
    right_aligned(table, "mean", "merged", "distilled", "updates", "down", "up", "time")
    for one in report.rounds:
        parts = [part for device in report.devices for part in device.rounds if part.round == one.round]
        table.add_row(
            str(one.round),
            metric_text(one.averaged, report.metric),
            metric_text(one.merged, report.metric),
            metric_text(one.distilled, report.metric),
            f"{one.updates} of {one.asked}",
            bytes_text(sum(part.down_bytes for part in parts)),
            bytes_text(sum(part.up_bytes for part in parts)),
            seconds_text(one.seconds),
        )
    return table


def _devices(report: RunReport) -> Table:
    unpruned = bytes_text(report.unpruned_bytes)
    table = new_table(f"Devices, all rounds (unpruned float32: {unpruned} each way)", "device")
    right_aligned(table, "model", "down", "up", "predicted", "measured")
    for device in report.devices:
        predicted, measured = mean_times(device)
        table.add_row(
            device.device,
            f"{device.share:.0%}",
            bytes_text(device.down_bytes),
            bytes_text(device.up_bytes),
            seconds_text(predicted),
            seconds_text(measured),
        )
    return table


def mean_times(device: DeviceFigures) -> tuple[float | None, float | None]:
    """Mean predicted and measured seconds of a round, over the rounds that were measured."""
    pairs = [(one.predicted_s, one.measured_s) for one in device.rounds if one.measured_s is not None]
    if not pairs:
        return None, None
    return sum(predicted for predicted, _ in pairs) / len(pairs), sum(measured for _, measured in pairs) / len(pairs)


def _exports(report: RunReport) -> Table:
    table = new_table("Exported models", "file")
    right_aligned(table, "size", report.metric)
    for one in report.exports:
        size = one.values.get("size_bytes")
        value = metric_text(one.values.get(report.metric), report.metric)
        table.add_row(f"{one.name}.onnx", "-" if size is None else bytes_text(size), value)
    return table


def _deployed(report: RunReport) -> Table:
    table = new_table(f"Deployed, {report.metric} on each device's own held-out data", "device")
    table.add_column("model", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    right_aligned(table, report.metric)
    table.add_column("state", no_wrap=True)
    for one in report.deployed:
        value = metric_text(one.value, report.metric)
        if one.value is not None:
            value += f" of {one.holdout_samples}"
        table.add_row(one.device, one.model, one.precision or "-", value, one.state.replace("_", " "))
    return table


def new_table(title: str, first_column: str) -> Table:
    """Fits 80 characters, the width of a terminal that nobody has widened."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first_column, no_wrap=True)
    return table


def right_aligned(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
