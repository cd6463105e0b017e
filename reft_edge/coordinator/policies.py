"""Which variant a device should get, if it were for that device alone.

A policy looks at all devices and at the ladder of variants, and chooses a rung for each. `deadline` gives each device
the largest sub-model it can finish in time. `reft` is the paper's variable pruning. Both refuse what does not fit a
device's memory. Another policy is a function with the same signature, in `POLICIES`.

Rungs are priced when they are first asked for, because pricing means pruning and compiling; policies bisect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from reft_edge.coordinator.prediction import Device, Option, Workload, predict, unfit
from reft_edge.errors import ConfigError, ModelError

DEADLINE_SHARE = 0.9
"""Of the deadline that a plan may use up: predictions err, and a straggler's work is lost."""


class Ladder:
    """Pruning ratios from the whole model (0) to the smallest variant, and what each costs.

    `price` is called once for each ratio that is looked at. Raises `ConfigError` for ratios that are no ladder.
    """

    def __init__(self, ratios: Sequence[float], price: Callable[[float], Option]) -> None:
        if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
            raise ConfigError(f"pruning ratios are at least 0 and below 1, not {list(ratios)!r}")
        self.ratios = tuple(sorted(set(ratios)))
        self._price = price
        self._options: dict[int, Option] = {}

    def __len__(self) -> int:
        return len(self.ratios)

    def priced(self, rung: int) -> bool:
        """Whether the price of this rung is known."""
        return rung in self._options

    def option(self, rung: int) -> Option:
        """The variant at a rung. Raises what `price` raises."""
        if rung not in self._options:
            self._options[rung] = self._price(self.ratios[rung])
        return self._options[rung]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A rung for one device, or None, and why."""

    rung: int | None
    reason: str


Policy = Callable[[Sequence[Device], Workload, Ladder], list[Choice]]
"""One choice for each device, in their order."""


def deadline(devices: Sequence[Device], workload: Workload, ladder: Ladder) -> list[Choice]:
    """The largest variant whose predicted round meets the deadline and whose predicted peak fits the memory."""
    reason = "the largest that meets the deadline and fits its memory"
    return [_largest(device, ladder, 0, lambda d, o: _obstacle(d, o, workload), reason) for device in devices]


def reft(devices: Sequence[Device], workload: Workload, ladder: Ladder) -> list[Choice]:
    """Variable pruning as in REFT (Desai, Hilal, Eldardiry, arXiv 2308.13662, section 3).

    The fastest device trains the whole model, and another one as large a share of its channels as it has of the
    fastest one's FLOP/s: ratio = 1 - F / F_max. The deadline plays no part. F is the sustained training speed where it
    was measured, where the paper takes cores x clock x operations per cycle.
    """
    fastest = max((device.profile.planning_flops_per_s for device in devices), default=0.0)
    choices = []
    for device in devices:
        share = device.profile.planning_flops_per_s / fastest
        # A rung is near enough when it is the same number but for rounding.
        rung = next((i for i, ratio in enumerate(ladder.ratios) if ratio >= 1 - share - 1e-9), len(ladder) - 1)
        reason = f"has {share:.0%} of the fastest device's FLOP/s"
        choices.append(_largest(device, ladder, rung, lambda d, o: unfit(d, o, predict(d, o, workload)), reason))
    return choices


POLICIES: Mapping[str, Policy] = {"deadline": deadline, "reft": reft}


def find_policy(policy: str | Policy) -> Policy:
    """The policy of that name, or the function itself. Raises `ConfigError`."""
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}; known are {', '.join(POLICIES)}")
    return POLICIES[policy]


def _obstacle(device: Device, option: Option, workload: Workload) -> str:
    """Why the device cannot train this variant in time; empty if it can."""
    prediction = predict(device, option, workload)
    if prediction.round_s > workload.deadline_s * DEADLINE_SHARE:
        late = f"takes {prediction.round_s:.4g} s at ratio {option.ratio:.3g}"
        late += f", with a deadline of {workload.deadline_s:.4g} s"
    else:
        late = ""
    return unfit(device, option, prediction) or late


def _largest(
    device: Device, ladder: Ladder, first: int, obstacle: Callable[[Device, Option], str], reason: str
) -> Choice:
    """The lowest rung from `first` on that nothing speaks against; `reason` is why a device gets it."""
    if device.training_samples < 1:
        return Choice(rung=None, reason="has no training samples")
    failed = device.correction.failed_ratio
    if failed is not None:
        first = max(first, sum(ratio <= failed for ratio in ladder.ratios))
        reason = f"ran out of memory at ratio {failed:.3g}"
    if first >= len(ladder):
        return Choice(rung=None, reason=f"{reason}, and there is no smaller variant")
    rung, why = _bisect(lambda rung: obstacle(device, ladder.option(rung)), first, ladder)
    return Choice(rung=rung, reason=reason if rung is not None else why)


def _bisect(obstacle: Callable[[int], str], first: int, ladder: Ladder) -> tuple[int | None, str]:
    """The lowest rung from `first` on without an obstacle, or None and what stands in the way of the highest.

    Costs fall with the ratio, so bisection finds it; the rung returned was always tried.
    A model that cannot be pruned is no error as long as somebody can train it whole: then it is the obstacle.
    """
    why = ""
    try:
        why = obstacle(first)
        low, high = first + 1, len(ladder)
        if not why:
            return first, ""
        while low < high:
            middle = (low + high) // 2
            if obstacle(middle):
                low = middle + 1
            else:
                high = middle
        return (low, "") if low < len(ladder) else (None, obstacle(len(ladder) - 1))
    except ModelError as exc:
        if ladder.ratios[first] == 0 and not ladder.priced(first):
            raise  # the model itself cannot be compiled
        return None, f"{why}; {exc}" if why else str(exc)
