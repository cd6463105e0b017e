"""How a federation stands: the run, its round, the accuracy so far, how many devices do what, and what they serve.

Reads what the coordinator has written, so it works beside it, after it, and while it is stopped.

examples:
  reft-edge status federation.toml
  reft-edge status federation.toml --json | jq .phase
  reft-edge status federation.toml --json | jq .deployment.state
  reft-edge status federation.toml --run 20260301-5f3a9c21
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reft_edge.cli.run_arguments import add_json_argument, add_run_arguments, load_overview, print_json
from reft_edge.errors import one_line

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
    from reft_edge.coordinator.report.figures import metric_text
    from reft_edge.coordinator.report.times import time_text

    if found.run:
        place = f"round {found.round} of {found.rounds}" if found.round else "before the first round"
        print(f"federation {found.federation}, run {found.run}, begun {time_text(found.created_at)}")
        print(one_line(f"{place}: {found.phase}" + (f": {found.reason}" if found.reason else "")))
    else:
        print(f"federation {found.federation}: {found.phase}")
    if found.values:
        print(f"{found.metric} by round: " + " ".join(metric_text(value, found.metric) for value in found.values))
    print(f"{len(found.devices)} devices{_counts(Counter(device.state for device in found.devices))}")
    _print_served(found)
    for device in found.devices:
        if device.reason:
            print(one_line(f"  {device.device} ({device.state}): {device.reason}"))
        for reason in device.departs:
            print(f"  {device.device} departs from the others: {reason}")


def _print_served(found: RunOverview) -> None:
    latest = found.deployment
    if latest is not None:
        reason = f" ({latest.reason})" if latest.reason else ""
        state = latest.state.replace("_", " ")
        print(one_line(f"deployment {latest.deployment} of {latest.version}: {state}{reason}{_counts(latest.devices)}"))
    versions = Counter(device.serving.version for device in found.devices if device.serving is not None)
    if versions:
        print("served now: " + ", ".join(f"{version} by {count}" for version, count in versions.most_common()))


def _counts(by_state: Mapping[str, int]) -> str:
    return "".join(f", {count} {state.replace('_', ' ')}" for state, count in sorted(by_state.items()))
