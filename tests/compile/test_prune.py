from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn

from reft_edge.compile.importance import Candidates
from reft_edge.compile.prune import Budget, Pruner, Variant, prune, prune_to
from reft_edge.compile.sizes import count_macs, measure
from reft_edge.errors import ConfigError, ModelError, PlanError
from tests.compile.nets import NETS, build

PRUNED_WHOLLY = [
    "mlp", "flatten", "residual", "concatenated", "grouped", "depthwise", "squeeze-excite", "transposed", "sensor",
    "attention", "transformer", "reused", "words",
]  # fmt: skip
LEFT_WHOLE = {"split": {"a"}, "gated": {"a"}, "shuffled": {"first.0"}, "own attention": {"attention.qkv", "patch"}}
"""Layers whose outputs the network cuts at fixed places."""


@functools.cache
def pruner(name: str, **options: object) -> tuple[nn.Module, Pruner]:
    """A network and its pruner, which leaves the network as it is."""
    module = build(name)
    for parent in list(module.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.GroupNorm) and options.get("level"):
                setattr(parent, key, nn.Identity())
    options.pop("level", None)
    dtype = "int64" if name == "words" else "float32"
    return module, Pruner(module, input_shape=NETS[name][1], input_dtype=dtype, **options)  # type: ignore[arg-type]


def state(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def vgg16() -> nn.Module:
    """As in the paper, for 32x32 pictures: 33,646,666 parameters."""
    layers: list[nn.Module] = []
    n_in = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(n_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            n_in = width
    head = [nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


@functools.cache
def paper_model() -> nn.Module:
    torch.manual_seed(0)
    return vgg16()


@functools.cache
def paper_pruner() -> Pruner:
    return Pruner(paper_model(), input_shape=(3, 32, 32))


@pytest.mark.parametrize("name", NETS)
def test_the_map_says_where_every_weight_comes_from(name: str) -> None:
    module, made = pruner(name)
    before = state(module)
    for ratio in (0.0, 0.4, 0.9):
        variant = made.prune(ratio)
        small = state(variant.module)
        assert equal(small, variant.channels.gather(before))
        into = {key: values.copy() for key, values in before.items()}
        variant.channels.scatter(small, into)
        assert equal(into, before)
    assert equal(state(module), before), "the module itself changed"
    assert made.prune(0.0).channels.is_identity


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("attention", "transformer", "own attention")])
def test_a_variant_computes_the_model_with_the_other_channels_switched_off(name: str) -> None:
    """By hand, with zeros in the global model; without layers whose result depends on the number of channels."""
    module, made = pruner(name, level=name == "grouped")
    inputs = torch.randn(3, *NETS[name][1]) if name != "words" else torch.randint(0, 11, (3, 7))
    for ratio in (0.5, 0.7):
        variant = made.prune(ratio)
        into = {key: np.zeros_like(values) for key, values in state(module).items()}
        variant.channels.scatter(state(variant.module), into)
        whole = copy.deepcopy(module)
        whole.load_state_dict({key: torch.from_numpy(values) for key, values in into.items()})
        assert torch.allclose(variant.module.eval()(inputs), whole.eval()(inputs), atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_what_can_be_pruned_is_and_the_outputs_are_whole(name: str) -> None:
    module, made = pruner(name)
    variant = made.prune(0.5)
    inputs = torch.zeros(2, *NETS[name][1], dtype=torch.int64 if name == "words" else torch.float32)
    assert variant.module(inputs).shape == module(inputs).shape
    kept = variant.channels.variant_shapes
    whole = {
        key.rpartition(".")[0]
        for key, shape in variant.channels.global_shapes.items()
        if key.endswith("weight") and len(shape) > 1 and kept[key][0] == shape[0]
    }
    outputs = {"mlp": "4", "flatten": "4", "grouped": "5", "transposed": "out", "sensor": "9"}.get(name, "head")
    # The first axis of a transposed convolution or an embedding is its input.
    expected = {outputs} | LEFT_WHOLE.get(name, set()) | {"words": {"embed"}}.get(name, set())
    assert expected <= whole
    if name in PRUNED_WHOLLY:
        assert whole == expected
    variant.module.train()(inputs[:, :]).square().sum().backward()  # and it can be trained


def test_vgg16_as_in_the_paper() -> None:
    module, made = paper_model(), paper_pruner()
    inputs = torch.zeros(1, 3, 32, 32)
    assert (measure(module, inputs).parameters, count_macs(module, inputs)) == (33_646_666, 332_111_872)
    half = made.prune(0.5)
    size = measure(half.module, inputs)
    assert (size.parameters, size.macs) == (8_427_562, 83_480_576)
    # torch-pruning's counter adds what normalization, bias, activation and pooling cost.
    assert torch_pruning.utils.count_ops_and_params(half.module, inputs) == (84_104_202, 8_427_562)
    paper = made.fit(Budget(weight_bytes=1_887_437))  # 1.8 MiB
    assert 0.97 * 1_887_437 < measure(paper.module, inputs).weight_bytes <= 1_887_437


@pytest.mark.parametrize("importance", ["magnitude", "random", "first"])
def test_variants_are_nested_and_deterministic(importance: str) -> None:
    _, one = pruner("residual", importance=importance, seed=3)
    two = Pruner(build("residual"), input_shape=(3, 6, 6), importance=importance, seed=3)
    previous: Variant | None = None
    for ratio in (0.2, 0.5, 0.8):
        variant = one.prune(ratio)
        assert variant.channels.to_bytes() == two.prune(ratio).channels.to_bytes()
        if previous is not None:
            for name, flat in variant.channels.indices.items():
                assert np.isin(flat, previous.channels.indices[name]).all()
        previous = variant


def test_importance_decides_what_stays() -> None:
    module = build("mlp")
    with torch.no_grad():
        module[0].weight[[1, 4, 6]] = 9.0
    first = np.array([0, 1, 2])

    def kept(importance: object, **options: object) -> list[int]:
        made = prune(module, input_shape=(7,), ratio=0.75, importance=importance, **options)  # type: ignore[arg-type]
        return made.channels.indices["0.bias"].tolist()

    def last(candidates: Candidates) -> np.ndarray:
        if candidates.name == "0":
            assert {name: values.shape for name, values in candidates.weights.items()} == {
                "0.weight": (12, 7), "0.bias": (12, 1), "2.weight": (12, 12),
            }  # fmt: skip
        return np.arange(candidates.n_channels)

    assert kept("magnitude") == [1, 4, 6]
    assert kept("first") == first.tolist()
    assert kept(last) == [9, 10, 11]
    assert kept("random", seed=1) != kept("random", seed=2)
    with pytest.raises(ConfigError, match="magnitude, random, first"):
        kept("taylor")
    with pytest.raises(ModelError, match="12 finite scores"):
        kept(lambda candidates: np.full(candidates.n_channels, np.nan))


def test_global_scope_takes_more_from_the_layer_that_matters_less() -> None:
    module = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1.0)
        module[0].weight[:24] = module[0].bias[:24] = 0.0
        module[2].weight[:, :24] = 0.0
    variant = prune(module, input_shape=(4,), ratio=0.375, scope="global")
    assert variant.channels.indices["0.bias"].tolist() == list(range(24, 32))
    assert variant.channels.variant_shapes["2.bias"] == (32,)


@pytest.mark.parametrize("name", ["flatten", "residual", "depthwise", "attention", "grouped"])
def test_a_budget_is_met_and_the_next_larger_variant_would_not_fit(name: str) -> None:
    module, made = pruner(name)
    inputs = torch.zeros(1, *NETS[name][1])
    whole = measure(module, inputs)
    for budget in (
        Budget(parameters=whole.parameters // 2),
        Budget(macs=whole.macs // 2),
        Budget(weight_bytes=whole.weight_bytes, macs=whole.macs // 3),
    ):
        variant = made.fit(budget)
        assert budget.allows(measure(variant.module, inputs))
        larger = made.prune(variant.ratio - 1 / 1024)
        exact = name != "attention"  # its products of queries and keys are predicted from above
        assert not exact or not budget.allows(measure(larger.module, inputs))
    assert prune_to(module, input_shape=NETS[name][1], budget=Budget(parameters=whole.parameters)).ratio == 0.0
    with pytest.raises(PlanError, match="the smallest has"):
        made.fit(Budget(parameters=10))


def test_balanced_widths_use_what_a_uniform_ratio_wastes() -> None:
    """The paper's target for VGG16: 1.8 MB and 0.07 GFLOPs."""
    made = paper_pruner()
    budget = Budget(parameters=470_000, macs=70_000_000)
    inputs = torch.zeros(1, 3, 32, 32)
    uniform = measure(made.fit(budget).module, inputs)
    variant = made.fit(budget, balanced=True)
    balanced = measure(variant.module, inputs)
    assert budget.allows(balanced)
    assert balanced.parameters > 0.99 * 470_000
    assert balanced.macs > 0.8 * 70_000_000 > 10 * uniform.macs
    assert equal(state(variant.module), variant.channels.gather(state(paper_model())))


@pytest.mark.parametrize("name", ["depthwise", "residual", "attention", "concatenated"])
def test_balanced_variants_meet_any_budget(name: str) -> None:
    module, made = pruner(name)
    inputs = torch.zeros(1, *NETS[name][1])
    whole, least = measure(module, inputs), measure(made.prune(0.999).module, inputs)
    for share in (0.0, 0.1, 0.5, 1.0):
        limits = {
            quantity: int(getattr(least, quantity) + share * (getattr(whole, quantity) - getattr(least, quantity)))
            for quantity in ("parameters", "weight_bytes")
        }
        budget = Budget(**limits)
        assert budget.allows(measure(made.fit(budget, balanced=True).module, inputs))
    with pytest.raises(PlanError, match="the smallest has"):
        made.fit(Budget(parameters=10), balanced=True)


def test_within_a_budget_ratios_prune_on_from_its_balanced_variant() -> None:
    """Nested, smaller by the same share everywhere, and never above the budget."""
    module, made = pruner("residual")
    whole = measure(module, torch.zeros(1, *NETS["residual"][1]))
    budget = Budget(parameters=whole.parameters // 4, macs=whole.macs // 2)
    largest = made.fit(budget, balanced=True)
    again = made.prune(largest.ratio, within=budget)
    assert again.channels == largest.channels
    half = made.prune(1 - (1 - largest.ratio) / 2, within=budget)
    for name, flat in half.channels.indices.items():
        assert np.isin(flat, largest.channels.indices[name]).all(), name
    inputs = torch.zeros(1, *NETS["residual"][1])
    assert budget.allows(measure(half.module, inputs))
    assert measure(half.module, inputs).macs < 0.5 * measure(largest.module, inputs).macs
    with pytest.raises(ConfigError, match=r"within .* a pruning ratio is at least"):
        made.prune(largest.ratio - 0.01, within=budget)


def test_round_to_keeps_multiples() -> None:
    _, made = pruner("depthwise")
    assert made.prune(0.4, round_to=4).channels.variant_shapes["depth.0.weight"] == (12, 1, 3, 3)
    assert made.prune(0.99, round_to=4).channels.variant_shapes["depth.0.weight"] == (4, 1, 3, 3)


def test_frozen_parameters_and_modes_survive() -> None:
    module = build("residual")
    module.stem.requires_grad_(False)
    module.stem.eval()
    variant = prune(module, input_shape=(3, 6, 6), ratio=0.5)
    assert not variant.module.stem[0].weight.requires_grad
    assert variant.module.a[0].weight.requires_grad
    assert [variant.module.stem.training, variant.module.a.training] == [False, True]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(inputs)))))))


def test_tied_layers_stay_whole() -> None:
    variant = prune(Tied(), input_shape=(4,), ratio=0.5)
    shapes = variant.channels.variant_shapes
    assert (shapes["a.weight"], shapes["b.weight"], shapes["c.weight"]) == ((4, 4), (4, 4), (3, 4))
    assert variant.module.a.weight is variant.module.b.weight


class Pair(nn.Module):
    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs, inputs


@pytest.mark.parametrize(
    ("module", "shape", "why"),
    [
        (nn.Linear(4, 2), (4,), "no channel of the model can be pruned"),
        (nn.Linear(4, 2), (5,), r"cannot run on a float32 input of shape \(1, 5\)"),
        (Pair(), (4,), "must return one tensor"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(module: nn.Module, shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        prune(module, input_shape=shape, ratio=0.5)


def test_senseless_options_are_refused() -> None:
    _, made = pruner("mlp")
    for ratio in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="ratio"):
            made.prune(ratio)
    with pytest.raises(ConfigError, match="limit"):
        Budget()
