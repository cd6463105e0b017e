"""Does a variant compute what the global model computes with the removed channels switched off?

That is what pruning means, and what makes merging by a `ChannelMap` meaningful: entry `i` of the variant plays the part
of entry `map[i]` of the global model. Shapes alone do not show it (a wrong permutation after a reshape fits as well),
so it is tried: both models get the same random weights, the global one zeros at every entry that the map leaves out,
and their outputs must agree.

Two kinds of layer depend on the number of channels by design and are levelled in both copies: layer, group and RMS
norms (their statistics) are reduced to their affine part, and multi-head attention's queries are rescaled for the
smaller head. What else depends on the number of channels makes the two disagree; such channels are then left whole.
"""

from __future__ import annotations

import copy
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reft_edge.compile.dependencies import FOREIGN_ERRORS

if TYPE_CHECKING:
    from reft_edge.compile.channels import ChannelMap

_TOLERANCE = 1e-6
"""Relative to the largest output, in float64: a wrong map is off by the order of 1, rounding by 1e-12."""

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def agrees(variant: nn.Module, channels: ChannelMap, module: nn.Module, example: torch.Tensor) -> bool:
    """Whether `variant` is `module` with everything outside `channels` switched off.

    `example`: an input with its batch axis. Neither module is changed. A variant that cannot run does not agree.
    """
    whole = _prepared(module)
    small = _prepared(variant)
    _randomize(whole)
    state = {name: tensor.detach().numpy() for name, tensor in whole.state_dict().items()}
    kept = channels.gather(state)
    small.load_state_dict({name: torch.from_numpy(values) for name, values in kept.items()})
    for values in state.values():
        values[...] = 0  # the arrays are the module's own memory
    channels.scatter(kept, into=state)
    _rescale_attention(small, whole)
    example = example.cpu().to(torch.float64) if example.is_floating_point() else example.cpu()
    expected = _run(whole, example)
    try:
        found = _run(small, example)
    except FOREIGN_ERRORS:
        return False
    if found.shape != expected.shape:
        return False
    scale = max(float(expected.abs().max()), 1e-30)
    return bool((found - expected).abs().max() <= _TOLERANCE * scale)


def _prepared(module: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode with the norms reduced to their affine part."""
    made = copy.deepcopy(module).cpu().to(torch.float64).eval()
    for layer in made.modules():
        if isinstance(layer, _NORMS):
            layer.register_forward_hook(_affine_part)
    return made


def _affine_part(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """What the norm's weight and bias make of its input."""
    values: torch.Tensor = args[0]
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    shape = (1, -1, *[1] * (output.ndim - 2)) if isinstance(layer, nn.GroupNorm) else None
    if isinstance(weight, torch.Tensor):
        values = values * (weight if shape is None else weight.reshape(shape))
    if isinstance(bias, torch.Tensor):
        values = values + (bias if shape is None else bias.reshape(shape))
    return values


def _randomize(module: nn.Module) -> None:
    """Weights that keep a signal alive through any depth (He et al., arXiv 1502.01852), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = sqrt(6 / prod(parameter.shape[1:])) if parameter.ndim > 1 else 1.0
            parameter.uniform_(-bound, bound, generator=generator)


def _rescale_attention(small: nn.Module, whole: nn.Module) -> None:
    """Undo that attention divides by the root of its head's size (Vaswani et al., arXiv 1706.03762, equation 1)."""
    for name, layer in small.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            original = whole.get_submodule(name)
            factor = sqrt(layer.head_dim / float(original.head_dim))  # type: ignore[arg-type]
            with torch.no_grad():
                layer.in_proj_weight[: layer.embed_dim] *= factor
                if layer.in_proj_bias is not None:
                    layer.in_proj_bias[: layer.embed_dim] *= factor


def _run(module: nn.Module, example: torch.Tensor) -> torch.Tensor:
    """Gradients stay on: without them, transformer layers take a fused path that passes the hooks by."""
    output: torch.Tensor = module(example)
    return output.detach()
