"""The rounds of a run: accuracy after merging and after distilling, updates, time, and bytes down and up.

examples:
  reft-edge rounds federation.toml
  reft-edge rounds federation.toml --json | jq '.[-1].distilled'
"""

from __future__ import annotations

import argparse

from reft_edge.cli.run_arguments import add_json_argument, add_run_arguments, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    from reft_edge.coordinator.report.record import gather
    from reft_edge.coordinator.run_files import find_run

    report = gather(find_run(args.settings, args.run).events())
    if args.json:
        print_json(report.rounds)
    elif report.rounds:
        from rich.console import Console

        from reft_edge.coordinator.report.terminal import rounds_table

        Console().print(rounds_table(report))
    else:
        print("No round has been merged yet.")
    return 0
