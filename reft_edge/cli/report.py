"""The report of a run as one HTML page that needs nothing else, for any run, finished or not.

RUN is the federation's settings file, which means its latest run, or a run's folder, also one that was copied from
elsewhere: all that is needed of it is events.jsonl. Of a settings file the report also tells what devices made of the
run, if it is what was deployed last.

--tensorboard DIR writes the run's curves for TensorBoard instead, into a folder of its own below DIR, so that several
runs stand side by side; `tensorboard --logdir DIR` shows them. coordinator --tensorboard does so while the run goes on.

examples:
  reft-edge report federation.toml                           writes report.html here
  reft-edge report federation/20260301-5f3a9c21 --output 1.html
  reft-edge report federation.toml --json > report.json
  reft-edge report federation.toml --tensorboard curves
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.errors import ConfigError, FederationError, ResourceError

if TYPE_CHECKING:
    from reft_edge.coordinator.events import Event
    from reft_edge.coordinator.records import DeployedDevice


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="federation.toml, or a run's folder")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    shape.add_argument("--json", action="store_true", help="print the figures as JSON instead")
    shape.add_argument("--tensorboard", type=Path, metavar="DIR", help="write the curves for TensorBoard instead")


def run(args: argparse.Namespace) -> int:
    events, deployed = _told(args.run)
    if args.tensorboard is not None:
        from reft_edge.coordinator.report.tensorboard import write_run

        print(write_run(events, args.tensorboard))
        return 0
    from reft_edge.coordinator.report.record import gather, to_json

    report = gather(events, deployed=deployed)
    if args.json:
        print(to_json(report).decode())
        return 0
    from reft_edge.coordinator.report.page import to_html

    try:
        args.output.write_text(to_html(report), encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"{args.output} cannot be written: {exc.strerror or exc}; give --output") from exc
    print(args.output)
    return 0


def _told(where: Path) -> tuple[list[Event], list[DeployedDevice]]:
    """The run's events, and the devices of the latest deployment if that was of this run."""
    from reft_edge.coordinator.event_log import EVENTS_FILE, read_log
    from reft_edge.coordinator.run_files import find_run

    if not where.exists():
        raise ConfigError(f"{where} does not exist; give federation.toml, or a run's folder")
    log, deployed = where / EVENTS_FILE, []
    if not where.is_dir():
        files = find_run(where)
        log = files.log
        if files.deployments and files.deployments[0].version == files.record.run:
            deployed = files.deployed
    events = read_log(log)
    if not events:
        raise FederationError(f"{log} tells of nothing; is {log.parent} the folder of a run?")
    return events, deployed
