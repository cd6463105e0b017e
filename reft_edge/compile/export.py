"""Deployable ONNX: an inference graph with its weights inside.

Any ONNX runtime runs the file; the batch axis stays free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from reft_edge.bundle.bundle import check_tensors, graph_bytes
from reft_edge.bundle.inference import INPUTS

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import Manifest
    from reft_edge.types import Tensors


def export_onnx(manifest: Manifest, inference_graph: bytes, weights: Tensors) -> bytes:
    """A standard ONNX file: input `inputs` (n_batch, *sample), output `outputs`, weights as initializers.

    `inference_graph` is the compressed blob of a bundle. Raises `BundleError` when the weights do not fit the manifest.
    """
    check_tensors(weights, manifest.tensors)
    model = onnx.load_model_from_string(graph_bytes(inference_graph))
    used = {name for node in model.graph.node for name in node.input}
    for name in sorted(used & set(weights)):
        array = np.asarray(weights[name])
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
    kept = [value for value in model.graph.input if value.name == INPUTS]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.producer_name = "reft-edge"
    model.graph.name = manifest.model
    data: bytes = model.SerializeToString(deterministic=True)
    return data
