"""Keys and certificates of a small federation, as files and as the [trust] tables that name them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from reft_edge.wire.signing import SigningKey
from tests.certificates import Authority, Issued, public_pem

LONG_AGO = timedelta(days=-10)
"""Certificates begin here, so that a clock may be set back in a test."""


class TrustedSite:
    """An authority, the coordinator's key, and devices' as they are asked for, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory, starts=LONG_AGO)
        self.coordinator = self.authority.issue("coordinator", starts=LONG_AGO)
        self.coordinator_key_file = directory / "coordinator.pub"
        self.coordinator_key_file.write_bytes(public_pem(self.coordinator.key))
        self._devices: dict[str, Issued] = {}

    def device(self, name: str) -> Issued:
        if name not in self._devices:
            self._devices[name] = self.authority.issue(name, starts=LONG_AGO)
        return self._devices[name]

    @property
    def coordinator_key(self) -> SigningKey:
        return signing_key(self.coordinator)

    def agent_table(self, name: str) -> str:
        """[trust] of agent.toml."""
        device = self.device(name)
        return (
            f'[trust]\nkey_file = "{device.key_file}"\ncertificate_file = "{device.certificate_file}"\n'
            f'coordinator_key_file = "{self.coordinator_key_file}"\n'
        )

    def federation_table(self) -> str:
        """[trust] of federation.toml."""
        revoked = self.authority.revoke()
        return (
            f'[trust]\nkey_file = "{self.coordinator.key_file}"\nca_file = "{self.authority.ca_file}"\n'
            f'crl_file = "{revoked}"\n'
        )


def signing_key(issued: Issued) -> SigningKey:
    return SigningKey.from_pem(issued.key_pem)
