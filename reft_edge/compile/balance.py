"""Widths that use up several limits at once.

One ratio for all layers meets the tightest of several limits and wastes the others: VGG16 pruned uniformly to the
paper's 1.8 MB has 5 million multiply-accumulates, where 70 million were allowed. Early layers are cheap in parameters
and dear in operations, late ones the other way round, so the widths are chosen for each group of channels:

    minimize  sum_g log(n_g / k_g)^2   subject to   cost_c(k) <= limit_c for every limit c,   1 <= k_g <= n_g

with k_g of n_g units kept. Costs are sums of products of widths, so in log k this is a geometric program: convex, with
one optimum. The square keeps layers alike: neighbours cost the product of their widths, and without it a narrow layer
beside a wide one would do as well as two of middle width.

A limit that this optimum leaves slack is drawn on as far as widths stay alike: its price may become negative, so that
VGG16 keeps its first layers whole, which cost operations and hardly a parameter.

Solved by damped updates of widths and of the limits' prices; then rounded down, and what is left is handed out unit by
unit to the layers that have lost most.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log

from reft_edge.compile.sizes import SizeModel

_ITERATIONS = 2000
"""Models of up to 60 groups settle to 0.1% of the limits by then; an iteration takes less than a millisecond."""

_WIDTH_STEP = 0.1
_PRICE_STEP = 0.05
"""Prices move more slowly than the widths that answer them."""

_LEAST_PRICE = -3.0
"""Of a slack limit. At 0, VGG16 within 470,000 parameters and 70 million multiply-accumulates uses 42% of the latter,
at -3 84%, at -10 99%; but at -10 a transformer gives up 95% of its perceptrons for operations in attention."""


def balance(sizes: SizeModel, limits: Mapping[str, int], *, round_to: int = 1) -> dict[str, int] | None:
    """Units to keep in each group, or None when even one unit in each group exceeds a limit.

    `limits`: attributes of `Size`, with what they may be at most. Numbers kept are multiples of `round_to` where the
    group has as many.
    """
    least = {name: min(round_to, n) for name, n in sizes.units.items()}
    if not _within(sizes, least, limits):
        return None
    widths = _relaxed(sizes, limits)
    kept = {name: max(least[name], int(width) // round_to * round_to) for name, width in widths.items()}
    for name in sorted(kept, key=lambda name: -kept[name]):  # raising some to one unit may have exceeded a limit
        while not _within(sizes, kept, limits) and kept[name] > least[name]:
            kept[name] -= round_to
    return _filled(sizes, kept, limits, round_to)


def _relaxed(sizes: SizeModel, limits: Mapping[str, int]) -> dict[str, float]:
    """The optimum in real numbers, nearly."""
    lost = dict.fromkeys(sizes.units, 0.0)  # log(n / k)
    prices = dict.fromkeys(limits, 1.0)
    widths: dict[str, float] = dict(sizes.units)
    for _ in range(_ITERATIONS):
        costs = {quantity: sizes.elasticities(widths, quantity) for quantity in limits}
        for quantity, limit in limits.items():
            excess = log(costs[quantity][0] / limit)
            prices[quantity] = max(_LEAST_PRICE, prices[quantity] + _PRICE_STEP * _clip(excess, 1.0))
        for name, n in sizes.units.items():
            # Where the derivative is zero, what a group has lost is what it would pay for its share of the costs.
            paid = sum(prices[key] * slopes.get(name, 0.0) / total for key, (total, slopes) in costs.items())
            change = _clip(_WIDTH_STEP * (paid - lost[name]), _WIDTH_STEP)
            lost[name] = max(0.0, min(log(n), lost[name] + change))
            widths[name] = n * exp(-lost[name])
    return widths


def _clip(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))


def _filled(sizes: SizeModel, kept: Mapping[str, int], limits: Mapping[str, int], round_to: int) -> dict[str, int]:
    """Add units while any fits, first where most is lost."""
    kept = dict(kept)
    open_groups = {name for name, n in sizes.units.items() if kept[name] + round_to <= n}
    while open_groups:
        name = min(sorted(open_groups), key=lambda group: kept[group] / sizes.units[group])
        wider = {**kept, name: kept[name] + round_to}
        if _within(sizes, wider, limits):
            kept = wider
            if kept[name] + round_to > sizes.units[name]:
                open_groups.discard(name)
        else:
            open_groups.discard(name)
    return kept


def _within(sizes: SizeModel, kept: Mapping[str, int], limits: Mapping[str, int]) -> bool:
    size = sizes.size(kept)
    return all(getattr(size, quantity) <= limit for quantity, limit in limits.items())
