"""The teachers and what they say together: the targets that a student learns.

A teacher is a device's updated variant; its outputs on the public inputs are computed once, in onnxruntime. For
classification the target of an input is

    pooling "mean":     p = sum_k w_k softmax(z_k / T)
    pooling "classes":  p = softmax(s / T), where s joins the teachers class by class (`coordinator.pooling`)

with weights w_k by samples, equal, or by agreement (`coordinator.agreement`), which is what holds against hostile
teachers. FedDF (Lin et al., arXiv 2006.07242, algorithm 1) averages logits; probabilities did as well on digits (98.8%
against 98.7%, 3 seeds), and one overconfident teacher cannot outvote the others. For regression the target is the
weighted mean of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.bundle.inference import Predictor
from reft_edge.bundle.manifest import Loss, MeanSquaredError
from reft_edge.coordinator.agreement import agreement_weights, divergences_of_classes, divergences_of_values
from reft_edge.coordinator.pooling import pooled_scores, softmax
from reft_edge.data.dataset import scale
from reft_edge.errors import FederationError

if TYPE_CHECKING:
    from reft_edge.coordinator.augmentation import Views
    from reft_edge.coordinator.distillation_settings import DistillationSettings
    from reft_edge.types import Array, FloatArray, Tensors

TEACHER_BATCH = 256
"""Public inputs that a teacher sees at once."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One device's variant: its outputs on all public inputs, float32 `(n_public, *output_shape)`, and its training
    samples."""

    name: str
    outputs: FloatArray
    samples: float
    augmented: tuple[FloatArray, ...] = ()
    """The same on each further view of the inputs, in order (`coordinator.augmentation`)."""

    @property
    def views(self) -> tuple[FloatArray, ...]:
        return (self.outputs, *self.augmented)


def teacher_outputs(inference_graph: bytes, weights: Tensors, inputs: Array, *, threads: int = 1) -> FloatArray:
    """A variant's outputs `(n, *output_shape)` on `inputs` (n, *sample_shape), computed in onnxruntime."""
    return _outputs(Predictor(inference_graph, threads=threads), weights, inputs)


def teacher_of(
    name: str, inference_graph: bytes, weights: Tensors, views: Views, *, samples: float, threads: int = 1
) -> Teacher:
    """A variant with its outputs on every view, one view in memory at a time."""
    predictor = Predictor(inference_graph, threads=threads)
    outputs = [_outputs(predictor, weights, views.view(number)) for number in range(len(views))]
    return Teacher(name=name, outputs=outputs[0], augmented=tuple(outputs[1:]), samples=samples)


def targets_of_views(
    teachers: Sequence[Teacher], *, settings: DistillationSettings, loss: Loss, n_public: int, n_views: int
) -> list[FloatArray]:
    """`ensemble_targets` of each view."""
    _check(teachers, n_public, n_views)
    weights = _weights(teachers, settings, loss)
    return [
        _targets([teacher.views[number] for teacher in teachers], weights, settings, loss) for number in range(n_views)
    ]


def ensemble_targets(
    teachers: Sequence[Teacher], *, settings: DistillationSettings, loss: Loss, n_public: int
) -> FloatArray:
    """What the student shall give for each public input, float32 `(n_public, *output_shape)`.

    For classification: probabilities at the settings' temperature. For regression: outputs. Raises `FederationError`
    for teachers that do not fit.
    """
    return targets_of_views(teachers, settings=settings, loss=loss, n_public=n_public, n_views=1)[0]


def _outputs(predictor: Predictor, weights: Tensors, inputs: Array) -> FloatArray:
    starts = range(0, len(inputs), TEACHER_BATCH)
    return np.concatenate([predictor.predict(weights, scale(inputs[s : s + TEACHER_BATCH])) for s in starts])


def _check(teachers: Sequence[Teacher], n_public: int, n_views: int) -> None:
    if not teachers:
        raise FederationError("there are no teachers to distil from; no device finished this round")
    shape = (n_public, *teachers[0].outputs.shape[1:])
    for teacher in teachers:
        if len(teacher.views) < n_views:
            raise FederationError(f"teacher {teacher.name!r} has seen {len(teacher.views)} of {n_views} views")
        for outputs in teacher.views:
            if outputs.shape != shape or not np.isfinite(outputs).all():
                raise FederationError(
                    f"teacher {teacher.name!r} gives {outputs.shape}, expected finite numbers of shape {shape}"
                )


def _targets(outputs: Sequence[FloatArray], weights: Array, settings: DistillationSettings, loss: Loss) -> FloatArray:
    if settings.pooling == "classes" and not isinstance(loss, MeanSquaredError):
        pooled: FloatArray = softmax(pooled_scores(outputs, weights) / settings.temperature).astype(np.float32)
        return pooled
    total: Array = np.zeros(outputs[0].shape, np.float64)
    for weight, values in zip(weights, outputs, strict=True):
        precise = values.astype(np.float64)
        total += weight * (precise if isinstance(loss, MeanSquaredError) else softmax(precise / settings.temperature))
    mean: FloatArray = total.astype(np.float32)
    return mean


def _weights(teachers: Sequence[Teacher], settings: DistillationSettings, loss: Loss) -> Array:
    """What each teacher counts, float64 (n_teachers,); they sum to 1."""
    if settings.weights == "agreement":
        outputs = [teacher.outputs.astype(np.float64) for teacher in teachers]
        if isinstance(loss, MeanSquaredError):
            return agreement_weights(divergences_of_values(outputs))
        return agreement_weights(divergences_of_classes([softmax(logits) for logits in outputs]))
    weights = np.array([1.0 if settings.weights == "uniform" else teacher.samples for teacher in teachers])
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise FederationError(f"teachers' samples must be above 0; got {weights.tolist()!r}")
    shares: Array = weights / weights.sum()
    return shares
