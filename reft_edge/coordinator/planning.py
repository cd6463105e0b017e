"""The plan of a round: for each device a variant, or the reason why it gets none.

A policy chooses for each device; then devices with like budgets are brought together, so that no more than
`max_variants` variants are compiled, published and kept at the broker. A device is only ever moved to a smaller variant
than the policy chose, never to a larger one.

Pure and deterministic: the same devices, workload, ladder and prices give the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from reft_edge.coordinator.policies import Choice, Ladder, Policy, find_policy
from reft_edge.coordinator.prediction import Device, Option, Workload, predict, unfit
from reft_edge.coordinator.records import Prediction
from reft_edge.errors import ConfigError

DEFAULT_RATIOS = tuple(sixteenth / 16 for sixteenth in range(16))
"""A ladder of 16 rungs: the smallest keeps 1/16 of the channels, about 1/256 of the weights."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part in the plan. Without an option it takes no part, and `reason` says why."""

    device: str
    option: Option | None
    prediction: Prediction | None
    reason: str


def plan(
    devices: Sequence[Device],
    *,
    workload: Workload,
    ladder: Ladder,
    policy: str | Policy = "deadline",
    max_variants: int = 4,
) -> list[Assignment]:
    """One assignment for each device, in their order. Raises `ConfigError` for senseless options."""
    if max_variants < 1:
        raise ConfigError(f"max_variants is at least 1, not {max_variants!r}")
    choices = find_policy(policy)(devices, workload, ladder)
    wanted = Counter(choice.rung for choice in choices if choice.rung is not None)
    parameters = {rung: ladder.option(rung).cost.parameters for rung in wanted}
    tier = merge_tiers(wanted, parameters, max_variants)
    return [_assign(device, choice, tier, workload, ladder) for device, choice in zip(devices, choices, strict=True)]


def _assign(device: Device, choice: Choice, tier: Mapping[int, int], workload: Workload, ladder: Ladder) -> Assignment:
    if choice.rung is None:
        return Assignment(device=device.device, option=None, prediction=None, reason=choice.reason)
    rung = tier[choice.rung]
    option = ladder.option(rung)
    prediction = predict(device, option, workload)
    if reason := unfit(device, option, prediction):
        return Assignment(device=device.device, option=None, prediction=None, reason=reason)
    reason = choice.reason
    if rung != choice.rung:
        reason += f"; smaller than ratio {ladder.ratios[choice.rung]:.3g}, to share a variant"
    return Assignment(device=device.device, option=option, prediction=prediction, reason=reason)


def merge_tiers(n_devices: Mapping[int, int], parameters: Mapping[int, int], max_variants: int) -> dict[int, int]:
    """For each rung in use, the rung that its devices get: itself or a smaller variant's.

    At most `max_variants` rungs remain. Of all ways, the one that takes the fewest parameters from the devices in sum;
    exact, by dynamic programming over the rungs in order.
    """
    rungs = sorted(n_devices)
    # best[i] with k tiers: (parameters lost, tiers) for the rungs before i, where a tier ends just before i.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(min(max_variants, len(rungs))):
        extended: dict[int, tuple[int, tuple[int, ...]]] = dict(best)
        for start, (lost, tiers) in best.items():
            for end in range(start + 1, len(rungs) + 1):
                last = rungs[end - 1]
                more = sum(n_devices[rung] * (parameters[rung] - parameters[last]) for rung in rungs[start:end])
                candidate = (lost + more, (*tiers, last))
                if end not in extended or candidate < extended[end]:
                    extended[end] = candidate
        best = extended
    tiers = best[len(rungs)][1]
    return {rung: next(last for last in tiers if last >= rung) for rung in rungs}
