"""Write a starter project into a new folder: settings, a model, made-up data, and a script that runs it at once.

Three machines with an accelerometer each; the comments say what to change for your own data and model.

examples:
  reft-edge new my-federation && my-federation/run
  reft-edge new projects/presses --federation presses
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reft_edge.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="FOLDER", help="a folder that is empty or not there yet")
    parser.add_argument("--federation", metavar="NAME", help="the federation's name (default: the folder's)")


def run(args: argparse.Namespace) -> int:
    from reft_edge.starter.project import write_project
    from reft_edge.wire.topics import check_name

    name = args.federation if args.federation is not None else args.directory.resolve().name
    try:
        check_name(name, "federation")
    except ConfigError as exc:
        raise ConfigError(f"{exc}; name one with --federation") from exc
    for path in write_project(args.directory, federation=name):
        print(path)
    print(f"\nRun it: {args.directory / 'run'}    Then read {args.directory / 'README.md'}")
    return 0
