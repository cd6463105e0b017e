"""What an ONNX file says about itself is used, what it does not say is decided, and what does not fit is explained."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reft_edge.agent.serving.onnx_model import OnnxModel
from reft_edge.errors import DataError, ModelError
from tests.agent.serving.onnx_files import SHAPE, linear_onnx


@pytest.fixture
def opened(tmp_path: Path):
    def open_it(*bias: float, **options) -> OnnxModel:
        (tmp_path / "model.onnx").write_bytes(linear_onnx(bias, **options))
        return OnnxModel(tmp_path / "model.onnx")

    return open_it


ONES = np.ones((5, *SHAPE), np.float32)


def test_outputs_are_those_of_one_sample_after_the_other(opened):
    model = opened(1, 2, gain=0.5)
    inputs = np.arange(5 * 16, dtype=np.float32).reshape(5, *SHAPE)
    expected = 0.5 * inputs.sum(axis=(1, 2, 3))[:, None] + [1, 2]
    for batch_size in (1, 2, 5, 64):
        assert np.allclose(model.run(model.checked(inputs), batch_size=batch_size), expected)


def test_a_file_with_a_fixed_number_of_samples_takes_any_number(opened):
    model = opened(1, 2, gain=1, batch=4)
    assert np.array_equal(model.run(model.checked(ONES)), np.tile([17, 18], (5, 1)))


@pytest.mark.parametrize(
    ("stated", "expected"), [(None, 16), ("Normalized_0_1", 16), ("Normalized_1_1", 16), ("NominalRange_0_255", 4080)]
)
def test_bytes_are_scaled_as_the_file_says_and_to_one_if_it_says_nothing(opened, stated, expected):
    model = opened(0, 0, gain=1, metadata={"Image.NominalPixelRange": stated} if stated else {})
    white = np.full((1, *SHAPE), 255, np.uint8)
    assert model.run(model.checked(white))[0, 0] == pytest.approx(expected)
    black = model.run(model.checked(np.zeros_like(white)))[0, 0]
    assert black == pytest.approx(-16 if stated == "Normalized_1_1" else 0)


def test_whole_numbers_and_doubles_are_taken_for_real_numbers(opened):
    model = opened(0, 0, gain=1)
    for dtype in (np.int64, np.float64, np.float16):
        assert model.run(model.checked(ONES.astype(dtype)))[0, 0] == 16
    assert model.run(model.checked(ONES.tolist()))[0, 0] == 16


def test_a_model_of_indices_takes_bytes_as_numbers_and_no_fractions(opened):
    model = opened(0, 0, gain=1, dtype=TensorProto.INT64)
    assert model.run(model.checked(np.full((1, *SHAPE), 3, np.uint8)))[0, 0] == 48
    assert model.run(model.checked(ONES))[0, 0] == 16
    with pytest.raises(DataError, match=r"fractions.*takes \(n, 1, 4, 4\) int64$"):
        model.checked(ONES / 2)


WRONG = {
    "another shape": (np.ones((2, 3, 4, 4)), r"shape (2, 3, 4, 4); model.onnx takes (n, 1, 4, 4) float32 or uint8"),
    "one sample alone": (np.ones(SHAPE), "put one sample into a list of its own"),
    "no sample": (np.ones((0, *SHAPE)), "shape (0, 1, 4, 4)"),
    "a number": (3.0, "shape ()"),
    "rows of different lengths": ([[1, 2], [1]], "do not make one array"),
    "text": (np.full((1, *SHAPE), "1"), "inputs are str"),
    "nothing": (np.full((1, *SHAPE), None), "inputs are object"),
    "not a number": (np.where(np.arange(32).reshape(2, *SHAPE) == 20, np.nan, 1), "inputs of sample 1 have NaN"),
    "beyond float32": (np.full((1, *SHAPE), 1e300), "inputs of sample 0 have NaN or infinite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit_are_told_what_is_expected(opened, name):
    inputs, message = WRONG[name]
    with pytest.raises(DataError, match=re.escape(message)):
        opened(0, 0).checked(inputs)


def test_scores_become_probabilities_and_probabilities_stay(opened):
    scores = np.log([0.2, 0.7, 0.1])
    for softmax in (False, True):
        model = opened(*scores, softmax=softmax)
        outputs = model.run(model.checked(ONES))
        assert model.is_classifier
        assert np.allclose(model.probabilities(outputs), [[0.2, 0.7, 0.1]] * 5)


def test_scores_that_are_probabilities_of_zeros_only_are_scores(opened):
    model = opened(0, 1, 0, gain=0.1)
    shares = model.probabilities(model.run(model.checked(ONES)))
    assert np.allclose(shares.sum(axis=1), 1)
    assert shares.max() < 0.6


def test_scores_that_are_large_do_not_overflow(opened):
    model = opened(1e4, -1e4)
    assert np.allclose(model.probabilities(model.run(model.checked(ONES))), [[1, 0]] * 5)


def test_classes_are_the_files_or_those_that_are_given(opened, tmp_path):
    assert opened(0, 1).classes == ()
    assert opened(0, 1, metadata={"classes": '["robin", "süß"]'}).classes == ("robin", "süß")
    assert OnnxModel(tmp_path / "model.onnx", classes=["a", "b"]).classes == ("a", "b")


def test_a_model_of_numbers_is_no_classifier(opened):
    assert not opened(0, 1, metadata={"task": "regression"}).is_classifier
    assert not opened(0).is_classifier
    assert opened(0, 1, metadata={"task": "classification"}).is_classifier


@pytest.mark.parametrize(
    ("operator", "options", "reason"),
    [
        ("Nope", {}, "This is an invalid model. node 'first' (Nope): No Op registered for Nope"),
        ("Relu", {"domain": "own"}, "node 'first' (Relu): No opset import for domain 'own'"),
        ("Reshape", {}, "Name:'first' input_shape_size == requested_shape_size was false. The input tensor cannot be"),
    ],
)
def test_what_onnxruntime_says_is_told_without_its_path_and_dumps(tmp_path, operator, options, reason):
    folder = tmp_path / "a folder"
    folder.mkdir()
    inputs = ["inputs", "sizes"] if operator == "Reshape" else ["inputs"]
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["outputs"], name="first", **options)],
        "wrong",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([3, 3]), "sizes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "wrong.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError) as raised:
        OnnxModel(folder / "wrong.onnx")
    text = str(raised.value)
    assert text.startswith("wrong.onnx cannot be used: ")
    assert reason in text
    assert not any(word in text for word in ("ONNXRuntimeError", "/", "tensor(float)", "::"))


UNUSABLE = {
    "names for other outputs": ({"metadata": {"classes": '["a"]'}}, "1 classes are named, and a sample's output has 2"),
    "names that are none": ({"metadata": {"classes": '{"a": 1}'}}, "its entry 'classes' is not a list of str"),
    "no JSON": ({"metadata": {"classes": "[" * 9}}, "its entry 'classes' is not JSON"),
    "unknown pixels": ({"metadata": {"Image.NominalPixelRange": "x"}}, "Image.NominalPixelRange is 'x'; known are"),
    "an axis of any size": ({"shape": (1, 4, 4), "free": True}, "the first axis must be the samples"),
    "another shape than stated": ({"metadata": {"input_shape": "[3]"}}, "it fails on 1 samples"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name):
    options, message = UNUSABLE[name]
    options = dict(options)
    data = linear_onnx([0, 1], **{key: value for key, value in options.items() if key != "free"})
    if "free" in options:
        model = onnx.load_model_from_string(data)
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
        data = model.SerializeToString()
    (tmp_path / "own.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=re.escape(message)) as info:
        OnnxModel(tmp_path / "own.onnx")
    assert str(info.value).startswith("own.onnx cannot be used: ")


def test_what_is_no_onnx_file_is_one_line(tmp_path):
    (tmp_path / "own.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"^own\.onnx cannot be used: ") as info:
        OnnxModel(tmp_path / "own.onnx")
    assert "\n" not in str(info.value)
    with pytest.raises(ModelError, match="away"):
        OnnxModel(tmp_path / "away.onnx")
