"""Whether a model may serve, and in which precision: a deployment's rules applied to what the device measured. Pure.

int8 is taken where it is the faster one here and its metric is as good by the deployment's own measure. On a small
holdout that is not known; then the federation's test data speak, and where there are none, float32 is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reft_edge.agent.serving.deployment_words import Reproach
from reft_edge.wire.deployment import Health, HealthRules, Precision

ROUNDING = 1e-9
"""0.93 - 0.88 is a little more than 0.05."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class NotTaken:
    kind: Reproach
    reason: str


def judge(
    measured: Sequence[Health],
    rules: HealthRules,
    *,
    accuracy: bool,
    test_metrics: Mapping[Precision, float | None] | None = None,
) -> Taken | NotTaken:
    """Choose among one or two files. `accuracy`: the metric is one; else it is a mean squared error."""
    by_precision = {health.precision: health for health in measured}
    objections = {health.precision: objection(health, rules, accuracy=accuracy) for health in measured}
    full, small = by_precision.get("float32"), by_precision.get("int8")
    if full is None or small is None:
        only = measured[0].precision
        return objections[only] or Taken(precision=only)
    drop = _int8_drop(full, small, rules, accuracy=accuracy, test_metrics=test_metrics or {})
    good = drop is not None and drop <= rules.max_int8_drop + ROUNDING
    faster = small.latency_p50_s < full.latency_p50_s
    against = objections["float32"]
    if objections["int8"] is None and good and (faster or against is not None):
        return Taken(precision="int8")
    if against is None:
        return Taken(precision="float32")
    if objections["int8"] is None:
        how = "cannot be compared" if drop is None else f"is {drop:.3g} below; max_int8_drop is {rules.max_int8_drop:g}"
        return NotTaken(kind=against.kind, reason=f"float32: {against.reason}; int8 {how}")
    return against


def objection(health: Health, rules: HealthRules, *, accuracy: bool) -> NotTaken | None:
    """The first rule that one file breaks."""
    return (
        _metric_objection(health, rules, accuracy=accuracy)
        or _latency_objection(health, rules)
        or _memory_objection(health, rules)
    )


def _metric_objection(health: Health, rules: HealthRules, *, accuracy: bool) -> NotTaken | None:
    name = "accuracy" if accuracy else "mean squared error"
    where = f"on {health.holdout_samples} held out samples"
    metric, before = health.metric, health.metric_before
    if metric is None:
        if health.holdout_samples == 0:
            return None
        return NotTaken(kind="accuracy", reason=f"its answers {where} are not all numbers")
    if health.holdout_samples < rules.min_holdout_samples:
        return None
    if accuracy and rules.min_accuracy is not None and metric < rules.min_accuracy - ROUNDING:
        return NotTaken(
            kind="accuracy", reason=f"accuracy {metric:.3g} {where}; min_accuracy is {rules.min_accuracy:g}"
        )
    if before is not None and _drop(metric, before, accuracy=accuracy) > rules.max_metric_drop + ROUNDING:
        return NotTaken(
            kind="accuracy",
            reason=f"{name} {metric:.3g} {where}, {before:.3g} of what is served now; "
            f"max_metric_drop is {rules.max_metric_drop:g}",
        )
    return None


def _latency_objection(health: Health, rules: HealthRules) -> NotTaken | None:
    if rules.max_latency_s is None or health.latency_p95_s <= rules.max_latency_s:
        return None
    return NotTaken(
        kind="latency",
        reason=f"95 of 100 single samples take up to {health.latency_p95_s * 1e3:.3g} ms; "
        f"max_latency_s is {rules.max_latency_s:g}",
    )


def _memory_objection(health: Health, rules: HealthRules) -> NotTaken | None:
    limit = rules.max_memory_bytes
    if limit is None or health.peak_memory_bytes <= limit:
        return None
    return NotTaken(
        kind="memory",
        reason=f"predicting takes {health.peak_memory_bytes / 2**20:.0f} MiB; "
        f"max_memory_bytes is {limit} ({limit / 2**20:.0f} MiB)",
    )


def _int8_drop(
    full: Health,
    small: Health,
    rules: HealthRules,
    *,
    accuracy: bool,
    test_metrics: Mapping[Precision, float | None],
) -> float | None:
    """By how much int8 is worse; None: nobody knows."""
    pairs = [(small.metric, full.metric)] if small.holdout_samples >= rules.min_holdout_samples else []
    pairs.append((test_metrics.get("int8"), test_metrics.get("float32")))
    for metric, reference in pairs:
        if metric is not None and reference is not None:
            return _drop(metric, reference, accuracy=accuracy)
    return None


def _drop(metric: float, reference: float, *, accuracy: bool) -> float:
    """By how much `metric` is worse: a difference of accuracies, or the share by which an error is above the other."""
    if accuracy:
        return reference - metric
    if reference <= 0:
        return 0.0 if metric <= 0 else float("inf")
    return metric / reference - 1
