"""What the authority does with a running broker: make it read its files, see that it did, end a connection, publish.

For each of these `provision` makes itself a certificate that ends after minutes and whose key never touches the disk.
Nothing here needs an administrator's interface, so it works with any broker that asks its clients for certificates.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

from reft_edge.errors import BrokerError, ConfigError
from reft_edge.provisioning.authority import new_client_key, private_pem
from reft_edge.provisioning.directory import PROVISIONER, Provisioning
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.mqtt import Event, MqttLink, Rejected
from reft_edge.wire.topics import device_topic

LOGIN_LIFETIME = timedelta(minutes=10)
"""Of the certificates that are made for one connection: longer than it takes, shorter than it takes to misuse."""

RELOAD_TIMEOUT_S = 120.0
"""A command that copies some kilobytes to another machine and sends a signal there has hung when it takes longer."""

NOTICE_TIMEOUT_S = 10.0
"""A broker that was told to read its files does so at its next look at the signal, within a second; busy ones later."""

CONNECT_TIMEOUT_S = 5.0
"""A broker that listens answers within a second, also over a mobile network."""

_NOTICE_POLL_S = 0.2
_FLUSH_S = 30.0
_QUEUE_FULL_POLL_S = 0.05

_log = logging.getLogger(__name__)


def run_reload_command(provisioning: Provisioning) -> bool:
    """Have the broker read its files again; False where no command is set. Raises `BrokerError` when it fails."""
    command = provisioning.settings.reload_command
    if not command:
        return False
    try:
        done = subprocess.run(
            command,
            cwd=provisioning.paths.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=RELOAD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        reason = "did not end in time" if isinstance(exc, subprocess.TimeoutExpired) else exc.strerror or exc
        raise BrokerError(f"reload_command {command[0]!r}: {reason}; see {provisioning.paths.settings}") from exc
    if done.returncode != 0:
        said = (done.stderr + b"\n" + done.stdout).decode("utf-8", "replace").strip().splitlines()
        reason = said[-1][:500] if said else "it said nothing"
        raise BrokerError(f"reload_command {command[0]!r} ended with status {done.returncode}: {reason}")
    return True


def wait_until_list_is_read(provisioning: Provisioning, *, wait_s: float = NOTICE_TIMEOUT_S) -> None:
    """Return when the broker refuses what the newest revocation list names, and so has read that list.

    Raises `BrokerError` when it cannot be reached, or has not read the list after `wait_s`.
    """
    give_up_at = time.monotonic() + wait_s
    while (reason := _refusal_of_canary(provisioning)) != _REVOKED:
        if time.monotonic() >= give_up_at:
            found = f"it refuses everybody: {reason}" if reason else "it still accepts what the list revokes"
            raise BrokerError(
                f"broker {_address(provisioning)} has not read the new revocation list: {found}; bring "
                f"{provisioning.paths.broker} to the broker and send it SIGHUP, or mend reload_command"
            )
        time.sleep(_NOTICE_POLL_S)


def end_connection(provisioning: Provisioning, device: str, *, now: datetime) -> None:
    """Take over the session of `device` and leave: the broker ends the older connection of the same name.

    Its revoked certificate does not bring it back. Raises `BrokerError`.
    """
    with _login(provisioning, device, now=now) as settings:
        link = MqttLink(settings, client_id=device, events=queue.SimpleQueue(), persistent=False)
        link.start(wait_s=CONNECT_TIMEOUT_S)
        link.stop()


def publish_certificates(provisioning: Provisioning, certificates: Mapping[str, str], *, now: datetime) -> set[str]:
    """Leave each device its renewed certificate at the broker, by device; empty: take back what lies there.

    Returns the devices whose certificate the broker did not acknowledge. Raises `BrokerError` when the broker cannot be
    reached.
    """
    federation = provisioning.settings.federation
    topics = {device: device_topic(federation, device, "certificate") for device in certificates}
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with _login(provisioning, PROVISIONER, now=now) as settings:
        link = MqttLink(settings, client_id=PROVISIONER, events=events, persistent=False)
        link.start(wait_s=CONNECT_TIMEOUT_S)
        give_up_at = time.monotonic() + _FLUSH_S
        unsent = set()
        for device, certificate in certificates.items():
            while not (taken := link.publish(topics[device], certificate.encode("ascii"), retain=True)):
                if time.monotonic() >= give_up_at:
                    break
                time.sleep(_QUEUE_FULL_POLL_S)  # some thousand wait already
            if not taken:
                unsent.add(device)
        link.stop(flush_s=max(0.0, give_up_at - time.monotonic()))
        waiting = link.waiting_topics()
    refusals = " ".join(_refusals(events))
    return unsent | {device for device, topic in topics.items() if topic in waiting or f"{topic}:" in refusals}


_REVOKED = "SSLV3_ALERT_CERTIFICATE_REVOKED"
"""OpenSSL's name for the TLS alert 44."""


def _refusal_of_canary(provisioning: Provisioning) -> str:
    """Why the broker refuses the certificate that only exists to be refused; empty when it does not.

    Over TLS 1.2, where the handshake ends after the broker has judged the certificate; with 1.3 the client is done
    before. Raises `BrokerError` when the broker cannot be reached.
    """
    host, port, paths = provisioning.settings.broker_host, provisioning.settings.port, provisioning.paths
    try:
        context = ssl.create_default_context(cafile=paths.authority_certificate)
        context.load_cert_chain(paths.canary)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"{paths.canary} cannot be used: {exc}; `reft-edge provision refresh-crl` makes it") from exc
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with (
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as exc:
        raise BrokerError(
            f"broker {_address(provisioning)}: its certificate is not accepted: {exc.verify_message}; "
            "`reft-edge provision renew broker` makes a new one"
        ) from exc
    except ssl.SSLError as exc:
        return exc.reason or str(exc)
    except OSError as exc:
        raise BrokerError(f"broker {_address(provisioning)} cannot be reached: {exc.strerror or exc}") from exc


@contextmanager
def _login(provisioning: Provisioning, name: str, *, now: datetime) -> Iterator[BrokerSettings]:
    """How to connect as `name`, for the time of the block."""
    key = new_client_key()
    certificate = provisioning.authority.issue_client(name, key.public_key(), lifetime=LOGIN_LIFETIME, now=now)
    with _in_memory(certificate) as certificate_file, _in_memory(private_pem(key)) as key_file:
        yield BrokerSettings(
            host=provisioning.settings.broker_host,
            port=provisioning.settings.port,
            ca_file=str(provisioning.paths.authority_certificate),
            certificate_file=certificate_file,
            key_file=key_file,
            connect_timeout_s=CONNECT_TIMEOUT_S,
        )


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A file name that this process can open and that is on no disk."""
    descriptor = os.memfd_create("reft-edge", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _refusals(events: queue.SimpleQueue[Event]) -> Iterator[str]:
    while not events.empty():
        event = events.get()
        if isinstance(event, Rejected):
            _log.warning("%s", event.reason)
            yield event.reason


def _address(provisioning: Provisioning) -> str:
    return f"{provisioning.settings.broker_host}:{provisioning.settings.port}"
