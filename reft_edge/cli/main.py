"""The `reft-edge` command: finds the subcommand, runs it, turns errors into one line and an exit code.

Every subcommand is a module of this package with `configure(parser)` and `run(args) -> int`; its docstring is the help
text. Only the module that is asked for is imported, so that the agent never pays for the coordinator's imports.

Exit codes: 0 success; 2 wrong arguments or settings; 3 data; 4 model; 5 no plan; 6 bundle; 7 broker; 8 federation
failed; 9 out of memory or disk; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

import reft_edge
from reft_edge import logs
from reft_edge.errors import ConfigError, ReftError

_log = logging.getLogger(__name__)


class Command(NamedTuple):
    """Where a subcommand is, and what it needs."""

    module: str
    summary: str
    extra: str
    """The optional dependencies, `pip install reft-edge[extra]`, with which it works."""


COMMANDS = {
    "demo": Command("reft_edge.cli.demo", "run a whole federation on this machine", "demo"),
    "new": Command("reft_edge.cli.new", "write a starter project that runs at once", "agent"),
    "profile-device": Command("reft_edge.cli.profile_device", "measure what this device can do", "agent"),
    "plan": Command("reft_edge.cli.plan", "show what each device would train, and what it would cost", "coordinator"),
    "agent": Command("reft_edge.cli.agent", "run the agent: train here, on this device's own data", "agent"),
    "predict": Command("reft_edge.cli.predict", "predict files with the model that this device serves", "agent"),
    "serve": Command("reft_edge.cli.serve", "answer predictions over HTTP on this device", "agent"),
    "benchmark": Command("reft_edge.cli.benchmark", "how fast models predict on this device", "agent"),
    "coordinator": Command(
        "reft_edge.cli.coordinator", "run the coordinator: plan, send, merge, distil", "coordinator"
    ),
    "deploy": Command("reft_edge.cli.deploy", "bring a version to the devices: canaries, then the rest", "coordinator"),
    "rollback": Command("reft_edge.cli.rollback", "undo the last deployment", "coordinator"),
    "monitor": Command("reft_edge.cli.monitor", "watch the fleet between runs", "coordinator"),
    "status": Command("reft_edge.cli.status", "how a federation stands", "coordinator"),
    "devices": Command("reft_edge.cli.devices", "its devices: what each is, trains and does", "coordinator"),
    "rounds": Command("reft_edge.cli.rounds", "its rounds: accuracy, updates, time and bytes", "coordinator"),
    "watch": Command("reft_edge.cli.watch", "follow a run as it goes on", "coordinator"),
    "dashboard": Command("reft_edge.cli.dashboard", "look at a federation in a browser", "dashboard"),
    "report": Command("reft_edge.cli.report", "a run as one HTML page", "coordinator"),
    "provision": Command("reft_edge.cli.provision", "give out certificates, renew and revoke them", "agent"),
    "quarantine": Command("reft_edge.cli.quarantine", "devices that get no tasks: list, lift or add", "coordinator"),
    "broker": Command("reft_edge.cli.broker", "run a broker on this machine, for trying out", "demo"),
    "completion": Command("reft_edge.cli.completion", "complete commands and options in your shell", "agent"),
}
"""Summaries stand here so that `--help` imports nothing."""

EPILOG = """\
examples:
  reft-edge demo                                    the whole loop with four emulated boards
  reft-edge new my-federation                       a project of your own to start from
  reft-edge profile-device --output board.toml      on a board: what can it do?
  reft-edge plan --model vgg16 --profile board.toml
  reft-edge coordinator federation.toml             on a laptop
  reft-edge agent agent.toml                        on every device
  reft-edge deploy federation.toml                  the run's models, to the devices; rollback undoes it
  reft-edge predict picture.jpg                     on a device, with what it serves; serve does it over HTTP
  reft-edge status federation.toml                  how does it stand? devices, rounds and watch say more

`reft-edge COMMAND --help` tells more about each.
"""


def entry_point() -> None:
    """Console script: run and exit with the code of `main`."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `reft-edge` command line; returns the exit code and never raises for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return _run_command(arguments[0], arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        from reft_edge.config import did_you_mean

        print(
            f"reft-edge: error: there is no command {arguments[0]!r}{did_you_mean(arguments[0], list(COMMANDS))}",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    top_parser().parse_args(arguments or ["--help"])  # prints help, version or the error, and exits
    return ConfigError.exit_code


def top_parser() -> argparse.ArgumentParser:
    """Knows the commands by name only; what each takes is in its module."""
    parser = _Parser(
        prog="reft-edge",
        description="Train one model across small devices without moving their data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reft-edge {reft_edge.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    return parser


def _run_command(name: str, arguments: Sequence[str]) -> int:
    try:
        module = importlib.import_module(COMMANDS[name].module)
        args = command_parser(name, module).parse_args(arguments)
        level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
        logs.configure(args.log_format, level)
        code: int = module.run(args)
        sys.stdout.flush()  # a reader that has gone is met here and not while Python ends
    except ReftError as exc:
        return _fail(name, str(exc), exc.exit_code)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith(reft_edge.__name__):
            raise
        hint = f"needs the package {exc.name!r}; install it with: pip install 'reft-edge[{COMMANDS[name].extra}]'"
        return _fail(name, hint, ConfigError.exit_code)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); what Python would flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as exc:
        if isinstance(exc.__context__, BrokenPipeError):  # rich ends the process itself then
            return 0
        raise
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and not after ten lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def command_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Of one subcommand."""
    parser = _Parser(
        prog=f"reft-edge {name}",
        description=(module.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    configure_command(parser, module)
    return parser


def configure_command(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    """Add what all commands take, then what this one takes."""
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="log details to standard error")
    loudness.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    parser.add_argument(
        "--log-format",
        choices=logs.LOG_FORMATS,
        default="text",
        help="log lines as text, or as JSON objects for programs (default: %(default)s)",
    )
    module.configure(parser)


def _fail(name: str, message: str, code: int) -> int:
    line = " ".join(message.splitlines())
    if logs.chosen_format() == "json":
        _log.error("%s", line)
    else:
        print(f"reft-edge {name}: error: {line}", file=sys.stderr)
    return code
