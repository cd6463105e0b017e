"""Follow a run as it goes on, from another terminal: the coordinator's own view, without touching it.

Follows the run's log until the run has ended; a coordinator that is stopped and started again is followed on. Ctrl-C
ends the watching, not the run.

examples:
  reft-edge watch federation.toml                       a table on a terminal, lines elsewhere
  reft-edge watch federation.toml --json                each event as a line of JSON
"""

from __future__ import annotations

import argparse
import sys

from reft_edge.cli.run_arguments import add_run_arguments


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")


def run(args: argparse.Namespace) -> int:
    from reft_edge.coordinator.event_log import event_line, follow_log
    from reft_edge.coordinator.run_files import find_run

    events = follow_log(find_run(args.settings, args.run).log)
    if args.json:
        for event in events:
            sys.stdout.buffer.write(event_line(event))
            sys.stdout.buffer.flush()
        return 0
    from rich.console import Console

    from reft_edge.coordinator.report.live import watcher

    with watcher(Console()) as shown:
        for event in events:
            shown.show(event)
    return 0
