"""provisioning.toml: what an operator decides about the authority, typed and checked."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from reft_edge.config import convert_settings, read_toml
from reft_edge.errors import ConfigError
from reft_edge.provisioning.authority import check_host
from reft_edge.wire.endpoint import TLS_PORT
from reft_edge.wire.topics import check_name

Days: TypeAlias = Annotated[int, Meta(ge=1, le=36_500)]


class Lifetimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[lifetimes], in days."""

    authority_days: Days = 7300
    """20 years. The authority's certificate is the one thing that no message renews: when it ends, somebody has to
    visit every device. It counts at `init` only."""
    certificate_days: Days = 365
    """A year. Renewing needs no visit, so a shorter life costs nothing while devices are switched on now and then; one
    that is kept in a drawer for longer has to be enrolled again."""
    renew_before_days: Days = 60
    """`renew` takes those that end within this time. A device has this long to be switched on once and get its own."""
    revocation_list_days: Days = 30
    """A list past its date locks everybody out, so it outlives any holiday of the machine that renews it daily. It is
    also how long somebody who can hold back new lists from the broker keeps a revoked device alive."""

    def __post_init__(self) -> None:
        if self.renew_before_days >= self.certificate_days:
            raise ValueError("renew_before_days must be less than certificate_days")

    @property
    def authority(self) -> timedelta:
        return timedelta(days=self.authority_days)

    @property
    def certificate(self) -> timedelta:
        return timedelta(days=self.certificate_days)

    @property
    def revocation_list(self) -> timedelta:
        return timedelta(days=self.revocation_list_days)

    @property
    def warn_before(self) -> timedelta:
        """A revocation list that ends within this time should have been renewed long ago."""
        return self.revocation_list / 3


class ProvisioningSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    federation: str
    broker_hosts: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
    """Names and IP addresses in the broker's certificate. Devices, coordinator and `provision` connect to the first."""
    port: Annotated[int, Meta(ge=1, le=65_535)] = TLS_PORT
    reload_command: tuple[str, ...] = ()
    """Brings the folder `broker` to the broker and makes it read its files again. Run in the provisioning directory,
    without a shell."""
    revocation_list_url: Annotated[str, Meta(max_length=1000, pattern=r"^(https?://[!-~]+)?\Z")] = ""
    """Where the broker fetches the list, if it is one that looks there and takes no file (broker_config/CLUSTER.md). It
    stands in every client's certificate, so it should be set before any is made."""
    lifetimes: Lifetimes = Lifetimes()

    def __post_init__(self) -> None:
        try:
            check_name(self.federation, "federation")
            for host in self.broker_hosts:
                check_host(host)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc

    @property
    def broker_host(self) -> str:
        return self.broker_hosts[0]


def read_settings(path: Path) -> ProvisioningSettings:
    """Raises `ConfigError`."""
    return convert_settings(read_toml(path), ProvisioningSettings, origin=str(path))
