"""Settings and finished runs of the deployment benchmark, as its JSON holds them. Seconds and bytes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from reft_edge.simulation.deployments.bad_models import Badness

BENCHMARK = "deploy"

Part: TypeAlias = Literal["rollout", "swaps", "bad", "faults"]

PARTS: tuple[Part, ...] = ("rollout", "swaps", "bad", "faults")


class DeploySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The same for all runs of a file. The defaults are the full form's."""

    devices: int = 20
    soak_s: float = 2.0
    max_latency_s: float = 0.1
    """What devices accept of one sample's 95th percentile."""
    rollouts: int = 7
    swaps: int = 60
    """Roll-outs and roll-backs of one device under load, in turn."""
    swap_runs: int = 3
    requests_per_s: float = 100.0
    connections: int = 8
    bad: tuple[Badness, ...] = ("random", "slow", "unreadable", "hungry", "deadly", "brittle")
    fault_runs: int = 60
    fault_devices: int = 5
    seed: int = 0


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One version on its way to all devices, by `reft-edge deploy`, and back, by `reft-edge rollback`."""

    until_served_s: float
    """From the start of `deploy` to the last device's switch; the next four are its parts."""
    start_s: float
    """Until the canaries were asked: Python, settings, store, compressing, the connection, who is there."""
    canaries_s: float
    """Until the last canary had answered: fetch, worker start, check, switch."""
    soak_s: float
    """Until the rest were asked."""
    rest_s: float
    """Until the last of them had switched."""
    command_s: float
    """The whole of `deploy`."""
    devices: int
    canaries: int
    fetch_s: float
    """Median over the devices: from `fetching` to `checking`, as they said it; so the next one."""
    check_s: float
    """From `checking` to `serving`: the worker's start, both files on the holdout, latency, installing, switching."""
    int8: int
    """Devices that took int8."""
    said_bytes: int
    """MQTT to the broker, from all, while the command ran and until its counters came, a second or two."""
    heard_bytes: int
    """MQTT from the broker, to all."""
    file_bytes: int
    """Of the version's ONNX files, each once."""
    until_undone_s: float
    """From the start of `rollback` until the last device served the old version again."""
    undo_command_s: float


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one kind of moment."""

    requests: int
    p50_s: float
    p99_s: float
    worst_s: float


class Swaps(msgspec.Struct, frozen=True, kw_only=True):
    """One server under load while versions go back and forth. Latencies are from when a request was due."""

    seconds: float
    switches: int
    requests: int
    lost: int
    """Without a good answer, for whatever reason."""
    why: tuple[str, ...]
    """The first few reasons."""
    late: int
    """Answers by what was served before, more than `GRACE_S` after the switch."""
    quiet: Window
    """Nothing is being deployed."""
    deploying: Window
    """A deployment is under way, which fetches and checks beside the server; not near a switch."""
    switching: Window
    """Within `NEAR_S` of a switch."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """One bad version, and how far it came."""

    badness: Badness
    status: int
    """Exit code of `deploy`."""
    state: str
    """The deployment's last."""
    kind: str
    """What the first canary that refused it or failed said it was about; empty where all canaries served it."""
    reason: str
    """Its words."""
    canaries: int
    switched: int
    """Devices that ever served it."""
    switched_beyond: int
    """Of these, those that were no canaries."""
    command_s: float
    """From the command's start until it had ended, everything undone."""
    undo_s: float | None
    """From the first refusal to the end of the command; None where there was none."""
    complaints: tuple[str, ...]
    """Devices that do not serve the old version afterwards, agents that ended."""


class Survived(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment in which something was killed or stopped."""

    faults: tuple[str, ...]
    injected: tuple[str, ...]
    """Kinds of those that were really done."""
    missed: tuple[str, ...]
    seconds: float
    state: str
    """The deployment's last."""
    status: int
    """Exit code of the last `deploy`."""
    restarts: int
    """How often `deploy` found no broker and was given again."""
    refused: int
    """Devices that refused or failed, which a killed worker may make them do."""
    complaints: tuple[str, ...]


class DeployRun(msgspec.Struct, frozen=True, kw_only=True):
    """One finished run: of the fields after `number`, that of its part."""

    part: Part
    number: int
    """Of this part's runs, from 0."""
    rollout: Rollout | None = None
    swaps: Swaps | None = None
    bad: Stopped | None = None
    faults: Survived | None = None


NEAR_S = 0.5
"""Around a switch: what belongs to it."""

GRACE_S = 1.0
"""How long after a switch the old version may still answer: requests that were under way, and a look at the disk."""
