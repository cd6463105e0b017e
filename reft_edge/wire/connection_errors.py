"""Why there is no connection to the broker, as one line for a person: what went wrong, at which address, what to check.

Knows sockets, TLS and MQTT's reasons, but no MQTT client.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from reft_edge.errors import BrokerError
from reft_edge.wire.endpoint import TLS_PORT, BrokerSettings

REFUSED_LOGIN = ("Bad user name or password", "Not authorized", "Banned", "Bad authentication method")
"""MQTT's reasons for refusing who we are, as paho words them."""


class BrokerConnectionError(BrokerError):
    """The broker could not be reached, refused us, or the connection broke.

    `permanent`: trying again cannot help before somebody changes a setting, a file or the broker; what depends on a
    clock is not permanent. `turned_away`: the broker is there and does not let us in, because of who we are.
    `version_refused`: it does not speak this version of MQTT. `hung_up`: it closed the connection without an answer,
    which may mean the same.
    """

    def __init__(
        self,
        message: str,
        *,
        permanent: bool = False,
        turned_away: bool = False,
        version_refused: bool = False,
        hung_up: bool = False,
    ) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.turned_away = turned_away
        self.version_refused = version_refused
        self.hung_up = hung_up


class _Alert(NamedTuple):
    """What a TLS alert of the broker means for us."""

    words: str
    permanent: bool


_ALERTS: Mapping[str, _Alert] = {
    "CERTIFICATE_REVOKED": _Alert("says that our certificate is revoked", True),
    "CERTIFICATE_EXPIRED": _Alert("says that our certificate has expired, or its own revocation list has", False),
    "BAD_CERTIFICATE": _Alert("does not accept our certificate; perhaps it is not valid yet by its clock", False),
    "UNKNOWN_CA": _Alert("does not know the authority that signed our certificate", True),
    "UNSUPPORTED_CERTIFICATE": _Alert("does not accept our certificate, which is not for clients", True),
    "CERTIFICATE_REQUIRED": _Alert("wants a client certificate; set certificate_file and key_file in [broker]", True),
}
"""By the end of OpenSSL's name for it. Mosquitto with OpenSSL 3 was tried with each of these certificates."""

_ANOTHER_AUTHORITY = frozenset({2, 7, 18, 19, 20, 21, 30})
"""OpenSSL's verification errors of a certificate that nobody we trust has signed: an unknown issuer, a self-signed one,
a signature by an authority of the same name with another key."""
_WRONG_HOST = frozenset({62, 64})
_NOT_YET_VALID, _EXPIRED = 9, 10


def explain_failure(exc: OSError | ValueError, settings: BrokerSettings) -> BrokerConnectionError:
    """For what came up while the socket was connected or TLS negotiated."""
    where = f"broker {settings.address}"
    if isinstance(exc, ConnectionRefusedError):
        return BrokerConnectionError(
            f"nobody listens at {settings.address}; is the broker running, and is the port right?"
        )
    if isinstance(exc, socket.gaierror):
        known = exc.errno != socket.EAI_AGAIN
        return BrokerConnectionError(f"{where}: this host name is not known; check the address", permanent=known)
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _explain_verification(exc, settings)
    if isinstance(exc, ssl.SSLError) and is_alert(exc):
        return explain_alert(exc.reason, settings)
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionResetError) and settings.uses_tls:
        return BrokerConnectionError(f"{where} broke off the TLS handshake; is this its TLS port?")
    if isinstance(exc, ssl.SSLError):
        return BrokerConnectionError(f"{where}: TLS failed: {exc.reason or exc}; is this the TLS port?", permanent=True)
    if isinstance(exc, TimeoutError):
        advice = "is this its TLS port?" if settings.uses_tls else "check the address and the firewall"
        return BrokerConnectionError(f"{where}: no answer within {settings.connect_timeout_s:g} s; {advice}")
    return BrokerConnectionError(
        f"{where} cannot be reached: {(exc.strerror if isinstance(exc, OSError) else None) or exc}"
    )


def is_alert(exc: ssl.SSLError) -> bool:
    """Whether the peer ended TLS and said why."""
    return "_ALERT_" in (exc.reason or "")


def explain_alert(name: str, settings: BrokerSettings) -> BrokerConnectionError:
    """For a TLS alert from the broker; `name` is OpenSSL's, which ends with the alert's own."""
    kind = name.rpartition("_ALERT_")[2]
    alert = _ALERTS.get(kind) or _Alert(f"ends TLS with the alert {kind.lower().replace('_', ' ')!r}", False)
    return BrokerConnectionError(
        f"broker {settings.address} {alert.words}", permanent=alert.permanent, turned_away=True
    )


def explain_refused_login(reason: str, settings: BrokerSettings) -> BrokerConnectionError:
    """For one of `REFUSED_LOGIN` in MQTT's answer."""
    advice = "check username and password_file"
    if settings.certificate_file is not None and settings.username is None:
        advice = "it knows the authority of our certificate, but does not admit its name; see the broker's log"
    return BrokerConnectionError(
        f"broker {settings.address} refuses the connection: {reason}; {advice}", permanent=True, turned_away=True
    )


def explain_silence(settings: BrokerSettings) -> BrokerConnectionError:
    """For a connection that was closed before MQTT began."""
    advice = f"check the port, and whether the broker wants TLS: set ca_file in [broker] (its port is often {TLS_PORT})"
    if settings.uses_tls:
        advice = "check that it is an MQTT broker, and in its log whether it wants a client certificate"
    return BrokerConnectionError(
        f"{settings.address} took the connection and closed it without an MQTT answer; {advice}",
        turned_away=settings.certificate_file is not None,
        hung_up=True,
    )


def _explain_verification(exc: ssl.SSLCertVerificationError, settings: BrokerSettings) -> BrokerConnectionError:
    """We do not accept the broker's certificate."""
    what = f"broker {settings.address}: its certificate is not accepted"
    code = exc.verify_code
    if code in (_NOT_YET_VALID, _EXPIRED):
        dates = "it has expired" if code == _EXPIRED else "it is not valid yet"
        clock = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        return BrokerConnectionError(f"{what}: {dates} by the clock here, which says {clock}")
    if code in _ANOTHER_AUTHORITY:
        system = "an authority that this system knows; set ca_file in [broker]"
        ca = f"the authority in ca_file {settings.ca_file!r}" if settings.ca_file else system
        return BrokerConnectionError(f"{what}: it was not signed by {ca}", permanent=True)
    if code in _WRONG_HOST:
        return BrokerConnectionError(
            f"{what}: it is not for the host name {settings.host!r}; use the name that it was made for", permanent=True
        )
    return BrokerConnectionError(f"{what}: {exc.verify_message}; check ca_file and the host name", permanent=True)
