"""The adapter around torch-pruning: which channels of a module must go together, and cutting them out.

torch-pruning traces a module and builds its dependency graph (Fang et al., DepGraph, arXiv 2301.12900): when a channel
of one layer goes, so must that channel's batch-norm statistics, the next layer's input weights, and the same channel
of every branch that is added to it. A set of channels that are coupled like this is a `ChannelGroup`.

What this file adds to torch-pruning: units (channels that can only go together: one from each group of a grouped
convolution, group norm or attention head; the pixels of a linear layer's output that becomes a feature map), layers
that are left whole (the model's output, tied weights), and the way to learn the map of indices: every tensor of the
working copy is filled with its own flat indices before it is cut, so that what is left says where it came from.

What it does not do: choose channels (`compile.prune`), or judge whether torch-pruning was right
(`compile.equivalence`). torch-pruning's types do not leave this file. Its pruners are shared: one thread at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch_pruning
from torch import nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping
from torch_pruning.ops import OPTYPE

from reft_edge.compile.channels import ChannelMap
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from reft_edge.types import IntArray

FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What torch, torch-pruning and a user's `forward` raise when a module cannot be traced or run."""

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
"""Layers whose outputs may be the first of a group."""

_EXACT_FLOAT32 = 2**24
"""float32 holds every integer up to here."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The positions along one axis of one tensor that belong to a group."""

    tensor: str
    axis: int
    positions: IntArray
    """int64 (n,), positions along the axis."""
    units: IntArray
    """int64 (n,), the unit of the group that each position belongs to."""


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that are coupled: removing unit `u` removes every position of unit `u` from every slice."""

    name: str
    """The layer that produces the channels, for example `features.0`."""
    n_units: int
    slices: tuple[Slice, ...]
    roots: tuple[tuple[int, ...], ...] = field(repr=False)
    """For each unit, the output channels of the layer `name`."""


class Dissection:
    """A traced working copy of a module, to be cut once.

    `groups` is the same for equal modules, in the order of the forward pass from the output backwards.
    Raises `ModelError` when the module cannot be traced. The module itself is left as it is.
    """

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self._source = module
        self._work = _working_copy(module)
        self._names = {id(layer): name for name, layer in self._work.named_modules()}
        self._tied = _tied_layers(self._work)
        try:
            with torch.enable_grad(), _plain_flattening():
                self._graph = torch_pruning.DependencyGraph().build_dependency(self._work, example.cpu(), verbose=False)
                found = [self._read(items) for items in self._graph.get_all_groups(root_module_types=_ROOTS)]
        except FOREIGN_ERRORS as exc:
            raise ModelError(f"the model cannot be traced for pruning: {type(exc).__name__}: {exc}") from exc
        self.groups: tuple[ChannelGroup, ...] = tuple(group for group in found if group is not None)

    def cut(self, removals: Mapping[str, Sequence[int]]) -> tuple[nn.Module, ChannelMap]:
        """Remove units, given by the group's name, and return the smaller module and its map.

        The module has the weights, the mode and the `requires_grad` flags of the source. Raises `ModelError`.
        """
        source = self._source.state_dict()
        work = self._work
        _fill_with_indices(work)
        try:
            with _plain_flattening():
                for group in self.groups:
                    channels = [root for unit in removals.get(group.name, ()) for root in group.roots[unit]]
                    if channels:
                        layer = work.get_submodule(group.name)
                        handler = self._graph.get_pruner_of_module(layer).prune_out_channels
                        self._graph.get_pruning_group(layer, handler, channels).prune(record_history=False)
        except FOREIGN_ERRORS as exc:
            raise ModelError(f"the model cannot be pruned: {type(exc).__name__}: {exc}") from exc
        indices = {name: tensor.detach().to(torch.int64) for name, tensor in work.state_dict().items()}
        for name, tensor in work.state_dict(keep_vars=True).items():
            tensor.data = source[name].detach().cpu().reshape(-1)[indices[name]]
        for name, parameter in self._source.named_parameters():
            work.get_parameter(name).requires_grad_(parameter.requires_grad)
        for name, layer in self._source.named_modules():
            work.get_submodule(name).training = layer.training
        shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        return work, ChannelMap({name: flat.numpy() for name, flat in indices.items()}, shapes)

    def _read(self, items: Any) -> ChannelGroup | None:
        """torch-pruning's group as ours, or None where nothing of it may go."""
        units = self._units(items)
        if units is None or units.max() == 0:
            return None
        slices = []
        for item in items:
            positions = np.asarray(item.idxs, np.int64)
            owners = units[np.asarray(item.root_idxs, np.int64)]
            slices += [
                Slice(tensor=name, axis=axis, positions=where, units=whose)
                for name, axis, where, whose in self._tensors(item.dep, positions, owners)
            ]
        roots: list[list[int]] = [[] for _ in range(int(units.max()) + 1)]
        for channel, unit in enumerate(units.tolist()):
            roots[unit].append(channel)
        return ChannelGroup(
            name=self._names[id(items[0].dep.target.module)],
            n_units=len(roots),
            slices=tuple(slices),
            roots=tuple(map(tuple, roots)),
        )

    def _units(self, items: Any) -> IntArray | None:
        """int64 (n_root_channels,): the unit of each output channel of the group's root; None: all must stay."""
        units = self._closures(items)
        if units is None:
            return None
        for item in items:
            layer, node = item.dep.target.module, item.dep.target
            if not node.outputs and self._is_output(item.dep):
                return None  # the model's output
            if id(layer) in self._tied or _unsupported(layer):
                return None
            if any(root is None for root in item.root_idxs):
                return None
            n_channels = self._channels(item.dep)
            if n_channels is None:
                continue
            positions = np.asarray(item.idxs, np.int64)
            if positions.max() >= n_channels or len(positions) > n_channels:
                return None  # an operation that torch-pruning does not know lies between, and changed the channels
            n_groups = _channel_groups(layer)
            if (n_groups > 1 or node.type == OPTYPE.PARAMETER) and len(positions) != n_channels:
                return None  # the group has a part of a layer whose groups must stay of equal size
            if n_groups > 1:
                owners = units[np.asarray(item.root_idxs, np.int64)][np.argsort(positions)]
                units = _unite(units, owners.reshape(n_groups, -1))
        return _relabel(units)

    def _closures(self, items: Any) -> IntArray | None:
        """Root channels that torch-pruning removes together: neighbours, or those a fixed distance apart."""
        root = items[0].dep
        n_channels = len(items[0].idxs)
        first, last = (
            sorted(self._graph.get_pruning_group(root.target.module, root.handler, [channel])[0].idxs)
            for channel in (0, n_channels - 1)
        )
        size = len(first)
        channels = np.arange(n_channels, dtype=np.int64)
        if n_channels % size or len(last) != size:
            return None
        step = n_channels // size
        if first == list(range(size)) and last == list(range(n_channels - size, n_channels)):
            return channels // size
        if first == list(range(0, n_channels, step)) and last == list(range(step - 1, n_channels, step)):
            return channels % step
        return None

    def _channels(self, dep: Any) -> int | None:
        count = self._graph.get_out_channels if self._is_output(dep) else self._graph.get_in_channels
        channels: int | None = count(dep.target)
        return channels

    def _is_output(self, dep: Any) -> bool:
        return bool(self._graph.is_out_channel_pruning_fn(dep.handler))

    def _tensors(self, dep: Any, positions: IntArray, units: IntArray) -> list[tuple[str, int, IntArray, IntArray]]:
        """(tensor, axis, positions, units) of everything that the handler of `dep` cuts."""
        layer = dep.target.module
        if dep.target.type == OPTYPE.PARAMETER:
            return [(self._graph._param_to_name[layer], dep.target.pruning_dim % layer.ndim, positions, units)]
        if id(layer) not in self._names:
            return []  # an operation without tensors
        name = self._names[id(layer)]
        present = {key for key, _ in layer.named_parameters(recurse=False)} | {
            key for key, _ in layer.named_buffers(recurse=False)
        }
        found = []
        for key, axis in _axes(layer, output=self._is_output(dep)):
            if isinstance(layer, nn.MultiheadAttention) and axis == 0 and key.startswith("in_proj"):
                n_channels = layer.embed_dim  # queries, keys and values lie one below the other
                repeated = np.concatenate([positions + part * n_channels for part in range(3)])
                found.append((f"{name}.{key}", axis, repeated, np.tile(units, 3)))
            elif isinstance(layer, nn.modules.conv._ConvNd) and axis == _input_axis(layer) and layer.groups > 1:
                own = positions < layer.in_channels // layer.groups  # the other groups' weights share this axis
                found.append((f"{name}.{key}", axis, positions[own], units[own]))
            elif key in present or "." in key:
                found.append((f"{name}.{key}" if name else key, axis, positions, units))
        return found


class _PlainFlatten(index_mapping._FlattenIndexMapping):  # type: ignore[misc]  # torch-pruning has no types
    """A channel's pixels after a flatten, and back, each index once.

    torch-pruning's own repeats an index for every root channel that leads to it, in the order of a hash set: where a
    linear layer's output becomes a feature map, its groups then grow with the square of the pixels.
    """

    def __call__(self, indices: Sequence[_HybridIndex]) -> list[_HybridIndex]:
        stride: int = self._stride
        if self.reverse:
            once: dict[int, int] = {}
            for index in indices:
                once.setdefault(index.idx // stride, index.root_idx)
        else:
            once = {index.idx * stride + pixel: index.root_idx for index in indices for pixel in range(stride)}
        return [_HybridIndex(idx=idx, root_idx=root) for idx, root in once.items()]


@contextmanager
def _plain_flattening() -> Iterator[None]:
    """`_PlainFlatten` in the place of torch-pruning's mapping."""
    original = index_mapping._FlattenIndexMapping
    index_mapping._FlattenIndexMapping = _PlainFlatten
    try:
        yield
    finally:
        index_mapping._FlattenIndexMapping = original


def _unsupported(layer: nn.Module) -> bool:
    """Layers whose tensors torch-pruning 1.6 cuts wrongly."""
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        return 1 < layer.groups < layer.out_channels
    return isinstance(layer, nn.RNNBase)


def _input_axis(layer: nn.modules.conv._ConvNd) -> int:
    return 0 if layer.transposed else 1


def _axes(layer: nn.Module, *, output: bool) -> list[tuple[str, int]]:
    """(tensor of the layer, axis) that the layer's output, or else input, channels lie along."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups > 1 and layer.groups == layer.out_channels:  # depthwise: in and out are one
            return [("weight", 0), ("bias", 0)]
        return [("weight", 1 - _input_axis(layer)), ("bias", 0)] if output else [("weight", _input_axis(layer))]
    if isinstance(layer, nn.Linear):
        return [("weight", 0), ("bias", 0)] if output else [("weight", 1)]
    if isinstance(layer, nn.Embedding):
        return [("weight", 1)]
    if isinstance(layer, nn.LayerNorm):
        return [("weight", len(layer.normalized_shape) - 1), ("bias", len(layer.normalized_shape) - 1)]
    if isinstance(layer, nn.MultiheadAttention):
        keys = [("in_proj_weight", 0), ("in_proj_weight", 1), ("out_proj.weight", 0), ("out_proj.weight", 1)]
        return keys + ([("in_proj_bias", 0), ("out_proj.bias", 0)] if layer.in_proj_bias is not None else [])
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return []
    return [(key, 0) for key in ("weight", "bias", "running_mean", "running_var")]


def _channel_groups(layer: nn.Module) -> int:
    """Into how many groups of equal size the layer divides its channels."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1 if layer.groups == layer.out_channels else layer.groups
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return layer.num_heads if isinstance(layer, nn.MultiheadAttention) else 1


def _unite(units: IntArray, rows: IntArray) -> IntArray:
    """Join the units that stand in one column of `rows`, (n_groups, n_channels_in_a_group)."""
    parent = list(range(int(units.max()) + 1))

    def find(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    for first, *others in rows.T.tolist():
        for other in others:
            parent[find(other)] = find(first)
    return np.asarray([find(unit) for unit in units.tolist()], np.int64)


def _relabel(units: IntArray) -> IntArray:
    """The same partition with units numbered from 0 in the order of their first channel."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    labelled: IntArray = rank[inverse]
    return labelled


def _working_copy(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode whose floating-point parameters all require gradients, as tracing needs."""
    try:
        work = copy.deepcopy(module)
    except FOREIGN_ERRORS as exc:
        raise ModelError(f"the model cannot be copied, so it cannot be pruned: {exc}") from exc
    for parameter in work.parameters():
        if not parameter.is_floating_point():
            raise ModelError("the model has a parameter that is not floating-point; it cannot be pruned")
        parameter.requires_grad_(True)
    return work.cpu().eval()


def _tied_layers(module: nn.Module) -> set[int]:
    """Layers that share a parameter object with another layer; cutting one of them would part the two."""
    owners: dict[int, set[int]] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(layer))
    return {owner for sharing in owners.values() if len(sharing) > 1 for owner in sharing}


def _fill_with_indices(module: nn.Module) -> None:
    """Replace every value of the state by its flat index, in a dtype that holds it exactly."""
    for tensor in module.state_dict(keep_vars=True).values():
        dtype = torch.float32 if tensor.numel() <= _EXACT_FLOAT32 else torch.float64
        tensor.data = torch.arange(tensor.numel(), dtype=dtype).reshape(tensor.shape)
