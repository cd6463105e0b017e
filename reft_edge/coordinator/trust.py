"""What the coordinator signs with, and which devices it believes.

A device proves its key with the certificate that it puts beside its profile. The authority's signature, the dates, the
name and the revocation list are checked then, and again when the list changes and from time to time, because a
certificate ends while its device stays connected. The store keeps the certificate, so that after a restart a report is
believed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from reft_edge.coordinator.records import DeviceRecord
from reft_edge.coordinator.settings import CoordinatorTrust
from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.certificates import MAX_REVOCATION_LIST_BYTES, device_key, read_authority, revocation_list_faults
from reft_edge.wire.signing import MAX_CERTIFICATE_BYTES, Sealed, SigningKey, VerifyKey, verify

RECHECK_S = 600.0
"""Certificates are checked again after this long."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What [trust] names, read and checked."""

    key: SigningKey
    ca_pem: bytes
    crl_file: Path | None

    @classmethod
    def read(cls, settings: CoordinatorTrust, *, now: datetime) -> Trust:
        """Raises `ConfigError` that names the file."""
        key = SigningKey.read(settings.key_file)
        ca_pem = _read(settings.ca_file, "ca_file", MAX_CERTIFICATE_BYTES)
        try:
            read_authority(ca_pem)
        except ConfigError as exc:
            raise ConfigError(f"{settings.ca_file}: {exc}") from exc
        trust = cls(key=key, ca_pem=ca_pem, crl_file=None if settings.crl_file is None else Path(settings.crl_file))
        trust.read_revocations(now)
        return trust

    def read_revocations(self, now: datetime) -> bytes | None:
        """The revocation list as it is now; None where there is none. Raises `ConfigError`."""
        if self.crl_file is None:
            return None
        crl_pem = _read(str(self.crl_file), "crl_file", MAX_REVOCATION_LIST_BYTES)
        try:
            faults = revocation_list_faults(crl_pem=crl_pem, ca_pem=self.ca_pem, now=now)
        except ConfigError as exc:
            raise ConfigError(f"{self.crl_file}: {exc}") from exc
        for fault in faults:
            _log.warning("crl_file %s: %s", self.crl_file, fault)
        return crl_pem


class DeviceKeys:
    """The keys of devices that have proved them. `clock` gives Unix time in seconds. Raises `ConfigError`.

    Use it from one thread at a time.
    """

    def __init__(self, trust: Trust, *, clock: Callable[[], float]) -> None:
        self._trust = trust
        self._clock = clock
        self._certificates: dict[str, str] = {}
        self._keys: dict[str, VerifyKey] = {}
        """Of `_certificates`, those that were checked since `_checked_at`."""
        self._checked_at = clock()
        self._list_version = self._version_of_list()
        self._crl_pem = trust.read_revocations(self._now())

    @property
    def own(self) -> SigningKey:
        """What the coordinator signs with."""
        return self._trust.key

    def recall(self, record: DeviceRecord) -> bool:
        """Take over what an earlier process was shown; whether it is still good."""
        try:
            self._keys[record.device] = self._certified(record.device, record.certificate)
        except RemoteProtocolError as exc:
            _log.debug("%s: %s", record.device, exc)
            return False
        self._certificates[record.device] = record.certificate
        return True

    def knows(self, device: str) -> bool:
        """Whether the device has shown a certificate, so that its reports can be checked."""
        return device in self._certificates

    def check_profile(self, device: str, topic: str, sealed: Sealed) -> None:
        """Check a profile by the certificate beside it, which is kept. Raises `RemoteProtocolError`."""
        self._look_again()
        if not sealed.certificate:
            raise RemoteProtocolError("it is not signed: no certificate came with it")
        key = self._certified(device, sealed.certificate)
        verify(topic, sealed, key)
        self._certificates[device], self._keys[device] = sealed.certificate, key

    def check_report(self, device: str, topic: str, sealed: Sealed) -> None:
        """Check what a device says by the certificate that it has shown. Raises `RemoteProtocolError`."""
        self._look_again()
        if device not in self._keys:
            self._keys[device] = self._certified(device, self._certificates[device])
        verify(topic, sealed, self._keys[device])

    def forget_if_ended(self, device: str) -> bool:
        """Forget a device whose certificate, as it has shown it, is good no more; whether it was one."""
        if device not in self._certificates or device in self._keys:
            return False
        try:
            self._keys[device] = self._certified(device, self._certificates[device])
        except RemoteProtocolError:
            del self._certificates[device]
            return True
        return False

    def _certified(self, device: str, certificate: str) -> VerifyKey:
        """Raises `RemoteProtocolError`."""
        raw = device_key(certificate, ca_pem=self._trust.ca_pem, crl_pem=self._crl_pem, device=device, now=self._now())
        return VerifyKey.from_raw(raw)

    def _look_again(self) -> None:
        """Forget which certificates were good when that may have changed."""
        now = self._clock()
        version = self._version_of_list()
        if version == self._list_version and 0 <= now - self._checked_at < RECHECK_S:
            return
        self._keys.clear()
        self._checked_at = now
        if version != self._list_version:
            self._list_version = version
            try:
                self._crl_pem = self._trust.read_revocations(self._now())
            except ConfigError as exc:
                _log.error("%s; what was revoked before stays revoked", exc)

    def _version_of_list(self) -> tuple[int, int, int] | None:
        """Differs when the revocation list was replaced or changed; None where there is none."""
        if self._trust.crl_file is None:
            return None
        try:
            status = self._trust.crl_file.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_mtime_ns, status.st_size, status.st_ino)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def _read(path: str, name: str, max_bytes: int) -> bytes:
    """A file of [trust], bounded. Raises `ConfigError`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as exc:
        raise ConfigError(f"{name} {path!r} cannot be read: {exc.strerror or exc}; check [trust]") from exc
    if len(data) > max_bytes:
        raise ConfigError(f"{name} {path!r} is larger than {max_bytes} bytes; this is some other file")
    return data
