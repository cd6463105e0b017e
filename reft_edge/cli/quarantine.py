"""Devices that get no tasks: list them, lift one, or put one there.

The coordinator puts a device into quarantine when the updates of so many of its tasks in a row were of no use
([rejection] quarantine_after in federation.toml, 3 unless it says otherwise). It stays there over rounds, runs and
restarts until a person lifts it; what was rejected before is then forgiven. The updates themselves lie in the folder
`rejected` of the output directory. A coordinator that is at work sees a change when it plans the next round.

examples:
  reft-edge quarantine federation.toml                                   who is there, since when, and why
  reft-edge quarantine federation.toml --lift pi-3
  reft-edge quarantine federation.toml --add pi-7 --reason "its camera is broken"
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.errors import ConfigError

if TYPE_CHECKING:
    from reft_edge.coordinator.records import QuarantineRecord
    from reft_edge.coordinator.store import Store


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--lift", metavar="DEVICE", help="give this device tasks again")
    change.add_argument("--add", metavar="DEVICE", help="give this device no more tasks; needs --reason")
    parser.add_argument("--reason", metavar="TEXT", help="with --add: why; shown in every plan")
    parser.add_argument("--json", action="store_true", help="print who is there afterwards as one JSON document")


def run(args: argparse.Namespace) -> int:
    if (args.add is None) != (args.reason is None):
        raise ConfigError("--add and --reason go together")
    from reft_edge.coordinator.settings import load_federation
    from reft_edge.coordinator.store import Store

    settings = load_federation(args.settings)
    with closing(Store(args.settings.resolve().parent / settings.output.directory, shared=True)) as store:
        if args.lift is not None:
            _lift(store, args.lift)
        elif args.add is not None:
            _add(store, args.add, args.reason)
        records = store.quarantined()
    if args.json:
        _print_json(records)
    else:
        _print_lines(records)
    return 0


def _lift(store: Store, device: str) -> None:
    if not store.lift(device, now=time.time()):
        there = ", ".join(record.device for record in store.quarantined()) or "nobody"
        raise ConfigError(f"{device!r} is not in quarantine; there is: {there}")


def _add(store: Store, device: str, reason: str) -> None:
    from reft_edge.coordinator.records import QuarantineRecord
    from reft_edge.wire.topics import check_name

    check_name(device, "device")
    if not store.quarantine(QuarantineRecord(device=device, since=time.time(), reason=reason, by="person")):
        raise ConfigError(f"{device!r} is in quarantine already")


def _print_json(records: list[QuarantineRecord]) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(records), indent=2).decode())


def _print_lines(records: list[QuarantineRecord]) -> None:
    for record in records:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.since))
        author = "by the coordinator" if record.by == "rejections" else "by hand"
        print(f"{record.device}: since {since}, {author}: {record.reason}")
    if not records:
        print("Nobody is in quarantine.")
