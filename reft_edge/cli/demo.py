"""Run a whole federation on this machine: a broker, a coordinator and four agents, each a process of its own.

Each agent is slowed and short of memory like a small board, and has its own uneven part of scikit-learn's handwritten
digits. The coordinator plans, prunes, compiles, sends, merges, distils and exports. The result is deployed to the four,
each of which measures it on data of its own before it serves it. At the end the same net is trained on all the data in
one place, to compare with. Takes one to three minutes on two cores; Ctrl-C ends everything.

It is set up as a real fleet: an authority of its own gives everybody a key and a certificate, and tasks and updates are
signed. With Mosquitto all connections are mutual TLS, too; the embedded broker does not have it, and one that runs
anyway is reached over plain TCP.

Writes the run's folder: provisioning/ with the keys, federation.toml, a folder a device, logs, models, report.html and
report.json. Look into it to see how a fleet of your own would look.

examples:
  reft-edge demo
  reft-edge demo --quick                       two short rounds, to see that it works
  reft-edge demo --rounds 8 --seed 3 --output runs/eight
  reft-edge demo --broker mosquitto            or embedded, or HOST:PORT of one that runs
  reft-edge demo --json > figures.json
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from reft_edge.errors import BrokerError, ConfigError, ResourceError

if TYPE_CHECKING:
    from reft_edge.coordinator.report.live import Watcher
    from reft_edge.coordinator.report.record import CentralFigures, RunReport
    from reft_edge.simulation.digits import Digits
    from reft_edge.simulation.run_directory import DemoOptions
    from reft_edge.simulation.trust import TrustedBroker
    from reft_edge.wire.endpoint import BrokerSettings

DEFAULT_OUTPUT = Path("demo-run")
QUICK_ROUNDS = 2
TIMEOUT_S_A_ROUND = 120.0
"""Beyond start-up; a round takes ten seconds on a quiet machine."""

START_TIMEOUT_S = 300.0

DEPLOY_TIMEOUT_S = 180.0
"""It takes ten seconds on a quiet machine."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--broker",
        default="auto",
        metavar="KIND|HOST:PORT",
        help="auto (mosquitto where it is installed), embedded, mosquitto, or the address of one that runs",
    )
    parser.add_argument("--rounds", type=_positive, help="rounds of the federation")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and training (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="the run's folder (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from reft_edge.coordinator.report.live import watcher
    from reft_edge.coordinator.report.terminal import print_report
    from reft_edge.simulation.run_directory import make_empty

    began = time.monotonic()
    options = _options(args)
    directory = make_empty(args.output)
    with _ending_on_sigterm():
        with watcher(Console(stderr=True)) as shown:
            report = _play(options, directory, args.broker, shown, began)
        _write(report, directory)
    if args.json:
        sys.stdout.write((directory / "report.json").read_text(encoding="utf-8"))
    else:
        console = Console()
        print_report(report, console)
        console.print(f"Report: {directory / 'report.html'}", soft_wrap=True, highlight=False)
    return 0


def _options(args: argparse.Namespace) -> DemoOptions:
    import msgspec

    from reft_edge.simulation.run_directory import DemoOptions

    if not 0 <= args.seed <= 2**31:
        raise ConfigError(f"--seed {args.seed} is outside 0 to {2**31}")
    options = DemoOptions(seed=args.seed)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else options.rounds)
    return msgspec.structs.replace(options, rounds=rounds)


def _play(options: DemoOptions, directory: Path, broker: str, shown: Watcher, began: float) -> RunReport:
    """The federation, its deployment, then central training; everything that was started has ended."""
    from reft_edge.coordinator.report.record import gather
    from reft_edge.simulation.children import Children
    from reft_edge.simulation.digits import load_digits_split
    from reft_edge.simulation.fleet import deploy_run, run_fleet
    from reft_edge.simulation.run_directory import prepare

    events = []
    with _broker(broker, directory) as trusted, Children() as children:
        shown.say(trusted.words)
        digits = load_digits_split(len(options.boards), alpha=options.alpha, seed=options.seed)
        agents = prepare(directory, options, digits, trusted)
        timeout_s = START_TIMEOUT_S + options.rounds * TIMEOUT_S_A_ROUND
        for event in run_fleet(directory, agents, children=children, timeout_s=timeout_s):
            events.append(event)
            shown.show(event)
        shown.say("deploying the run to its devices")
        deployed = deploy_run(directory, children=children, timeout_s=DEPLOY_TIMEOUT_S)
    central = _central(options, digits, directory, shown)
    setting = {
        "data": f"scikit-learn digits, Dirichlet({options.alpha:g}) over {len(options.boards)} devices",
        "seed": str(options.seed),
        "deadline": f"{options.deadline_s:g} s",
        "security": trusted.words,
    }
    return gather(events, deployed=deployed, central=central, seconds=time.monotonic() - began, setting=setting)


def _central(options: DemoOptions, digits: Digits, directory: Path, shown: Watcher) -> CentralFigures:
    """Train the federation's net, from the same initial weights, on all private data."""
    import torch

    from reft_edge.coordinator.catalogue import initial_model
    from reft_edge.coordinator.settings import load_federation
    from reft_edge.simulation.central import CentralOptions, train_centrally
    from reft_edge.simulation.run_directory import FEDERATION_FILE

    settings = load_federation(directory / FEDERATION_FILE)
    torch.set_num_threads(1)  # batches this small are no work to share; on a busy machine sharing takes minutes
    shown.say("training the same net centrally, to compare")
    return train_centrally(
        initial_model(settings.model, base_dir=directory, seed=settings.seed),
        digits.private,
        digits.test,
        CentralOptions(
            epochs=options.rounds * options.local_epochs,
            batch_size=settings.training.batch_size,
            learning_rate=settings.training.learning_rate,
            optimizer=settings.model.optimizer,
            loss=settings.model.loss_function,
            seed=settings.seed,
        ),
    )


@contextlib.contextmanager
def _broker(wanted: str, directory: Path) -> Iterator[TrustedBroker]:
    """A broker of the wanted kind that runs for the length of the block, or the address of one that runs anyway."""
    from reft_edge.simulation.run_directory import FEDERATION
    from reft_edge.simulation.trust import start_trusted_broker, trust_at

    match wanted:
        case "auto" | "embedded" | "mosquitto":
            with start_trusted_broker(wanted, directory=directory, federation=FEDERATION) as trusted:
                yield trusted
        case _:
            yield trust_at(_address(wanted), directory=directory, federation=FEDERATION)


def _address(text: str) -> BrokerSettings:
    """Raises `ConfigError` unless `text` is HOST:PORT, and `BrokerError` when nobody listens there."""
    import socket

    from reft_edge.wire.endpoint import BrokerSettings

    host, separator, port = text.rpartition(":")
    if not (separator and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--broker {text!r} is neither auto, embedded or mosquitto nor HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as exc:
        raise BrokerError(
            f"no broker answers at {text}: {exc.strerror or exc}; start it, or leave out --broker"
        ) from exc
    return BrokerSettings(host=host, port=int(port))


def _write(report: RunReport, directory: Path) -> None:
    from reft_edge.coordinator.report.page import to_html
    from reft_edge.coordinator.report.record import to_json

    try:
        (directory / "report.json").write_bytes(to_json(report) + b"\n")
        (directory / "report.html").write_text(to_html(report), encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"the report cannot be written to {directory}: {exc.strerror or exc}") from exc


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C does, so that every `with` ends what it started."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
