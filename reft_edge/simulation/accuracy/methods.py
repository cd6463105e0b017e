"""The methods that are compared, in the quick and in the full form.

In all of them a device makes equally many passes over its own data, so what differs is what travels and how often, and
what is made of it. They share a learning rate, with which FedAvg did as well as with any in a short look
(notes/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.distillation_settings import AugmentationSettings, DistillationSettings
from reft_edge.coordinator.settings import TrainingSettings
from reft_edge.simulation.accuracy.records import AccuracySettings, Central, Federated, Method

if TYPE_CHECKING:
    from reft_edge.simulation.accuracy.records import DataKind

RATIOS = (0.0, 0.0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75)
"""Ten devices with all, 56%, 25% and 6% of the multiply-accumulates, as REFT fits them to what boards can compute."""

ALPHAS = (0.5, 0.1)
BATCH_SIZE = 32
LEARNING_RATE = 0.05
EPOCHS = 2
"""Over a device's own data in a round, where devices and coordinator exchange often."""

FLOAT32: Mapping[str, str] = {"update_codec": "float32", "weights_codec": "float32", "delta_codec": "none"}
INT8: Mapping[str, str] = {"update_codec": "int8", "weights_codec": "int8", "delta_codec": "int8"}
"""Written out, so that the product's defaults may change without making rows of one table differ in their codecs."""

ONE_SHOT, MULTI_ROUND = "REFT one-shot", "REFT multi-round"
FEDAVG, SMALLEST, FL_PQSU, CENTRAL = "FedAvg", "FedAvg, all smallest", "FL-PQSU", "central"


def accuracy_settings(kind: DataKind, *, quick: bool) -> AccuracySettings:
    """Data, net and devices of a form. Digits have one form."""
    if kind == "digits":
        return AccuracySettings(
            data=kind, model="mlp", input_shape=(1, 8, 8), n_private=1079, n_public=359, n_test=359, ratios=RATIOS
        )
    return AccuracySettings(
        data=kind,
        model="vgg_tiny" if quick else "vgg_small",
        input_shape=(3, 32, 32),
        n_private=5_000 if quick else 12_000,
        n_public=3_000 if quick else 6_000,
        n_test=2_000 if quick else 10_000,
        ratios=RATIOS,
    )


def methods_of(kind: DataKind, *, quick: bool) -> tuple[Method, ...]:
    """All methods, those that others are compared with first."""
    rounds, exchanges = (10 if quick or kind == "digits" else 15), 2
    passes = EPOCHS * rounds
    whole = _training(EPOCHS, **FLOAT32)
    return (
        Federated(name=FEDAVG, rounds=rounds, sizes="whole", training=whole),
        Federated(
            name=ONE_SHOT,
            rounds=1,
            sizes="fitted",
            training=_training(passes, schedule="cosine", **INT8),
            distillation=_distillation(kind, epochs=20),
        ),
        Federated(
            name=MULTI_ROUND,
            rounds=exchanges,
            sizes="fitted",
            training=_training(passes // exchanges, schedule="cosine", **INT8),
            aggregation=AggregationSettings(divide_by="cohort"),
            distillation=_distillation(kind, epochs=20),
        ),
        Federated(name=SMALLEST, rounds=rounds, sizes="smallest", training=whole),
        Federated(
            name=FL_PQSU,
            rounds=rounds,
            sizes="smallest",
            training=_training(EPOCHS, **{**INT8, "delta_codec": "none"}),
            selective=True,
        ),
        Central(name=CENTRAL, epochs=passes, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE),
    )


def _training(local_epochs: int, **options: Any) -> TrainingSettings:
    return TrainingSettings(local_epochs=local_epochs, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, **options)


def _distillation(kind: DataKind, *, epochs: int) -> DistillationSettings:
    if kind == "digits":  # a mirrored digit is another one, or none
        return DistillationSettings(epochs=epochs)
    return DistillationSettings(
        epochs=epochs,
        learning_rate=2e-3,
        temperature=1.0,
        pooling="classes",
        augmentation=AugmentationSettings(flip=True, shift=2),
    )
