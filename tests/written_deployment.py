"""Deployments and what devices tell between rounds, on disk as a deployment and a monitor leave them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator.records import (
    ConditionRecord,
    DeployedDevice,
    DeploymentRecord,
    DeploymentState,
    PresenceRecord,
    ReleasedModel,
)
from reft_edge.coordinator.store import Store
from reft_edge.wire.deployment import Attempt, Condition, Health, ModelFile, PredictionCounts, Served, Vitals
from tests.written_run import RUN

CLASSES = ("robin", "wren", "owl")
SHA256 = "0" * 64


def files() -> tuple[ModelFile, ...]:
    blob = BlobRef(sha256=SHA256, size_bytes=900)
    return (
        ModelFile(blob=blob, size_bytes=1000, precision="float32", test_metric=0.9),
        ModelFile(blob=blob, size_bytes=300, precision="int8", test_metric=0.89),
    )


def deployment(name: str, state: DeploymentState, *, version: str = RUN, **more: object) -> DeploymentRecord:
    models = tuple(
        ReleasedModel(name=model, files=files(), sha256s=(SHA256, SHA256)) for model in ("global", "variant-0.5")
    )
    record = DeploymentRecord(
        deployment=name,
        federation="birds",
        version=version,
        state=state,
        started_at=1e9 + 100,
        since=1e9 + 110,
        models=models,
        classes=CLASSES,
    )
    return msgspec.structs.replace(record, **more)


def health(precision: Literal["float32", "int8"], metric: float, before: float | None = None) -> Health:
    return Health(
        precision=precision,
        holdout_samples=40,
        metric=metric,
        metric_before=before,
        latency_p50_s=0.002,
        latency_p95_s=0.0031,
        latency_p99_s=0.005,
        peak_memory_bytes=90 * 2**20,
    )


def asked(deployment_name: str, device: str, **more: object) -> DeployedDevice:
    """A device of the rest that was asked; `more` says what became of it."""
    one = DeployedDevice(
        deployment=deployment_name, device=device, model="global", wave="rest", state="asked", asked_at=1e9 + 101
    )
    return msgspec.structs.replace(one, **more)


def served(deployment_name: str, *, version: str = RUN, precision: Literal["float32", "int8"] = "int8") -> Served:
    return Served(deployment=deployment_name, version=version, model="global", precision=precision, sha256=SHA256)


def counts(classes: Sequence[int], *, version: str = RUN) -> PredictionCounts:
    n = sum(classes)
    confidence = (0, 0, 0, 0, 0, n // 10, n // 10, n // 10, n // 10, n - 4 * (n // 10))
    return PredictionCounts(
        version=version, predictions=n, classes=tuple(classes), confidence=confidence, latency_p95_s=0.004
    )


def condition(
    deployment_name: str,
    device: str,
    *,
    seen_at: float = 1e9 + 200,
    told: PredictionCounts | None = None,
    **vitals: object,
) -> ConditionRecord:
    return ConditionRecord(
        device=device,
        seen_at=seen_at,
        condition=Condition(
            serving=served(deployment_name),
            attempt=Attempt(deployment=deployment_name, state="serving"),
            counts=told,
            vitals=msgspec.convert(vitals, Vitals),
        ),
    )


def write(
    directory: Path,
    *,
    deployments: Sequence[tuple[DeploymentRecord, Sequence[DeployedDevice]]] = (),
    conditions: Sequence[ConditionRecord] = (),
    away: Sequence[str] = (),
) -> None:
    """Add to the store beside `federation.toml` in `directory`."""
    with closing(Store(directory / "federation", shared=True)) as store:
        for record, devices in deployments:
            store.save_deployment(record, devices)
        presence = [
            PresenceRecord(device=one.device, online=one.device not in away, at=one.seen_at) for one in conditions
        ]
        store.save_heard(conditions=conditions, presence=presence)


def write_rollout(directory: Path) -> None:
    """One that was rolled back, a later one in the midst of its rest; six devices predict, one unlike the others."""
    write(
        directory,
        deployments=[
            (
                deployment(
                    "d-1",
                    "rolled_back",
                    version="too-big",
                    started_at=1e9,
                    ended_at=1e9 + 9,
                    reason="1 of 1 canaries refused (pi-1: accuracy 0.41 on its holdout, 0.90 before)",
                ),
                [
                    asked(
                        "d-1",
                        "pi-1",
                        wave="canary",
                        state="refused",
                        answered_at=1e9 + 105,
                        health=(health("float32", 0.41, 0.9),),
                        reason="accuracy 0.41 on its holdout, 0.90 before",
                    )
                ],
            ),
            (
                deployment("d-2", "rolling_out"),
                [
                    asked(
                        "d-2",
                        "pi-1",
                        wave="canary",
                        state="serving",
                        precision="int8",
                        answered_at=1e9 + 104.5,
                        health=(health("float32", 0.9, 0.8), health("int8", 0.895, 0.8)),
                    ),
                    asked("d-2", "pi-2", state="checking"),
                    asked(
                        "d-2",
                        "pi-3",
                        state="refused",
                        answered_at=1e9 + 103,
                        reason="p95 of a sample <b>0.9 s</b>, at most 0.5 s",
                        health=(health("float32", 0.9),),
                    ),
                    asked("d-2", "pi-4", state="away"),
                    asked("d-2", "pi-5", state="waiting", asked_at=None, model="variant-0.5"),
                ],
            ),
        ],
        conditions=[
            condition(
                "d-2", "pi-1", told=counts((500, 20, 10)), temperature_celsius=48.5, battery_share=0.8, on_battery=True
            ),
            *(condition("d-0", f"pi-{number}", told=counts((100 + number, 95, 90))) for number in (2, 3, 4, 5, 6)),
        ],
        away=["pi-4"],
    )
