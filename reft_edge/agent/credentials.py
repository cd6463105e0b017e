"""This device's certificate as the daemon sees it: why the broker may have turned us away, when it ends, its renewal.

Checking a certificate takes `cryptography`, which would cost the daemon 9 MiB for good; so a child process looks
(`agent.certificate_report`) and ends. Its time and its answer are bounded. All methods block for as long as it takes
(a second or two on a small board) and may be called from any thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from reft_edge.agent.child import start_child
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import write_atomically
from reft_edge.errors import RemoteProtocolError, ResourceError

WARN_BEFORE = timedelta(days=30)
"""Time enough for a person who looks at the log once a month."""

REPORT_TIMEOUT_S = 30.0
"""A slow board with a busy card imports `cryptography` in a few seconds."""

MAX_RENEWAL_BYTES = 8 * 1024
"""Larger than any certificate; what is longer is refused unread."""

MAX_REPORT_BYTES = 16 * 1024


class ReportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is to look at. `renewal` (PEM) empty: the certificate that is installed."""

    device: str
    certificate_file: str
    key_file: str
    ca_file: str
    renewal: Annotated[str, Meta(max_length=MAX_RENEWAL_BYTES)] = ""


class CertificateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong, each entry a clause for people; and when the certificate ends, if that could be read."""

    faults: tuple[str, ...] = ()
    ends: datetime | None = None


class Credentials:
    """The certificate of an agent's settings: the one of its TLS connection, else the one it signs with."""

    def __init__(self, settings: AgentSettings) -> None:
        self._request = report_request(settings)
        self._ends: datetime | None = None

    def explain_refusal(self) -> str:
        """What is wrong with our certificate, in one or two sentences; empty when we have none.

        For a broker that has turned us away: it may see what we cannot, and then the answer says that.
        """
        if self._request is None:
            return ""
        try:
            report = _ask(self._request)
        except ResourceError as exc:
            return f"our certificate could not be examined: {exc}"
        return explanation(self._request, report)

    def expiry_warning(self) -> str:
        """A line for the log when our certificate ends within `WARN_BEFORE` or has ended; else empty.

        Meant for the start and once a day. The child is asked once; a renewal is noticed.
        """
        if self._request is None:
            return ""
        if self._ends is None:
            with contextlib.suppress(ResourceError):  # a warning that cannot be given is not worth another
                self._ends = _ask(self._request).ends
        return expiry_warning(self._request.certificate_file, self._ends, datetime.now(UTC))

    def accept_renewal(self, pem: bytes) -> str:
        """Check a renewed certificate and install it; returns a line for the log, empty if we have it already.

        The next connection uses it. Raises `RemoteProtocolError` with the reason when it is refused, `ResourceError`
        when it cannot be checked or written; in both cases nothing has changed.
        """
        if self._request is None:
            raise RemoteProtocolError("a renewed certificate for a device whose settings name none")
        pem = pem.strip() + b"\n"
        path = Path(self._request.certificate_file)
        if _holds(path, pem):
            return ""
        report = self._examine_renewal(self._request, pem)
        write_atomically(path, pem)
        self._ends = report.ends
        return f"our certificate was renewed{_until(report.ends)}: {path}"

    def _examine_renewal(self, installed: ReportRequest, pem: bytes) -> CertificateReport:
        if len(pem) > MAX_RENEWAL_BYTES or not pem.isascii():
            raise RemoteProtocolError(f"{len(pem)} bytes that are no certificate")
        report = _ask(msgspec.structs.replace(installed, renewal=pem.decode("ascii")))
        if report.faults:
            raise RemoteProtocolError(f"a renewed certificate is not accepted: {'; '.join(report.faults)}")
        return report


def report_request(settings: AgentSettings) -> ReportRequest | None:
    """Which files are this device's identity; None when it has no certificate."""
    source = settings.broker if settings.broker.certificate_file is not None else settings.trust
    if source is None or source.certificate_file is None or source.key_file is None:
        return None
    return ReportRequest(
        device=settings.device,
        certificate_file=source.certificate_file,
        key_file=source.key_file,
        ca_file=settings.broker.ca_file or "",
    )


def explanation(request: ReportRequest, report: CertificateReport) -> str:
    """What a report says to someone whom the broker has turned away."""
    if report.faults:
        return f"our certificate {request.certificate_file}: {'; '.join(report.faults)}"
    return (
        f"nothing is wrong with our certificate that can be seen from here{_until(report.ends)}; it may have been "
        "revoked, or the broker's own revocation list may have expired: see `reft-edge provision list`"
    )


def expiry_warning(certificate_file: str, ends: datetime | None, now: datetime) -> str:
    """A line for the log when the certificate ends within `WARN_BEFORE` of `now`; else empty."""
    if ends is None or now < ends - WARN_BEFORE:
        return ""
    when = f"ended on {ends:%Y-%m-%d}" if ends <= now else f"ends on {ends:%Y-%m-%d %H:%M} UTC"
    return f"our certificate {certificate_file} {when}; `reft-edge provision renew` makes the next one"


def _until(ends: datetime | None) -> str:
    return "" if ends is None else f" (valid until {ends:%Y-%m-%d})"


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size <= MAX_RENEWAL_BYTES and path.read_bytes().strip() == data.strip()
    except OSError:
        return False


def _ask(request: ReportRequest) -> CertificateReport:
    """Have a child look. Raises `ResourceError` when it gives no answer."""
    child = start_child("reft_edge.agent.certificate_report")
    try:
        with contextlib.suppress(BrokenPipeError), os.fdopen(child.requests, "wb") as stream:
            stream.write(msgspec.json.encode(request))
        data = _read(child.answers, REPORT_TIMEOUT_S)
    finally:
        os.close(child.answers)
        os.kill(child.pid, signal.SIGKILL)  # has ended, or is of no use any more; not yet waited for, so it is ours
        os.waitpid(child.pid, 0)
    try:
        return msgspec.json.decode(data, type=CertificateReport)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ResourceError("the process that checks certificates gives no answer") from exc


def _read(descriptor: int, timeout_s: float) -> bytes:
    """What comes until the end, at most `MAX_REPORT_BYTES` and not for longer than `timeout_s`."""
    data = b""
    end = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(data) < MAX_REPORT_BYTES and poll.poll(max(0.0, end - time.monotonic()) * 1000):
        chunk = os.read(descriptor, MAX_REPORT_BYTES - len(data))
        if not chunk:
            break
        data += chunk
    return data
