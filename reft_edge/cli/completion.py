"""Print a script that completes reft-edge's commands, options and files in your shell.

The script is complete in itself: pressing TAB starts no Python, so it is as quick on a small board as elsewhere. Print
it again after an update of reft-edge.

examples:
  reft-edge completion bash > ~/.local/share/bash-completion/completions/reft-edge
  reft-edge completion zsh > ~/.zfunc/_reft-edge              with fpath+=~/.zfunc before compinit in ~/.zshrc
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

SHELLS = ("bash", "zsh")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell to print it for")


def run(args: argparse.Namespace) -> int:
    from shtab import complete

    print(complete(whole_parser(), shell=args.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands with all that they take, for which each has to be imported; `reft-edge` itself never does that."""
    from shtab import DIRECTORY, FILE

    from reft_edge.cli.main import COMMANDS, configure_command, top_parser

    whole = top_parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        configure_command(parser, importlib.import_module(COMMANDS[name].module))
    for action in _actions(whole):
        is_folder = action.metavar in ("DIR", "FOLDER")
        if is_folder or action.type is Path or action.metavar == "FILE":
            action.complete = DIRECTORY if is_folder else FILE  # type: ignore[attr-defined]
    return whole


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments, those of commands within commands as well; argparse has no public way to ask."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
