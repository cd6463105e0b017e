"""What the authority issued and took back: the one place that knows. Pure; `provisioning.directory` keeps it on disk.

Every other file is made from it: a certificate file from its newest entry, the revocation list from those with a date
of revocation. Certificates that end within minutes, which `provision` makes for itself, are not entered.
"""

from __future__ import annotations

import functools
from datetime import datetime, timedelta
from typing import Literal, TypeAlias

import msgspec

from reft_edge.errors import ConfigError
from reft_edge.provisioning.authority import CertificateFacts, read_facts

SCHEMA = 1

Role: TypeAlias = Literal["broker", "coordinator", "device"]

_FORGET_AFTER = timedelta(days=1)
"""A certificate that ended needs no revocation; a day, because a broker's clock may be behind."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate that was issued."""

    name: str
    role: Role
    certificate: str
    """PEM. It holds the rest: serial number, dates, public key."""
    revoked_at: datetime | None = None

    @property
    def facts(self) -> CertificateFacts:
        return _facts(self.certificate)

    def is_valid(self, now: datetime) -> bool:
        return self.revoked_at is None and now < self.facts.ends


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """All entries, in the order of issue. Changes return a new ledger."""

    entries: tuple[Entry, ...] = ()
    schema: int = SCHEMA

    def newest(self, name: str) -> Entry | None:
        """The last certificate that was issued for `name`."""
        return next((entry for entry in reversed(self.entries) if entry.name == name), None)

    def active(self, name: str) -> Entry | None:
        """The certificate that `name` should use: the newest, unless it is revoked. It may have ended."""
        entry = self.newest(name)
        return None if entry is None or entry.revoked_at is not None else entry

    def identities(self) -> list[Entry]:
        """The newest entry of each key: those that a renewal or nothing follows. In the order of first issue."""
        return [group[-1] for group in self._by_key()]

    def ending_before(self, moment: datetime) -> list[Entry]:
        """Those to renew: the newest of each key that is not revoked and ends before `moment`."""
        return [entry for entry in self.identities() if entry.revoked_at is None and entry.facts.ends < moment]

    def unsettled_renewals(self, now: datetime) -> list[Entry]:
        """Devices' renewed certificates that may not have arrived: while the one before is valid it may be in use."""
        return [
            newest
            for *older, newest in self._by_key()
            if newest.role == "device" and newest.is_valid(now) and any(each.is_valid(now) for each in older)
        ]

    def revoked(self, now: datetime) -> dict[int, datetime]:
        """Serial number and time of what the revocation list has to name."""
        return {
            entry.facts.serial: entry.revoked_at
            for entry in self.entries
            if entry.revoked_at is not None and now < entry.facts.ends + _FORGET_AFTER
        }

    def with_entry(self, entry: Entry) -> Ledger:
        return msgspec.structs.replace(self, entries=(*self.entries, entry))

    def with_revoked(self, name: str, now: datetime) -> Ledger:
        """Every certificate of `name` revoked, also those that a renewal has replaced and that are still valid."""
        entries = tuple(
            msgspec.structs.replace(entry, revoked_at=now) if entry.name == name and entry.revoked_at is None else entry
            for entry in self.entries
        )
        return msgspec.structs.replace(self, entries=entries)

    def without_ended(self, now: datetime) -> Ledger:
        """Forget what was renewed and has ended; revoked ones are kept, so that people can see them."""
        newest = {id(entry) for entry in self.identities()}
        kept = tuple(
            entry
            for entry in self.entries
            if id(entry) in newest or entry.revoked_at is not None or now < entry.facts.ends + _FORGET_AFTER
        )
        return msgspec.structs.replace(self, entries=kept)

    def _by_key(self) -> list[list[Entry]]:
        """The entries of each name and key, in the order of issue."""
        groups: dict[tuple[str, bytes], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.name, entry.facts.key_id), []).append(entry)
        return list(groups.values())


def encode_ledger(ledger: Ledger) -> bytes:
    """Indented JSON, so that a person can read it and `diff` two of them."""
    return msgspec.json.format(msgspec.json.encode(ledger), indent=2) + b"\n"


def decode_ledger(data: bytes, *, origin: str) -> Ledger:
    """Raises `ConfigError`; `origin` names the file."""
    try:
        ledger = msgspec.json.decode(data, type=Ledger)
        if ledger.schema != SCHEMA:
            raise ConfigError(
                f"{origin} has version {ledger.schema} and this reft-edge reads version {SCHEMA}; install a newer one"
            )
        for entry in ledger.entries:
            _ = entry.facts
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise ConfigError(f"{origin} is damaged; restore it from a copy: {exc}") from exc
    return ledger


@functools.cache
def _facts(certificate: str) -> CertificateFacts:
    return read_facts(certificate.encode("ascii"))
