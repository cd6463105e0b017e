"""Small networks, one for each way in which channels can be coupled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def relu_conv(n_in: int, n_out: int, *, groups: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())


class Fn(nn.Module):
    """A function of layers given by name: one line a network."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._forward(self, inputs)


class Attention(nn.Module):
    """Self-attention that knows its number of heads and their size as plain integers, as in timm."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, n, dim = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, n, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, n, dim))


def _mha_block(net: Fn, x: Tensor) -> Tensor:
    tokens = net.patch(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([net.token.expand(len(x), -1, -1), tokens], dim=1) + net.position
    normed = net.norm1(tokens)
    tokens = tokens + net.attention(normed, normed, normed, need_weights=False)[0]
    tokens = tokens + net.down(functional.gelu(net.up(net.norm2(tokens))))
    return net.head(tokens[:, 0])


def _own_attention(net: Fn, x: Tensor) -> Tensor:
    tokens = net.patch(x).flatten(2).transpose(1, 2)
    tokens = tokens + net.attention(net.norm1(tokens))
    tokens = tokens + net.down(functional.gelu(net.up(net.norm2(tokens))))
    return net.head(tokens.mean(1))


def _shuffled(net: Fn, x: Tensor) -> Tensor:
    y = net.first(x)
    batch, channels, height, width = y.shape
    y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    return net.head(net.second(y).mean((2, 3)))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)), (7,)),
    "flatten": (
        lambda: nn.Sequential(relu_conv(3, 8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 10), nn.Linear(10, 4)),
        (3, 6, 6),
    ),
    "residual": (
        lambda: Fn(
            lambda n, x: n.head((n.b(n.a(n.stem(x))) + n.down(n.stem(x))).mean((2, 3))),
            stem=relu_conv(3, 8),
            a=relu_conv(8, 8, stride=2),
            b=relu_conv(8, 16),
            down=nn.Conv2d(8, 16, 1, stride=2),
            head=nn.Linear(16, 4),
        ),
        (3, 6, 6),
    ),
    "concatenated": (
        lambda: Fn(
            lambda n, x: n.head(n.mix(torch.cat([n.a(x), n.b(x), n.c(n.a(x))], 1)).flatten(1)),
            a=relu_conv(3, 6),
            b=relu_conv(3, 10),
            c=relu_conv(6, 4),
            mix=relu_conv(20, 8),
            head=nn.Linear(8 * 16, 4),
        ),
        (3, 4, 4),
    ),
    "grouped": (
        lambda: nn.Sequential(
            relu_conv(3, 12),
            relu_conv(12, 24, groups=4),
            nn.GroupNorm(3, 24),
            relu_conv(24, 8),
            nn.Flatten(),
            nn.Linear(8 * 16, 4),
        ),
        (3, 4, 4),
    ),
    "depthwise": (
        lambda: Fn(
            lambda n, x: n.head((n.project(n.depth(n.expand(n.stem(x)))) + n.stem(x)).mean((2, 3))),
            stem=relu_conv(3, 8),
            expand=relu_conv(8, 24),
            depth=relu_conv(24, 24, groups=24),
            project=nn.Conv2d(24, 8, 1),
            head=nn.Linear(8, 4),
        ),
        (3, 6, 6),
    ),
    "squeeze-excite": (
        lambda: Fn(
            lambda n, x: n.head((n.a(x) * torch.sigmoid(n.up(n.down(n.a(x).mean((2, 3), keepdim=True))))).mean((2, 3))),
            a=relu_conv(3, 8),
            down=nn.Conv2d(8, 4, 1),
            up=nn.Conv2d(4, 8, 1),
            head=nn.Linear(8, 4),
        ),
        (3, 6, 6),
    ),
    "transposed": (
        lambda: Fn(
            lambda n, x: n.out(torch.relu(n.up(torch.relu(n.wide(n.code(x)).view(len(x), -1, 3, 3))))),
            code=nn.Linear(5, 6),
            wide=nn.Linear(6, 8 * 9),
            up=nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
            out=nn.Conv2d(6, 2, 1),
        ),
        (5,),
    ),
    "sensor": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 5, padding=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 12, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 6, 10),
            nn.ReLU(),
            nn.Linear(10, 4),
        ),
        (3, 16),
    ),
    "split": (
        lambda: Fn(
            lambda n, x: n.head((n.left(n.a(x)[:, :8]) + n.right(n.a(x).chunk(2, 1)[1])).mean((2, 3))),
            a=nn.Conv2d(3, 16, 3),
            left=nn.Conv2d(8, 6, 1),
            right=nn.Conv2d(8, 6, 1),
            head=nn.Linear(6, 4),
        ),
        (3, 6, 6),
    ),
    "gated": (
        lambda: Fn(
            lambda n, x: n.head(torch.relu(n.mix(functional.glu(n.a(x), dim=1).mean((2, 3))))),
            a=nn.Conv2d(3, 16, 3),
            mix=nn.Linear(8, 6),
            head=nn.Linear(6, 4),
        ),
        (3, 6, 6),
    ),
    "words": (
        lambda: Fn(
            lambda n, x: n.head(torch.relu(n.mix(n.embed(x).transpose(1, 2))).mean(2)),
            embed=nn.Embedding(11, 6),
            mix=nn.Conv1d(6, 8, 3),
            head=nn.Linear(8, 4),
        ),
        (7,),
    ),
    "attention": (
        lambda: Fn(
            _mha_block,
            patch=nn.Conv2d(3, 16, 2, stride=2),
            token=nn.Parameter(torch.randn(1, 1, 16)),
            position=nn.Parameter(torch.randn(1, 5, 16)),
            norm1=nn.LayerNorm(16),
            attention=nn.MultiheadAttention(16, 4, batch_first=True),
            norm2=nn.LayerNorm(16),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
            head=nn.Linear(16, 4),
        ),
        (3, 4, 4),
    ),
    "own attention": (
        lambda: Fn(
            _own_attention,
            patch=nn.Conv2d(3, 16, 2, stride=2),
            norm1=nn.LayerNorm(16),
            attention=Attention(16, 4),
            norm2=nn.LayerNorm(16),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
            head=nn.Linear(16, 4),
        ),
        (3, 4, 4),
    ),
    "transformer": (
        lambda: Fn(
            lambda n, x: n.head(n.layer(n.embed(x)).mean(1)),
            embed=nn.Linear(6, 16),
            layer=nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True),
            head=nn.Linear(16, 4),
        ),
        (5, 6),
    ),
    "shuffled": (
        lambda: Fn(_shuffled, first=relu_conv(3, 8), second=relu_conv(8, 8), head=nn.Linear(8, 4)),
        (3, 4, 4),
    ),
    "reused": (
        lambda: Fn(
            lambda n, x: n.head(n.same(torch.relu(n.same(n.stem(x)))).mean((2, 3))),
            stem=relu_conv(3, 8),
            same=nn.Conv2d(8, 8, 3, padding=1),
            head=nn.Linear(8, 4),
        ),
        (3, 6, 6),
    ),
}
"""Name: (how it is made, the shape of a sample)."""
