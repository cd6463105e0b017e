"""Who gets what, and who gets it first: a new deployment's parts, from what is known of the fleet.

Devices that are away are part of it: what they are told waits for them at the broker. Not part of it are those in
quarantine, those whose certificate is good no more, and those whose samples have another shape. Nothing is told here,
and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_edge.config import did_you_mean
from reft_edge.coordinator.deploying.answers import UNANSWERED
from reft_edge.coordinator.deploying.choosing import Choice, Facts, choose, choose_canaries, model_of_variant
from reft_edge.coordinator.records import DeployedDevice
from reft_edge.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.releases import Release
    from reft_edge.coordinator.deployment_settings import DeploymentSettings
    from reft_edge.coordinator.fleet import Device
    from reft_edge.coordinator.store import Store
    from reft_edge.wire.deployment import Condition

MAX_NAMED = 5
"""Devices that one error message names."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person has said beside the settings."""

    devices: tuple[str, ...] = ()
    """Only these; empty: everybody."""
    model: str = ""
    """They all get this one."""
    canary: float | None = None
    """Instead of the settings' share."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A device that is no part of it, and why."""

    device: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DeploymentPlan:
    parts: tuple[DeployedDevice, ...]
    """By name. Devices that serve it already have the state `serving`."""
    left_out: tuple[LeftOut, ...]
    is_needed: bool = True
    """Whether somebody neither serves it nor will take it anyhow: it waits at the broker for who was asked before."""


def plan_deployment(
    deployment: str,
    release: Release,
    *,
    federation: str,
    store: Store,
    known: Sequence[Device],
    online: Iterable[str],
    conditions: Mapping[str, Condition],
    settings: DeploymentSettings,
    wishes: Wishes,
) -> DeploymentPlan:
    """Raises `ConfigError` for a device or model that there is not, `FederationError` where there is nobody to ask.

    `known`: devices that are believed and have told what they can do. `conditions`: what each told last.
    """
    present = set(online)
    barred = _left_out(release, known, store)
    wanted = _wanted(known, barred, store, wishes)
    trained = _trained(store, release.run)
    choices = {
        device.device: choose(
            release.candidates, _facts(device, trained), latency_s=settings.latency_s, forced=wishes.model
        )
        for device in wanted
    }
    serving = {name for name in choices if _serves(conditions.get(name), release, wishes.model)}
    there = {name: choice.model for name, choice in choices.items() if name in present and name not in serving}
    if not present & choices.keys():
        raise FederationError(_nobody_there(choices))
    canaries = _canaries(there, release.version, settings, wishes, unable=_without_judgement(known, settings))
    parts = [
        _part(deployment, name, choice, canary=name in canaries, serving=name in serving)
        for name, choice in sorted(choices.items())
    ]
    needing = choices.keys() - serving
    return DeploymentPlan(
        parts=tuple(parts),
        left_out=tuple(barred.values()),
        is_needed=bool(there or needing - _will_take_it(release, store, federation)),
    )


def _part(deployment: str, device: str, choice: Choice, *, canary: bool, serving: bool) -> DeployedDevice:
    return DeployedDevice(
        deployment=deployment,
        device=device,
        model=choice.model,
        smaller=choice.smaller,
        why="it serves this version already" if serving else choice.why,
        wave="canary" if canary else "rest",
        state="serving" if serving else "waiting",
    )


def _left_out(release: Release, known: Sequence[Device], store: Store) -> dict[str, LeftOut]:
    quarantined = {record.device: record.reason for record in store.quarantined()}
    found = {}
    for device in known:
        shape = device.announcement.input_shape if device.announcement is not None else ()
        if device.device in quarantined:
            reason = f"it is in quarantine: {quarantined[device.device]}"
        elif shape and release.input_shape and tuple(shape) != release.input_shape:
            reason = f"its samples have shape {tuple(shape)}, the model takes {release.input_shape}"
        else:
            continue
        found[device.device] = LeftOut(device=device.device, reason=reason)
    believed = {device.device for device in known}
    for record in store.devices():
        if record.device not in believed:
            reason = "its certificate is not accepted; it was revoked or has ended, or the device must show a new one"
            found[record.device] = LeftOut(device=record.device, reason=reason)
    return dict(sorted(found.items()))


def _wanted(known: Sequence[Device], barred: Mapping[str, LeftOut], store: Store, wishes: Wishes) -> list[Device]:
    names = [device.device for device in known]
    for name in wishes.devices:
        if name in barred:
            raise ConfigError(f"device {name!r} cannot be deployed to: {barred[name].reason}")
        if name not in names:
            hint = did_you_mean(name, names) if names else "; start its agent"
            raise ConfigError(f"device {name!r} was never heard of{hint}")
    chosen = [one for one in known if one.device not in barred and (one.device in wishes.devices or not wishes.devices)]
    if not chosen and not known and not store.devices():
        raise FederationError("no device was ever heard of; start their agents, with the same federation and broker")
    if not chosen:
        reasons = "; ".join(f"{one.device}: {one.reason}" for one in list(barred.values())[:MAX_NAMED])
        raise FederationError(f"there is no device to deploy to: {reasons}")
    return chosen


def _will_take_it(release: Release, store: Store, federation: str) -> set[str]:
    """Devices that were asked for this version and have not answered yet."""
    ours = {one.deployment for one in store.deployments(federation) if one.version == release.version}
    parts = [part for part in store.standing_parts(federation) if part.deployment in ours and not part.undone]
    return {part.device for part in parts if part.state in UNANSWERED}


def _facts(device: Device, trained: Mapping[str, str]) -> Facts:
    profile = None if device.announcement is None else device.announcement.profile
    return Facts(device=device.device, profile=profile, trained=trained.get(device.device, ""))


def _trained(store: Store, run: str) -> dict[str, str]:
    """Device -> the model of the variant that it was given last in that run."""
    return {one.device: model_of_variant(one.variant) for one in store.history(run)}


def _serves(condition: Condition | None, release: Release, forced: str) -> bool:
    serving = None if condition is None else condition.serving
    if serving is None or serving.version != release.version or (forced and serving.model != forced):
        return False
    return any(serving.sha256 in model.sha256s for model in release.models)


def _without_judgement(known: Sequence[Device], settings: DeploymentSettings) -> set[str]:
    """Devices that keep too few samples from training to compare a version's accuracy with anything."""
    least = settings.rules.min_holdout_samples
    return {one.device for one in known if one.announcement is None or one.announcement.holdout_samples < least}


def _canaries(
    there: Mapping[str, str],
    version: str,
    settings: DeploymentSettings,
    wishes: Wishes,
    *,
    unable: Collection[str],
) -> frozenset[str]:
    share = settings.canary if wishes.canary is None else wishes.canary
    named = () if wishes.canary is not None else settings.canary_devices
    canaries = choose_canaries(there, share=share, named=named, version=version, unable=unable)
    if there and not canaries:
        raise FederationError(
            f"none of [deployment] canary_devices ({', '.join(named)}) is there and needs the version; name others, or "
            "give --canary SHARE"
        )
    return canaries


def _nobody_there(devices: Iterable[str]) -> str:
    names = sorted(devices)
    some = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    return f"no device is online ({some}); somebody must be there to try a version first; start their agents"
