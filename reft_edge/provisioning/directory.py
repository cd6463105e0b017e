"""The provisioning directory: where the authority's key, the ledger, and what is handed out lie.

    provisioning.toml        settings, for a person to edit
    ledger.json              what was issued and revoked
    authority/               ca.pem, ca.key, and canary.pem: a certificate that every new revocation list names
    broker/                  what the broker needs: configuration, ACL, certificate and key, revocation list
    coordinator/             what the coordinator needs: certificate and key, revocation list, lines for federation.toml
    devices/<id>.enrol       what a device needs; a person brings it there and deletes it

A change is made by replacing ledger.json, and by nothing else: before that an interrupted command has done nothing, and
after it `opened` completes what follows from the ledger. Only an enrolment file cannot be made from the ledger, because
it holds a key; it is complete under another name before the ledger names its certificate.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.provisioning.authority import (
    Authority,
    RevocationFacts,
    new_client_key,
    private_pem,
    read_facts,
    read_revocations,
)
from reft_edge.provisioning.files import (
    FOLDER,
    NEW,
    PRIVATE,
    PUBLIC,
    locked,
    read_file,
    remove_file,
    settle,
    write_file,
    write_pending,
)
from reft_edge.provisioning.ledger import Ledger, decode_ledger, encode_ledger
from reft_edge.provisioning.settings import ProvisioningSettings, read_settings
from reft_edge.wire.blobs import sync_directory
from reft_edge.wire.enrolment import Enrolment, decode_enrolment, encode_enrolment

BROKER = "broker"
COORDINATOR = "coordinator"
PROVISIONER = "provisioner"
"""Common names that mean something to the broker's access rules or to people; no device may have them."""

_ENROL = ".enrol"


class Paths:
    """Every file of the directory `root`, named once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = root / "provisioning.toml"
        self.ledger = root / "ledger.json"
        self.authority = root / "authority"
        self.authority_certificate = self.authority / "ca.pem"
        self.authority_key = self.authority / "ca.key"
        self.canary = self.authority / "canary.pem"
        self.broker = root / BROKER
        self.coordinator = root / COORDINATOR
        self.devices = root / "devices"

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.root, self.authority, self.broker, self.coordinator, self.devices)

    @property
    def revocation_list(self) -> Path:
        """The broker's copy, which the others follow."""
        return self.broker / "revoked.pem"

    @property
    def broker_configuration(self) -> Path:
        return self.broker / "mosquitto.conf"

    @property
    def federation_tables(self) -> Path:
        """Lines for federation.toml."""
        return self.coordinator / "federation-tables.toml"

    def enrolment(self, device: str) -> Path:
        return self.devices / f"{device}{_ENROL}"


class Provisioning:
    """An authority and its directory, for one command. Changing methods need the lock: see `opened`."""

    def __init__(
        self, paths: Paths, *, settings: ProvisioningSettings, authority: Authority, ledger: Ledger | None = None
    ) -> None:
        self.paths = paths
        self.settings = settings
        self.authority = authority
        self.ledger = ledger or Ledger()

    @classmethod
    def read(cls, root: Path) -> Provisioning:
        """What lies in `root`. Raises `ConfigError`, also where there is nothing."""
        paths = Paths(root.resolve())
        if not paths.ledger.is_file():
            raise ConfigError(
                f"{root} is not a provisioning directory; name it with --directory, "
                "or make one with `reft-edge provision init`"
            )
        settings = read_settings(paths.settings)
        return cls(
            paths,
            settings=settings,
            authority=Authority.load(
                key_pem=read_file(paths.authority_key),
                certificate_pem=read_file(paths.authority_certificate),
                list_url=settings.revocation_list_url,
            ),
            ledger=decode_ledger(read_file(paths.ledger), origin=str(paths.ledger)),
        )

    def save(self, ledger: Ledger) -> None:
        """Make `ledger` the truth. Raises `ResourceError`; then nothing has changed."""
        write_file(self.paths.ledger, encode_ledger(ledger), PRIVATE)
        self.ledger = ledger

    def save_with_enrolment(self, ledger: Ledger, enrolment: Enrolment) -> Path:
        """Make `ledger` the truth together with the enrolment file of the device that it adds; returns the file."""
        path = self.paths.enrolment(enrolment.device)
        write_pending(path, encode_enrolment(enrolment), PRIVATE)
        self.save(ledger)
        settle(path)
        return path

    def write_certificates(self) -> None:
        """Bring the certificate files of broker and coordinator to what the ledger says."""
        for name, folder in ((BROKER, self.paths.broker), (COORDINATOR, self.paths.coordinator)):
            entry = self.ledger.active(name)
            if entry is not None:
                _write_if_other(folder / f"{name}.pem", entry.certificate.encode("ascii"))

    def write_revocation_list(self, now: datetime) -> None:
        """A new list of what the ledger says, from now on.

        It also names a certificate that is made for this: a broker that refuses it has read this list.
        """
        lifetime = self.settings.lifetimes.revocation_list
        key = new_client_key()
        canary = self.authority.issue_client(PROVISIONER, key.public_key(), lifetime=lifetime, now=now)
        write_file(self.paths.canary, private_pem(key) + canary, PRIVATE)
        before = self.revocation_facts()
        number = max(0 if before is None else before.number + 1, int(now.timestamp()))
        revoked = {**self.ledger.revoked(now), read_facts(canary).serial: now}
        written = self.authority.revocation_list(revoked, number=number, lifetime=lifetime, now=now)
        write_file(self.paths.revocation_list, written, PUBLIC)
        self._copy_revocation_list()

    def revocation_facts(self) -> RevocationFacts | None:
        """What the present revocation list says; None where it is missing or damaged."""
        try:
            return read_revocations(self.paths.revocation_list.read_bytes())
        except (OSError, ValueError):
            return None

    def complete(self, now: datetime) -> None:
        """Do what an interrupted command did not come to."""
        for pending in self.paths.devices.glob(f".*{_ENROL}{NEW}"):
            if self._is_issued(pending):
                settle(self.paths.devices / pending.name.removeprefix(".").removesuffix(NEW))
        for folder in self.paths.folders:
            for leftover in folder.glob(f".*{NEW}"):
                remove_file(leftover)
        self.write_certificates()
        if self._revocation_list_lacks_something(now):
            self.write_revocation_list(now)
        self._copy_revocation_list()

    def _is_issued(self, pending: Path) -> bool:
        try:
            enrolment = decode_enrolment(pending.read_bytes())
        except (OSError, ConfigError):
            return False
        newest = self.ledger.newest(enrolment.device)
        return newest is not None and newest.certificate == enrolment.certificate

    def _revocation_list_lacks_something(self, now: datetime) -> bool:
        facts = self.revocation_facts()
        try:
            canary = read_facts(self.paths.canary.read_bytes())
        except (OSError, ValueError):
            return True
        return facts is None or not facts.serials >= {canary.serial, *self.ledger.revoked(now)}

    def _copy_revocation_list(self) -> None:
        _write_if_other(self.paths.coordinator / self.paths.revocation_list.name, read_file(self.paths.revocation_list))


@contextmanager
def opened(root: Path, *, now: datetime) -> Iterator[Provisioning]:
    """The directory `root` for a command that changes it: locked, and in order. Raises `ConfigError`."""
    paths = Provisioning.read(root).paths
    with locked(paths.root):
        provisioning = Provisioning.read(root)  # again: another command may have changed it before we had the lock
        provisioning.complete(now)
        yield provisioning


@contextmanager
def created(root: Path) -> Iterator[Paths]:
    """An empty directory that becomes `root` at the end of the block, and never was if the block fails.

    Raises `ConfigError` when `root` exists.
    """
    _refuse_existing(root)
    target = root.resolve()
    building = target.with_name(f".{target.name}{NEW}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):
            _refuse_existing(root)
            shutil.rmtree(building, ignore_errors=True)  # of one that was killed
            try:
                paths = Paths(building)
                for folder in paths.folders:
                    folder.mkdir(mode=FOLDER)
                    folder.chmod(FOLDER)
                yield paths
                building.rename(target)
                sync_directory(target.parent)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as exc:
        raise ResourceError(f"{root} cannot be made: {exc.strerror or exc}; choose another --directory") from exc


def _refuse_existing(root: Path) -> None:
    if root.exists() or root.is_symlink():
        raise ConfigError(f"{root} exists already and was left as it is; choose another folder with --directory")


def _write_if_other(path: Path, data: bytes) -> None:
    try:
        is_same = path.read_bytes() == data
    except OSError:
        is_same = False
    if not is_same:
        write_file(path, data, PUBLIC)
