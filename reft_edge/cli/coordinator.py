"""Run the coordinator: wait for devices, then plan, send, collect, merge and distil, round by round, and export.

Stop it whenever you like, with Ctrl-C or worse: started again with the same file it goes on where it was. Results go to
the output directory: models as ONNX, a report, and the coordinator's memory.

A settings file:

  federation = "birds"
  rounds = 5
  min_devices = 3                   # wait for so many before the first round
  deadline_s = 1800                 # what a round may take
  quorum = 0.6                      # share of the devices whose updates are needed

  [broker]
  host = "broker.local"

  [trust]                           # made by reft-edge provision; without it nothing is signed
  key_file = "coordinator.key"      # signs tasks; what devices say must be signed, too
  ca_file = "ca.pem"
  crl_file = "revoked.pem"

  [model]
  name = "vgg_small"                # of the zoo; or "mymodel:build", a function in mymodel.py beside this file
  input_shape = [3, 32, 32]
  classes = ["robin", "wren", "blackbird"]

  [data]
  public = { path = "public", labelled = false }
  test = { path = "test" }

  [rejection]                       # updates of no use are kept in the folder "rejected" of the output directory
  quarantine_after = 3              # so many in a row, and a device gets no more tasks; see reft-edge quarantine

examples:
  reft-edge coordinator federation.toml --check                       model, data, every variant: all right?
  reft-edge coordinator federation.toml --check --profile pi.toml     and what would this board train?
  reft-edge coordinator federation.toml
  reft-edge coordinator federation.toml --new-run                     begin anew instead of going on
  reft-edge coordinator federation.toml --dashboard                   and look at http://localhost:8080/
  reft-edge coordinator federation.toml --metrics 9464                figures at http://127.0.0.1:9464/metrics
  reft-edge coordinator federation.toml --tensorboard                 curves in federation/tensorboard
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge import logs
from reft_edge.cli.processes import dashboard_beside, ending_on_sigterm
from reft_edge.cli.run_arguments import add_looking_arguments
from reft_edge.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from reft_edge.coordinator.events import Event, Listener
    from reft_edge.coordinator.preparation import Preparation
    from reft_edge.coordinator.report.live import Watcher
    from reft_edge.coordinator.server import Summary

_log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the settings file")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on with the run that was begun (the default)")
    begin.add_argument("--new-run", action="store_true", help="begin anew, whatever was begun before")
    parser.add_argument("--check", action="store_true", help="validate everything and compile, then exit")
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE.toml",
        help="with --check: plan for these device profiles",
    )
    parser.add_argument(
        "--progress",
        choices=("auto", "rich", "plain", "json"),
        default="auto",
        help="how to show what goes on: a table or lines on standard error, or JSON lines on standard output",
    )
    parser.add_argument(
        "--events", dest="progress", action="store_const", const="json", help="short for --progress json"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    add_looking_arguments(parser)
    parser.add_argument(
        "--tensorboard",
        nargs="?",
        const="",
        metavar="DIR",
        help="write the run's curves for TensorBoard below DIR (default: tensorboard in the output directory)",
    )


def run(args: argparse.Namespace) -> int:
    if args.json and args.progress == "json":
        raise ConfigError("--json and --progress json both write to standard output; choose one")
    if args.profile and not args.check:
        raise ConfigError("--profile is for --check; a running coordinator takes profiles from the devices")
    from reft_edge.coordinator.settings import load_federation

    settings = load_federation(args.settings)

    from reft_edge.coordinator.preparation import prepare

    preparation = prepare(settings, args.settings.resolve().parent)
    if args.check:
        return _check(preparation, args)
    with ending_on_sigterm():
        try:
            return _run(preparation, args)
        except KeyboardInterrupt:
            logs.say(f"The devices keep their tasks. To go on: reft-edge coordinator {args.settings}")
            raise


def _run(preparation: Preparation, args: argparse.Namespace) -> int:
    from reft_edge.coordinator.server import Coordinator

    with (
        dashboard_beside(args.settings, args.dashboard),
        _listener(args.progress) as show,
        _with_metrics(show, args.metrics, args.settings) as show,
        _with_tensorboard(show, args.tensorboard, preparation.directory) as listener,
    ):
        summary = Coordinator(preparation, listener=listener, new_run=args.new_run).run()
    if args.json:
        _print_json(summary)
    elif args.progress != "json":
        _print_summary(summary)
    return 0


@contextlib.contextmanager
def _listener(progress: str) -> Iterator[Listener]:
    """Shows events as they come."""
    if progress == "json":
        yield _write_event
        return
    from rich.console import Console

    from reft_edge.coordinator.report.live import PlainWatcher, TableWatcher, watcher

    console = Console(stderr=True)
    shown: Watcher
    if progress == "auto" and logs.chosen_format() == "json":
        yield _log_event(PlainWatcher(lambda line: _log.info("%s", line)))
        return
    if progress == "rich":
        shown = TableWatcher(console)
    elif progress == "plain":
        shown = PlainWatcher(lambda line: print(line, file=sys.stderr))
    else:
        shown = watcher(console)
    with shown:
        yield shown.show


@contextlib.contextmanager
def _with_metrics(show: Listener, address: str | None, settings: Path) -> Iterator[Listener]:
    """`show`, and where an address is given the metrics: of the run from its events, of the fleet from the store."""
    if address is None:
        yield show
        return
    from reft_edge.coordinator.fleet_metrics import FleetFigures
    from reft_edge.coordinator.metrics import Metrics
    from reft_edge.coordinator.run_files import find_fleet
    from reft_edge.metrics_page import serving

    metrics = Metrics()
    metrics.registry.register(FleetFigures(lambda: find_fleet(settings)))

    def tell(event: Event) -> None:
        metrics.show(event)
        show(event)

    with serving(metrics.registry, address) as url:
        _log.info("metrics: %s", url)
        yield tell


@contextlib.contextmanager
def _with_tensorboard(show: Listener, folder: str | None, results: Path) -> Iterator[Listener]:
    """`show`, and where a folder is given (empty: one among the results) the curves as well."""
    if folder is None:
        yield show
        return
    from reft_edge.coordinator.report.tensorboard import LiveScalars

    scalars = LiveScalars(Path(folder) if folder else results / "tensorboard", results=results)
    with contextlib.closing(scalars):

        def tell(event: Event) -> None:
            show(event)
            scalars.show(event)

        yield tell


def _log_event(watcher: Watcher) -> Listener:
    """Log lines that say which device and round they are about."""

    def show(event: Event) -> None:
        with logs.about(device=getattr(event, "device", ""), round=getattr(event, "round", None)):
            watcher.show(event)

    return show


def _write_event(event: Event) -> None:
    from reft_edge.coordinator.event_log import event_line

    sys.stdout.buffer.write(event_line(event))
    sys.stdout.buffer.flush()


def _print_json(result: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())


def _print_summary(summary: Summary) -> None:
    from rich.console import Console

    from reft_edge.coordinator.event_log import EVENTS_FILE, read_log
    from reft_edge.coordinator.report.record import gather
    from reft_edge.coordinator.report.terminal import print_report

    directory = Path(summary.directory)
    console = Console()
    print_report(gather(read_log(directory / EVENTS_FILE)), console)
    if summary.already_finished:
        print(f"Run {summary.run} has finished its {summary.rounds} rounds; --new-run begins anew, more rounds go on.")
    print(f"Models and report: {directory}")


def _check(preparation: Preparation, args: argparse.Namespace) -> int:
    from reft_edge.coordinator.checking import CheckedVariant, check
    from reft_edge.profiling.profile import DeviceProfile

    def tell(variant: CheckedVariant) -> None:
        if not args.quiet:
            print(
                f"ratio {variant.ratio:.3g}: {variant.parameters:,} parameters, "
                f"{variant.forward_macs / 1e6:.4g} million MACs, compiled in {variant.seconds:.1f} s",
                file=sys.stderr,
            )

    report = check(preparation, profiles=[DeviceProfile.read(path) for path in args.profile], tell=tell)
    nobody = bool(report.devices) and not any(device.option for device in report.devices)
    if args.json:
        _print_json(report)
    else:
        print(f"federation {report.federation}: {report.model}, {report.parameters:,} parameters")
        print(f"public data: {report.public_samples} samples; test data: {report.test_samples} samples")
        print(f"variants that compile: {len(report.variants)}")
        if report.unprunable:
            print(f"devices train the whole model or nothing: {report.unprunable}")
        for device in report.devices:
            chosen = "takes no part" if device.option is None else f"ratio {device.option.ratio:.3g}"
            print(f"{device.device}: {chosen}: {device.reason}")
        print("No device can take part." if nobody else "All right.")
    return PlanError.exit_code if nobody else 0
