"""Give broker, coordinator and devices their certificates, renew them, and take back a device's.

All of it lies in one folder, the provisioning directory, with the private key of the federation's own authority: keep
it on a machine of yours and a copy offline. Settings are in its provisioning.toml; the key of a device is only in its
enrolment file, which you bring to the device and delete here.

What `revoke` does: no new connection is accepted from the device, and the one that it has ends. `reload_command` in
provisioning.toml says how the broker is made to read its files again. The revocation list has a date, after which the
broker refuses everybody: run `refresh-crl` every day (broker_config/systemd has a timer for it).

Exit code 7 when the broker could not be told; what was revoked or renewed stays so, and the same command again goes on
from there.

examples:
  reft-edge provision init --federation birds --broker-host broker.local --broker-host 192.168.1.10
  reft-edge provision add-device pi-kitchen        writes provisioning/devices/pi-kitchen.enrol
  reft-edge provision list
  reft-edge provision revoke pi-kitchen
  reft-edge provision renew --publish              what ends soon; devices get theirs by the broker, without a visit
  reft-edge provision refresh-crl

`reft-edge provision ACTION --help` tells more about each.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reft_edge.errors import BrokerError

if TYPE_CHECKING:
    from reft_edge.provisioning.directory import Provisioning
    from reft_edge.provisioning.ledger import Entry

DEFAULT_DIRECTORY = Path("provisioning")

SERVICE_FILES = Path("/etc/reft-edge/broker")
SERVICE_STATE = Path("/var/lib/reft-edge-broker")
"""Folders of broker_config/systemd/reft-edge-broker.service."""

_DAY = timedelta(days=1)

_log = logging.getLogger(__name__)


class _Action(NamedTuple):
    run: Callable[[argparse.Namespace], int]
    configure: Callable[[argparse.ArgumentParser], None]
    summary: str


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    for name, action in ACTIONS.items():
        each = actions.add_parser(name, help=action.summary, description=action.summary, allow_abbrev=False)
        each.add_argument(
            "--directory",
            type=Path,
            default=DEFAULT_DIRECTORY,
            metavar="DIR",
            help="the provisioning directory (default: ./%(default)s)",
        )
        action.configure(each)


def run(args: argparse.Namespace) -> int:
    return ACTIONS[args.action].run(args)


# init


def _configure_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--federation", required=True, metavar="NAME", help="the federation; part of every topic")
    parser.add_argument(
        "--broker-host",
        required=True,
        action="append",
        metavar="HOST",
        help="a name or IP address of the broker, for its certificate; everybody connects to the first that is given",
    )
    parser.add_argument("--port", type=int, metavar="PORT", help="the broker's TLS port (default: 8883)")
    parser.add_argument(
        "--service",
        action="store_true",
        help=f"the broker will run as reft-edge-broker.service, with its files in {SERVICE_FILES}; "
        "without it: right in the provisioning directory",
    )
    parser.add_argument(
        "--revocation-list-url", metavar="URL", help="for brokers that fetch the list: see broker_config/CLUSTER.md"
    )
    parser.add_argument("--authority-days", type=int, metavar="N", help="life of the authority (default: 20 years)")
    parser.add_argument("--certificate-days", type=int, metavar="N", help="life of a certificate (default: a year)")


def _init(args: argparse.Namespace) -> int:
    from reft_edge.config import convert_settings
    from reft_edge.provisioning.issuing import BrokerPlaces, begin
    from reft_edge.provisioning.settings import ProvisioningSettings

    lifetimes = {"authority_days": args.authority_days, "certificate_days": args.certificate_days}
    table: dict[str, Any] = {
        "federation": args.federation,
        "broker_hosts": args.broker_host,
        "lifetimes": {key: value for key, value in lifetimes.items() if value is not None},
    }
    given = {"port": args.port, "revocation_list_url": args.revocation_list_url}
    table |= {key: value for key, value in given.items() if value is not None}
    settings = convert_settings(table, ProvisioningSettings, origin="the command line")
    places = BrokerPlaces(files=SERVICE_FILES, state=SERVICE_STATE) if args.service else BrokerPlaces()
    paths = begin(args.directory, settings, places=places, now=_now()).paths
    directory = "" if args.directory == DEFAULT_DIRECTORY else f" --directory {args.directory}"
    print(f"{paths.root} is the authority of federation {settings.federation!r}. Keep a copy of it offline. Now:")
    if args.service:
        print(f"  broker       bring {paths.broker} to {SERVICE_FILES} and start reft-edge-broker.service")
    else:
        print(f"  broker       mosquitto -c {paths.broker_configuration}")
        if os.geteuid() == 0:
            print(
                "               (root's Mosquitto becomes the user mosquitto, who may not look into that folder: start"
            )
            print(f"               it as the folder's owner, or add `user root` to {paths.broker_configuration.name})")
    print(f"  coordinator  copy the lines of {paths.federation_tables} into federation.toml")
    print(f"  each device  reft-edge provision add-device ID{directory}")
    print(f"  every day    reft-edge provision refresh-crl{directory}; reft-edge provision renew --publish{directory}")
    print(f"Look through {paths.settings}: how does the broker get its files when they change?")
    return 0


# add-device


def _configure_add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="ID", help="1 to 64 letters, digits, '_' or '-'")
    parser.add_argument(
        "--replace", action="store_true", help="revoke what the device of this name has, and make everything anew"
    )


def _add_device(args: argparse.Namespace) -> int:
    from reft_edge.provisioning.directory import opened
    from reft_edge.provisioning.issuing import add_device

    with opened(args.directory, now=_now()) as provisioning:
        had_one = provisioning.ledger.newest(args.device) is not None
        path = add_device(provisioning, args.device, replace=args.replace, now=_now())
    print(f"{path}: bring it to {args.device}, install it there with `reft-edge agent --enrol`, and delete this copy")
    if had_one:
        # Revoking it again would take the new certificate as well.
        _enforce(provisioning, args.device, what=f"what {args.device} had", again="refresh-crl")
    return 0


# revoke


def _configure_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="ID", help="the device that is not to be trusted any more")


def _revoke(args: argparse.Namespace) -> int:
    from reft_edge.provisioning.directory import opened
    from reft_edge.provisioning.issuing import revoke

    with opened(args.directory, now=_now()) as provisioning:
        is_new = revoke(provisioning, args.device, now=_now())
    print(f"{args.device} is revoked" if is_new else f"{args.device} was revoked before", flush=True)
    _enforce(provisioning, args.device, what=args.device, again=f"revoke {args.device}")
    print(f"the broker refuses {args.device}, and a connection that it had is ended")
    return 0


def _enforce(provisioning: Provisioning, device: str, *, what: str, again: str) -> None:
    """Make a revocation real: the broker reads the list, the device's connection ends, what waits for it goes.

    Raises `BrokerError`, which says that the revocation of `what` stands and which command goes on from there.
    """
    from reft_edge.provisioning.live_broker import end_connection, publish_certificates

    try:
        _make_list_known(provisioning)
        end_connection(provisioning, device, now=_now())
        publish_certificates(provisioning, {device: ""}, now=_now())
    except BrokerError as exc:
        raise BrokerError(
            f"{what} is revoked and stays so, but a connection of {device} may last: {exc}; "
            f"go on with `reft-edge provision {again}`"
        ) from exc


def _make_list_known(provisioning: Provisioning) -> None:
    """Raises `BrokerError` unless the broker has read the newest revocation list."""
    from reft_edge.provisioning.live_broker import NOTICE_TIMEOUT_S, run_reload_command, wait_until_list_is_read

    was_told = run_reload_command(provisioning)
    wait_until_list_is_read(provisioning, wait_s=NOTICE_TIMEOUT_S if was_told else 0.0)


# renew


def _configure_renew(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="ID", help="devices, `coordinator` or `broker`; without any: all that end soon"
    )
    parser.add_argument(
        "--within", type=int, metavar="DAYS", help="what ends within so many days (default: renew_before_days, 60)"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="leave devices their renewed certificates at the broker, also earlier ones",
    )


def _renew(args: argparse.Namespace) -> int:
    from reft_edge.errors import ConfigError
    from reft_edge.provisioning.directory import BROKER, COORDINATOR, opened
    from reft_edge.provisioning.issuing import renew
    from reft_edge.provisioning.live_broker import run_reload_command

    if args.names and args.within is not None:
        raise ConfigError("--within chooses what to renew, and so does naming it; use one of them")
    if args.within is not None and not 0 <= args.within <= 36_500:
        raise ConfigError(f"--within {args.within}: expected a number of days")
    with opened(args.directory, now=_now()) as provisioning:
        days = provisioning.settings.lifetimes.renew_before_days if args.within is None else args.within
        renewed = renew(provisioning, args.names, within=timedelta(days=days), now=_now())
    for entry in renewed:
        print(f"{entry.name}: renewed until {entry.facts.ends:%Y-%m-%d}", flush=True)
    if not renewed:
        print("nothing to renew", flush=True)
    names = {entry.name for entry in renewed}
    if COORDINATOR in names:
        print(
            f"a running coordinator uses it at its next connection; elsewhere it needs {provisioning.paths.coordinator}"
        )
    if BROKER in names and not run_reload_command(provisioning):
        print(f"bring {provisioning.paths.broker} to the broker and send it SIGHUP: no reload_command is set")
    if args.publish:
        _publish(provisioning)
    elif any(entry.role == "device" for entry in renewed):
        print("the devices do not have theirs yet: reft-edge provision renew --publish")
    return 0


def _publish(provisioning: Provisioning) -> None:
    """Publish what devices may not have yet, and say which. Raises `BrokerError` unless the broker took all."""
    from reft_edge.provisioning.live_broker import publish_certificates

    certificates = {entry.name: entry.certificate for entry in provisioning.ledger.unsettled_renewals(_now())}
    if not certificates:
        print("nothing to publish")
        return
    missed = publish_certificates(provisioning, certificates, now=_now())
    for device in certificates:
        if device not in missed:
            print(f"{device}: its certificate waits at the broker, and is fetched when the device is connected")
    if missed:
        raise BrokerError(
            f"the broker did not take the certificates of {', '.join(sorted(missed))}; "
            "is its access list the one that `provision` wrote? run this again"
        )


# refresh-crl and list


def _configure_nothing(_parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def _refresh_crl(args: argparse.Namespace) -> int:
    from reft_edge.provisioning.directory import opened

    with opened(args.directory, now=_now()) as provisioning:
        _warn_about_list(provisioning)
        provisioning.write_revocation_list(_now())
    print(f"{provisioning.paths.revocation_list}: valid until {_list_ends(provisioning):%Y-%m-%d}", flush=True)
    if not provisioning.settings.reload_command:
        print(f"bring {provisioning.paths.broker} to the broker and send it SIGHUP: no reload_command is set")
        return 0
    _make_list_known(provisioning)
    print("the broker has read it")
    return 0


def _configure_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _list(args: argparse.Namespace) -> int:
    from reft_edge.provisioning.directory import Provisioning

    provisioning, now = Provisioning.read(args.directory), _now()
    entries = provisioning.ledger.identities()
    if args.json:
        document = {
            "federation": provisioning.settings.federation,
            "broker": f"{provisioning.settings.broker_host}:{provisioning.settings.port}",
            "authority_ends": provisioning.authority.certificate.not_valid_after_utc.isoformat(),
            "revocation_list_ends": _list_ends(provisioning).isoformat(),
            "certificates": [_document(entry, now) for entry in entries],
        }
        print(json.dumps(document, indent=2))
    else:
        print(f"federation {provisioning.settings.federation}, {len(entries)} certificates")
        _print_table([("name", "role", "ends", "revoked", "serial"), *(_row(entry, now) for entry in entries)])
        print(f"revocation list valid until {_list_ends(provisioning):%Y-%m-%d %H:%M} UTC")
    _warn_about_list(provisioning)
    return 0


def _document(entry: Entry, now: datetime) -> dict[str, Any]:
    return {
        "name": entry.name,
        "role": entry.role,
        "serial": f"{entry.facts.serial:x}",
        "expires": entry.facts.ends.isoformat(),
        "expires_in_days": round((entry.facts.ends - now) / _DAY, 1),
        "revoked_at": None if entry.revoked_at is None else entry.revoked_at.isoformat(),
    }


def _row(entry: Entry, now: datetime) -> tuple[str, ...]:
    left = (entry.facts.ends - now) / _DAY
    ends = f"in {left:.0f} days" if left > 0 else f"ended {-left:.0f} days ago"
    revoked = "" if entry.revoked_at is None else f"{entry.revoked_at:%Y-%m-%d %H:%M}"
    return entry.name, entry.role, ends, revoked, f"{entry.facts.serial:x}"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _list_ends(provisioning: Provisioning) -> datetime:
    """When the revocation list ends; long ago where there is none."""
    facts = provisioning.revocation_facts()
    return datetime.fromtimestamp(0, UTC) if facts is None else facts.ends


def _warn_about_list(provisioning: Provisioning) -> None:
    left = _list_ends(provisioning) - _now()
    if left <= timedelta(0):
        _log.warning("the revocation list is past its date: the broker refuses everybody until it has read a new one")
    elif left < provisioning.settings.lifetimes.warn_before:
        _log.warning(
            "the revocation list ends in %.0f days; refresh-crl should run every day: is its timer active?", left / _DAY
        )


def _now() -> datetime:
    return datetime.now(UTC)


ACTIONS = {
    "init": _Action(_init, _configure_init, "make the authority, and what broker and coordinator need"),
    "add-device": _Action(_add_device, _configure_add_device, "make a device's key and certificate, as one file"),
    "revoke": _Action(_revoke, _configure_revoke, "lock a device out, now"),
    "renew": _Action(_renew, _configure_renew, "new certificates for the same keys"),
    "refresh-crl": _Action(_refresh_crl, _configure_nothing, "date the revocation list anew; run it every day"),
    "list": _Action(_list, _configure_list, "who has a certificate, until when, and who was revoked"),
}
