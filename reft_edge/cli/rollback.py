"""Undo the last deployment: each device goes back to what it served before it.

The model from before lies on the device, in its other slot, so nothing has to be fetched. Devices that are away go back
when they return. Started again it tells those that have not answered yet, and changes nothing else. With --device, only
these go back, each from the last version that it was given.

examples:
  reft-edge rollback federation.toml
  reft-edge rollback federation.toml --device pi-3 pi-7
  reft-edge rollback federation.toml --json | jq '.[].devices[] | select(.state != "rolled_back")'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.cli.deploy import add_progress_argument, listener_for, metric_of, show_outcome
from reft_edge.cli.processes import ending_on_sigterm
from reft_edge.cli.run_arguments import add_json_argument, print_json
from reft_edge.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.deployer import Progress


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    parser.add_argument(
        "--device",
        dest="devices",
        nargs="+",
        action="extend",
        default=[],
        metavar="DEVICE",
        help="only these (default: all that got the last version)",
    )
    add_progress_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.json and args.progress == "json":
        raise ConfigError("--json and --progress json both write to standard output; choose one")
    from reft_edge.coordinator.settings import load_federation

    settings = load_federation(args.settings)
    from reft_edge.coordinator.deploying.operations import roll_back
    from reft_edge.coordinator.deploying.site import open_site

    with ending_on_sigterm(), open_site(settings, args.settings.resolve().parent) as site:
        site.settle()
        try:
            with listener_for(args.progress, metric_of(settings)) as listener:
                outcomes = roll_back(site, args.devices, listener=listener)
        except KeyboardInterrupt:
            print("Who was told goes back. To go on: the same command again.", file=sys.stderr)
            raise
        silent = [part.device for outcome in outcomes for part in outcome.devices if part.state == "late"]
    if args.json:
        print_json([{"deployment": outcome.record, "devices": outcome.devices} for outcome in outcomes])
    elif args.progress != "json":
        for outcome in outcomes:
            show_outcome(outcome, settings)
            _print_hint(outcome)
    return FederationError.exit_code if silent else 0


def _print_hint(outcome: Progress) -> None:
    away = [part.device for part in outcome.devices if part.state == "away"]
    if away:
        print(f"{len(away)} away; they go back when they return: {', '.join(away)}")
