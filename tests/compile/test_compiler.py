from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reft_edge.agent.trainer import Trainer
from reft_edge.bundle.bundle import Bundle, graph_bytes
from reft_edge.compile import SGD, compile_bundle, export_onnx
from reft_edge.errors import ModelError
from reft_edge.models.registry import build_model


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10)
    )


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return compile_bundle(small_net(), (1, 8, 8), optimizer=SGD(momentum=0.9))


@pytest.fixture(scope="module")
def vgg16() -> Bundle:
    return compile_bundle(build_model("vgg16", input_shape=(3, 32, 32), n_outputs=10), (3, 32, 32), name="vgg16")


def test_equal_modules_give_equal_bytes(bundle: Bundle) -> None:
    assert compile_bundle(small_net(), (1, 8, 8), optimizer=SGD(momentum=0.9)) == bundle


def test_the_module_is_left_as_it_was() -> None:
    module = small_net()
    module[1].eval()
    seen: list[object] = []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    before = copy.deepcopy(module.state_dict())
    compile_bundle(module, (1, 8, 8))
    assert [part.training for part in module.modules()] == [True, True, False, True, True, True, True]
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert len(module[0]._forward_hooks) == 1


def test_graphs_are_valid_onnx_without_weights(bundle: Bundle) -> None:
    for blob in (bundle.training_graph, bundle.inference_graph):
        model = onnx.load_model_from_string(graph_bytes(blob))
        onnx.checker.check_model(model, full_check=True)
        assert sum(np.prod(tensor.dims) for tensor in model.graph.initializer) < 300


def test_vgg16_travels_in_less_than_64_kib_and_costs_what_is_known_of_it(vgg16: Bundle) -> None:
    assert len(vgg16.training_graph) + len(vgg16.inference_graph) < 64 * 1024
    cost = vgg16.manifest.cost
    assert cost.parameters == 33_646_666
    assert cost.forward_macs == pytest.approx(333.4e6, rel=0.01)
    assert 5.8 < cost.step_flops_per_sample / cost.forward_macs < 6.5  # forward and two products backward, two each
    assert cost.memory_fixed_bytes >= 4 * 4 * cost.parameters  # weights and momentum, before and after the step


def test_dropout_is_reproducible_by_seed_and_drops_the_right_share() -> None:
    layer = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.3), Scale(5000))
    with torch.no_grad():
        layer[2].weight.fill_(1)
    compiled = compile_bundle(layer, (5000,), loss="mean_squared_error", optimizer=SGD())
    assert compiled.manifest.uses_seed
    inputs = np.ones((4, 5000), np.float32)

    def kept(seed: int, steps: int = 1) -> np.ndarray:
        trainer = Trainer(compiled, threads=1, seed=seed)
        for _ in range(steps - 1):
            trainer.step(inputs, np.ones_like(inputs), 0.0)
        trainer.step(inputs, np.ones_like(inputs), 1.0)
        return 1 - trainer.state()["2.weight"]  # the gradient: a sum over the batch of x * (x - 1)

    first = kept(1)
    assert np.array_equal(first, kept(1))
    assert not np.array_equal(first, kept(2))
    assert not np.array_equal(first, kept(1, steps=2))
    # An entry survives both layers with probability 0.49 and is then 1 / 0.49: x (x - 1) has mean 1/0.49 - 1, the rest
    # is 0.
    expected = (1 / 0.49 - 1) * 2 / 5000
    assert first.mean() == pytest.approx(expected, rel=0.05)
    assert np.array_equal(Trainer(compiled, threads=1).predict(inputs), inputs)


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Branching(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight if x.sum() > 0 else x


class Spectrum(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x * self.weight).real


class Pair(Scale):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x, x * self.weight


class Selecting(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight)[x[:, 0] > 0]


class Flattened(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).flatten()


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, second)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), Branching(4)), "module '1'.*depends on the data"),
        (lambda: Branching(4), r"traced \(test_compiler.py, line \d+\): .*depends on the data"),
        (lambda: nn.Sequential(Selecting(4)), "operator aten::.* in module '0': the size .* depends on the data"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(Spectrum(4))), "operator aten::_fft_r2c in module '1.0'"),
        (lambda: nn.Sequential(nn.Linear(5, 4)), "module '0'.*same reduction dim"),
        (lambda: nn.Linear(4, 4).double(), "float64.*float"),
        (tied, "'0.weight' and '1.weight' are one"),
        (lambda: nn.ReLU(), "no parameter to train"),
        (lambda: Pair(4), "must return one tensor"),
        (lambda: Flattened(4), "batch axis first"),
        (lambda: object(), "not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_compiled_is_named(
    make: Callable[[], nn.Module], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=message):
        compile_bundle(make(), (4,))
    assert capfd.readouterr() == ("", ""), "torch's own tracebacks are not for the user"


def test_an_unknown_loss_and_outputs_that_do_not_suit_it_are_refused() -> None:
    with pytest.raises(ModelError, match="'hinge' is unknown"):
        compile_bundle(nn.Linear(4, 2), (4,), loss="hinge")
    with pytest.raises(ModelError, match="optimizer 'adam'"):
        compile_bundle(nn.Linear(4, 2), (4,), optimizer="adam")  # type: ignore[arg-type]
    for shape in ((), (0,), 4, "4"):
        with pytest.raises(ModelError, match="input_shape"):
            compile_bundle(nn.Linear(4, 2), shape)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="cross entropy needs"):
        compile_bundle(nn.Conv2d(1, 2, 3), (1, 8, 8))


def test_exported_onnx_predicts_as_the_trainer(bundle: Bundle) -> None:
    data = export_onnx(bundle.manifest, bundle.inference_graph, bundle.tensors())
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["inputs"]
    inputs = np.random.default_rng(0).standard_normal((3, 1, 8, 8), np.float32)
    (outputs,) = session.run(["outputs"], {"inputs": inputs})
    np.testing.assert_allclose(outputs, Trainer(bundle, threads=1).predict(inputs), rtol=1e-5, atol=1e-6)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    groups=st.sampled_from([1, 2, 3]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    transposed=st.booleans(),
)
def test_any_convolution_trains_as_in_torch(
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    transposed: bool,
    assert_trains_like_torch: Callable[..., object],
) -> None:
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = nn.Sequential(
        nn.Conv2d(1, 6, 1),
        conv(6, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    try:
        module(torch.zeros(1, 1, 9, 8))
    except RuntimeError:
        return  # no output is left
    assert_trains_like_torch(module, (1, 9, 8), steps=2, sizes=(4,))
