"""What an ONNX file tells about itself: its entries, what it takes, what it gives. Read, not run.

The only file here that knows the `onnx` package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types

from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from onnx import ValueInfoProto


@dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """Of one file."""

    run: str
    """The run that exported it; empty for another's file."""
    classes: tuple[str, ...]
    """In the order of the outputs; empty where they have no names."""
    input_shape: tuple[int, ...]
    """Of one sample; empty where the file leaves it open."""
    n_outputs: int | None
    """Numbers for each sample; None where the file leaves it open."""
    test_metric: float | None
    """Accuracy or mean squared error on the test data of whoever exported it."""


def read_onnx_facts(data: bytes, *, called: str) -> OnnxFacts:
    """The facts of a whole file. Raises `ModelError` for what is no ONNX model with one input.

    `called`: what errors call it.
    """
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as exc:
        raise ModelError(f"{called} is no ONNX file: {exc}") from exc
    stored = {initializer.name for initializer in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in stored]
    if len(inputs) != 1 or not model.graph.output:
        raise ModelError(f"{called} has {len(inputs)} inputs; a model that is served has one input and an output")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    metric = entries.get("test_accuracy", entries.get("test_mse"))
    try:
        classes = tuple(str(name) for name in json.loads(entries.get("classes", "[]")))
        input_shape = tuple(int(size) for size in json.loads(entries.get("input_shape", "[]")))
        test_metric = None if metric is None else float(metric)
    except (ValueError, TypeError) as exc:
        raise ModelError(f"{called}: what it says about itself cannot be read: {exc}") from exc
    outputs = _sample_shape(model.graph.output[0])
    return OnnxFacts(
        run=entries.get("run", ""),
        classes=classes,
        input_shape=input_shape or _sample_shape(inputs[0]) or (),
        n_outputs=outputs[0] if outputs is not None and len(outputs) == 1 else None,
        test_metric=test_metric,
    )


def _sample_shape(value: ValueInfoProto) -> tuple[int, ...] | None:
    """Without the axis of samples; None where an axis is open."""
    axes = value.type.tensor_type.shape.dim[1:]
    if any(not axis.HasField("dim_value") or axis.dim_value < 1 for axis in axes):
        return None
    return tuple(axis.dim_value for axis in axes)
