"""Lower a pair of traced aten graphs to ONNX, operator by operator.

`rule("aten::name.overload", ...)` registers how an operator becomes ONNX nodes; the rules are in
`reft_edge.compile.rules`. A rule takes the `Lowering`, the traced node and the operator's arguments in the order of its
schema, defaults filled in; tensors arrive as `Value`, numbers that depend on the batch size as `Affine`. It returns a
`Value`, or a tuple of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, batch_first, batch_last, behind
from reft_edge.compile.symbols import Shape, pair_number, pair_shape
from reft_edge.errors import ModelError

Tensor: TypeAlias = Value | BatchLast
Result: TypeAlias = Tensor | tuple[Tensor | None, ...] | None
Rule: TypeAlias = Callable[..., Result]

_RULES: dict[str, Rule] = {}
_BROADCASTING: set[str] = set()
_ANY_LAYOUT: set[str] = set()


def rule(*operators: str, broadcasts: bool = False, any_layout: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the lowering of the named operators.

    Only a rule that `broadcasts` is handed tensors smaller than torch has them (see `Value`); for the others expanded
    tensors are written out first. Such a rule works entry by entry, so tensors with the batch last are handed to it as
    they are stored, and its result is stored so. A rule for `any_layout` is handed `BatchLast` itself; the others get
    such tensors with the batch first.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, function))
        if broadcasts:
            _BROADCASTING.update(operators)
        if any_layout:
            _ANY_LAYOUT.update(operators)
        return function

    return register


def is_known(target: object) -> bool:
    """Whether a traced node's target can be lowered."""
    return target is operator.getitem or operator_name(target) in _RULES


def place_text(module: str) -> str:
    """Where in the model, in words; "" is the module that holds all others."""
    return f"in module {module!r}" if module else "in the model's own forward()"


def operator_name(target: object) -> str:
    """For example `aten::add.Tensor`."""
    if isinstance(target, torch._ops.OpOverload):
        name: str = target.name()  # type: ignore[no-untyped-call]
        return name
    return str(target)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class NodePair:
    """One operation as both traces have it."""

    small: fx.Node
    large: fx.Node

    @property
    def module(self) -> str:
        """Path of the module that the operation (or the forward operation it differentiates) belongs to."""
        node: fx.Node | None = self.small
        while node is not None:
            if "module" in (custom := node.meta.get("custom") or {}):
                return str(custom["module"])
            node = next((n for n in node.all_input_nodes if n.op != "placeholder"), None)
        return ""

    def output(self, index: int | None = None) -> tuple[Shape, str]:
        """Shape and dtype of the result, or of one of several results."""
        small, large = self.small.meta["val"], self.large.meta["val"]
        if index is not None:
            small, large = small[index], large[index]
        return pair_shape(small.shape, large.shape), dtype_name(small.dtype)

    @property
    def shape(self) -> Shape:
        return self.output()[0]

    @property
    def dtype(self) -> str:
        return self.output()[1]


@dataclass
class Lowering:
    """Walks two traces in step and fills a `GraphBuilder`."""

    graph: GraphBuilder
    moves_batch: bool = False
    """Whether tensors may be kept with the batch last (see `reft_edge.compile.layout`)."""
    values: dict[fx.Node, Result] = field(default_factory=dict)
    seed: Value | None = None
    """The random seed's input; made by the first random operator."""
    rectified: set[tuple[str, str]] = field(default_factory=set)
    """Gradients, by name, that are zero already wherever a rectified tensor is; and that tensor's name."""
    n_random: int = 0
    """Random operators lowered so far: each draws from its own stream."""

    def run(
        self,
        small: fx.GraphModule,
        large: fx.GraphModule,
        inputs: Mapping[str, Value],
        late: Callable[[str, Value], Value | None] | None = None,
    ) -> list[Result]:
        """Lower all nodes and return what the traces return.

        `inputs` are the placeholders by name. A placeholder that is not among them is made by `late(name, output)` when
        an operation first needs it, `output` being the first of the traces' results: so the loss is computed between
        forward and backward pass.
        """
        nodes = [NodePair(a, b) for a, b in _in_step(small, large)]
        self._check(nodes)
        *_, last = nodes
        first_result = (last.small.args[0][0], last.large.args[0][0])  # type: ignore[index]
        for pair in nodes[:-1]:
            node = pair.small
            if node.op == "placeholder":
                if node.name in inputs:
                    self.values[node] = inputs[node.name]
            elif node.op == "get_attr":
                tensor = getattr(small, str(node.target))
                self.values[node] = self.graph.constant(tensor.detach().cpu().numpy())
            else:
                for needed in node.all_input_nodes:
                    if needed not in self.values and late is not None:
                        self.values[needed] = late(needed.name, self._argument(*first_result))
                self.values[node] = self._lower(pair)
        return [self._argument(a, b) for a, b in zip(last.small.args[0], last.large.args[0], strict=True)]  # type: ignore[arg-type]

    def _lower(self, pair: NodePair) -> Result:
        node = pair.small
        if node.target is operator.getitem:
            results = self.values[node.args[0]]  # type: ignore[index]
            if not isinstance(results, tuple):
                raise ModelError(f"cannot take element {node.args[1]!r} of operator {node.args[0]!r}")
            return results[node.args[1]]  # type: ignore[index]
        name = operator_name(node.target)
        try:
            arguments = self._arguments(pair)
            if name not in _ANY_LAYOUT and any(isinstance(argument, BatchLast) for argument in arguments):
                return self._entry_by_entry(pair, arguments)
            return _RULES[name](self, pair, *arguments)
        except ModelError as exc:
            raise ModelError(f"operator {name} {place_text(pair.module)}: {exc}") from exc

    def _entry_by_entry(self, pair: NodePair, arguments: Sequence[Any]) -> Result:
        """A rule that `broadcasts`, on tensors of which some have the batch last."""
        lower, rank = _RULES[operator_name(pair.small.target)], len(pair.shape)
        if any(isinstance(argument, BatchLast) and argument.rank != rank for argument in arguments):
            return lower(
                self, pair, *(batch_first(self.graph, a) if isinstance(a, BatchLast) else a for a in arguments)
            )
        stored = [batch_last(self.graph, a, rank) if isinstance(a, Value | BatchLast) else a for a in arguments]
        result = lower(self, pair, *stored)
        return BatchLast(result) if isinstance(result, Value) else result

    def _arguments(self, pair: NodePair) -> list[Any]:
        """Arguments in the order of the operator's schema, defaults filled in."""
        small, large = pair.small, pair.large
        target: Any = small.target
        lazy = operator_name(target) in _BROADCASTING
        stored = lazy or operator_name(target) in _ANY_LAYOUT
        result: list[Any] = []
        for index, argument in enumerate(target._schema.arguments):
            if index < len(small.args):
                result.append(self._argument(small.args[index], large.args[index], lazy=lazy, stored=stored))
            elif argument.name in small.kwargs:
                pair_of = (small.kwargs[argument.name], large.kwargs[argument.name])
                result.append(self._argument(*pair_of, lazy=lazy, stored=stored))
            else:
                result.append(argument.default_value)
        return result

    def _argument(self, small: Any, large: Any, *, lazy: bool = False, stored: bool = False) -> Any:
        """An argument out of both traces. `lazy`: as small as it is; `stored`: with the batch where it is."""
        if isinstance(small, fx.Node):
            value = self.values[small]
            if isinstance(value, BatchLast):
                if not lazy:
                    value = BatchLast(self.graph.expand(value.stored, behind(NodePair(small, large).shape)))
                return value if stored else batch_first(self.graph, value)
            if isinstance(value, Value) and not lazy:
                return self.graph.expand(value, NodePair(small, large).shape)
            return value
        if isinstance(small, list | tuple):
            return [self._argument(a, b, lazy=lazy, stored=stored) for a, b in zip(small, large, strict=True)]
        if isinstance(small, bool) or not isinstance(small, int | float):
            return small
        return pair_number(small, large)

    def _check(self, nodes: Sequence[NodePair]) -> None:
        for pair in nodes:
            node = pair.small
            if node.op == "call_function" and not is_known(node.target):
                raise ModelError(
                    f"operator {operator_name(node.target)} {place_text(pair.module)} cannot be compiled; "
                    "replace it by layers that reft-edge knows"
                )


def _in_step(small: fx.GraphModule, large: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    first, second = list(small.graph.nodes), list(large.graph.nodes)
    if [(n.op, n.target) for n in first if n.op != "placeholder"] != [
        (n.op, n.target) for n in second if n.op != "placeholder"
    ]:
        raise ModelError(
            "the model computes differently for different batch sizes; make it independent of the batch size"
        )
    return list(zip(first, second, strict=True))
