"""What a step is said to take: counted in the order in which it is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from reft_edge.bundle.inference import graph_bytes
from reft_edge.compile import compile_bundle
from reft_edge.compile.cost import execution_order
from tests.compile.nets import NETS, build

N_BATCH = 2


def order_of_onnxruntime(model: onnx.ModelProto, directory: Path) -> list[str]:
    """Names of the nodes as they were run."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(directory / "profile")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {
        value.name: np.zeros([size if isinstance(size, int) else N_BATCH for size in value.shape], dtypes[value.type])
        for value in session.get_inputs()
    }
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    suffix = "_kernel_time"
    return [event["name"].removesuffix(suffix) for event in events if event["name"].endswith(suffix)]


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_memory_is_counted_in_the_order_in_which_nodes_are_run(name: str, tmp_path: Path) -> None:
    bundle = compile_bundle(build(name), input_shape=NETS[name][1])
    model = onnx.load_model_from_string(graph_bytes(bundle.training_graph))
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    order = [node.name for node in execution_order(model.graph)]
    assert order == order_of_onnxruntime(model, tmp_path)
    assert sorted(order) == sorted(node.name for node in model.graph.node)
