"""Tiny models as ONNX files, and finished runs that have exported them, as a coordinator leaves them."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reft_edge.coordinator.records import ExportRecord, RunRecord
from reft_edge.coordinator.store import Store
from reft_edge.wire.endpoint import BrokerSettings

SETTINGS = """
federation = "{federation}"
settle_s = 5
absent_s = 1
[broker]
host = "{host}"
port = {port}
mqtt_version = "{mqtt_version}"
[model]
name = "mlp"
input_shape = [6]
n_outputs = 3
[distillation]
epochs = 0
[deployment]
soak_s = 0
timeout_s = 30
"""


def model_bytes(seed: int, *, n_inputs: int = 6, n_outputs: int = 3, **entries: str) -> bytes:
    """Inputs times a matrix that `seed` decides; `entries` is what the file says about itself."""
    weights = np.random.default_rng(seed).normal(size=(n_inputs, n_outputs)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["inputs", "weights"], ["outputs"])],
        "linear",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", n_inputs])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["n", n_outputs])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def finish_run(results: Path, federation: str, run: str, *, seed: int, names=("global", "small"), at=1.0) -> None:
    """A run that has finished, with its models in float32 and int8."""
    folder = results / run / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with closing(Store(results)) as store:
        store.create_run(RunRecord(run=run, federation=federation, settings_digest="", created_at=at))
        for place, name in enumerate(names):
            for suffix in ("", ".int8"):
                path = folder / f"{name}{suffix}.onnx"
                data = model_bytes(seed + 10 * place + len(suffix), run=run, input_shape=json.dumps([6]))
                path.write_bytes(data)
                values = {"size_bytes": len(data), "ratio": place / 2, "accuracy": 0.9 - place / 10}
                store.save_export(run, ExportRecord(name=f"{name}{suffix}", path=str(path), values=values))
        store.set_run_state(run, "finished", ended_at=at + 1)


def write_settings(folder: Path, federation: str, broker: BrokerSettings, *, more: str = "", **replaced: float) -> Path:
    """federation.toml in `folder`; `replaced`: values for others; `more`: at the end."""
    text = SETTINGS.format(federation=federation, host=broker.host, port=broker.port, mqtt_version=broker.mqtt_version)
    for key, value in replaced.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    path = folder / "federation.toml"
    path.write_text(text + more)
    return path
