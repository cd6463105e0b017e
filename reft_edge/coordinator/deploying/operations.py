"""Deploy a version, and undo a deployment: the whole of each, from the store's lock to the last device's answer.

Each can be killed at any moment and started again. `deploy` goes on with a deployment of the same version that has not
ended; one that was being rolled back is rolled back first. `roll_back` undoes the last deployment, once: again it
changes nothing but for devices that have not answered yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_edge.config import did_you_mean
from reft_edge.coordinator.deploying import rollout
from reft_edge.coordinator.deploying.deployer import Deployer, Listener, Progress, new_deployment_id, rollout_rules
from reft_edge.coordinator.deploying.planning import DeploymentPlan, Wishes, plan_deployment
from reft_edge.coordinator.deploying.standing import forget_files, kept_blobs
from reft_edge.coordinator.records import ENDED_DEPLOYMENTS, GONE_BACK, DeployedDevice, DeploymentRecord
from reft_edge.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.releases import Release
    from reft_edge.coordinator.deploying.site import Site

CLOCK_STEP_S = 0.001

UNDONE_BY_A_PERSON = "a person rolled it back"


@dataclass(frozen=True, kw_only=True)
class RolledBack:
    """What became of a deployment that was to be undone."""

    progress: Progress
    was_needed: bool = True
    """Whether there was anything to undo: again changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A deployment before anybody is told: what will be done."""

    release: Release
    plan: DeploymentPlan
    goes_on: DeploymentRecord | None = None
    """A deployment that was begun before and has not ended."""


def prepare_deployment(site: Site, release: Release, wishes: Wishes) -> Prepared:
    """Decide, and tell nobody. Raises `ConfigError` or `FederationError` where it cannot be done."""
    record = site.store.latest_deployment(site.settings.federation)
    if record is not None and _is_the_same(record, release, site, wishes):
        parts = tuple(site.store.deployed_devices(record.deployment))
        return Prepared(release=release, plan=DeploymentPlan(parts=parts, left_out=()), goes_on=record)
    _check_name_is_free(site, release)
    plan = plan_deployment(
        new_deployment_id(site.clock()),
        release,
        federation=site.settings.federation,
        store=site.store,
        known=site.fleet.known(),
        online=site.present(),
        conditions={one.device: one.condition for one in site.store.conditions()},
        settings=site.settings.deployment,
        wishes=wishes,
    )
    return Prepared(release=release, plan=plan)


def deploy(site: Site, prepared: Prepared, *, listener: Listener) -> Progress:
    """Roll it out, to its end. `prepared` needs it: `plan.is_needed` or `goes_on`."""
    if prepared.goes_on is not None:
        return _go_on(site, prepared.goes_on, listener, lambda now: rollout.Resumed(now=now))
    now = site.clock()
    rules = rollout_rules(site.settings)
    state = rollout.start_rollout(prepared.plan.parts, online=site.present(), rules=rules, now=now)
    record = DeploymentRecord(
        deployment=prepared.plan.parts[0].deployment,
        federation=site.settings.federation,
        version=prepared.release.version,
        state=state.phase.value,
        started_at=_after_all_before(site, now),
        since=state.since,
        models=prepared.release.models,
        classes=prepared.release.classes,
        rules=site.settings.deployment.health_rules,
    )
    # With the canaries as those that are asked: a process that finds nobody asked would go on without them.
    site.store.begin_deployment(record, list(state.parts.values()))
    return _played(site, Deployer(site, record, state, listener=listener))


def _after_all_before(site: Site, now: float) -> float:
    """When a deployment begins: their order is that of their starts, also where the clock was set back."""
    latest = site.store.latest_deployment(site.settings.federation)
    return now if latest is None else max(now, latest.started_at + CLOCK_STEP_S)


def forget_unused(site: Site, release: Release) -> None:
    """Remove the files of a version that nobody was offered after all."""
    files = {file.blob.sha256 for model in release.models for file in model.files}
    for sha256 in files - kept_blobs(site.store, site.settings.federation):
        site.blobs.remove(sha256)


def unfinished_rollback(site: Site) -> DeploymentRecord | None:
    """The last deployment, if it was being undone when its process ended."""
    record = site.store.latest_deployment(site.settings.federation)
    return record if record is not None and record.state == "rolling_back" else None


def finish_rollback(site: Site, record: DeploymentRecord, *, listener: Listener) -> Progress:
    """Go on undoing a deployment."""
    return _go_on(site, record, listener, lambda now: rollout.Resumed(now=now))


def roll_back(
    site: Site, devices: Sequence[str] = (), *, version: str | None = None, listener: Listener
) -> list[RolledBack]:
    """Undo the last deployment; with `devices`, for each of these the last that it was part of.

    `version`: undo that one instead, on the devices that go by it now, or on those of them that are named.

    Raises `FederationError` where nothing was ever deployed, `ConfigError` for a device that got nothing and a version
    that nobody goes by.
    """
    deployments = site.store.deployments(site.settings.federation)
    if not deployments:
        raise FederationError(f"nothing was ever deployed in federation {site.settings.federation!r}")
    if version is not None:
        chosen = _going_by(site, deployments, version, devices)
    elif devices:
        chosen = _last_of_each(site, deployments, devices)
    else:
        return [_roll_back_all(site, deployments[0], listener)]
    return [_roll_back_some(site, record, parts, listener) for record, parts in chosen]


def _roll_back_all(site: Site, record: DeploymentRecord, listener: Listener) -> RolledBack:
    parts = site.store.deployed_devices(record.deployment)
    if record.state == "rolled_back" and all(part.asked_at is None or part.state in GONE_BACK for part in parts):
        return RolledBack(progress=Progress(record=record, devices=parts, changed=()), was_needed=False)
    if record.state == "rolling_back":
        return RolledBack(progress=finish_rollback(site, record, listener=listener))
    stopped = _go_on(site, record, listener, lambda now: rollout.Stopped(now=now, reason=UNDONE_BY_A_PERSON))
    return RolledBack(progress=stopped)


def _roll_back_some(
    site: Site, record: DeploymentRecord, parts: list[DeployedDevice], listener: Listener
) -> RolledBack:
    if all(part.undone and part.state in GONE_BACK for part in parts):
        return RolledBack(progress=Progress(record=record, devices=parts, changed=()), was_needed=False)
    others = site.store.deployed_devices(record.deployment)
    if all(part in parts or part.undone or part.asked_at is None for part in others):
        return _roll_back_all(site, record, listener)
    now = site.clock()
    rules = rollout_rules(site.settings)
    state = rollout.resume_rollout(record, parts, online=site.present(), rules=rules, now=now)
    if state.phase is not rollout.Phase.ROLLING_BACK:
        state = rollout.advance(state, rollout.Stopped(now=now, reason=UNDONE_BY_A_PERSON))
    return RolledBack(progress=_played(site, Deployer(site, record, state, listener=listener, of_some=True)))


def _going_by(
    site: Site, deployments: Sequence[DeploymentRecord], version: str, devices: Sequence[str]
) -> list[tuple[DeploymentRecord, list[DeployedDevice]]]:
    """The deployments of a version that devices go by, with these devices' parts."""
    versions = {record.deployment: record.version for record in deployments}
    standing = site.store.standing_parts(site.settings.federation)
    current = sorted({versions[part.deployment] for part in standing})
    if version not in current:
        hint = did_you_mean(version, current) if current else "; none is left that could be undone"
        raise ConfigError(f"no device goes by version {version!r}{hint}")
    ours = [part for part in standing if versions[part.deployment] == version]
    for name in devices:
        if name not in {part.device for part in ours}:
            raise ConfigError(f"device {name!r} does not go by version {version!r}")
    wanted = [part for part in ours if part.device in devices or not devices]
    grouped = [(record, [one for one in wanted if one.deployment == record.deployment]) for record in deployments]
    return [(record, parts) for record, parts in grouped if parts]


def _last_of_each(
    site: Site, deployments: Sequence[DeploymentRecord], devices: Sequence[str]
) -> list[tuple[DeploymentRecord, list[DeployedDevice]]]:
    """For each device the last deployment that it was asked in; those of one deployment together."""
    missing, found = list(dict.fromkeys(devices)), []
    for record in deployments:
        parts = [part for part in site.store.deployed_devices(record.deployment) if part.device in missing]
        if asked := [part for part in parts if part.asked_at is not None]:
            found.append((record, asked))
            missing = [name for name in missing if name not in {part.device for part in asked}]
        if not missing:
            return found
    raise ConfigError(f"device {missing[0]!r} was given no version yet; reft-edge devices lists those that are known")


def _go_on(
    site: Site, record: DeploymentRecord, listener: Listener, event: Callable[[float], rollout.Event]
) -> Progress:
    """Play a stored deployment from where it is, beginning with `event`, which is given the time."""
    now = site.clock()
    parts = site.store.deployed_devices(record.deployment)
    rules = rollout_rules(site.settings)
    state = rollout.resume_rollout(record, parts, online=site.present(), rules=rules, now=now)
    return _played(site, Deployer(site, record, rollout.advance(state, event(now)), listener=listener))


def _played(site: Site, deployer: Deployer) -> Progress:
    outcome = deployer.play()
    if any(part.undone for part in outcome.devices):
        site.standing.keep_up(site.clock())  # who has gone back may have missed what the others go by now
    forget_files(site.store, site.blobs, site.settings.federation)
    return outcome


def _is_the_same(record: DeploymentRecord, release: Release, site: Site, wishes: Wishes) -> bool:
    """Whether a deployment that has not ended is the one that is wanted."""
    if record.state in (*ENDED_DEPLOYMENTS, "rolling_back") or record.version != release.version:
        return False
    models = {part.device: part.model for part in site.store.deployed_devices(record.deployment)}
    fits = not wishes.model or set(models.values()) == {wishes.model}
    return record.models == release.models and fits and set(wishes.devices) <= models.keys()


def _check_name_is_free(site: Site, release: Release) -> None:
    """One name means one version for ever: devices tell what they serve by it. Raises `ConfigError`."""
    for record in site.store.deployments(site.settings.federation):
        same_name = record.version == release.version
        if same_name and {m.sha256s for m in record.models} != {m.sha256s for m in release.models}:
            raise ConfigError(
                f"version {release.version!r} was deployed before with other files; give this one another name with "
                "--as NAME"
            )
