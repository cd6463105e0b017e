"""Which devices predict unlike the rest of the fleet.

Each device tells, where its owner allows it, how often each class was its answer and how sure the model was: counts,
never inputs. Nobody knows the right answers out there, so this does not say that a device is wrong. It says whose
counts depart from those of the other devices that serve the same version: a lens that fogged over, a sensor that was
turned, a place where the world looks unlike the data of training.

The measure is the Jensen-Shannon distance between a device's distribution and the mean of all others' (base 2: 0 for
the same, 1 where they have nothing in common; a metric, see Endres and Schindelin 2003, doi:10.1109/TIT.2003.813506).
Unlike the population stability index it is finite where a class is never predicted, which is the rule in fleets whose
devices see different things. For small differences PSI is 8 times the divergence in nats, so its customary bounds 0.1
and 0.25 (Siddiqi, Credit Risk Scorecards, 2006) are distances of 0.13 and 0.21.

A device departs when two things hold:

- It is no chance. Of n samples of one distribution 8 n times the divergence is, to second order, Pearson's chi-squared
  statistic, so it must exceed that one's quantile, at `SIGNIFICANCE` over all devices: of 10 classes and 20 devices a
  distance of 0.28 shows in 70 predictions or more. Below `MIN_PREDICTIONS` nothing counts. Predictions that follow each
  other are alike (a camera sees one scene for minutes), so the second condition carries the weight.
- It stands out from how the others differ among each other: its distance, less the part that sampling explains, is
  further from the others' median than `OUTLIER` times their spread, the modified z-score of Iglewicz and Hoaglin (How
  to Detect and Handle Outliers, 1993). So a fleet whose devices all see something else is no alarm, and in such a
  fleet a device must be very odd to be one.

Counts are from the switch to the version on: a device that changes after a million predictions is seen late. Pure:
conditions in, departures out. O(devices x classes).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec
import numpy as np

from reft_edge.coordinator.records import ConditionRecord, DeploymentRecord
from reft_edge.wire.deployment import CONFIDENCE_BINS, MAX_COUNTED_CLASSES, PredictionCounts

if TYPE_CHECKING:
    from reft_edge.types import Array

MIN_PREDICTIONS = 30
"""A device with fewer is neither judged nor taken as an example."""

MIN_DEVICES = 5
"""Of one version. How four others differ among each other is the least that has a spread."""

SIGNIFICANCE = 0.01
"""Probability that chance alone makes any device of a fleet pass the first condition."""

OUTLIER = 3.5
"""Modified z-score, as Iglewicz and Hoaglin recommend."""

MIN_SPREAD = 0.08
"""Taken where the others are more alike: so a departure is at least 0.28 further than usual (0.28 is a PSI of 0.43)."""

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

Aspect: TypeAlias = Literal["classes", "confidence"]


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose predictions are unlike the others'."""

    device: str
    version: str
    aspect: Aspect
    """What differs: which classes it predicts, or how sure it is."""
    distance: float
    """Jensen-Shannon, from 0 to 1, less the part that sampling explains."""
    usual: float
    """Median of the others' distances."""
    predictions: int
    """Number of samples that this rests on."""
    entry: int
    """The class, or the bin of confidence, whose share differs most from the others'."""
    reason: str
    """In words."""


def class_names(deployments: Sequence[DeploymentRecord]) -> dict[str, tuple[str, ...]]:
    """Names of the classes by version, as far as it was deployed with names. `deployments`: the latest first."""
    return {one.version: one.classes for one in reversed(deployments)}


def departures(
    conditions: Sequence[ConditionRecord], names: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> list[Departure]:
    """Devices that depart from the rest that serves the same version; the furthest first. `names`: `class_names`."""
    by_version: dict[str, list[tuple[str, PredictionCounts]]] = defaultdict(list)
    for record in sorted(conditions, key=lambda one: one.device):  # the same sums whatever the order
        counts = record.condition.counts
        if counts is not None:
            by_version[counts.version].append((record.device, counts))
    found: list[Departure] = []
    for version, told in by_version.items():
        words = _class_words(names.get(version, ()))
        found += _departing(version, "classes", [(device, counts.classes) for device, counts in told], words)
        found += _departing(
            version, "confidence", [(device, counts.confidence) for device, counts in told], _confidence_words
        )
    return sorted(found, key=lambda one: (-one.distance, one.device))


Words: TypeAlias = "Callable[[Array, Array, int], str]"
"""Of a device's shares, the others' shares, and the entry that differs most."""


def _departing(
    version: str, aspect: Aspect, told: Sequence[tuple[str, Sequence[int]]], words: Words
) -> list[Departure]:
    enough = [(device, counts) for device, counts in told if sum(counts) >= MIN_PREDICTIONS]
    if len(enough) < MIN_DEVICES:
        return []
    counts = _table([counts for _, counts in enough])
    n = counts.sum(axis=1)
    shares = counts / n[:, None]
    rest = (shares.sum(axis=0) - shares) / (len(enough) - 1)
    distance, by_chance = _distances(shares, rest, n)
    found = []
    for index, (device, _) in enumerate(enough):
        usual, spread = _median_and_spread(np.delete(distance, index))
        if by_chance[index] or distance[index] - usual <= OUTLIER * max(spread, MIN_SPREAD):
            continue
        entry = int(np.abs(shares[index] - rest[index]).argmax())
        found.append(
            Departure(
                device=device,
                version=version,
                aspect=aspect,
                distance=float(distance[index]),
                usual=usual,
                predictions=int(n[index]),
                entry=entry,
                reason=words(shares[index], rest[index], entry),
            )
        )
    return found


def _table(rows: Sequence[Sequence[int]]) -> Array:
    """Counts (n_devices, n_entries), float64. A device may leave out classes at the end that it never predicted."""
    table = np.zeros((len(rows), max(len(row) for row in rows)))
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _distances(shares: Array, rest: Array, n: Array) -> tuple[Array, Array]:
    """Distance of each row from the rest, and whether chance explains it. `shares`, `rest`: (n_devices, n_entries).

    `n`: samples of each device. The rest is a sample as well, a mean of shares; both sizes together count as one.
    """
    divergence = jensen_shannon(shares, rest)
    rest_inverse = ((1 / n).sum() - 1 / n) / (len(n) - 1) ** 2
    size = 1 / (1 / n + rest_inverse)
    freedom = np.maximum(1, ((shares > 0) | (rest > 0)).sum(axis=1) - 1)
    explained = freedom / (8 * size)
    distance = np.sqrt(np.maximum(0, divergence - explained) / np.log(2))
    bound = np.array([chi_squared_quantile(1 - SIGNIFICANCE / len(n), int(one)) for one in freedom])
    return distance, 8 * size * divergence <= bound


def _median_and_spread(distances: Array) -> tuple[float, float]:
    median = float(np.median(distances))
    return median, _MAD_TO_DEVIATION * float(np.median(np.abs(distances - median)))


def jensen_shannon(p: Array, q: Array) -> Array:
    """Divergence in nats, from 0 to log 2, of distributions along the last axis."""
    middle = (p + q) / 2
    return np.maximum(0, (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2)


def _relative_entropy(p: Array, q: Array) -> Array:
    """Of p relative to q, in nats; q is not 0 where p is not."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log(ratio)).sum(axis=-1))


def chi_squared_quantile(probability: float, freedom: int) -> float:
    """By Wilson and Hilferty's cube root (1931, doi:10.1073/pnas.17.12.684).

    In the tail that is used here up to 12% too high, never too low.
    """
    term = 2 / (9 * freedom)
    return float(freedom * (1 - term + NormalDist().inv_cdf(probability) * term**0.5) ** 3)


def _class_words(names: Sequence[str]) -> Words:
    def words(own: Array, rest: Array, entry: int) -> str:
        known = entry < len(names) <= MAX_COUNTED_CLASSES  # of more, the last are counted together
        name = names[entry] if known else entry
        return f"predicts class {name} in {own[entry]:.0%} of cases, the others in {rest[entry]:.0%}"

    return words


def _confidence_words(own: Array, rest: Array, _: int) -> str:
    means = (_mean_confidence(own), _mean_confidence(rest))
    word = "less" if means[0] < means[1] else "more"
    return f"is {word} sure than the others: confidence {means[0]:.2f} on average, theirs {means[1]:.2f}"


def _mean_confidence(shares: Array) -> float:
    """By the middles of the bins."""
    return float(((np.arange(len(shares)) + 0.5) * shares).sum() / CONFIDENCE_BINS)
