"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929) for 32x32 pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from reft_edge.errors import ModelError


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron, each with a shortcut."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(tokens)
        attended, _ = self.attention(normed, normed, normed, need_weights=False)
        tokens = tokens + attended
        outputs: torch.Tensor = tokens + self.mlp(self.norm2(tokens))
        return outputs


class VisionTransformer(nn.Module):
    """Patches to tokens, encoder blocks, mean over the tokens, a linear classifier.

    Input: float32 (n_batch, n_channels, height, width). Output: (n_batch, n_outputs). Raises `ModelError` when the
    picture cannot be cut into patches.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        n_outputs: int,
        *,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        n_heads: int = 4,
    ) -> None:
        super().__init__()
        n_channels, height, breadth = input_shape
        if height % patch or breadth % patch:
            raise ModelError(f"a {height}x{breadth} picture cannot be cut into {patch}x{patch} patches")
        n_tokens = (height // patch) * (breadth // patch)
        self.patches = nn.Conv2d(n_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(1, n_tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, n_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(inputs).flatten(2).transpose(1, 2) + self.positions
        outputs: torch.Tensor = self.classifier(self.norm(self.blocks(tokens)).mean(dim=1))
        return outputs


def vit_small(input_shape: Sequence[int], n_outputs: int) -> VisionTransformer:
    """About 210,000 parameters on 3x32x32."""
    return VisionTransformer(input_shape, n_outputs)
