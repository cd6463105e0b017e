"""`federation.toml`: everything a person decides about a federation, typed and checked.

A key, its type and its default are written here once. Paths in the file are relative to the file. Checks that need the
model or the data themselves belong to `--check`, which builds and loads them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from reft_edge.bundle.manifest import SGD, CrossEntropy, Loss, MeanSquaredError, Optimizer
from reft_edge.config import convert_settings, read_toml
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.deployment_settings import DeploymentSettings
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.planning import DEFAULT_RATIOS
from reft_edge.coordinator.policies import find_policy
from reft_edge.coordinator.rejection_settings import RejectionSettings
from reft_edge.coordinator.rounds import RoundRules
from reft_edge.data.settings import DataSettings
from reft_edge.errors import ConfigError
from reft_edge.wire.codec_names import Codec, CodecName, RandomK, codec_text, find_codec, keeps_every_entry
from reft_edge.wire.compensation_names import Compensation, CompensationName, Uncompensated, find_compensation
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.topics import check_name

Positive: TypeAlias = Annotated[int, Meta(ge=1)]
PositiveSeconds: TypeAlias = Annotated[float, Meta(gt=0, le=31_536_000)]
"""At most a year."""

_LOSSES: dict[str, Loss] = {"cross_entropy": CrossEntropy(), "mean_squared_error": MeanSquaredError()}


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[model]: what is trained."""

    name: str
    """A model of the zoo, for example `vgg16`, or `module:function` in a .py file beside federation.toml."""
    input_shape: Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=4)]
    """One sample, without the batch axis."""
    n_outputs: Positive | None = None
    """Classes, or regression targets; the number of `classes` where those are given."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the outputs. Empty: devices' labels are indices."""
    input_dtype: Literal["float32", "int64"] = "float32"
    loss: Literal["cross_entropy", "mean_squared_error"] | Loss = "cross_entropy"
    """A name, or a table with a name and its options."""
    optimizer: Optimizer = SGD(momentum=0.9)

    @property
    def loss_function(self) -> Loss:
        return _LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    @property
    def outputs(self) -> int:
        return self.n_outputs if self.n_outputs is not None else len(self.classes)


class TrainingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[training]: how devices train in a round, and how tensors travel."""

    local_epochs: Annotated[int, Meta(ge=1, le=10_000)] = 2
    batch_size: Annotated[int, Meta(ge=1, le=65_536)] = 32
    learning_rate: Annotated[float, Meta(gt=0, le=1000)] = 0.05
    schedule: Literal["constant", "cosine"] = "constant"
    update_codec: CodecName | Codec = "layer_wise"
    """A name, or a table with a name and its options; so is `weights_codec`. By default the one with the fewest bytes
    that cost no accuracy, in many rounds nor in one (scripts/benchmarks/codecs)."""
    weights_codec: CodecName | Codec = "float16"
    """Weights on the way down; half the bytes of float32 for a rounding error far below a training step."""
    delta_codec: Literal["none"] | CodecName | Codec = "layer_wise"
    """From the second round on, new weights travel as their difference from the last ones; `none`: always whole. What
    the codec leaves out comes with the next round, so it may be as coarse as that of updates."""

    compensation: CompensationName | Compensation = "error_feedback"
    """What becomes of what `update_codec` leaves out: a name, or a table with a name and its options."""

    @property
    def compensation_method(self) -> Compensation:
        return find_compensation(self.compensation)

    @property
    def delta_encoding(self) -> Codec | None:
        return None if self.delta_codec == "none" else find_codec(self.delta_codec)

    @property
    def update_encoding(self) -> Codec:
        return find_codec(self.update_codec)

    @property
    def weights_encoding(self) -> Codec:
        return find_codec(self.weights_codec)


class SizeLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[planning] limits: how large a variant may be, whatever the device; what is left out is not limited."""

    parameters: Positive | None = None
    macs: Positive | None = None
    """Multiply-accumulates of one sample's forward pass."""
    weight_bytes: Positive | None = None
    """Of the weights in float32."""

    @property
    def given(self) -> dict[str, int]:
        every = {"parameters": self.parameters, "macs": self.macs, "weight_bytes": self.weight_bytes}
        return {name: limit for name, limit in every.items() if limit is not None}


class PlanningSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[planning]: which device gets how much of the model."""

    policy: str = "deadline"
    """`deadline` or `reft` (`coordinator.policies`)."""
    max_variants: Annotated[int, Meta(ge=1, le=64)] = 4
    ratios: Annotated[tuple[Annotated[float, Meta(ge=0, lt=1)], ...], Meta(min_length=1, max_length=64)] = (
        DEFAULT_RATIOS
    )
    """The ladder of pruning ratios to choose from; 0 is the whole model, or the largest within `limits`."""
    importance: str = "magnitude"
    limits: SizeLimits | None = None
    """Every variant stays within these. Its layers' widths are balanced, so that no limit is left unused: one ratio for
    all layers meets the tightest limit and wastes the others (`compile.balance`). The ladder prunes on from there."""


class CoordinatorData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[data]: what the coordinator has. Forms as on a device."""

    public: DataSettings | None = None
    """Unlabelled is enough. Without it: no distillation and no new batch-norm statistics."""
    test: DataSettings | None = None
    """Labelled; without it nothing is evaluated."""


class CoordinatorTrust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[trust]: what tasks are signed with, and which devices are believed. With it, what is not signed is dropped."""

    key_file: str
    """The coordinator's private Ed25519 key; devices know its public half."""
    ca_file: str
    """The federation's authority: devices whose certificate it signed are believed."""
    crl_file: str | None = None
    """Certificates that the authority has revoked; read again when it changes."""

    def resolved_in(self, base_dir: Path) -> CoordinatorTrust:
        """The same with file names made absolute, relative ones below `base_dir`."""
        names = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        return CoordinatorTrust(**{name: str(base_dir / getattr(self, name)) for name in names})


class OutputSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[output]: where results and the coordinator's memory go."""

    directory: str = "federation"


class FederationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    federation: str
    """Name; part of every topic."""
    model: ModelSettings
    rounds: Annotated[int, Meta(ge=1, le=100_000)] = 5
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0
    deadline_s: PositiveSeconds = 3600.0
    """Time that a device has in a round, from the task being sent to the update being announced."""
    grace_s: PositiveSeconds = 60.0
    """More time for announced updates that wait for their turn to upload."""
    absent_s: PositiveSeconds = 120.0
    """With the quorum, devices that have been offline this long are not waited for."""
    quorum: Annotated[float, Meta(gt=0, le=1)] = 0.5
    """Share of the asked devices whose updates are needed."""
    on_missed_quorum: Literal["extend", "fail"] = "extend"
    max_extensions: Annotated[int, Meta(ge=0, le=1000)] = 3
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    """How often one round is planned anew when it found no quorum, before the run fails."""
    min_devices: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """Devices that must be there before the first round."""
    enrol_wait_s: PositiveSeconds = 600.0
    """How long to wait for them, and in later rounds for the quorum's share of them, before the run fails."""
    settle_s: Annotated[float, Meta(ge=0, le=86_400)] = 2.0
    """Once enough devices are there: how long to wait for more before the first round that is planned."""
    max_parallel_uploads: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Updates that are pulled at once."""
    broker: BrokerSettings = BrokerSettings()
    training: TrainingSettings = TrainingSettings()
    planning: PlanningSettings = PlanningSettings()
    data: CoordinatorData = CoordinatorData()
    aggregation: AggregationSettings = AggregationSettings()
    distillation: DistillationSettings = DistillationSettings()
    rejection: RejectionSettings = RejectionSettings()
    deployment: DeploymentSettings = DeploymentSettings()
    output: OutputSettings = OutputSettings()
    trust: CoordinatorTrust | None = None

    @property
    def round_rules(self) -> RoundRules:
        return RoundRules(
            deadline_s=self.deadline_s,
            quorum=self.quorum,
            grace_s=self.grace_s,
            absent_s=self.absent_s,
            on_missed_quorum=self.on_missed_quorum,
            max_extensions=self.max_extensions,
        )


def load_federation(path: Path) -> FederationSettings:
    """Read and check federation.toml. Raises `ConfigError` with file, key and the way out."""
    table = read_toml(path)
    if "device" in table:
        raise ConfigError(f"{path} is an agent's settings file; give the federation's")
    settings = convert_settings(table, FederationSettings, origin=str(path))
    try:
        check_federation(settings)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return settings


def check_federation(settings: FederationSettings) -> None:
    """What types alone cannot say. Raises `ConfigError`."""
    check_name(settings.federation, "federation")
    model = settings.model
    if model.n_outputs is None and not model.classes:
        raise ConfigError("[model] needs n_outputs, or classes with their names")
    if model.classes and model.n_outputs not in (None, len(model.classes)):
        raise ConfigError(
            f"[model] has n_outputs = {model.n_outputs} but {len(model.classes)} classes; they must agree"
        )
    if repeated := sorted({name for name in model.classes if model.classes.count(name) > 1}):
        raise ConfigError(f"[model] classes has {repeated[0]!r} twice")
    if model.classes and isinstance(model.loss_function, MeanSquaredError):
        raise ConfigError("[model] classes are for cross_entropy; a mean_squared_error model has n_outputs only")
    if settings.deployment.rules.min_accuracy is not None and isinstance(model.loss_function, MeanSquaredError):
        raise ConfigError(
            "[deployment.rules] min_accuracy is for cross_entropy; for mean_squared_error there is max_metric_drop"
        )
    if reason := settings.distillation.augmentation.unfit_reason(model.input_shape):
        raise ConfigError(f"[distillation.augmentation] {reason}")
    if not keeps_every_entry(settings.training.weights_encoding):
        raise ConfigError(
            f"[training] weights_codec = {codec_text(settings.training.weights_encoding)!r} leaves out entries, which "
            "whole weights cannot do without; it is for update_codec and delta_codec"
        )
    _check_unbiased(settings.training)
    find_policy(settings.planning.policy)
    if settings.planning.limits is not None and not settings.planning.limits.given:
        raise ConfigError("[planning] limits is empty; give parameters, macs or weight_bytes, or leave it out")
    ratios = settings.planning.ratios
    if len(set(ratios)) != len(ratios):
        raise ConfigError(f"[planning] ratios has a value twice: {list(ratios)!r}")
    if settings.distillation.epochs and settings.data.public is None:
        raise ConfigError(
            "distillation needs public data: give [data] public = { path = ... }, or set [distillation] epochs = 0"
        )


def _check_unbiased(training: TrainingSettings) -> None:
    """Raises `ConfigError` for a codec that is right in expectation where what it leaves out is added up."""
    delta, update = training.delta_encoding, training.update_encoding
    if isinstance(delta, RandomK) and delta.unbiased:
        raise ConfigError("[training] delta_codec random_k is unbiased: its error would grow with every round")
    compensated = not isinstance(training.compensation_method, Uncompensated)
    if isinstance(update, RandomK) and update.unbiased and compensated:
        raise ConfigError(
            '[training] update_codec random_k is unbiased, and what it leaves out would grow; set compensation = "none"'
        )


def run_digest(settings: FederationSettings) -> str:
    """SHA-256 over what makes a run this run: a change needs a new run, everything else may change between restarts.

    A person may correct the broker, the deadline or the number of rounds and go on; another model, seed or data would
    make the stored weights and metrics mean something else.
    """
    model = settings.model
    planning = settings.planning
    fixed = (settings.federation, settings.seed, model, settings.data, planning.importance, planning.limits)
    return hashlib.sha256(msgspec.json.encode(fixed, order="deterministic")).hexdigest()
