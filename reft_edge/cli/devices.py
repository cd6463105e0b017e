"""The devices of a federation: what each trains and serves, what it does now, and what became of its updates.

`planned` and `took` are the seconds of the latest round, without the upload. Once something was deployed, `serves` is
in their place: the version that each predicts with, as float32 or int8; a device whose predictions depart from the
others' is named below. `updates` are those that counted, of all that were announced in this run. `heard` is how long
ago the coordinator last heard of the device. A temperature stands beside the state where a device was throttled. --json
says all that is known, with the kind of each device.
`reft-edge quarantine` says more about those that get no tasks, and lifts them.

examples:
  reft-edge devices federation.toml
  reft-edge devices federation.toml --json | jq '.[] | select(.state == "offline") | .device'
  reft-edge devices federation.toml --json | jq '.[] | {device, version: .serving.version, departs}'
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from reft_edge.cli.run_arguments import add_json_argument, add_run_arguments, load_overview, print_json
from reft_edge.errors import one_line

if TYPE_CHECKING:
    from reft_edge.coordinator.overview import DeviceOverview


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    devices = load_overview(args).devices
    if args.json:
        print_json(devices)
    elif devices:
        _print(devices)
    else:
        print("No device was ever heard of.")
    return 0


def _print(devices: list[DeviceOverview]) -> None:
    from rich.console import Console
    from rich.text import Text

    from reft_edge.coordinator.overview import served_text
    from reft_edge.coordinator.report.figures import seconds_text
    from reft_edge.coordinator.report.terminal import new_table, right_aligned
    from reft_edge.coordinator.report.times import age_text

    table = new_table("", "device")
    table.add_column("state", no_wrap=True)
    somebody_serves = any(one.serving is not None for one in devices)
    right_aligned(table, "model", "updates", *(() if somebody_serves else ("planned", "took")), "heard")
    if somebody_serves:
        table.add_column("serves", overflow="fold")
    for one in devices:
        times = (seconds_text(one.predicted_s), seconds_text(one.measured_s))
        table.add_row(
            one.device,
            _state(one),
            "-" if one.share is None else f"{one.share:.0%}",
            f"{one.counted} of {one.announced}",
            *(() if somebody_serves else times),
            age_text(one.seen_at, time.time()),
            *((Text(one_line(served_text(one.serving))),) if somebody_serves else ()),  # a device's own words
        )
    console = Console()
    console.print(table)
    for one in devices:
        for reason in one.departs:
            console.print(f"{one.device} departs from the others: {reason}", markup=False, soft_wrap=True)


def _state(one: DeviceOverview) -> str:
    if one.state == "training" and one.steps_total:
        return f"training {one.steps_done / one.steps_total:.0%}"
    if one.throttled:
        return (
            f"{one.state}, hot" if one.temperature_celsius is None else f"{one.state}, {one.temperature_celsius:.0f} °C"
        )
    return one.state
