"""Versions that go back and forth on one device, while its server is under load.

Each request belongs to a kind of moment: nothing is being deployed; a deployment is under way, whose fetching and
checking take the same processor; or the server has just switched, or is about to.
"""

from __future__ import annotations

import bisect
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from reft_edge.agent.serving.latency import percentile
from reft_edge.errors import FederationError
from reft_edge.simulation.brokers import LOOPBACK, free_port
from reft_edge.simulation.deployments.load import Answer, Load
from reft_edge.simulation.deployments.records import GRACE_S, NEAR_S, DeploySettings, Swaps, Window
from reft_edge.simulation.deployments.served import Switch, Watch

if TYPE_CHECKING:
    from reft_edge.simulation.deployments.crew import Crew, Ended

PREDICT = "/predict"

_QUIET_S = 5.0
"""Before the first deployment and after the last, and a tenth of it between two."""

_START_WITHIN_S = 60.0
_STOP_WITHIN_S = 10.0
_LOOK_S = 0.05
_MAX_REASONS = 5


class _Reply(msgspec.Struct):
    """As much of an answer as is of interest here."""

    version: str


def swap(crew: Crew, settings: DeploySettings, body: bytes, *, old: str, new: str) -> Swaps:
    """The site's only device serves `old`. `body`: of a request. Raises `FederationError` when a deployment fails."""
    (device,) = crew.site.devices
    watch = Watch(crew.site)
    busy: list[Ended] = []
    with serving(crew, device) as port, load_on(port, body, settings) as load:
        began = time.monotonic()
        time.sleep(_QUIET_S)
        for number in range(settings.swaps):
            ended = crew.roll_back(look=watch.look) if number % 2 else crew.deploy(new, look=watch.look)
            watch.look()
            if ended.status != 0:
                raise FederationError(f"swap {number + 1} of {device} ended with {ended.status}: {ended.said}")
            busy.append(ended)
            time.sleep(_QUIET_S / 10)
        time.sleep(_QUIET_S)
        seconds = time.monotonic() - began
    expected = [old if number % 2 else new for number in range(settings.swaps)]
    if [switch.version for switch in watch.switches] != expected:
        raise FederationError(f"{settings.swaps} swaps were these switches: {watch.switches}")
    spans = [(ended.began_at, ended.ended_at) for ended in busy]
    return summarize(load.answers, watch.switches, spans, seconds=seconds, first=old)


@contextmanager
def serving(crew: Crew, device: str) -> Iterator[int]:
    """A server of the device that answers, for the length of the block; its port. Raises `FederationError`."""
    port = free_port()
    server = crew.serve(device, port)
    end = time.monotonic() + _START_WITHIN_S
    while not _listens(port):
        if server.status is not None or time.monotonic() > end:
            raise FederationError(f"the server does not start: {server.obituary()}")
        time.sleep(_LOOK_S)
    yield port
    if (status := server.stop(_STOP_WITHIN_S)) != 0:
        raise FederationError(f"the server was told to stop and ended with {status}: {server.obituary()}")


def load_on(port: int, body: bytes, settings: DeploySettings) -> Load:
    """As much as `settings` say; a context manager."""
    return Load(
        port,
        PREDICT,
        body,
        content_type="application/json",
        per_s=settings.requests_per_s,
        connections=settings.connections,
        read_version=read_version,
    )


def read_version(content: bytes) -> str:
    """Of an answer of `reft-edge serve`. Raises `ValueError`."""
    return msgspec.json.decode(content, type=_Reply).version


def summarize(
    answers: Sequence[Answer],
    switches: Sequence[Switch],
    busy: Sequence[tuple[float, float]],
    *,
    seconds: float,
    first: str,
) -> Swaps:
    """`switches` in order, `busy`: when commands were at work, Unix times; `first`: what was served before."""
    kinds: dict[str, list[float]] = {"quiet": [], "deploying": [], "switching": []}
    switched_at = [switch.at for switch in switches]
    versions = [first, *(switch.version for switch in switches)]
    late = 0
    for answer in answers:
        past = bisect.bisect_right(switched_at, answer.due_at - GRACE_S)
        if answer.version and answer.version not in versions[past:]:
            late += 1
        if any(abs(answer.due_at - at) <= NEAR_S for at in switched_at):
            kind = "switching"
        else:
            kind = "deploying" if any(began <= answer.due_at <= ended for began, ended in busy) else "quiet"
        kinds[kind].append(answer.latency_s)
    problems = [answer.problem for answer in answers if answer.problem]
    return Swaps(
        seconds=seconds,
        switches=len(switches),
        requests=len(answers),
        lost=len(problems),
        why=tuple(dict.fromkeys(problems))[:_MAX_REASONS],
        late=late,
        **{kind: _window(latencies) for kind, latencies in kinds.items()},
    )


def _listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _window(latencies_s: Sequence[float]) -> Window:
    ordered = sorted(latencies_s)
    if not ordered:
        return Window(requests=0, p50_s=0.0, p99_s=0.0, worst_s=0.0)
    return Window(
        requests=len(ordered), p50_s=percentile(ordered, 0.5), p99_s=percentile(ordered, 0.99), worst_s=ordered[-1]
    )
