"""What a bundle says about itself: the shapes, the recipe and the cost of one compiled variant.

A bundle is a manifest, a training graph, an inference graph and weights. The manifest travels as JSON; the other three
are blobs named by the SHA-256 of their bytes. Graphs and weights are apart, so a device that already has the graphs
receives new weights only.

This module holds value objects and their checks. It loads neither numpy nor onnxruntime: the agent's daemon reads
manifests.
"""

from __future__ import annotations

from math import isfinite, prod
from typing import Annotated, Literal, TypeAlias

import msgspec

from reft_edge.errors import BundleError

SCHEMA = 1

MAX_MANIFEST_BYTES = 4 * 2**20
"""4 MiB: about 40,000 tensors. A manifest is read whole, so an attacker must not choose its size."""

MAX_TENSORS = 20_000
MAX_TENSOR_ELEMENTS = 2**31
"""Of one tensor, and of all tensors of a model: 8 GiB of float32, beyond what can be sent."""

MAX_AXES = 32
"""As many as every numpy takes. Limits on what a manifest may claim are checked before anything is allocated."""

MAX_COUNT = 2**53
"""Counts and sizes stay exact as JSON numbers and as floats."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]

DType: TypeAlias = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]


class SGD(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sgd", tag_field="name"):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it.

    State: one float32 `momentum` tensor a parameter when `momentum > 0`, else none. The learning rate is an input of
    the graph.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_range("momentum", self.momentum, 0.0, 1.0)
        _check_range("weight_decay", self.weight_decay, 0.0, float("inf"))
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs momentum > 0")


class Adam(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="adam", tag_field="name"):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), as `torch.optim.Adam` computes it.

    State: float32 `exp_avg` and `exp_avg_sq` tensors a parameter, and one float32 scalar `step`.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_range("beta1", self.beta1, 0.0, 1.0)
        _check_range("beta2", self.beta2, 0.0, 1.0)
        _check_range("epsilon", self.epsilon, 0.0, float("inf"))
        _check_range("weight_decay", self.weight_decay, 0.0, float("inf"))


class CrossEntropy(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="cross_entropy", tag_field="name"
):
    """Softmax cross entropy, mean over the batch. Targets: int64 (n_batch,), class indices."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_range("label_smoothing", self.label_smoothing, 0.0, 1.0)


class MeanSquaredError(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mean_squared_error", tag_field="name"
):
    """Mean squared error over all elements. Targets: float32, the shape of the model's output."""


Optimizer: TypeAlias = SGD | Adam
Loss: TypeAlias = CrossEntropy | MeanSquaredError


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if not self.name or not is_possible_shape(self.shape):
            raise ValueError(f"tensor {self.name!r} has an impossible shape {self.shape!r}")

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


class BlobRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A blob by content: SHA-256 as 64 lower-case hexadecimal digits, and its size."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError(f"{self.sha256!r} is not a SHA-256 in lower-case hexadecimal digits")
        if not 0 <= self.size_bytes <= MAX_COUNT:
            raise ValueError(f"a blob cannot have {self.size_bytes!r} bytes")


class Work(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one run of a graph makes a processor do; affine in the batch size. See `reft_edge.compile.work`."""

    product_flops_fixed: Count
    product_flops_per_sample: Count
    """Operations of matrix products, the padding of small ones included."""
    moved_bytes_fixed: Count
    moved_bytes_per_sample: Count
    """As many as a plain pass over memory would move in the time that all other work takes."""
    calls: Count
    """Of nodes, and for binding each tensor that goes in or comes out."""

    def product_flops(self, batch_size: int) -> int:
        return self.product_flops_fixed + batch_size * self.product_flops_per_sample

    def moved_bytes(self, batch_size: int) -> int:
        return self.moved_bytes_fixed + batch_size * self.moved_bytes_per_sample


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What training this variant costs, counted on the compiled graph.

    A training step on a batch of `n` samples computes `n * step_flops_per_sample` floating-point operations (a
    multiply-accumulate counts as 2), and its tensors take at most `memory_bytes(n)` at once.
    """

    parameters: Count
    forward_macs: Count
    """Multiply-accumulates of one sample's forward pass."""
    step_flops_per_sample: Count
    memory_fixed_bytes: Count
    """Parameters, gradients, optimizer state and buffers, held at the step's peak."""
    memory_per_sample_bytes: Count
    """Activations and their gradients alive at the step's peak, for each sample of the batch."""
    prediction_bytes_per_sample: Count = 0
    """Activations alive at the peak of the inference graph, for each sample; 0 in manifests from before."""
    step_work: Work | None = None
    """Of a training step; None in manifests from before it was counted."""
    forward_work: Work | None = None
    """Of a run of the inference graph."""

    def memory_bytes(self, batch_size: int) -> int:
        """Peak bytes of tensors in a training step on `batch_size` samples; the runtime itself is not in it."""
        return self.memory_fixed_bytes + batch_size * self.memory_per_sample_bytes

    def step_flops(self, batch_size: int) -> int:
        return batch_size * self.step_flops_per_sample


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a device must know to train a variant, apart from the blobs themselves."""

    model: str
    """What a person calls the model, for example `vgg16` or `vgg16 x 0.50`."""
    input: TensorSpec
    """One sample, without the batch axis."""
    target: TensorSpec
    """One sample's target, without the batch axis: shape () and int64 for cross entropy."""
    output: TensorSpec
    """One sample's output, without the batch axis."""
    loss: Loss
    optimizer: Optimizer
    parameters: tuple[TensorSpec, ...]
    """Trained tensors, in the order of the module's `named_parameters()`."""
    buffers: tuple[TensorSpec, ...]
    """Tensors that the step updates but does not train (running statistics), and constants of `state_dict()`."""
    cost: Cost
    training_graph: BlobRef
    inference_graph: BlobRef
    weights: BlobRef
    uses_seed: bool = False
    """Whether the training graph takes a `seed` (it has dropout)."""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"manifest schema {self.schema!r} is not {SCHEMA}; use the same reft-edge on both sides")
        if len(self.parameters) + len(self.buffers) > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        if sum(spec.n_elements for spec in self.tensors) > MAX_TENSOR_ELEMENTS:
            raise ValueError(f"the model has more than {MAX_TENSOR_ELEMENTS} elements")
        names = [spec.name for spec in (*self.parameters, *self.buffers)]
        if len(set(names)) != len(names):
            raise ValueError("a tensor name occurs twice")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Parameters, then buffers: what the weights blob holds and what an update may contain."""
        return self.parameters + self.buffers

    @property
    def weight_bytes(self) -> int:
        """Of all tensors, as they are trained."""
        return sum((8 if spec.dtype == "int64" else 4) * spec.n_elements for spec in self.tensors)

    @property
    def sample_bytes(self) -> int:
        """Of one sample's input."""
        return (8 if self.input.dtype == "int64" else 4) * self.input.n_elements

    def to_json(self) -> bytes:
        """The manifest as readable JSON, the same bytes for equal manifests."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse and check a manifest.

        Raises `BundleError` when it is too large, not JSON, or breaks a rule above.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"manifest has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are accepted")
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise BundleError(f"manifest is not valid: {exc}") from exc


def is_possible_shape(shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have this shape. Each size counts, because 0 hides all others in their product."""
    fits = len(shape) <= MAX_AXES and all(0 <= size <= MAX_TENSOR_ELEMENTS for size in shape)
    return fits and prod(shape) <= MAX_TENSOR_ELEMENTS


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and isfinite(value)):
        raise ValueError(f"{name} = {value!r} is outside {low} to {high}")
