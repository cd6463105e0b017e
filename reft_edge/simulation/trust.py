"""Keys for a federation on this machine, made, handed out and installed by the code that does so for a real one.

    <run>/provisioning/             the authority, as `reft-edge provision init` makes it
    <any folder>/identity.key, ...  a device, as `reft-edge agent --enrol` leaves it

A Mosquitto that is started here lets in whom the authority has certified, and nobody else. The embedded broker cannot
ask for certificates, and one that runs anyway does as its owner wants: there, messages are signed and not encrypted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from reft_edge.agent.enrolment import check_enrolment, install, read_enrolment
from reft_edge.config import convert_settings, read_toml
from reft_edge.provisioning.directory import Paths, opened
from reft_edge.provisioning.files import remove_file
from reft_edge.provisioning.issuing import add_device, begin
from reft_edge.provisioning.settings import ProvisioningSettings
from reft_edge.simulation.brokers import LOOPBACK, choose_kind, free_port, start_broker, start_provisioned_broker
from reft_edge.wire.endpoint import BrokerSettings

PROVISIONING = "provisioning"
"""Folder of the authority in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class TrustedBroker:
    """A broker, and the authority of the federation that meets there."""

    broker: BrokerSettings
    """How it is reached; files of TLS come from the authority."""
    provisioned: Paths
    """The authority's folder."""
    mutual_tls: bool

    @property
    def words(self) -> str:
        """What is on, for people."""
        if self.mutual_tls:
            return "mutual TLS, signed tasks and updates"
        return "signed tasks and updates; this broker has no TLS"

    def coordinator_tables(self) -> dict[str, Any]:
        """What a person copies into federation.toml: `federation`, [broker] and [trust]."""
        return self._at_broker(read_toml(self.provisioned.federation_tables))

    def enrol(self, device: str, directory: Path) -> dict[str, Any]:
        """Give `device` a key and a certificate, and install them into `directory`.

        Returns the content of the agent.toml that lies there then; it says everything but where the data is. Raises
        `ConfigError` and `ResourceError`.
        """
        now = datetime.now(UTC)
        with opened(self.provisioned.root, now=now) as provisioning:
            file = add_device(provisioning, device, now=now)
        enrolment = read_enrolment(file)
        check_enrolment(enrolment, origin=str(file), now=now)
        installed = install(enrolment, directory)
        remove_file(file)
        return self._at_broker(read_toml(installed.settings_file))

    def _at_broker(self, tables: dict[str, Any]) -> dict[str, Any]:
        reached = {"host": self.broker.host, "port": self.broker.port, "mqtt_version": self.broker.mqtt_version}
        return tables | {"broker": (tables["broker"] if self.mutual_tls else {}) | reached}


@contextmanager
def start_trusted_broker(
    kind: Literal["auto", "mosquitto", "embedded"], *, directory: Path, federation: str
) -> Iterator[TrustedBroker]:
    """An authority in `directory`, and a broker that runs for the length of the block; Mosquitto asks for certificates.

    Raises `BrokerError` and `ConfigError`.
    """
    logs = directory / "broker"
    if choose_kind(kind) == "mosquitto":
        port = free_port()
        provisioned = found_authority(directory, federation, host=LOOPBACK, port=port)
        with start_provisioned_broker(provisioned.broker_configuration, directory=logs, port=port) as running:
            yield TrustedBroker(broker=running.settings, provisioned=provisioned, mutual_tls=True)
    else:
        with start_broker("embedded", directory=logs) as running:
            yield trust_at(running.settings, directory=directory, federation=federation)


def trust_at(broker: BrokerSettings, *, directory: Path, federation: str) -> TrustedBroker:
    """An authority in `directory` for a broker that asks nobody for a certificate. Raises `ConfigError`."""
    provisioned = found_authority(directory, federation, host=broker.host, port=broker.port)
    return TrustedBroker(broker=broker, provisioned=provisioned, mutual_tls=False)


def found_authority(directory: Path, federation: str, *, host: str, port: int) -> Paths:
    """A new authority in `directory`, for a broker that is reached at `host` and `port`.

    For a Mosquitto of one's own: `start_provisioned_broker` starts it. Raises `ConfigError`.
    """
    table = {"federation": federation, "broker_hosts": [host], "port": port}
    settings = convert_settings(table, ProvisioningSettings, origin="the broker's address")
    return begin(directory / PROVISIONING, settings, now=datetime.now(UTC)).paths
