from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from reft_edge.bundle.manifest import SGD, Adam, CrossEntropy, MeanSquaredError
from reft_edge.models.registry import build_model
from reft_edge.models.vgg import VGG, VGG16

Check = Callable[..., object]

PLAIN = SGD(momentum=0.9, weight_decay=1e-3)


def same(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def half_trained(module: nn.Module) -> nn.Module:
    """Without dropout; no tensor at zero, relative to which every rounding error is large; and few activations near the
    kinks of ReLU and ReLU6, where rounding alone decides whether a gradient passes (MobileNetV2 as initialised leaves
    torch's own float64 result by 2% within four steps).
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
                part.bias.add_(2.5)
    return module


def narrow_vgg16() -> nn.Module:
    plan = [step if step == "pool" else step // 8 for step in VGG16]
    return VGG((3, 32, 32), 10, plan, hidden=(64, 64))  # type: ignore[arg-type]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


class Branches(nn.Module):
    """Residual and concatenated branches, an in-place addition, chunks, a shared activation, a buffer in the sum."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.left(x), torch.relu(self.right(x))
        left += right * self.scale
        joined = self.norm(torch.cat([left, right], 1))
        first, second = joined.chunk(2, dim=1)
        whole = torch.stack([first * torch.sigmoid(second), second], 1).flatten(1, 2)
        return self.head(whole[:, :, 1:, ::2].amax(dim=(2, 3)))


def conv_net(conv: nn.Module, *tail: nn.Module) -> nn.Module:
    return same(conv, nn.Tanh(), *tail, nn.Flatten(), nn.LazyLinear(4))


IMAGES = (4, 9, 8)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: same(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 4)), (7,)),
    "conv stride": (lambda: conv_net(nn.Conv2d(4, 6, 3, stride=2, padding=1)), IMAGES),
    "conv uneven": (lambda: conv_net(nn.Conv2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 0), bias=False)), IMAGES),
    "conv dilation": (lambda: conv_net(nn.Conv2d(4, 6, 3, padding=2, dilation=2)), IMAGES),
    "conv wide padding": (lambda: conv_net(nn.Conv2d(4, 6, 2, padding=3)), IMAGES),
    "conv groups": (lambda: conv_net(nn.Conv2d(4, 6, 3, padding=1, groups=2)), IMAGES),
    "conv groups stride": (lambda: conv_net(nn.Conv2d(4, 8, 3, stride=2, groups=4)), IMAGES),
    "conv depthwise": (lambda: conv_net(nn.Conv2d(4, 4, 3, padding=1, groups=4)), IMAGES),
    "conv depthwise stride": (lambda: conv_net(nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)), IMAGES),
    "conv same reflect": (lambda: conv_net(nn.Conv2d(4, 6, 3, padding="same")), IMAGES),
    "conv pointwise": (lambda: same(nn.Conv2d(4, 6, 1), nn.ReLU(), conv_net(nn.Conv2d(6, 5, 1, stride=2))), IMAGES),
    "conv deep": (
        lambda: same(nn.Conv2d(4, 6, 3, stride=2), nn.Tanh(), conv_net(nn.Conv2d(6, 5, 3, stride=2, padding=1))),
        IMAGES,
    ),
    "conv 1-D": (lambda: conv_net(nn.Conv1d(3, 6, 5, stride=2, padding=2), nn.Conv1d(6, 6, 3, groups=3)), (3, 21)),
    "transposed": (lambda: same(nn.Conv2d(4, 6, 3), conv_net(nn.ConvTranspose2d(6, 3, 3, padding=1))), IMAGES),
    "transposed stride": (
        lambda: same(
            nn.Conv2d(4, 6, 3),
            conv_net(nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=1)),
        ),
        IMAGES,
    ),
    "transposed 1-D": (lambda: same(nn.Conv1d(3, 4, 3), conv_net(nn.ConvTranspose1d(4, 5, 4, stride=2))), (3, 11)),
    "batch norm": (lambda: same(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=0.2), conv_net(nn.ReLU())), IMAGES),
    "batch norm plain": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), IMAGES),
    "batch norm 1-D": (lambda: same(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (7,)),
    "batch norm no statistics": (
        lambda: conv_net(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        IMAGES,
    ),
    "batch norms of one width": (
        lambda: same(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), conv_net(nn.BatchNorm2d(6))),
        IMAGES,
    ),
    "layer norm": (lambda: same(nn.Linear(7, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), (7,)),
    "layer norm 3-D": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.LayerNorm((6, 7, 6), elementwise_affine=False)), IMAGES),
    "group norm": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6)), IMAGES),
    "instance norm": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True)), IMAGES),
    "max pool": (lambda: conv_net(nn.Conv2d(4, 6, 3, padding=1), nn.MaxPool2d(2)), IMAGES),
    "max pool ties": (lambda: same(nn.Conv2d(4, 6, 3), nn.ReLU6(), nn.MaxPool2d(2), conv_net(nn.Tanh())), IMAGES),
    "max pool rectified": (
        lambda: same(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), conv_net(nn.Conv2d(6, 6, 3))),
        IMAGES,
    ),
    "max pool overlapping": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), IMAGES),
    "max pool dilation": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2, 1, dilation=2)), IMAGES),
    "max pool first": (lambda: conv_net(nn.MaxPool1d(3, 2, padding=1), nn.Conv1d(3, 4, 3)), (3, 20)),
    "average pool": (lambda: conv_net(nn.Conv2d(4, 6, 3, padding=1), nn.AvgPool2d(2)), IMAGES),
    "average pool ceil": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.AvgPool2d(3, 2, 1, ceil_mode=True)), IMAGES),
    "average pool no pad": (
        lambda: conv_net(nn.Conv2d(4, 6, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        IMAGES,
    ),
    "average pool 1-D": (lambda: conv_net(nn.Conv1d(3, 6, 3), nn.AvgPool1d(3, 1)), (3, 20)),
    "adaptive pool": (lambda: conv_net(nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d((3, 4))), IMAGES),
    "adaptive pool one": (lambda: conv_net(nn.Conv1d(3, 6, 3), nn.AdaptiveAvgPool1d(1)), (3, 20)),
    "attention": (Attention, (6,)),
    "branches": (Branches, (3, 6, 6)),
    "softmax": (lambda: same(nn.Linear(7, 6), nn.Softmax(1), nn.Linear(6, 6), nn.LogSoftmax(1)), (7,)),
}

ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.ELU,
    nn.Softplus, nn.Mish,
]  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_every_layer_trains_as_in_torch(name: str, assert_trains_like_torch: Check) -> None:
    torch.manual_seed(1)
    make, shape = NETS[name]
    module = make()
    n_ids = 20 if name == "attention" else None
    sample = torch.zeros(2, *shape) if n_ids is None else torch.zeros(2, *shape, dtype=torch.int64)
    module(sample)  # fixes lazy layers
    assert_trains_like_torch(module, shape, n_ids=n_ids)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_trains_as_in_torch(activation: type[nn.Module], assert_trains_like_torch: Check) -> None:
    torch.manual_seed(2)
    module = same(nn.Linear(7, 32), nn.LayerNorm(32), nn.Linear(32, 32), activation(), nn.Linear(32, 4))
    with torch.no_grad():
        module[2].weight.mul_(4)  # reaches the bent parts on both sides
    assert_trains_like_torch(module, (7,))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (narrow_vgg16, (3, 32, 32)),
        (lambda: build_model("resnet_small", input_shape=(3, 16, 16), n_outputs=10), (3, 16, 16)),
        (lambda: build_model("mobilenet_v2", input_shape=(3, 16, 16), n_outputs=10), (3, 16, 16)),
        (lambda: build_model("vit_small", input_shape=(3, 16, 16), n_outputs=10), (3, 16, 16)),
        (lambda: build_model("sensor_cnn", input_shape=(6, 64), n_outputs=6), (6, 64)),
        (lambda: build_model("mlp", input_shape=(20,), n_outputs=5), (20,)),
        (lambda: build_model("digits_cnn", input_shape=(1, 8, 8), n_outputs=10), (1, 8, 8)),
    ],
    ids=["vgg16", "resnet", "mobilenet_v2", "vit", "sensor_cnn", "mlp", "digits_cnn"],
)
def test_ten_steps_of_a_whole_net_end_where_torch_ends(
    make: Callable[[], nn.Module], shape: tuple[int, ...], assert_trains_like_torch: Check
) -> None:
    torch.manual_seed(3)
    assert_trains_like_torch(half_trained(make()), shape, learning_rate=0.001, sizes=(16,))


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(),
        SGD(momentum=0.5),
        SGD(momentum=0.9, nesterov=True, weight_decay=0.01),
        Adam(),
        Adam(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.01),
    ],
    ids=str,
)
def test_every_optimizer_is_torchs(optimizer: object, assert_trains_like_torch: Check) -> None:
    torch.manual_seed(4)
    module = same(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 4))
    assert_trains_like_torch(module, (7,), optimizer=optimizer, learning_rate=0.01)


@pytest.mark.parametrize("loss", [CrossEntropy(label_smoothing=0.1), MeanSquaredError()], ids=str)
def test_every_loss_is_torchs(loss: object, assert_trains_like_torch: Check) -> None:
    torch.manual_seed(5)
    assert_trains_like_torch(same(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 4)), (7,), loss=loss)


def test_pictures_may_be_the_target(assert_trains_like_torch: Check) -> None:
    torch.manual_seed(6)
    module = same(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert_trains_like_torch(module, IMAGES, loss=MeanSquaredError(), learning_rate=0.1)


def test_frozen_parts_stay_and_a_batch_of_one_is_a_batch(assert_trains_like_torch: Check) -> None:
    torch.manual_seed(7)
    module = same(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(120, 3))
    module[0].requires_grad_(False)
    trainer = assert_trains_like_torch(module, IMAGES, sizes=(1, 3))
    assert "0.weight" in {spec.name for spec in trainer.manifest.buffers}  # type: ignore[attr-defined]
