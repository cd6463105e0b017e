"""What the coordinator remembers, as value objects: runs, rounds, assignments, updates, metrics.

The store writes and reads these; nothing else knows that there is a database. All times are Unix seconds.
"""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias, get_args

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.wire.compensation_names import Compensation
from reft_edge.wire.deployment import Condition, Health, HealthRules, ModelFile, Precision
from reft_edge.wire.messages import (
    Digest,
    Measured,
    ProfileAnnouncement,
    TrainingPlan,
    UpdateManifest,
    WeightsDelta,
    WeightsRef,
)

RunState: TypeAlias = Literal["active", "finished", "failed"]
Stage: TypeAlias = Literal["initial", "merged", "batch_norm", "distilled"]
"""What was measured: the round's start, after the weighted mean, with new batch-norm statistics, after distilling."""

STAGES: tuple[Stage, ...] = get_args(Stage)

UpdateState: TypeAlias = Literal["offered", "received", "merged", "late", "rejected", "duplicate", "damaged"]
"""`offered`: announced, perhaps half here. `received`: here, checked, counts. `merged`: in the global model.
`late`: announced after collecting had ended; not pulled. `rejected`: of no use, by itself or beside the others of its
round. `duplicate`: a second, different update for one task. `damaged`: it was here, and our disk has lost it."""

DeploymentState: TypeAlias = Literal[
    "canary", "soaking", "rolling_out", "rolling_back", "done", "rolled_back", "interrupted"
]
"""`interrupted`: a person stopped it, or deployed something else, before it had ended."""

ENDED_DEPLOYMENTS: tuple[DeploymentState, ...] = ("done", "rolled_back")
"""Nothing more is decided about these. Devices of a `done` one that were away may still come for it."""

Wave: TypeAlias = Literal["canary", "rest"]

DeployedState: TypeAlias = Literal[
    "waiting", "asked", "fetching", "checking", "serving", "refused", "failed", "late", "away", "rolled_back"
]
"""`waiting`: its wave has not begun. `late`: asked, and did not answer in time. `away`: asked, and not there."""

GONE_BACK: tuple[DeployedState, ...] = ("rolled_back", "refused", "failed")
"""Devices in these states that were told to go back do not serve it, and need not be told again."""

QuarantinedBy: TypeAlias = Literal["rejections", "person"]
"""Who put a device into quarantine: the coordinator, after so many rejected updates, or somebody at the console."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One federation from its first round to its last."""

    run: str
    federation: str
    settings_digest: str
    """SHA-256 over what must not change within a run (model, seed, data); see `settings.run_digest`."""
    created_at: float
    state: RunState = "active"
    reason: str = ""
    ended_at: float | None = None
    weights: BlobRef | None = None
    """The global model's tensors that the next round starts with."""


class RoundKey(msgspec.Struct, frozen=True, kw_only=True):
    """A round of a run; `attempt` counts its plans: a round without quorum is planned anew."""

    run: str
    number: int
    """From 1."""
    attempt: int = 1

    def task(self, device: str) -> str:
        """The id of a task that is new in this attempt: unique, valid in a topic, at most 64 characters.

        Whoever goes on with the work of an attempt before keeps that task (`coordinator.attempts`).
        """
        digest = hashlib.sha256(f"{self.run}/{self.number}/{self.attempt}/{device}".encode()).hexdigest()
        return f"r{self.number}-{digest[:24]}"


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a round beside its assignments."""

    key: RoundKey
    phase: str
    started_at: float
    deadline: float | None = None
    extensions: int = 0
    reason: str = ""
    closed_at: float | None = None
    merged: BlobRef | None = None
    """Global tensors after merging and new batch-norm statistics."""
    distilled: BlobRef | None = None
    """Global tensors at the round's end."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner expects of one device in one round, corrections included. Seconds and bytes."""

    download_s: float = 0.0
    start_s: float = 0.0
    """Worker start, session creation and the first evaluation of the holdout."""
    steps: int = 0
    step_s: float = 0.0
    """Of a full batch."""
    training_s: float = 0.0
    evaluation_s: float = 0.0
    """Of the holdout, after training."""
    upload_s: float = 0.0
    peak_memory_bytes: float = 0.0
    down_bytes: float = 0.0
    up_bytes: float = 0.0
    uncorrected_download_s: float = 0.0
    """The `uncorrected` figures follow from profile and cost alone: what the field of the same name in `Measured` is
    compared with."""
    uncorrected_start_s: float = 0.0
    uncorrected_training_s: float = 0.0
    """The device's own time, without pauses."""
    paced_training_s: float = 0.0
    """What pauses alone make of it; 0 where the device is not paced."""
    uncorrected_peak_memory_bytes: float = 0.0
    base_memory_bytes: float = 0.0
    """Of the peak, what the worker takes without a model."""

    @property
    def round_s(self) -> float:
        return self.download_s + self.start_s + self.training_s + self.evaluation_s + self.upload_s


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a device's updates, for compensation with a shared memory."""

    update: str
    """SHA-256 of the merged update up to which it goes."""
    tensors: BlobRef


class AssignmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part in a round."""

    task: str
    device: str
    variant: str
    """Name of its variant, for example `0.50`."""
    ratio: float
    prediction: Prediction
    plan: TrainingPlan
    bundle: BlobRef | None = None
    """The manifest's blob; None until published."""
    weights: WeightsRef | None = None
    delta: WeightsDelta | None = None
    """To `weights` from those of the variant's last round."""
    memory: Remembered | None = None
    """What the device's update may go on from."""
    broadcast: bool = False
    standing: str = "asked"
    update: str | None = None
    reason: str = ""
    failure: str = ""
    """Kind of failure that the device named, for example `out_of_memory`."""


class MergedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a device since its last merged update, and what that update was for."""

    device: str
    round: int
    variant: str
    method: Compensation
    remembered: Remembered


class TaskOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a task is, and of which round."""

    device: str
    round: int
    phase: str
    """Of the last attempt that it was for."""
    started_at: float
    """When the round was planned first."""


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One announced update."""

    task: str
    device: str
    round: int
    manifest: UpdateManifest
    measured: Measured
    state: UpdateState
    at: float
    """When it came to this state."""
    reason: str = ""
    memory: BlobRef | None = None
    """Of a merged one: what is remembered of its device from then on, where its compensation asks for it."""


class VariantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled variant of a run: enough to send and to merge it without pruning or compiling again."""

    variant: str
    ratio: float
    manifest: BlobRef
    channels: BlobRef


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it last announced itself."""

    device: str
    announcement: ProfileAnnouncement
    seen_at: float
    certificate: str = ""
    """PEM, as it came with the announcement; empty where messages are not signed."""


class QuarantineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device that gets no tasks, from `since` until a person lifts it."""

    device: str
    since: float
    reason: str
    by: QuarantinedBy
    lifted_at: float | None = None


class MetricRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One number about the global model."""

    round: int
    stage: Stage
    name: str
    value: float


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One exported file and what was measured on it."""

    name: str
    path: str
    sha256: str = ""
    """Of the file; empty where it was exported before this was kept."""
    values: dict[str, float] = {}


class ConditionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a device was when it last said so."""

    device: str
    condition: Condition
    seen_at: float


class PresenceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a device was there, by the last that was heard of it; nobody listens while no coordinator is at work."""

    device: str
    online: bool
    at: float
    """Since when."""


class ReleasedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One of a version's models, as it is offered to devices."""

    name: str
    """For example `global` or `variant-0.5`."""
    files: tuple[ModelFile, ...]
    """float32 first; int8 where there is one."""
    sha256s: tuple[Digest, ...]
    """Of the ONNX files themselves, in the order of `files`."""


class DeploymentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One roll-out of a version."""

    deployment: str
    federation: str
    version: str
    state: DeploymentState
    reason: str = ""
    """Why it was rolled back or interrupted."""
    started_at: float
    since: float
    """When it came to this state."""
    ended_at: float | None = None
    """When it was done or rolled back, or another took its place."""
    models: tuple[ReleasedModel, ...] = ()
    """The largest first."""
    classes: tuple[str, ...] = ()
    rules: HealthRules = HealthRules()

    def model(self, name: str) -> ReleasedModel:
        return next(model for model in self.models if model.name == name)


class DeployedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part in a deployment."""

    deployment: str
    device: str
    model: str
    """Name of the model that it is offered."""
    smaller: str = ""
    """The one that it gets if this is too slow or too large for it; empty where there is none, or it was tried."""
    why: str = ""
    """Why it gets this model."""
    wave: Wave
    undone: bool = False
    """Whether it is to go back to what it served before."""
    state: DeployedState = "waiting"
    reason: str = ""
    """Why it refused, failed or was not waited for."""
    precision: Precision | None = None
    """Of the file that it took; None while it has taken none, and where it went back by itself."""
    health: tuple[Health, ...] = ()
    """What it measured, a file each."""
    asked_at: float | None = None
    answered_at: float | None = None

    @property
    def measured(self) -> Health | None:
        """Of the file that it took; of one that it did not take otherwise."""
        taken = (one for one in self.health if one.precision == self.precision)
        return next(taken, next(iter(self.health), None))
