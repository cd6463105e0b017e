"""Run an inference graph: weights and samples in, outputs out.

The weights are inputs of the graph, so one `Predictor` serves every version of a variant's weights: the coordinator
evaluates many sets of weights with one session. Used by the device and by the coordinator; knows no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state

from reft_edge.bundle.bundle import graph_bytes
from reft_edge.errors import BundleError, DataError, ResourceError

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)
"""What onnxruntime raises: `Fail`, `InvalidArgument` and others, which have no base of their own but `Exception`;
its Python layer raises `ValueError` for unknown inputs."""

INPUTS = "inputs"
OUTPUTS = "outputs"
"""Names of the samples' input and of the result in every inference graph."""


def open_session(graph: bytes, *, threads: int, optimize: bool = True, spin: bool = False) -> ort.InferenceSession:
    """A CPU session on a graph blob, set up for devices: few threads, no arena beyond need.

    With `spin`, threads that wait for the next piece of a running graph do so on their core, and sleep between runs.
    Raises `BundleError` when onnxruntime refuses the graph and `ResourceError` when memory runs out.
    """
    options = session_options(threads=threads, spin=spin)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(graph_bytes(graph), options, providers=["CPUExecutionProvider"])
    except MemoryError as exc:
        raise ResourceError("not enough memory to load the graph; use a smaller variant") from exc
    except ORT_ERRORS as exc:
        raise BundleError(f"onnxruntime refuses the graph: {first_line(exc)}") from exc


def session_options(*, threads: int, spin: bool = False) -> ort.SessionOptions:
    """Settings of every session on a device."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Agents share cores with the device's own work: an idle pool must not burn them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_mem_pattern = False  # patterns are made a batch size; the arena alone re-uses as well
    options.log_severity_level = 3
    return options


def first_line(error: BaseException) -> str:
    """The first line of an error's text: onnxruntime appends dumps that no person reads."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Predictor:
    """An inference graph ready to run.

    `graph` is the compressed blob of a bundle. Inputs: `(n, *sample_shape)`; outputs: float32 `(n, *output_shape)`.
    """

    def __init__(self, graph: bytes, *, threads: int = 1) -> None:
        self._session = open_session(graph, threads=threads)
        self._weight_names = [value.name for value in self._session.get_inputs() if value.name != INPUTS]

    def predict(self, weights: Tensors, inputs: Array, *, batch_size: int = 128) -> Array:
        """Outputs for all samples, computed in batches so that memory does not grow with `n`.

        `weights` may hold more than the graph takes. Raises `BundleError` for a missing tensor, `DataError` for samples
        that do not fit the graph.
        """
        if missing := [name for name in self._weight_names if name not in weights]:
            raise BundleError(f"weights lack {missing[0]!r} ({len(missing)} of {len(self._weight_names)} are missing)")
        if len(inputs) == 0:
            raise DataError("there are no samples to predict; give at least one")
        feeds = {name: np.ascontiguousarray(weights[name]).reshape(weights[name].shape) for name in self._weight_names}
        parts: list[Array] = []
        for start in range(0, len(inputs), batch_size):
            batch = np.ascontiguousarray(inputs[start : start + batch_size])
            try:
                (outputs,) = self._session.run([OUTPUTS], {**feeds, INPUTS: batch})
            except MemoryError as exc:
                raise ResourceError(f"not enough memory to predict {len(batch)} samples at once") from exc
            except ORT_ERRORS as exc:
                raise DataError(
                    f"the model does not take inputs {batch.shape} {batch.dtype}: {first_line(exc)}"
                ) from exc
            parts.append(outputs)
        return np.concatenate(parts)
