"""What is wrong with this device's certificate: a short-lived process that may load `cryptography`.

    python -m reft_edge.agent.certificate_report < request.json > report.json

`agent.credentials` starts it for the daemon; `reft-edge agent --check` calls `examine` itself. It only reads.
"""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from reft_edge.agent.credentials import CertificateReport, ReportRequest
from reft_edge.errors import ConfigError
from reft_edge.wire.certificates import certificate_end, certificate_faults, shown
from reft_edge.wire.signing import MAX_CERTIFICATE_BYTES

_MAX_REQUEST_BYTES = 64 * 1024
_LIFETIME_S = 60
"""Longer than the daemon waits: this ends the process when the daemon has died meanwhile."""


def examine(request: ReportRequest, now: datetime) -> CertificateReport:
    """Look at the installed certificate, or at whether `request.renewal` may replace it."""
    if not request.ca_file:
        return CertificateReport(faults=("[broker] names no ca_file to check it against",))
    try:
        key, ca = _read(request.key_file), _read(request.ca_file)
        installed = _read(request.certificate_file)
        certificate = request.renewal.encode("ascii", "replace") or installed
        faults = certificate_faults(certificate_pem=certificate, key_pem=key, ca_pem=ca, name=request.device, now=now)
    except ConfigError as exc:
        return CertificateReport(faults=(str(exc),))
    ends = _end(certificate)
    if request.renewal and not faults:
        faults = _compare(ends, _end(installed))
    return CertificateReport(faults=tuple(faults), ends=ends)


def _compare(ends: datetime | None, installed_ends: datetime | None) -> list[str]:
    """A renewal that does not last longer is an old one that somebody sends again."""
    if ends is not None and installed_ends is not None and ends <= installed_ends:
        return [f"it ends on {shown(ends)} and ours not before {shown(installed_ends)}"]
    return []


def _end(certificate: bytes) -> datetime | None:
    try:
        return certificate_end(certificate)
    except ConfigError:
        return None


def _read(file: str) -> bytes:
    """A small file's content. Raises `ConfigError`."""
    try:
        with Path(file).open("rb") as stream:
            return stream.read(MAX_CERTIFICATE_BYTES + 1)  # one more than allowed is refused by whoever parses it
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror or exc}") from exc


def main() -> None:
    signal.alarm(_LIFETIME_S)
    request = msgspec.json.decode(sys.stdin.buffer.read(_MAX_REQUEST_BYTES), type=ReportRequest)
    sys.stdout.buffer.write(msgspec.json.encode(examine(request, datetime.now(UTC))))


if __name__ == "__main__":
    main()
