"""What an operator does with the authority: begin, add a device, renew, take back. On disk only: see `live_broker`.

Every function gets `now`, so that tests can live at any time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from reft_edge.config import did_you_mean
from reft_edge.errors import ConfigError
from reft_edge.provisioning.authority import (
    Authority,
    PublicKey,
    new_client_key,
    new_server_key,
    private_pem,
    public_pem,
)
from reft_edge.provisioning.directory import (
    BROKER,
    COORDINATOR,
    PROVISIONER,
    Paths,
    Provisioning,
    created,
)
from reft_edge.provisioning.files import FOLDER, PRIVATE, PUBLIC, read_file, write_file
from reft_edge.provisioning.ledger import Entry, Ledger, Role
from reft_edge.provisioning.settings import ProvisioningSettings
from reft_edge.provisioning.templates import check_path, filled_template
from reft_edge.wire.enrolment import Enrolment
from reft_edge.wire.topics import check_name

RESERVED = (BROKER, COORDINATOR, PROVISIONER)

_STATE = "state"
"""Folder of the broker's database, where the broker runs right in its provisioning folder."""


@dataclass(frozen=True, kw_only=True)
class BrokerPlaces:
    """Folders on the broker's machine, which its configuration names; by default those where the authority is."""

    files: Path | None = None
    state: Path | None = None


def begin(
    root: Path, settings: ProvisioningSettings, *, places: BrokerPlaces | None = None, now: datetime
) -> Provisioning:
    """A new authority in the new directory `root`, with what broker and coordinator need.

    Raises `ConfigError`, and changes nothing, when `root` exists.
    """
    lifetimes = settings.lifetimes
    with created(root) as paths:
        authority = Authority.create(
            settings.federation, lifetime=lifetimes.authority, now=now, list_url=settings.revocation_list_url
        )
        provisioning = Provisioning(paths, settings=settings, authority=authority)
        write_file(paths.authority_key, authority.key_pem, PRIVATE)
        for folder in (paths.authority, paths.broker, paths.coordinator):
            write_file(folder / "ca.pem", authority.certificate_pem, PUBLIC)
        broker_key, coordinator_key = new_server_key(), new_client_key()
        write_file(paths.broker / f"{BROKER}.key", private_pem(broker_key), PRIVATE)
        write_file(paths.coordinator / f"{COORDINATOR}.key", private_pem(coordinator_key), PRIVATE)
        ledger = Ledger()
        for name, key in ((BROKER, broker_key.public_key()), (COORDINATOR, coordinator_key.public_key())):
            ledger = ledger.with_entry(_issued(provisioning, name, key, now))
        provisioning.save(ledger)
        provisioning.write_certificates()
        provisioning.write_revocation_list(now)
        _write_settings(paths, settings)
        _write_broker_configuration(paths, Paths(root.resolve()), settings, places or BrokerPlaces())
        _write_federation_tables(paths, Paths(root.resolve()), settings)
    return Provisioning.read(root)


def add_device(provisioning: Provisioning, device: str, *, replace: bool = False, now: datetime) -> Path:
    """A key and a certificate for a new device; returns its enrolment file.

    With `replace` what an earlier device of this name has is revoked. Raises `ConfigError` for a name that is taken or
    that could not be a device's.
    """
    check_device(device)
    ledger, settings = provisioning.ledger, provisioning.settings
    if ledger.newest(device) is not None:
        if not replace:
            raise ConfigError(
                f"device {device!r} was added already; --replace revokes what it has and makes a new enrolment file"
            )
        ledger = ledger.with_revoked(device, now)
    key = new_client_key()
    entry = _issued(provisioning, device, key.public_key(), now)
    path = provisioning.save_with_enrolment(
        ledger.with_entry(entry),
        Enrolment(
            device=device,
            federation=settings.federation,
            broker_host=settings.broker_host,
            broker_port=settings.port,
            ca=provisioning.authority.certificate_pem.decode("ascii"),
            certificate=entry.certificate,
            key=private_pem(key).decode("ascii"),
            coordinator_key=_coordinator_public_key(provisioning),
        ),
    )
    if replace:
        provisioning.write_revocation_list(now)
    return path


def revoke(provisioning: Provisioning, device: str, *, now: datetime) -> bool:
    """Take back every certificate of `device`; whether there was one to take back.

    Raises `ConfigError` for a name that was never added, and for the broker and the coordinator.
    """
    if device in RESERVED:
        raise ConfigError(
            f"{device!r} cannot be revoked: every device trusts this authority and this coordinator's key; "
            "make a new directory with `reft-edge provision init --directory` and enrol the devices again"
        )
    if provisioning.ledger.newest(device) is None:
        raise ConfigError(f"no device {device!r} was added{did_you_mean(device, device_names(provisioning.ledger))}")
    if provisioning.ledger.active(device) is None:
        return False
    provisioning.save(provisioning.ledger.with_revoked(device, now))
    provisioning.write_revocation_list(now)
    return True


def renew(provisioning: Provisioning, names: Sequence[str], *, within: timedelta, now: datetime) -> list[Entry]:
    """New certificates for the same keys: of `names`, or without any of all that end `within` this time.

    Returns the new entries. Raises `ConfigError` for a name that has no certificate to renew.
    """
    ledger = provisioning.ledger
    chosen = [_renewable(ledger, name) for name in dict.fromkeys(names)] or ledger.ending_before(now + within)
    renewed = [_issued(provisioning, entry.name, entry.facts.public_key, now) for entry in chosen]
    if renewed:
        for entry in renewed:
            ledger = ledger.with_entry(entry)
        provisioning.save(ledger.without_ended(now))
        provisioning.write_certificates()
    return renewed


def check_device(device: str) -> str:
    """Return `device` if it may be a device's name. Raises `ConfigError`."""
    check_name(device, "device")
    if device.lower() in RESERVED:
        raise ConfigError(
            f"device {device!r}: the names {', '.join(RESERVED)} have a meaning of their own; choose another"
        )
    return device


def device_names(ledger: Ledger) -> list[str]:
    return list(dict.fromkeys(entry.name for entry in ledger.entries if entry.role == "device"))


def _issued(provisioning: Provisioning, name: str, public_key: PublicKey, now: datetime) -> Entry:
    """A new certificate, not yet in the ledger."""
    authority, settings = provisioning.authority, provisioning.settings
    lifetime = settings.lifetimes.certificate
    if name == BROKER:
        certificate = authority.issue_server(name, settings.broker_hosts, public_key, lifetime=lifetime, now=now)
    else:
        certificate = authority.issue_client(name, public_key, lifetime=lifetime, now=now)
    return Entry(name=name, role=_role(name), certificate=certificate.decode("ascii"))


def _role(name: str) -> Role:
    if name == BROKER:
        return "broker"
    return "coordinator" if name == COORDINATOR else "device"


def _renewable(ledger: Ledger, name: str) -> Entry:
    entry = ledger.active(name)
    if entry is not None:
        return entry
    if ledger.newest(name) is not None:
        raise ConfigError(f"{name!r} is revoked; `reft-edge provision add-device {name} --replace` makes it anew")
    known = [BROKER, COORDINATOR, *device_names(ledger)]
    raise ConfigError(f"{name!r} has no certificate{did_you_mean(name, known)}")


def _coordinator_public_key(provisioning: Provisioning) -> str:
    path = provisioning.paths.coordinator / f"{COORDINATOR}.key"
    try:
        key = load_pem_private_key(read_file(path), password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"{path} is damaged; restore it from a copy of the provisioning directory") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 key; restore it from a copy of the provisioning directory")
    return public_pem(key).decode("ascii")


def _write_settings(paths: Paths, settings: ProvisioningSettings) -> None:
    lifetimes = settings.lifetimes
    values = {
        "FEDERATION": json.dumps(settings.federation),
        "BROKER_HOSTS": json.dumps(settings.broker_hosts),
        "PORT": str(settings.port),
        "REVOCATION_LIST_URL": json.dumps(settings.revocation_list_url),
        "RELOAD_COMMAND": json.dumps(settings.reload_command),
        "AUTHORITY_DAYS": str(lifetimes.authority_days),
        "CERTIFICATE_DAYS": str(lifetimes.certificate_days),
        "RENEW_BEFORE_DAYS": str(lifetimes.renew_before_days),
        "REVOCATION_LIST_DAYS": str(lifetimes.revocation_list_days),
    }
    write_file(paths.settings, filled_template("provisioning.toml", values).encode(), PUBLIC)


def _write_broker_configuration(
    paths: Paths, final: Paths, settings: ProvisioningSettings, places: BrokerPlaces
) -> None:
    """`final`: where the directory will be; paths in the configuration are absolute."""
    files = places.files or final.broker
    state = places.state or files / _STATE
    if state == final.broker / _STATE:
        (paths.broker / _STATE).mkdir(mode=FOLDER)
    values = {
        "FEDERATION": settings.federation,
        "PORT": str(settings.port),
        "DIRECTORY": str(check_path(files)),
        "STATE": str(check_path(state)),
    }
    for name in ("mosquitto.conf", "reft-edge.acl"):
        write_file(paths.broker / name, filled_template(name, values).encode(), PUBLIC)


def _write_federation_tables(paths: Paths, final: Paths, settings: ProvisioningSettings) -> None:
    name = "federation-tables.toml"
    values = {
        "FEDERATION": settings.federation,
        "BROKER_HOST": settings.broker_host,
        "CA_FILE": str(final.coordinator / "ca.pem"),
        "CERTIFICATE_FILE": str(final.coordinator / f"{COORDINATOR}.pem"),
        "KEY_FILE": str(final.coordinator / f"{COORDINATOR}.key"),
        "CRL_FILE": str(final.coordinator / final.revocation_list.name),
    }
    quoted = {place: json.dumps(value) for place, value in values.items()}
    text = filled_template(name, {**quoted, "PORT": str(settings.port)})
    write_file(paths.coordinator / name, text.encode(), PUBLIC)
