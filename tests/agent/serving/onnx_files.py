"""Small ONNX files of known behaviour, and devices that serve them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reft_edge.agent.serving.slots import Slot, Slots

SHAPE = (1, 4, 4)
"""Of a sample: a gray picture."""


def linear_onnx(
    bias: Sequence[float],
    *,
    gain: float = 0.0,
    shape: Sequence[int] = SHAPE,
    batch: int | str = "n",
    softmax: bool = False,
    dtype: int = TensorProto.FLOAT,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A model whose outputs are `bias` + `gain` times the sample's sum."""
    n_inputs = int(np.prod(shape))
    weights = np.full((n_inputs, len(bias)), gain, dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["inputs"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores" if softmax else "outputs"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["outputs"], axis=1))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("inputs", dtype, [batch, *shape])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [batch, len(bias)])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array(bias, dtype=np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def serve(spool: Path, version: str, data: bytes, *, classes: Sequence[str] = ()) -> Slot:
    """Install `data` in the device's slots and switch to it."""
    slot = Slot(
        version=version,
        deployment=f"roll-out-of-{version}",
        model="global",
        precision="float32",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        classes=tuple(classes),
    )
    slots = Slots(spool / "serving")
    (spool / "serving").mkdir(parents=True, exist_ok=True)
    slots.install(slot, data)
    slots.switch()
    return slot


def write_agent_toml(folder: Path, *, serving: str = "") -> Path:
    """Settings of an agent with its spool beside them."""
    path = folder / "agent.toml"
    path.write_text(f'device = "pi-1"\nfederation = "birds"\n[data]\npath = "data"\n[serving]\n{serving}\n')
    return path
