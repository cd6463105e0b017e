"""Enrolment: what an enrolment file holds is checked, then installed into the agent's folder.

Only what was checked gets there: a wrong file changes nothing. Which files there are and how they are replaced is in
`agent.identity_files`.

Loads `cryptography`; the daemon must not import this.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from reft_edge.agent.identity_files import (
    CA_FILE,
    CERTIFICATE_FILE,
    COORDINATOR_FILE,
    KEY_FILE,
    SETTINGS_FILE,
    finish_install,
    replace_together,
)
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import is_in_use
from reft_edge.errors import ConfigError
from reft_edge.wire.certificates import certificate_end, certificate_faults
from reft_edge.wire.enrolment import MAX_ENROLMENT_BYTES, Enrolment, decode_enrolment
from reft_edge.wire.signing import VerifyKey

_SETTINGS = """\
device = {device}
federation = {federation}

[broker]
host = {host}
port = {port}
ca_file = "{ca}"
certificate_file = "{certificate}"
key_file = "{key}"

[trust]
key_file = "{key}"
certificate_file = "{certificate}"
coordinator_key_file = "{coordinator}"

[data]
path = "data"        # this device's own samples: `reft-edge agent --help` says in which forms

# [limits]           # what training may take from this device
# memory_bytes = 300_000_000
"""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What `install` did. `advice`: what an existing agent.toml should say, a line each."""

    settings_file: Path
    settings_kept: bool
    advice: tuple[str, ...]


def read_enrolment(path: Path) -> Enrolment:
    """Read an enrolment file. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ENROLMENT_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"enrolment file {path} cannot be read: {exc.strerror or exc}") from exc
    return decode_enrolment(data, origin=f"enrolment file {path}")


def others_may_read(path: Path) -> bool:
    """Whether other users of this machine may read (and so have copied) the file."""
    try:
        return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False


def check_enrolment(enrolment: Enrolment, *, origin: str, now: datetime) -> datetime:
    """Make sure that key, certificate, authority and device fit each other today; returns when the certificate ends.

    Raises `ConfigError`.
    """
    certificate = enrolment.certificate.encode()
    try:
        faults = certificate_faults(
            certificate_pem=certificate,
            key_pem=enrolment.key.encode(),
            ca_pem=enrolment.ca.encode(),
            name=enrolment.device,
            now=now,
        )
        VerifyKey.from_pem(enrolment.coordinator_key.encode(), origin="the coordinator's public key")
    except ConfigError as exc:
        raise ConfigError(f"enrolment file {origin}: {exc}") from exc
    if faults:
        raise ConfigError(f"enrolment file {origin}: the certificate for {enrolment.device}: {'; '.join(faults)}")
    return certificate_end(certificate)


def install(enrolment: Enrolment, directory: Path) -> Installed:
    """Install a checked enrolment into `directory`, which is created; an agent.toml that is there is kept.

    Raises `ConfigError` when that agent.toml is another device's or of no use, `ResourceError` when the disk refuses.
    """
    finish_install(directory)
    settings_file = directory / SETTINGS_FILE
    settings_kept = settings_file.exists()
    advice = _advice_for(settings_file, enrolment) if settings_kept else ()
    contents = {
        KEY_FILE: enrolment.key.encode(),
        CERTIFICATE_FILE: enrolment.certificate.encode(),
        CA_FILE: enrolment.ca.encode(),
        COORDINATOR_FILE: enrolment.coordinator_key.encode(),
    }
    if not settings_kept:
        contents[SETTINGS_FILE] = _settings_text(enrolment).encode()
    replace_together(contents, directory)
    return Installed(settings_file=settings_file, settings_kept=settings_kept, advice=advice)


def _settings_text(enrolment: Enrolment) -> str:
    return _SETTINGS.format(
        device=json.dumps(enrolment.device),
        federation=json.dumps(enrolment.federation),
        host=json.dumps(enrolment.broker_host),
        port=enrolment.broker_port,
        ca=CA_FILE,
        certificate=CERTIFICATE_FILE,
        key=KEY_FILE,
        coordinator=COORDINATOR_FILE,
    )


def _advice_for(settings_file: Path, enrolment: Enrolment) -> tuple[str, ...]:
    """What an existing agent.toml must say to use what is installed. Raises `ConfigError` if it is another device's.

    Also while its agent runs: that would go on signing with the key that it has in memory, and nobody would hear it.
    """
    settings, directory = AgentSettings.read(settings_file), settings_file.parent
    if is_in_use(directory / settings.spool):
        raise ConfigError(f"an agent runs with {settings_file}; stop it, enrol again, and start it")
    for key, present, enrolled in (
        ("device", settings.device, enrolment.device),
        ("federation", settings.federation, enrolment.federation),
    ):
        if present != enrolled:
            raise ConfigError(
                f"{directory / SETTINGS_FILE} has {key} = {present!r} and the enrolment is for {enrolled!r}; "
                "choose another --directory, or move that file away"
            )
    base = directory.resolve()
    broker, trust = settings.broker, settings.trust
    wanted = [
        ("[broker] host", broker.host, enrolment.broker_host),
        ("[broker] port", broker.port, enrolment.broker_port),
        ("[broker] ca_file", broker.ca_file, CA_FILE),
        ("[broker] certificate_file", broker.certificate_file, CERTIFICATE_FILE),
        ("[broker] key_file", broker.key_file, KEY_FILE),
        ("[trust] key_file", trust and trust.key_file, KEY_FILE),
        ("[trust] certificate_file", trust and trust.certificate_file, CERTIFICATE_FILE),
        ("[trust] coordinator_key_file", trust and trust.coordinator_key_file, COORDINATOR_FILE),
    ]
    return tuple(
        f"{key} = {json.dumps(value)}"
        for key, present, value in wanted
        if present != (str(base / str(value)) if key.endswith("_file") else value)
    )
