"""From marks and samples to a run's figures. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reft_edge.simulation.side_by_side.records import IdleUse, RoundUse
from reft_edge.simulation.side_by_side.watcher import Mark, Sample


def round_use(begin: Mark, end: Mark, accuracy: float | None) -> RoundUse:
    """What a round took."""
    return RoundUse(
        seconds=end.at - begin.at,
        cpu_s=cpu_s(begin, end),
        down_bytes=down_bytes(begin, end),
        up_bytes=up_bytes(begin, end),
        accuracy=accuracy,
    )


def idle_use(begin: Mark, end: Mark, samples: Sequence[Sample]) -> IdleUse:
    """What devices took between two marks; `samples` are those between them, at least one of each device."""
    devices = range(len(begin.trees))
    trees = [[sample.tree for sample in samples if sample.device == device] for device in devices]
    return IdleUse(
        seconds=end.at - begin.at,
        processes=[statistics.median_high(tree.processes for tree in of_device) for of_device in trees],
        pss_bytes=[statistics.median_high(tree.pss_bytes for tree in of_device) for of_device in trees],
        cpu_s=cpu_s(begin, end),
        down_bytes=down_bytes(begin, end),
        up_bytes=up_bytes(begin, end),
    )


def cpu_s(begin: Mark, end: Mark) -> list[float]:
    """CPU seconds of each device between two marks."""
    return [round(late.cpu_s - early.cpu_s, 4) for early, late in zip(begin.trees, end.trees, strict=True)]


def down_bytes(begin: Mark, end: Mark) -> list[int]:
    """What each device received."""
    return [late.down_bytes - early.down_bytes for early, late in zip(begin.links, end.links, strict=True)]


def up_bytes(begin: Mark, end: Mark) -> list[int]:
    """What each device sent."""
    return [late.up_bytes - early.up_bytes for early, late in zip(begin.links, end.links, strict=True)]


def peak_pss_bytes(samples: Sequence[Sample], n_devices: int) -> list[int]:
    """The largest sample of each device; 0 without one."""
    return [_extreme(samples, device, largest=True) for device in range(n_devices)]


def least_pss_bytes(samples: Sequence[Sample], n_devices: int) -> list[int]:
    """The smallest sample of each device; 0 without one."""
    return [_extreme(samples, device, largest=False) for device in range(n_devices)]


def _extreme(samples: Sequence[Sample], device: int, *, largest: bool) -> int:
    values = [sample.tree.pss_bytes for sample in samples if sample.device == device]
    return (max if largest else min)(values, default=0)
