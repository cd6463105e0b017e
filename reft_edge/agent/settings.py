"""agent.toml: which device this is, where the broker and the data are, and what training may take from the device.

Loads neither numpy nor the MQTT client.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from reft_edge.config import convert_settings, read_toml
from reft_edge.data.settings import DataSettings
from reft_edge.errors import ConfigError
from reft_edge.metrics_page import parse_address
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.topics import check_name

MAX_DEFAULT_THREADS = 4
"""Small boards have four cores; on a larger machine more threads gain little on models of this size."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What training may take from the device, whose main job is another one."""

    memory_bytes: Annotated[int, Meta(ge=2**20)] | None = None
    """Memory of the training process; by default what the device has to spare."""
    training_flops_per_s: Annotated[float, Meta(gt=0)] | None = None
    """Train no faster than this, by pausing after each step; by default as fast as the device can."""
    threads: Annotated[int, Meta(ge=1, le=256)] | None = None
    """Cores to train on; by default all, at most 4."""
    spin: bool = False
    """While a step runs, let cores wait for each other at full speed: faster where nothing else needs them, slower
    where something does."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    """How far training steps back behind other processes (`nice`)."""
    idle_worker_s: Annotated[float, Meta(ge=0, le=86_400)] = 120.0
    """The training process ends after this many seconds without work."""
    max_model_bytes: Annotated[int, Meta(ge=1024)] = 512 * 2**20
    """A model whose graphs and weights take more than this is refused before it is fetched."""

    @property
    def n_threads(self) -> int:
        return self.threads or min(MAX_DEFAULT_THREADS, os.cpu_count() or 1)


class ProfileSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the device profile comes from."""

    path: str = ""
    """A profile that `reft-edge profile-device --output` wrote, or one of device_profiles/; empty: measure once."""
    quick: bool = True
    """Measure for seconds rather than most of a minute."""


class ServingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[serving]: predicting with the model that was deployed to this device."""

    report: bool = False
    """Count which classes are predicted and how confidently, and tell the coordinator: counts only, never an input.
    How many predictions failed is told in any case, or a canary would tell nothing."""
    report_every_s: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    """At most one such report in this time; only what a deployment breaks is told sooner."""


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[metrics]: figures for Prometheus. Without it nothing is served, and nothing loaded for it."""

    address: str
    """PORT or HOST:PORT; without HOST it is this machine only."""

    def __post_init__(self) -> None:
        try:
            parse_address(self.address)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc


class AgentTrust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[trust]: who this device is and whom it obeys. With it, what is not signed is dropped."""

    key_file: str
    """This device's private Ed25519 key: signs what it says, and is its key in TLS as well."""
    certificate_file: str
    """For that key, by the federation's authority; its common name is the device."""
    coordinator_key_file: str
    """The coordinator's public Ed25519 key: only tasks that it signed are done."""

    def resolved_in(self, base_dir: Path) -> AgentTrust:
        """The same with file names made absolute, relative ones below `base_dir`."""
        return AgentTrust(**{name: str(base_dir / getattr(self, name)) for name in self.__struct_fields__})


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.toml. Relative paths in it start from the folder it lies in."""

    device: str
    """This device's name: unique in the federation, and its MQTT client id."""
    federation: str
    data: DataSettings
    broker: BrokerSettings = BrokerSettings()
    spool: str = "spool"
    """Folder for models, updates and state, which survive a restart. One agent, one spool."""
    limits: Limits = Limits()
    profile: ProfileSettings = ProfileSettings()
    serving: ServingSettings = ServingSettings()
    metrics: MetricsSettings | None = None
    trust: AgentTrust | None = None

    def __post_init__(self) -> None:
        try:
            check_name(self.device, "device")
            check_name(self.federation, "federation")
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc

    @classmethod
    def read(cls, path: Path) -> AgentSettings:
        """Read agent.toml; file names in [broker] and [trust] are made absolute. Raises `ConfigError`."""
        table = read_toml(path)
        if "model" in table:
            raise ConfigError(f"{path} is a federation's settings file; give the agent's")
        settings = convert_settings(table, cls, origin=str(path))
        base_dir = path.parent.resolve()
        trust = None if settings.trust is None else settings.trust.resolved_in(base_dir)
        return msgspec.structs.replace(settings, broker=settings.broker.resolved_in(base_dir), trust=trust)


def limited_profile(profile: DeviceProfile, limits: Limits) -> DeviceProfile:
    """The profile that is announced: what the device can do, within what its owner grants."""
    changes: dict[str, Quantity] = {}
    if limits.training_flops_per_s is not None and limits.training_flops_per_s < profile.planning_flops_per_s:
        changes["granted_flops_per_s"] = _granted(limits.training_flops_per_s, "training_flops_per_s")
    if limits.memory_bytes is not None and limits.memory_bytes < profile.planning_memory_bytes:
        changes["memory_available_bytes"] = _granted(limits.memory_bytes, "memory_bytes")
    return msgspec.structs.replace(profile, **changes)


def _granted(value: float, key: str) -> Quantity:
    return Quantity(value=value, basis="specified", source=f"[limits] {key} in agent.toml")
