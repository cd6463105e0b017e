"""Bring a version to the devices: canaries first, then the rest, or back again.

A version is a finished run, with the models that it has exported, or an ONNX file of your own. Each device gets the
model that fits it, in float32 and int8, measures both on its own held-out data, takes the better one and switches to it
without losing a request. It keeps what it served before. What does not pass its check is not served.

A few devices, the canaries, go first and are watched for a while. If they refuse it, fail or fall silent, everybody who
was asked is told to go back, and the exit code is 8. Devices that are away get it when they come back.

Stop it whenever you like: the same command goes on where it was, and reft-edge rollback undoes it. While a coordinator
is at work it cannot be used; stop that first, it goes on where it was.

In federation.toml, with what they are without it:

  [deployment]
  canary = 0.1                      # share of the devices that are there; at least one
  canary_devices = ["pi-1"]         # or exactly these
  soak_s = 10                       # how long the canaries are watched
  timeout_s = 600                   # for a device that is there to answer
  max_failed_canaries = 0.0         # share that may refuse, fail or not answer
  max_failed = 0.2                  # share of the rest that may refuse or fail
  latency_s = 0.05                  # a goal for one sample; without it devices get what they trained

  [deployment.rules]                # what a device's own check must show
  max_metric_drop = 0.05            # accuracy on its held-out data, beside what it serves now
  max_int8_drop = 0.01              # int8 is taken where it is faster and no more than this below float32
  min_accuracy = 0.8
  max_latency_s = 0.1               # 95th percentile; the goal if there is one
  max_memory_bytes = 200_000_000
  min_holdout_samples = 10          # with fewer a device compares no accuracy; it is a canary only if all are such

examples:
  reft-edge deploy federation.toml --dry-run                          who would get what, and why?
  reft-edge deploy federation.toml                                    the latest finished run
  reft-edge deploy federation.toml 20260301-5f3a9c21 --canary 0.25
  reft-edge deploy federation.toml --device pi-7 --model global
  reft-edge deploy federation.toml --file better.onnx --as better-1
  reft-edge rollback federation.toml                                  and undo it
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.cli.processes import ending_on_sigterm
from reft_edge.cli.run_arguments import add_json_argument, print_json
from reft_edge.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.deployer import Listener, Progress
    from reft_edge.coordinator.deploying.operations import Prepared
    from reft_edge.coordinator.deploying.releases import Release
    from reft_edge.coordinator.deploying.site import Site
    from reft_edge.coordinator.settings import FederationSettings

_log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    parser.add_argument("version", nargs="?", metavar="VERSION", help="a finished run (default: the latest)")
    parser.add_argument("--file", type=Path, metavar="MODEL.onnx", help="deploy a model of your own; needs --as")
    parser.add_argument("--as", dest="name", metavar="NAME", help="what the version is called (default: as the run)")
    parser.add_argument("--model", default="", metavar="NAME", help="every device gets this one, for example global")
    add_devices_argument(parser, "only to these (default: to all that are known)")
    parser.add_argument("--canary", type=_share, metavar="SHARE", help="share that goes first, from 0 to 1")
    parser.add_argument("--dry-run", action="store_true", help="show who would get what, and tell nobody")
    add_progress_argument(parser)
    add_json_argument(parser)


def add_devices_argument(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument(
        "--device", dest="devices", nargs="+", action="extend", default=[], metavar="DEVICE", help=meaning
    )


def add_progress_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("auto", "rich", "plain", "json"),
        default="auto",
        help="how to show what goes on: a table or lines on standard error, or JSON lines on standard output",
    )


def run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    from reft_edge.coordinator.settings import load_federation

    settings = load_federation(args.settings)
    from reft_edge.coordinator.deploying.site import open_site

    with ending_on_sigterm(), open_site(settings, args.settings.resolve().parent) as site:
        try:
            return _deploy(site, args)
        except KeyboardInterrupt:
            print(
                f"What was said stays said. To go on: the same command again. To undo it: reft-edge rollback "
                f"{args.settings}",
                file=sys.stderr,
            )
            raise


def _check_arguments(args: argparse.Namespace) -> None:
    if args.file is not None and args.name is None:
        raise ConfigError("--file needs --as NAME: what the version is called")
    if args.file is not None and args.version is not None:
        raise ConfigError(f"give a VERSION or --file, not both: {args.version!r} and {str(args.file)!r}")
    if args.json and args.progress == "json":
        raise ConfigError("--json and --progress json both write to standard output; choose one")


def _deploy(site: Site, args: argparse.Namespace) -> int:
    from reft_edge.coordinator.deploying.operations import finish_rollback, forget_unused, unfinished_rollback

    release = _release(site, args)
    site.settle()
    try:
        undone = unfinished_rollback(site)
        if undone is not None and not args.dry_run:
            _log.warning("version %s was being rolled back; that comes first", undone.version)
            with listener_for(args.progress, metric_of(site.settings)) as listener:
                outcome = finish_rollback(site, undone, listener=listener)
            if undone.version == release.version:
                return _finish(site, outcome, args)
        return _roll_out(site, release, args)
    finally:
        forget_unused(site, release)


def _roll_out(site: Site, release: Release, args: argparse.Namespace) -> int:
    from reft_edge.coordinator.deploying.operations import deploy, prepare_deployment
    from reft_edge.coordinator.deploying.planning import Wishes

    wishes = Wishes(devices=tuple(args.devices), model=args.model, canary=args.canary)
    prepared = prepare_deployment(site, release, wishes)
    if args.dry_run or not (prepared.plan.is_needed or prepared.goes_on):
        _show_plan(prepared, args)
        return 0
    for left_out in prepared.plan.left_out:
        _log.warning("%s is left out: %s", left_out.device, left_out.reason)
    if prepared.goes_on is not None:
        _log.info("going on with the deployment of version %s", prepared.goes_on.version)
    with listener_for(args.progress, metric_of(site.settings)) as listener:
        outcome = deploy(site, prepared, listener=listener)
    return _finish(site, outcome, args)


def _release(site: Site, args: argparse.Namespace) -> Release:
    from reft_edge.coordinator.deploying.releases import choose_run, release_file, release_run

    model = site.settings.model
    if args.file is not None:
        return release_file(args.file, args.name, site.blobs, model)
    record = choose_run(site.store, site.settings.federation, args.version)
    return release_run(site.store, site.blobs, record.run, model, version=args.name or "")


def _finish(site: Site, outcome: Progress, args: argparse.Namespace) -> int:
    """Show how it ended. 0 when every device that is there serves it."""
    if args.json:
        print_json({"deployment": outcome.record, "devices": outcome.devices})
    elif args.progress != "json":
        show_outcome(outcome, site.settings)
    present = site.present()
    missing = [part for part in outcome.devices if part.device in present and part.state != "serving"]
    return FederationError.exit_code if outcome.record.state != "done" or missing else 0


def _show_plan(prepared: Prepared, args: argparse.Namespace) -> None:
    plan, version = prepared.plan, prepared.release.version
    if args.json:
        print_json({"version": version, "devices": plan.parts, "left_out": plan.left_out})
        return
    from rich.console import Console

    from reft_edge.coordinator.deploying.live import print_plan

    print_plan(version, plan, Console())
    if not plan.is_needed and prepared.goes_on is None:
        print(f"Every device serves version {version}, or takes it when it comes back. Nothing to do.")


@contextlib.contextmanager
def listener_for(progress: str, metric: str) -> Iterator[Listener]:
    """Shows a deployment as it goes on."""
    if progress == "json":
        yield _write_progress
        return
    from rich.console import Console

    from reft_edge.coordinator.deploying.live import PlainWatcher, TableWatcher, Watcher, watcher

    console = Console(stderr=True)
    shown: Watcher
    if progress == "rich":
        shown = TableWatcher(console, metric)
    elif progress == "plain":
        shown = PlainWatcher(lambda line: print(line, file=sys.stderr, flush=True), metric)
    else:
        shown = watcher(console, metric)
    with shown:
        yield shown.show


def show_outcome(outcome: Progress, settings: FederationSettings) -> None:
    from rich.console import Console

    from reft_edge.coordinator.deploying.live import print_outcome

    print_outcome(
        outcome.record,
        outcome.devices,
        Console(),
        metric_of(settings),
        min_holdout_samples=settings.deployment.rules.min_holdout_samples,
    )


def metric_of(settings: FederationSettings) -> str:
    """What devices measure on their held-out data."""
    from reft_edge.bundle.manifest import CrossEntropy

    return "accuracy" if isinstance(settings.model.loss_function, CrossEntropy) else "mse"


def _write_progress(progress: Progress) -> None:
    import msgspec

    record = progress.record
    line = {
        "deployment": record.deployment,
        "version": record.version,
        "state": record.state,
        "reason": record.reason,
        "since": record.since,
        "changed": progress.changed,
    }
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value
