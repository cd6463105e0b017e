"""Which of a version's models a device is offered, and why. Pure.

Without a goal for latency a device gets the model that it trained, because that was planned for its memory and speed;
one that trained nothing gets the largest that fits its memory. With a goal it gets the model with the best figure on
the test data among those that are predicted to meet the goal. Predictions need the profile and what the model was
counted to cost; the device measures for itself and may still refuse, and then it is offered the next smaller one.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from reft_edge.bundle.manifest import Cost
from reft_edge.bundle.memory import PREDICTION_FACTOR, SESSION_BYTES
from reft_edge.coordinator.records import ReleasedModel
from reft_edge.coordinator.timing import Timing
from reft_edge.errors import ConfigError
from reft_edge.profiling.profile import DeviceProfile

GLOBAL_MODEL = "global"
"""As `exporting` calls the unpruned model. Importing that would load torch."""

FILE_COPIES = 2
"""Of the model's file, while a session opens: the bytes that are read, and the weights as they are laid out."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of a version's models, and what is known about it."""

    model: ReleasedModel
    cost: Cost | None = None
    """As it was counted when it was compiled; None where that is not known any more, and of a file of one's own."""
    sample_bytes: int = 0
    score: float | None = None
    """Of its better file on the test data; higher is better."""

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def size_bytes(self) -> int:
        """Of its largest file."""
        return max(file.size_bytes for file in self.model.files)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the choice for a device depends on."""

    device: str
    profile: DeviceProfile | None
    trained: str = ""
    """Name of the model that it last trained in the run; empty where it trained none."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    model: str
    smaller: str
    """What it is offered if it refuses that for its latency or its memory; empty where there is nothing smaller."""
    why: str


def model_of_variant(variant: str) -> str:
    """What `exporting` calls the model of a variant, whose name is its pruning ratio."""
    return GLOBAL_MODEL if float(variant) == 0 else f"variant-{variant}"


def choose(candidates: Sequence[Candidate], facts: Facts, *, latency_s: float | None, forced: str = "") -> Choice:
    """The model for one device. `candidates`: the largest first. `latency_s`: the goal. `forced`: it gets this one.

    Raises `ConfigError` for a forced one that there is not.
    """
    names = [candidate.name for candidate in candidates]
    if forced:
        if forced not in names:
            raise ConfigError(f"this version has no model {forced!r}; it has: {', '.join(names)}")
        return Choice(model=forced, smaller="", why="it was asked for")
    if len(names) == 1:
        return Choice(model=names[0], smaller="", why="the only model")
    chosen, why = _best_in_time(candidates, facts, latency_s) if latency_s is not None else _trained(candidates, facts)
    below = names[names.index(chosen) + 1 :]
    return Choice(model=chosen, smaller=below[0] if below else "", why=why)


def choose_canaries(
    models: Mapping[str, str],
    *,
    share: float,
    named: Sequence[str] = (),
    version: str = "",
    unable: Collection[str] = (),
) -> frozenset[str]:
    """Which of the devices that are there (device -> its model) get the version first. At least one, if there is any.

    Every model has a canary where that leaves as many devices to the rest. `named`: exactly those of them that are
    there. The same devices and version give the same canaries; another version gives others, so that it is not always
    the same device that takes the risk. `unable`: those that cannot tell a good version from a bad one; of devices with
    the same model they are taken last.
    """
    if named:
        return frozenset(named) & models.keys()
    if not models:
        return frozenset()
    by_model: dict[str, list[str]] = defaultdict(list)
    drawn = sorted(models, key=lambda device: hashlib.sha256(f"{version}/{device}".encode()).digest())
    for device in sorted(drawn, key=lambda device: device in unable):
        by_model[models[device]].append(device)
    groups = sorted(by_model.values(), key=lambda devices: (-len(devices), devices[0]))
    wanted = max(1, math.ceil(share * len(models) - 1e-9), min(len(groups), len(models) // 2))
    turns = [device for turn in range(len(models)) for group in groups for device in group[turn : turn + 1]]
    return frozenset(turns[:wanted])


def predicted_latency_s(candidate: Candidate, profile: DeviceProfile | None) -> float | None:
    """Seconds of one sample; None where nothing is known of the model or the device."""
    if candidate.cost is None or profile is None:
        return None
    timing = Timing(profile=profile, cost=candidate.cost, sample_bytes=candidate.sample_bytes)
    return sum(part.count * part.own_s for part in timing.evaluation(1, 1))


def predicted_memory_bytes(candidate: Candidate, profile: DeviceProfile) -> float:
    """Upper bound for a process that serves it, a sample at a time."""
    activations = 0.0 if candidate.cost is None else _activation_bytes(candidate.cost)
    return profile.planning_base_bytes + SESSION_BYTES + FILE_COPIES * candidate.size_bytes + activations


def _activation_bytes(cost: Cost) -> float:
    """Of one sample; where they were not counted, no more than a training step's."""
    return PREDICTION_FACTOR * cost.prediction_bytes_per_sample or cost.memory_per_sample_bytes


def _trained(candidates: Sequence[Candidate], facts: Facts) -> tuple[str, str]:
    if any(candidate.name == facts.trained for candidate in candidates):
        return facts.trained, "what it trained"
    if facts.profile is None:
        return candidates[0].name, "nothing is known about the device"
    fitting = _fitting(candidates, facts.profile)
    if not fitting:
        return candidates[-1].name, "the smallest; none should fit its memory"
    return fitting[0].name, "the largest that fits its memory"


def _best_in_time(candidates: Sequence[Candidate], facts: Facts, latency_s: float) -> tuple[str, str]:
    known = [(one, predicted) for one in candidates if (predicted := predicted_latency_s(one, facts.profile))]
    if not known:
        chosen, why = _trained(candidates, facts)
        return chosen, f"{why}; its latency cannot be predicted"
    in_time = [(one, predicted) for one, predicted in known if predicted <= latency_s]
    if not in_time:
        fastest, predicted = min(known, key=lambda pair: pair[1])
        return fastest.name, f"the fastest; {_ms(predicted)} predicted, the goal is {_ms(latency_s)}"
    best, predicted = max(in_time, key=lambda pair: (-math.inf if pair[0].score is None else pair[0].score, -pair[1]))
    return best.name, f"the best within {_ms(latency_s)}; {_ms(predicted)} predicted"


def _fitting(candidates: Iterable[Candidate], profile: DeviceProfile) -> list[Candidate]:
    return [one for one in candidates if predicted_memory_bytes(one, profile) <= profile.planning_memory_bytes]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
