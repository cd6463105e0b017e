"""Trace a module's training step and its inference to aten graphs, by torch's own autograd.

Two passes of `make_fx` on fake tensors: the first records what autograd does, the second makes it functional (no
in-place updates), which turns running statistics into outputs. Nothing is computed and the module itself is never run:
a deep copy is.
"""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.func import functional_call, functionalize
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import SDPBackend, sdpa_kernel

from reft_edge.compile.lowering import dtype_name, is_known, operator_name, place_text
from reft_edge.errors import ModelError

FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a user's `forward` raises when something is wrong in it or with its input."""


_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


@dataclass(frozen=True)
class Subject:
    """A private copy of a module, on the CPU, with its tensors sorted into roles."""

    module: nn.Module
    parameters: dict[str, Tensor]
    """Trained, in the order of `named_parameters()`."""
    buffers: dict[str, Tensor]
    """Frozen parameters and persistent buffers: everything else in `state_dict()`."""

    @classmethod
    def of(cls, module: nn.Module) -> Subject:
        """Copy and check a module. Raises `ModelError`."""
        if not isinstance(module, nn.Module):
            raise ModelError(f"{module!r} is not a torch.nn.Module")
        try:
            own = copy.deepcopy(module).cpu()
        except FORWARD_ERRORS as exc:
            raise ModelError(f"the model cannot be copied: {exc}") from exc
        state = dict(own.state_dict(keep_vars=True))
        _check_tied(state)
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise ModelError(f"the model keeps extra state {name!r} that is not a tensor; it cannot be compiled")
            if dtype_name(tensor.dtype) not in ("float32", "int64", "int32", "uint8", "int8", "bool"):
                raise ModelError(f"tensor {name!r} is {dtype_name(tensor.dtype)}; call .float() on the model first")
        trained = {name: p.detach() for name, p in own.named_parameters() if p.requires_grad}
        if not trained:
            raise ModelError("the model has no parameter to train (requires_grad is off everywhere, or there are none)")
        others = {name: tensor.detach() for name, tensor in state.items() if name not in trained}
        return cls(own, trained, others)


def _check_tied(state: dict[str, Tensor]) -> None:
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            other = seen.setdefault(tensor.data_ptr(), name)
            if other != name:
                raise ModelError(f"tensors {other!r} and {name!r} are one (tied); give each module a tensor of its own")


@dataclass(frozen=True)
class Trace:
    """One traced function. Placeholders are named `p0, p1, …`, `b0, …`, `inputs` and `output_grad`.

    Training returns (output, one gradient or None a parameter, one new value a buffer); inference the output only.
    """

    graph: fx.GraphModule

    @property
    def output(self) -> Tensor:
        """The module's output as torch's fake tensor."""
        node = next(node for node in self.graph.graph.nodes if node.op == "output")
        return node.args[0][0].meta["val"]  # type: ignore[no-any-return]


def trace_training(subject: Subject, samples: Tensor, output: Tensor) -> Trace:
    """The step without loss and optimizer: the loss' derivative by the output, shaped as `output`, is an input.

    Raises `ModelError` when torch cannot trace the module.
    """
    names = list(subject.parameters)
    buffer_names = list(subject.buffers)

    def step(parameters: Sequence[Tensor], buffers: Sequence[Tensor], inputs: Tensor, output_grad: Tensor) -> list[Any]:
        leaves = [p.detach().requires_grad_() for p in parameters]
        output = _call(subject.module, names, leaves, buffer_names, buffers, inputs)
        grads = torch.autograd.grad(output, leaves, output_grad, allow_unused=True)
        return [output, *grads, *buffers]

    return _trace(subject, step, samples, output, training=True)


def trace_inference(subject: Subject, samples: Tensor) -> Trace:
    """The module in evaluation mode."""
    names = list(subject.parameters)
    buffer_names = list(subject.buffers)

    def infer(parameters: Sequence[Tensor], buffers: Sequence[Tensor], inputs: Tensor) -> list[Any]:
        # With leaves that need gradients torch takes no inference-only short cuts, so both graphs know the same
        # operators.
        leaves = [p.detach().requires_grad_() for p in parameters]
        return [_call(subject.module, names, leaves, buffer_names, buffers, inputs)]

    return _trace(subject, infer, samples, None, training=False)


def _call(
    module: nn.Module,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    buffer_names: Sequence[str],
    buffers: Sequence[Tensor],
    inputs: Tensor,
) -> Tensor:
    tensors = dict(zip((*names, *buffer_names), (*parameters, *buffers), strict=True))
    output = functional_call(module, tensors, (inputs,))
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns {type(output).__name__}; it must return one tensor")
    return output


def _trace(
    subject: Subject, function: Callable[..., list[Any]], samples: Tensor, output_grad: Tensor | None, *, training: bool
) -> Trace:
    subject.module.train(training)
    arguments: list[Any] = [list(subject.parameters.values()), list(subject.buffers.values()), samples]
    names = (
        [f"p{i}" for i in range(len(subject.parameters))] + [f"b{i}" for i in range(len(subject.buffers))] + ["inputs"]
    )
    if output_grad is not None:
        arguments.append(output_grad)
        names.append("output_grad")
    with _module_paths(subject.module) as paths, _quiet():
        try:
            recorded = make_fx(function, decomposition_table=_decompositions(), tracing_mode="fake")(*arguments)
            flat = torch.utils._pytree.tree_leaves(arguments)
            replay = functionalize(lambda *args: _Replay(recorded).run(*args))
            functional = make_fx(replay, tracing_mode="fake")(*flat)
        except FORWARD_ERRORS as exc:
            where = f" in module {paths[-1]!r}" if paths and paths[-1] else ""
            raise ModelError(f"the model cannot be traced{where}{_user_line(exc)}: {_reason(exc)}") from exc
    for node in reversed(functional.graph.nodes):
        # Updates of inputs are written back at the end as well as returned; only the latter is wanted.
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder" and not node.users:
            functional.graph.erase_node(node)
    functional.graph.eliminate_dead_code()
    _check_shapes(functional)
    placeholders = [node for node in functional.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.name = name
    return Trace(functional)


def _check_shapes(traced: fx.GraphModule) -> None:
    """Raises `ModelError` where a size is known only when the model runs, as after `x[x > 0]`."""
    for node in traced.graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
                module = (node.meta.get("custom") or {}).get("module", "")
                raise ModelError(
                    f"operator {operator_name(node.target)} {place_text(module)}: the size of its result depends on "
                    "the data; use torch.where instead of boolean indexing"
                )


class _Replay(fx.Interpreter):
    """Runs a recorded graph with the one hidden update made visible: batch norm changes its statistics in place."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.native_batch_norm.default:
            x, weight, bias, mean, variance, training, momentum, epsilon = args
            if training and mean is None:
                return torch.ops.aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, epsilon)
            if training:
                *results, new_mean, new_variance = torch.ops.aten._native_batch_norm_legit_functional(*args)
                mean.copy_(new_mean)
                variance.copy_(new_variance)
                return tuple(results)
        return super().call_function(target, args, kwargs)


_NATIVE = frozenset(
    f"aten::{name}"
    for name in [
        "convolution",
        "convolution_backward",
        "native_batch_norm",
        "native_batch_norm_backward",
        "native_layer_norm",
        "native_layer_norm_backward",
        "native_group_norm",
        "native_group_norm_backward",
        "embedding_dense_backward",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool2d_backward",
        "avg_pool2d_backward",
        "max_pool2d_with_indices_backward",
        "bernoulli",
        "bernoulli.p",
        "bernoulli_.float",
    ]
)
"""Operators that are lowered whole even where torch could take them apart."""


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's table, without the operators that our rules lower better whole."""
    return {
        operator: function
        for operator, function in core_aten_decompositions().items()  # type: ignore[no-untyped-call]
        if operator.name() not in _NATIVE and not is_known(operator)
    }


@contextmanager
def _module_paths(module: nn.Module) -> Iterator[list[str]]:
    """Note with every traced operation the path of its module; yields the stack of running modules."""
    stack: list[str] = []
    entered: list[Any] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            stack.append(path)
            annotation = fx_traceback.annotate({"module": path})
            annotation.__enter__()
            entered.append(annotation)

        return hook

    def leave(*_: object) -> None:
        stack.pop()
        entered.pop().__exit__(None, None, None)

    handles = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(enter(path), prepend=True))
        handles.append(part.register_forward_hook(leave))
    try:
        with fx_traceback.preserve_node_meta(), sdpa_kernel(SDPBackend.MATH):
            try:
                yield stack
            finally:
                while entered:  # after an error in a forward; before torch takes its own annotations back
                    entered.pop().__exit__(None, None, None)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns about itself while tracing, and logs a traceback before it raises; what a user needs is raised."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    if isinstance(error, _DATA_DEPENDENT):
        return "its computation depends on the data; use torch.where instead of if and item()"
    return _first_line(str(error).strip()) or type(error).__name__


def _user_line(error: BaseException) -> str:
    """The line of the user's own code that failed, as ` (model.py, line 12)`; empty when all of it was torch's."""
    inside = False
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == __file__ and frame.name == _call.__name__:
            inside = True
        elif inside and "/torch/" not in frame.filename and Path(frame.filename).is_file():
            found = f" ({Path(frame.filename).name}, line {frame.lineno})"
    return found


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
