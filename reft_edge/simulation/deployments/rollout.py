"""One roll-out of a good version to every device, taken apart, and its undoing."""

from __future__ import annotations

from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING

from reft_edge.coordinator.store import Store
from reft_edge.errors import FederationError
from reft_edge.simulation.deployments.records import Rollout
from reft_edge.simulation.deployments.served import Watch, complaints
from reft_edge.simulation.deployments.site import FEDERATION, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reft_edge.coordinator.records import DeployedDevice, DeploymentRecord
    from reft_edge.simulation.deployments.crew import Crew, Ended
    from reft_edge.simulation.deployments.observer import Observer, Said
    from reft_edge.wire.deployment import AttemptState


def roll_out(crew: Crew, observer: Observer, *, old: str, new: str, file_bytes: int) -> Rollout:
    """Deploy `new` to all, who serve `old`, and roll it back.

    Raises `FederationError` when one of the two does not come to be served everywhere.
    """
    site = crew.site
    before = observer.bytes_until_now()
    watch = Watch(site)
    ended = crew.deploy(new, look=watch.look)
    switched_at = _last_switch(crew, watch, ended, new)
    after = observer.bytes_until_now()
    _, devices = latest_deployment(site)
    said = [observer.said(device, since=ended.began_at) for device in site.devices]
    spans = [_spans(one) for one in said]
    watch = Watch(site)
    undone = crew.roll_back(look=watch.look)
    return Rollout(
        **_parts(ended, devices, last_switch_at=switched_at),
        devices=len(site.devices),
        canaries=sum(device.wave == "canary" for device in devices),
        fetch_s=median(fetching for fetching, _ in spans),
        check_s=median(checking for _, checking in spans),
        int8=sum(_took_int8(one) for one in said),
        said_bytes=after.received - before.received,
        heard_bytes=after.sent - before.sent,
        file_bytes=file_bytes,
        until_undone_s=_last_switch(crew, watch, undone, old) - undone.began_at,
        undo_command_s=undone.seconds,
    )


def _last_switch(crew: Crew, watch: Watch, ended: Ended, version: str) -> float:
    """When the last device came to serve `version`, Unix time. Raises `FederationError` where one does not."""
    watch.look()
    site = crew.site
    wrong = [*complaints(site, dict.fromkeys(site.devices, (version,))), *crew.died()]
    if ended.status != 0 or wrong:
        raise FederationError(f"{version} is not served everywhere: {'; '.join([*wrong, ended.said])}")
    return max(switch.at for switch in watch.switches if switch.version == version)


def latest_deployment(site: Site) -> tuple[DeploymentRecord, list[DeployedDevice]]:
    """Raises `FederationError` where nothing was ever deployed."""
    with closing(Store(site.results, shared=True)) as store:
        for record in store.deployments(FEDERATION):
            return record, store.deployed_devices(record.deployment)
    raise FederationError("nothing was deployed yet")


def _parts(ended: Ended, devices: Sequence[DeployedDevice], *, last_switch_at: float) -> dict[str, float]:
    canaries, rest = ([device for device in devices if device.wave == wave] for wave in ("canary", "rest"))
    asked_at = min(_known(device.asked_at) for device in canaries)
    passed_at = max(_known(device.answered_at) for device in canaries)
    rest_asked_at = min((_known(device.asked_at) for device in rest), default=passed_at)
    return {
        "until_served_s": last_switch_at - ended.began_at,
        "start_s": asked_at - ended.began_at,
        "canaries_s": passed_at - asked_at,
        "soak_s": rest_asked_at - passed_at,
        "rest_s": last_switch_at - rest_asked_at,
        "command_s": ended.seconds,
    }


def _known(at: float | None) -> float:
    if at is None:
        raise FederationError("a device of a finished deployment was never asked or never answered")
    return at


def _spans(said: Sequence[Said]) -> tuple[float, float]:
    """Seconds of fetching and of checking, as far as a device has said when they began."""
    fetching, checking, serving = (_first(said, state) for state in ("fetching", "checking", "serving"))
    return checking - fetching, serving - checking


def _first(said: Sequence[Said], state: AttemptState) -> float:
    """When a device first said that it is in `state`; of states that were over too soon, when it said the next one."""
    order: tuple[AttemptState, ...] = ("fetching", "checking", "serving")
    later = order[order.index(state) :]
    for one in said:
        if one.condition.attempt is not None and one.condition.attempt.state in later:
            return one.at
    raise FederationError(f"a device has never said that it is {state}")


def _took_int8(said: Sequence[Said]) -> bool:
    serving = [one.condition.serving for one in said if one.condition.serving is not None]
    return bool(serving) and serving[-1].precision == "int8"
