"""A bad version, which must not come further than the canaries, and of which nothing may be left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from reft_edge.simulation.deployments.records import Stopped
from reft_edge.simulation.deployments.rollout import latest_deployment
from reft_edge.simulation.deployments.served import Watch, complaints

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reft_edge.simulation.deployments.bad_models import Badness
    from reft_edge.simulation.deployments.crew import Crew
    from reft_edge.simulation.deployments.observer import Observer, Said

ALIKE_WITHIN_S = 30.0
"""For the last device to have gone back, after the command has ended."""

_LOOK_S = 0.02


def stop_bad(
    crew: Crew, observer: Observer, badness: Badness, arguments: Sequence[str], *, version: str, served: str
) -> Stopped:
    """`reft-edge deploy federation.toml` with `arguments`, of the bad `version`, where all devices serve `served`."""
    site = crew.site
    watch = Watch(site)
    ended = crew.deploy(*arguments, look=watch.look)
    wrong = settle(crew, dict.fromkeys(site.devices, (served,)), watch)
    record, devices = latest_deployment(site)
    if record.version != version:  # it was stopped before there was a deployment
        devices = []
    canaries = {device.device for device in devices if device.wave == "canary"}
    answers = [_first_no(observer.said(device, since=ended.began_at), record.deployment) for device in canaries]
    first = min((one for one in answers if one is not None), key=lambda one: one.at, default=None)
    attempt = None if first is None else first.condition.attempt
    reason = attempt.reason if attempt is not None else record.reason if devices else ended.said
    switched = set(watch.devices_that_served(version))
    return Stopped(
        badness=badness,
        status=ended.status,
        state=record.state if devices else "",
        kind="" if attempt is None else attempt.kind,
        reason=reason.replace(f"{site.directory}/", ""),
        canaries=len(canaries),
        switched=len(switched),
        switched_beyond=len(switched - canaries),
        command_s=ended.seconds,
        undo_s=None if first is None else ended.ended_at - first.at,
        complaints=(*wrong, *crew.died()),
    )


def settle(crew: Crew, expected: Mapping[str, Sequence[str]], watch: Watch) -> list[str]:
    """What is wrong with what devices serve, once it is as `expected` or they had `ALIKE_WITHIN_S` for that."""
    end = time.monotonic() + ALIKE_WITHIN_S
    while (wrong := complaints(crew.site, expected)) and time.monotonic() < end:
        watch.look()
        time.sleep(_LOOK_S)
    return wrong


def _first_no(said: Sequence[Said], deployment: str) -> Said | None:
    """When a device said first that it does not serve what it was asked to."""
    for one in said:
        attempt = one.condition.attempt
        if attempt is not None and attempt.deployment == deployment and attempt.state in ("refused", "failed"):
            return one
    return None
