"""What a variant will cost before it is cut: parameters, bytes and multiply-accumulates from the channels kept.

The size of a tensor is the product of its axes, and an axis is what stays anyway plus what is kept of each group on it.
A layer's multiply-accumulates are its weight's entries times the places where it is applied, which pruning does not
change. Products without a weight (queries by keys in attention) are taken as large as in the whole model, so a
prediction of multiply-accumulates is never too small. Element-wise work is not counted.

`count_macs` counts on a real module, with torch's own counter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reft_edge.compile.dependencies import FOREIGN_ERRORS
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from reft_edge.compile.dependencies import ChannelGroup


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a variant: trained parameters, bytes of its state, multiply-accumulates of one sample's forward pass."""

    parameters: int
    weight_bytes: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class TensorSize:
    """One tensor: on each axis, positions that always stay, and for each group the positions of one unit."""

    axes: tuple[tuple[float, tuple[tuple[str, float], ...]], ...]
    itemsize: int
    trained: bool
    places: int
    """How often one sample's forward pass multiplies each entry; 0 for what is not a weight."""

    def entries(self, kept: Mapping[str, float]) -> int:
        return ceil(prod(stays + sum(kept[group] * each for group, each in parts) for stays, parts in self.axes))

    def weight(self, quantity: str) -> int:
        """What one entry adds to a field of `Size`."""
        return {"parameters": int(self.trained), "weight_bytes": self.itemsize, "macs": self.places}[quantity]


class SizeModel:
    """Predicts the `Size` of a variant from the number of units kept in each group."""

    def __init__(self, module: nn.Module, groups: Sequence[ChannelGroup], example: torch.Tensor) -> None:
        places = _places(module, example)
        trained = {name for name, _ in module.named_parameters()}
        on_axis: dict[tuple[str, int], dict[str, float]] = {}
        for group in groups:
            for part in group.slices:
                each = on_axis.setdefault((part.tensor, part.axis), {})
                each[group.name] = each.get(group.name, 0.0) + len(part.positions) / group.n_units
        self.units = {group.name: group.n_units for group in groups}
        self.tensors = tuple(
            TensorSize(
                axes=tuple(self._axis(size, on_axis.get((name, axis), {})) for axis, size in enumerate(tensor.shape)),
                itemsize=tensor.element_size(),
                trained=name in trained,
                places=places.get(name, 0),
            )
            for name, tensor in module.state_dict().items()
        )
        weighted = sum(tensor.entries(self.units) * tensor.places for tensor in self.tensors)
        self._other_macs = max(0, count_macs(module, example) - weighted)

    def _axis(self, size: int, parts: Mapping[str, float]) -> tuple[float, tuple[tuple[str, float], ...]]:
        return size - sum(each * self.units[group] for group, each in parts.items()), tuple(parts.items())

    def size(self, kept: Mapping[str, int]) -> Size:
        """`kept`: units kept in each group; groups that are not named stay whole."""
        units = {**self.units, **kept}
        entries = [(tensor, tensor.entries(units)) for tensor in self.tensors]
        parameters, weight_bytes, macs = (
            sum(n * tensor.weight(quantity) for tensor, n in entries)
            for quantity in ("parameters", "weight_bytes", "macs")
        )
        return Size(parameters=parameters, weight_bytes=weight_bytes, macs=self._other_macs + macs)

    def elasticities(self, kept: Mapping[str, float], quantity: str) -> tuple[float, dict[str, float]]:
        """The value of a field of `Size`, and its derivative with respect to the logarithm of each group's width."""
        total = float(self._other_macs) if quantity == "macs" else 0.0
        slopes: dict[str, float] = {}
        for tensor in self.tensors:
            weight = tensor.weight(quantity)
            if not weight:
                continue
            lengths = [stays + sum(kept[group] * each for group, each in parts) for stays, parts in tensor.axes]
            value = weight * prod(lengths)
            total += value
            for length, (_, parts) in zip(lengths, tensor.axes, strict=True):
                for group, each in parts:
                    slopes[group] = slopes.get(group, 0.0) + value * kept[group] * each / length
        return total, slopes


def measure(module: nn.Module, example: torch.Tensor) -> Size:
    """The size of a real module. Raises `ModelError` when it cannot run on `example`, which has a batch axis of 1."""
    return Size(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()),
        macs=count_macs(module, example),
    )


def count_macs(module: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates of the convolutions and matrix products of a forward pass on `example`.

    Raises `ModelError` when the module cannot run on it.
    """
    # Only attention as plain matrix products is counted on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(module, example)
    return int(counter.get_total_flops()) // 2


def run(module: nn.Module, example: torch.Tensor) -> torch.Tensor:
    """The output for `example` in evaluation mode, without gradients; modes are as before afterwards.

    Raises `ModelError` when the module cannot run, or returns anything but one tensor.
    """
    try:
        with _evaluating(module), torch.no_grad():
            output = module(example)
    except FOREIGN_ERRORS as exc:
        kind = str(example.dtype).removeprefix("torch.")
        raise ModelError(f"the model cannot run on a {kind} input of shape {tuple(example.shape)}: {exc}") from exc
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the model returns {type(output).__name__}; it must return one tensor")
    return output


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in module.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused transformer layers are invisible to hooks and counters
    module.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for layer, training in modes:
            layer.training = training


def _places(module: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """For each weight, by how many positions of one sample it is multiplied."""
    places: dict[str, int] = {}

    def record(layer: nn.Module, name: str, args: tuple[Any, ...], output: Any) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(layer, nn.modules.conv._ConvNd):
            tensor, channels = (args[0], layer.in_channels) if layer.transposed else (output, layer.out_channels)
            added = {f"{prefix}weight": tensor.numel() // channels}
        elif isinstance(layer, nn.Linear):
            added = {f"{prefix}weight": output.numel() // layer.out_features}
        elif isinstance(layer, nn.MultiheadAttention):
            tokens = args[0].numel() // layer.embed_dim
            added = {f"{prefix}in_proj_weight": tokens, f"{prefix}out_proj.weight": tokens}
        else:
            return
        for key, n in added.items():
            places[key] = places.get(key, 0) + n

    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: record(layer, name, args, output))
        for name, layer in module.named_modules()
    ]
    try:
        run(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return places
