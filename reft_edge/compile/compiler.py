"""From a torch module to a bundle: trace, lower, count the cost, pack.

`compile_bundle` is the one entry. The module is left as it was: everything happens on a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from reft_edge.bundle.bundle import Bundle, blob_ref
from reft_edge.bundle.container import compress, pack_tensors
from reft_edge.bundle.manifest import (
    SGD,
    Adam,
    CrossEntropy,
    DType,
    Loss,
    Manifest,
    MeanSquaredError,
    Optimizer,
    TensorSpec,
)
from reft_edge.compile import rules  # noqa: F401 - importing registers them
from reft_edge.compile.cost import count_cost
from reft_edge.compile.graph import Built, GraphBuilder, Value
from reft_edge.compile.loss import add_loss, target_spec
from reft_edge.compile.lowering import Lowering, Result, dtype_name
from reft_edge.compile.optimizer import Updates
from reft_edge.compile.symbols import LARGE_BATCH, SMALL_BATCH, Affine, pair_shape
from reft_edge.compile.tracing import Subject, Trace, trace_inference, trace_training
from reft_edge.errors import ModelError

LOSSES: dict[str, Callable[[], Loss]] = {"cross_entropy": CrossEntropy, "mean_squared_error": MeanSquaredError}
"""Losses that may be given by name."""

GRAPH_LEVEL = 19
"""Graphs are small and travel often: zstandard's level for them is high."""


def compile_bundle(
    module: torch.nn.Module,
    input_shape: Sequence[int],
    *,
    loss: Loss | str = "cross_entropy",
    optimizer: Optimizer | None = None,
    name: str | None = None,
    input_dtype: DType = "float32",
) -> Bundle:
    """Compile a module's training step and inference.

    `input_shape` is one sample's, without the batch axis; `input_dtype` is int64 for token ids. The default optimizer
    is SGD with momentum 0.9. Equal modules give equal bytes on one platform. Raises `ModelError` for what cannot be
    compiled.
    """
    subject = Subject.of(module)
    shape = _shape(input_shape)
    options = optimizer if optimizer is not None else SGD(momentum=0.9)
    if not isinstance(options, SGD | Adam):
        raise ModelError(f"optimizer {options!r} cannot be compiled; give SGD(...) or Adam(...) of reft_edge.compile")
    chosen = _loss(loss)
    small, large = (_samples(n, shape, input_dtype) for n in (SMALL_BATCH, LARGE_BATCH))
    inference_traces = (trace_inference(subject, small), trace_inference(subject, large))
    output = _output_spec(inference_traces)
    target = target_spec(chosen, output)
    empties = [torch.empty(trace.output.shape) for trace in inference_traces]
    training_traces = (trace_training(subject, small, empties[0]), trace_training(subject, large, empties[1]))
    source = _Source(subject, shape, input_dtype, target)
    training, uses_seed = _training_graph(source, training_traces, chosen, options)
    inference = _inference_graph(source, inference_traces)
    weights = pack_tensors({n: t.numpy() for n, t in (*subject.parameters.items(), *subject.buffers.items())})
    training_blob = compress(training.model.SerializeToString(deterministic=True), level=GRAPH_LEVEL)
    inference_blob = compress(inference.model.SerializeToString(deterministic=True), level=GRAPH_LEVEL)
    manifest = Manifest(
        model=name or type(module).__name__,
        input=TensorSpec(name="inputs", shape=shape, dtype=input_dtype),
        target=target,
        output=output,
        loss=chosen,
        optimizer=options,
        parameters=_specs(subject.parameters),
        buffers=_specs(subject.buffers),
        cost=count_cost(training, inference, sum(p.numel() for p in subject.parameters.values())),
        training_graph=blob_ref(training_blob),
        inference_graph=blob_ref(inference_blob),
        weights=blob_ref(weights),
        uses_seed=uses_seed,
    )
    return Bundle(manifest=manifest, training_graph=training_blob, inference_graph=inference_blob, weights=weights)


def _loss(loss: Loss | str) -> Loss:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ModelError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
        return LOSSES[loss]()
    return loss


def _shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in input_shape)
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelError(f"input_shape = {input_shape!r} is no shape of a sample; expected sizes like (3, 32, 32)")
    return shape


def _samples(n_batch: int, shape: Sequence[int], dtype: DType) -> torch.Tensor:
    if dtype not in ("float32", "int64"):
        raise ModelError(f"inputs of dtype {dtype!r} cannot be compiled; use float32 or int64")
    return torch.zeros((n_batch, *shape), dtype=torch.float32 if dtype == "float32" else torch.int64)


def _output_spec(traces: tuple[Trace, Trace]) -> TensorSpec:
    """One sample's output. Raises `ModelError` unless it is float32 with the batch axis first."""
    shape = pair_shape(traces[0].output.shape, traces[1].output.shape)
    dtype = dtype_name(traces[0].output.dtype)
    sizes = tuple(dim for dim in shape[1:] if not isinstance(dim, Affine))
    if dtype != "float32" or shape[:1] != (Affine(1),) or len(sizes) != len(shape) - 1:
        raise ModelError(
            f"the model returns {dtype} {tuple(traces[0].output.shape)} for {SMALL_BATCH} samples; "
            "it must return float32 with the batch axis first, and no other axis that depends on it"
        )
    return TensorSpec(name="outputs", shape=sizes, dtype="float32")


def _specs(tensors: dict[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=n, shape=tuple(t.shape), dtype=dtype_name(t.dtype)) for n, t in tensors.items())  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Source:
    """What both graphs take in."""

    subject: Subject
    input_shape: tuple[int, ...]
    input_dtype: str
    target: TensorSpec

    def inputs(self, graph: GraphBuilder) -> dict[str, Value]:
        """Graph inputs, by the names that the traces give their placeholders."""
        values: dict[str, Value] = {}
        for prefix, tensors in (("p", self.subject.parameters), ("b", self.subject.buffers)):
            for index, (name, tensor) in enumerate(tensors.items()):
                values[f"{prefix}{index}"] = graph.input(name, tuple(tensor.shape), dtype_name(tensor.dtype))
        values["inputs"] = graph.input("inputs", (Affine(1), *self.input_shape), self.input_dtype)
        return values


def _training_graph(
    source: _Source, traces: tuple[Trace, Trace], loss: Loss, optimizer: Optimizer
) -> tuple[Built, bool]:
    """The graph of a step, and whether it draws random numbers."""
    graph = GraphBuilder()
    inputs = source.inputs(graph)
    targets = graph.input("targets", (Affine(1), *source.target.shape), source.target.dtype)
    updates = Updates(graph, optimizer, graph.input("learning_rate", (), "float32"))
    lowering = Lowering(graph, moves_batch=True)
    losses: list[Value] = []

    def output_grad(name: str, output: Value) -> Value | None:
        if name != "output_grad":
            return None
        value, grad = add_loss(graph, loss, output, targets)
        losses.append(value)
        return grad

    results = lowering.run(traces[0].graph, traces[1].graph, inputs, output_grad)
    names = list(source.subject.parameters)
    grads = results[1 : 1 + len(names)]
    for index, (name, grad) in enumerate(zip(names, grads, strict=True)):
        if grad is not None:
            updates.add(name, inputs[f"p{index}"], _tensor(grad))
    new_tensors = updates.finish()
    for index, (name, new) in enumerate(zip(source.subject.buffers, results[1 + len(names) :], strict=True)):
        if new is not inputs[f"b{index}"]:
            new_tensors[name] = _tensor(new)
    if not losses:
        raise ModelError("the model's output does not depend on any trained parameter")
    outputs = {"loss": losses[0], **{f"updated/{name}": value for name, value in new_tensors.items()}}
    return graph.finish(outputs), lowering.seed is not None


def _inference_graph(source: _Source, traces: tuple[Trace, Trace]) -> Built:
    graph = GraphBuilder()
    results = Lowering(graph).run(traces[0].graph, traces[1].graph, source.inputs(graph))
    return graph.finish({"outputs": _tensor(results[0])})


def _tensor(result: Result) -> Value:
    if not isinstance(result, Value):
        raise ModelError(f"the model has no gradient where one is needed ({result!r})")  # pragma: no cover
    return result
