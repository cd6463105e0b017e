"""ONNX files that know the test data's three brightnesses, or do not; made in milliseconds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reft_edge.agent.serving.slots import InstalledModel
from reft_edge.bundle.container import compress
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.deployment import Deploy, ModelFile, Precision

N_CLASSES = 3


def brightness_model(*, wrong: float = 0.0, shape: tuple[int, ...] = (1, 6, 6), padding: int = 0) -> bytes:
    """Scores -(brightness - class)^2 for each class, apart from what is the same for all.

    `wrong`: added to the score of class 0; with 2, it is wrong about all of class 1, with 10 about classes 1 and 2.
    `padding`: bytes that the file is longer and that do nothing.
    """
    weights = np.tile(2 * np.arange(N_CLASSES) / np.prod(shape), (int(np.prod(shape)), 1)).astype(np.float32)
    bias = (-(np.arange(N_CLASSES, dtype=np.float32) ** 2) + np.array([wrong, 0, 0])).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["inputs"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["outputs"]),
        ],
        "brightness",
        [helper.make_tensor_value_info("inputs", onnx.TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("outputs", onnx.TensorProto.FLOAT, ["n", N_CLASSES])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
        doc_string="x" * padding,
    )
    return _file(graph)


def slow_model(n_rounds: int) -> bytes:
    """The same, after a loop that takes its time: 5 million additions a round."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["values", "values"], ["doubled"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("round_number", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, [5_000_000]),
        ],
        [
            helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("doubled", onnx.TensorProto.FLOAT, [5_000_000]),
        ],
    )
    model = onnx.load_from_string(brightness_model())
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(n_rounds), "n_rounds"))
    graph.initializer.append(numpy_helper.from_array(np.array([5_000_000]), "length"))
    zeros = helper.make_node("ConstantOfShape", ["length"], ["zeros"])
    loop = helper.make_node("Loop", ["n_rounds", "", "zeros"], ["spent"], body=body)
    total = helper.make_node("ReduceMax", ["spent"], ["nothing"], keepdims=0)
    (gemm,) = [node for node in graph.node if node.op_type == "Gemm"]
    gemm.output[0] = "scores"
    graph.node.extend([zeros, loop, total, helper.make_node("Add", ["scores", "nothing"], ["outputs"])])
    return bytes(model.SerializeToString())


def _file(graph: Any) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def deployment(
    store: BlobStore, name: str, *models: bytes, precisions: tuple[Precision, ...] = ("float32", "int8"), **other: Any
) -> Deploy:
    """Put the files into `store` and make an offer of them."""
    files = tuple(
        ModelFile(blob=store.put(compress(data)), size_bytes=len(data), precision=precision)
        for data, precision in zip(models, precisions, strict=False)
    )
    return Deploy(deployment=name, **{"version": f"version-{name}", "model": "global", "files": files, **other})


def is_model(installed: InstalledModel | None, data: bytes) -> bool:
    """Whether it is this one, byte for byte."""
    return installed is not None and installed.path.read_bytes() == data


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def spoil(path: Path) -> None:
    """Change a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
