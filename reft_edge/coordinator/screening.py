"""What one update may be beside the others of its round: how long, and how heavy.

A device's word is all that the coordinator has, so both rules compare it with the cohort's median, which a minority of
devices cannot move beyond what honest ones say (its breakdown point is one half).

`outliers` finds updates that are far too long. One update scaled by a million decides a mean alone; its checks
(`contributions`) only compare it with the weights. Variants differ in size, and no single length compares between them:
by the Euclidean norm large variants look long, by the root mean square over the parameters narrow ones do (a variant
with 7% of the parameters came to 5.4 times the others' and to 1.4 times their norm). So an update is an outlier when it
stands out in both. Logarithms are compared, because training lengthens an update by factors.

`bounded_weights` limits what a device gains by saying that it has more samples than it has.

Pure: no I/O, no clock. The same lengths give the same result, in whatever order they come. What this cannot see: an
update of the usual length that points the wrong way; robust merging is for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log, sqrt
from statistics import median, median_low
from typing import NamedTuple

MIN_COHORT = 3
"""Updates from which on there is a majority to compare with."""

FREE_FACTOR = 4.0
"""An update up to this many times as long as the cohort's median is never an outlier. Honest devices with as much data
each, one or all ten classes of digits, MLPs and convolutional nets at two or three widths, came to 2.6 at most; in a
cohort that agrees closely, a robust deviation alone would cut into them."""

MAX_DEVIATIONS = 3.5
"""Robust standard deviations above the median, in logarithms, that are still usual: the cut-off of the modified z-score
(Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993). Where devices have very different amounts of data,
lengths differ by their numbers of steps: with 16 to 600 samples honest updates came to 11 times the median, but to 2.7
deviations."""

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

MAX_WEIGHT_FACTOR = 3.0
"""How many times the cohort's median of samples one device may count for. In a fleet of ten alike, the largest lie then
has a quarter of the say instead of all of it; where data are uneven, devices above it count a little less than by
federated averaging. After Portnoy, Tirosh and Hendler (arXiv 2004.04986), who truncate reported sample counts because
weighting by them breaks every robust merge."""


class UpdateLength(NamedTuple):
    """How long one update is."""

    norm: float
    """Euclidean, over all parameters; above 0."""
    n_parameters: int
    """Entries of all parameters of the variant."""

    @property
    def root_mean_square(self) -> float:
        return self.norm / sqrt(self.n_parameters)


def outliers(lengths: Mapping[str, UpdateLength]) -> dict[str, str]:
    """Device -> reason, for every update that is far longer than its cohort's.

    At most half of the devices, and none of fewer than `MIN_COHORT`.
    """
    if len(lengths) < MIN_COHORT:
        return {}
    by_norm = _too_long({device: length.norm for device, length in lengths.items()})
    by_mean = _too_long({device: length.root_mean_square for device, length in lengths.items()})
    return {
        device: f"the update is {by_norm[device].factor:.3g} times as long as the median of {len(lengths)} updates in "
        f"this round, {by_mean[device].factor:.3g} times for each parameter; at most {by_norm[device].allowed:.3g} "
        f"and {by_mean[device].allowed:.3g} times is usual"
        for device in lengths
        if device in by_norm and device in by_mean
    }


class _Excess(NamedTuple):
    factor: float
    allowed: float
    """Multiples of the median."""


def _too_long(lengths: Mapping[str, float]) -> dict[str, _Excess]:
    logs = {device: log(length) for device, length in lengths.items()}
    middle = median(logs.values())
    deviation = DEVIATIONS_PER_MAD * median(abs(value - middle) for value in logs.values())
    allowed = max(log(FREE_FACTOR), MAX_DEVIATIONS * deviation)
    return {
        device: _Excess(exp(value - middle), exp(allowed)) for device, value in logs.items() if value - middle > allowed
    }


def bounded_weights(samples: Mapping[str, int]) -> dict[str, float]:
    """Device -> what it counts: its samples, at most `MAX_WEIGHT_FACTOR` times the median of all.

    The lower median, so that of two devices neither sets the bound for itself by a large number. A fleet whose counts
    are alike keeps them as they are.
    """
    if not samples:
        return {}
    most = MAX_WEIGHT_FACTOR * median_low(samples.values())
    return {device: min(float(count), most) for device, count in samples.items()}
