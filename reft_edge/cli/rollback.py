"""Undo the last deployment: each device goes back to what it served before it.

The model from before lies on the device, in its other slot, so nothing has to be fetched. Devices that are away go back
when they return. Started again it tells those that have not answered yet, and changes nothing else. With --device, only
these go back, each from the last version that it was given.

Again, or after a deployment that has undone itself, there is nothing to undo. To go back from what is served then, name
its version: devices return to what they served before it, or to nothing where that does not lie on them any more. To go
further back, deploy an older version again: reft-edge deploy federation.toml VERSION.

examples:
  reft-edge rollback federation.toml
  reft-edge rollback federation.toml 20260301-5f3a9c21
  reft-edge rollback federation.toml --device pi-3 pi-7
  reft-edge rollback federation.toml --json | jq '.[].devices[] | select(.state != "rolled_back")'
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.cli.deploy import add_devices_argument, add_progress_argument, listener_for, metric_of, show_outcome
from reft_edge.cli.processes import ending_on_sigterm
from reft_edge.cli.run_arguments import add_json_argument, print_json
from reft_edge.errors import ConfigError, FederationError, one_line

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.deployer import Progress
    from reft_edge.coordinator.deploying.operations import RolledBack
    from reft_edge.coordinator.deploying.site import Site
    from reft_edge.coordinator.settings import FederationSettings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    parser.add_argument(
        "version", nargs="?", metavar="VERSION", help="undo this one, which is served (default: the last deployment)"
    )
    add_devices_argument(parser, "only these (default: all that got the version)")
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
                outcomes = roll_back(site, args.devices, version=args.version, listener=listener)
        except KeyboardInterrupt:
            print("Who was told goes back. To go on: the same command again.", file=sys.stderr)
            raise
        served, idle = _served(site), _idle(site, outcomes)
    if args.json:
        print_json([_as_json(outcome) for outcome in outcomes])
    elif args.progress != "json":
        for outcome in outcomes:
            _show(outcome, settings, served)
        if idle:
            print(
                f"{len(idle)} now serve nothing, because no version from before lies on them: {', '.join(idle)}; "
                f"reft-edge deploy {args.settings} VERSION gives them one"
            )
        if not any(outcome.was_needed for outcome in outcomes):
            print(f"To go back from what is served, name it: reft-edge rollback {args.settings} VERSION")
    silent = [part.device for outcome in outcomes for part in outcome.progress.devices if part.state == "late"]
    return FederationError.exit_code if silent else 0


def _as_json(outcome: RolledBack) -> dict[str, object]:
    progress = outcome.progress
    return {"deployment": progress.record, "devices": progress.devices, "was_needed": outcome.was_needed}


def _show(outcome: RolledBack, settings: FederationSettings, served: str) -> None:
    if outcome.was_needed:
        show_outcome(outcome.progress, settings)
        _print_hint(outcome.progress)
    else:
        record = outcome.progress.record
        print(one_line(f"Nothing to undo: version {record.version} was rolled back already; {served}."))
        print(one_line(f"Why: {record.reason}"))


def _served(site: Site) -> str:
    """What the devices that are there serve, the most frequent first."""
    there = site.present()
    served = [condition.serving for device, condition in site.conditions.items() if device in there]
    counts = Counter("nothing" if one is None else f"version {one.version}" for one in served)
    found = [f"{what} ({n} device{'' if n == 1 else 's'})" for what, n in counts.most_common()]
    return f"served is {', '.join(found)}" if found else "no device is there"


def _idle(site: Site, outcomes: Sequence[RolledBack]) -> list[str]:
    """Devices that went back to nothing."""
    back = [part.device for one in outcomes for part in one.progress.devices if part.state == "rolled_back"]
    told = {device: condition for device, condition in site.conditions.items() if device in site.present()}
    return [device for device in back if device in told and told[device].serving is None]


def _print_hint(outcome: Progress) -> None:
    away = [part.device for part in outcome.devices if part.state == "away"]
    if away:
        print(f"{len(away)} away; they go back when they return: {', '.join(away)}")
