"""How a federation stands: the run, its round, the accuracy so far, and how many devices do what.

Reads what the coordinator has written, so it works beside it, after it, and while it is stopped.

examples:
  reft-edge status federation.toml
  reft-edge status federation.toml --json | jq .phase
  reft-edge status federation.toml --run 20260301-5f3a9c21
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from reft_edge.cli.run_arguments import add_json_argument, add_run_arguments, load_overview, print_json

if TYPE_CHECKING:
    from reft_edge.coordinator.overview import RunOverview


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    found = load_overview(args)
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _print(found: RunOverview) -> None:
    from reft_edge.coordinator.report.page import metric_text
    from reft_edge.coordinator.report.times import time_text

    place = f"round {found.round} of {found.rounds}" if found.round else "before the first round"
    print(f"federation {found.federation}, run {found.run}, begun {time_text(found.created_at)}")
    print(f"{place}: {found.phase}" + (f": {found.reason}" if found.reason else ""))
    if found.values:
        print(f"{found.metric} by round: " + " ".join(metric_text(value, found.metric) for value in found.values))
    states = Counter(device.state for device in found.devices)
    print(f"{len(found.devices)} devices" + "".join(f", {count} {state}" for state, count in sorted(states.items())))
    for device in found.devices:
        if device.reason:
            print(f"  {device.device} ({device.state}): {device.reason}")
