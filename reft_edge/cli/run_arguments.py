"""What commands about a federation have in common: which run, how to print, and how to look at it meanwhile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_edge.coordinator.drift import Departure
    from reft_edge.coordinator.overview import RunOverview


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    parser.add_argument("--run", metavar="RUN", help="a run's name (default: the latest)")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_looking_arguments(parser: argparse.ArgumentParser) -> None:
    """Of commands that go on for long: what they serve meanwhile."""
    parser.add_argument(
        "--dashboard",
        nargs="?",
        const=8080,
        type=port_number,
        metavar="PORT",
        help="serve the dashboard on this machine meanwhile (default: %(const)s)",
    )
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        help="serve figures for Prometheus here (without HOST: on this machine only)",
    )


def port_number(text: str) -> int:
    """A TCP port on the command line. Raises argparse's error."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def at_least_one(text: str) -> int:
    """A count on the command line. Raises argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def load_overview(args: argparse.Namespace) -> RunOverview:
    """How the run stands that `args` name; the fleet alone where models are served and none was trained."""
    from reft_edge.coordinator.overview import overview
    from reft_edge.coordinator.run_files import RunFiles, find_latest, find_run

    files = find_latest(args.settings) if args.run is None else find_run(args.settings, args.run)
    departing: list[Departure] = []
    if any(one.condition.counts is not None for one in files.conditions):
        from reft_edge.coordinator.drift import class_names, departures

        departing = departures(files.conditions, class_names(files.deployments))
    return overview(files.events() if isinstance(files, RunFiles) else [], files, departing=departing)


def print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
