"""What docs/own-model-and-data.md says about layers: pruned and trained, trained whole only, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from reft_edge.compile import compile_bundle
from reft_edge.compile.prune import prune
from reft_edge.errors import ModelError

CHANNELS, READINGS = 3, 32

Between = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A convolution, what is tried on its (n, 8, 32), the mean over time, and a linear layer."""

    def __init__(self, tried: Between) -> None:
        super().__init__()
        self.first = nn.Conv1d(CHANNELS, 8, 3, padding=1)
        self.tried = tried
        self.last = nn.Linear(8, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.last(self.tried(self.first(inputs)).mean(2))
        return outputs


class Encoder(nn.Module):
    """A step of a transformer over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(inputs.transpose(1, 2)).transpose(1, 2)
        return outputs


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.layer = kind(CHANNELS, 8, batch_first=True)
        self.last = nn.Linear(8, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.last(self.layer(inputs.transpose(1, 2))[0][:, -1])
        return outputs


CONVOLUTIONS = nn.Sequential(
    nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, dilation=2), nn.GroupNorm(2, 8), nn.GELU(), nn.Dropout(0.1),
    nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, groups=8), nn.Hardswish(), nn.PReLU(), nn.AvgPool1d(2),
    nn.Conv1d(8, 8, 2), nn.LayerNorm(5), nn.SiLU(), nn.Tanh(),
)  # fmt: skip


@pytest.mark.parametrize("tried", [CONVOLUTIONS, Encoder(), lambda x: x.cumsum(2)], ids=["layers", "encoder", "cumsum"])
def test_these_are_pruned_and_trained(tried: Between) -> None:
    module = Net(tried)
    smaller = prune(module, input_shape=(CHANNELS, READINGS), ratio=0.5).module
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in module.parameters())
    compile_bundle(smaller, (CHANNELS, READINGS))


FEW = 3
"""Readings for a GRU, whose steps are compiled one by one."""


@pytest.mark.parametrize("module", [Recurrent(nn.GRU), nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * FEW, 2))])
def test_these_are_trained_whole_or_not_at_all(module: nn.Module) -> None:
    compile_bundle(module, (CHANNELS, FEW))
    with pytest.raises(ModelError, match="no channel of the model can be pruned"):
        prune(module, input_shape=(CHANNELS, FEW), ratio=0.5)


REFUSED: dict[str, nn.Module] = {
    "operator aten::mkldnn_rnn_layer .*cannot be compiled": Recurrent(nn.LSTM),
    "operator aten::sort in the model's own forward": Net(lambda x: x.sort(2).values),
    "operator aten::_fft_r2c .*cannot be compiled": Net(lambda x: torch.fft.rfft(x).abs()),
    "operator aten::upsample_nearest1d.*cannot be compiled": Net(nn.Upsample(scale_factor=2)),
    "operator aten::adaptive_max_pool2d .*cannot be compiled": Net(nn.AdaptiveMaxPool1d(4)),
    "its computation depends on the data; use torch.where": Net(lambda x: x * 2 if x.mean() > 0 else x),
    "depends on the data; use torch.where instead of boolean indexing": Net(lambda x: x[x > 0].reshape(len(x), 8, -1)),
    "the model returns tuple; it must return one tensor": nn.GRU(READINGS, 8, batch_first=True),
    r"call .float\(\) on the model first": Net(nn.Identity()).double(),
}


@pytest.mark.parametrize(("message", "module"), REFUSED.items(), ids=range(len(REFUSED)))
def test_these_are_refused_with_the_reason(message: str, module: nn.Module) -> None:
    with pytest.raises(ModelError, match=message):
        compile_bundle(module, (CHANNELS, READINGS))


def test_tied_weights_and_frozen_models_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(READINGS, READINGS), nn.Linear(READINGS, READINGS), nn.Flatten(), nn.Linear(96, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ModelError, match=r"are one \(tied\)"):
        compile_bundle(tied, (CHANNELS, READINGS))
    with pytest.raises(ModelError, match="no parameter to train"):
        compile_bundle(Net(nn.Identity()).requires_grad_(False), (CHANNELS, READINGS))
