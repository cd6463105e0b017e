"""Targets for what reaches a device that predicts: bodies of requests, and files that other processes have left."""

from __future__ import annotations

import io
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from reft_edge.agent.serving.counts import CountsWriter, fold_ended, read_counts
from reft_edge.agent.serving.http_body import read_inputs
from reft_edge.agent.serving.onnx_model import OnnxModel
from reft_edge.agent.serving.prediction import Prediction
from reft_edge.agent.serving.slots import Slot, Slots
from reft_edge.errors import DataError
from tests.agent.serving.onnx_files import linear_onnx
from tests.fuzzing.harness import Target

SHAPE = (1, 2, 2)
"""Of a sample."""

BODY_MEMORY_BYTES = 8 * 2**20
"""Inputs here are small; a picture's pixels are not counted, which Pillow allocates, but bounded apart."""


def targets(directory: Path) -> list[Target]:
    folder = directory / "serving"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(linear_onnx([0, 1], shape=SHAPE))
    model = OnnxModel(folder / "model.onnx")

    def check_body(data: bytes) -> None:
        """What is accepted is predicted."""
        inputs = model.checked(read_inputs(data, "", model))
        assert model.run(inputs).shape == (len(inputs), 2)

    array = np.ones((2, *SHAPE), np.float32)
    as_json = b'{"inputs": ' + str(array.tolist()).encode() + b"}"
    bodies = {
        "body_npy": [_npy(array), _npy(array.astype(">i8")), _npy(np.asfortranarray(array), version=(2, 0))],
        "body_picture": [_picture(kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")],
        "body_json": [as_json],
    }
    counts = folder / "counts"
    counts.mkdir()

    def check_counts(data: bytes) -> None:
        """Whatever lies there, reading and folding do not fail."""
        (counts / "ended.json").write_bytes(data)
        (counts / "1-1.json").write_bytes(data)
        read_counts(counts, "d1", "v1")
        fold_ended(counts)

    slots = Slots(folder)
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "model.onnx").write_bytes(b"x")
    served = Slot(
        version="v1", deployment="d1", model="global", precision="int8", sha256=sha256(b"x").hexdigest(), size_bytes=1
    )

    def check_slots(data: bytes) -> None:
        """Whatever lies there, looking at it does not fail, and what is served is whole."""
        (folder / "current.json").write_bytes(data)
        for name in ("a", "b"):
            (folder / name / "slot.json").write_bytes(data if name == "b" else msgspec.json.encode(served))
        for model in (slots.current(), slots.previous(), slots.installed()):
            assert model is None or model.verified() == (model.slot.sha256 == served.sha256)

    return [
        Target(
            name="slots",
            check=check_slots,
            seeds=[b'{"slot": "b", "previous": true}', b'{"slot": null}', msgspec.json.encode(served)],
            errors=(),
            memory_bytes=BODY_MEMORY_BYTES,
            text=True,
        ),
        *(
            Target(
                name=name,
                check=check_body,
                seeds=seeds,
                errors=(DataError,),
                memory_bytes=BODY_MEMORY_BYTES,
                text=name == "body_json",
            )
            for name, seeds in bodies.items()
        ),
        Target(
            name="prediction_counts",
            check=check_counts,
            seeds=[_counts(folder / "seed")],
            errors=(),
            memory_bytes=BODY_MEMORY_BYTES,
            text=True,
        ),
    ]


def _npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).save(file, format=kind)
    return file.getvalue()


def _counts(folder: Path) -> bytes:
    outputs = np.array([[0.25, 0.75]], np.float32)
    writer = CountsWriter(folder)
    prediction = Prediction(version="v1", model="global", outputs=outputs, probabilities=outputs)
    writer.add("d1", prediction, duration_s=0.01)
    writer.close()
    (path,) = folder.glob("*.json")
    return path.read_bytes()
