"""Optimizer updates in ONNX: what `torch.optim.SGD` and `torch.optim.Adam` compute.

Optimizer state travels through the graph as inputs and outputs beside the parameters. A fresh state is all zeros, for
both optimizers. Vectors (biases, norms' weights) are updated together, laid end to end: they are most of the tensors
and nearly none of the numbers, so one by one they would cost only overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_edge.bundle.manifest import SGD, Adam, Optimizer
from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.symbols import Shape, at_batch


@dataclass
class Updates:
    """Adds the updates of all parameters to a graph: `add` each, then `finish`."""

    graph: GraphBuilder
    optimizer: Optimizer
    learning_rate: Value
    new: dict[str, Value] = field(default_factory=dict)
    """Updated parameters and state, by the names of their inputs."""
    _vectors: list[tuple[str, Value, Value]] = field(default_factory=list)
    _step: Value | None = None

    def add(self, name: str, parameter: Value, grad: Value) -> None:
        """Update one parameter with its gradient."""
        if parameter.rank == 1:
            self._vectors.append((name, parameter, grad))
        else:
            self._update([name], [parameter], [grad])

    def finish(self) -> dict[str, Value]:
        """Updated parameters and state, by the names of their inputs."""
        if self._vectors:
            names, parameters, grads = zip(*self._vectors, strict=True)
            self._update(names, parameters, grads)
            self._vectors = []
        return self.new

    def _update(self, names: Sequence[str], parameters: Sequence[Value], grads: Sequence[Value]) -> None:
        """Update tensors together; several are vectors."""
        kinds = self._state_kinds()
        shapes = [parameter.shape for parameter in parameters]
        state: dict[str, Value] = {}
        for kind in kinds:
            olds = [
                self.graph.input(f"{kind}/{name}", shape, "float32") for name, shape in zip(names, shapes, strict=True)
            ]
            state[kind] = self._joined(olds)
        rule = self._sgd if isinstance(self.optimizer, SGD) else self._adam
        for kind, value in rule(self._joined(parameters), self._joined(grads), state).items():
            pieces = self._parted(value, shapes)
            prefix = f"{kind}/" if kind else ""
            self.new.update({f"{prefix}{name}": piece for name, piece in zip(names, pieces, strict=True)})

    def _state_kinds(self) -> tuple[str, ...]:
        if isinstance(self.optimizer, Adam):
            return ("exp_avg", "exp_avg_sq")
        return ("momentum",) if self.optimizer.momentum else ()

    def _joined(self, tensors: Sequence[Value]) -> Value:
        if len(tensors) == 1:
            return tensors[0]
        total = sum(_length(tensor.shape) for tensor in tensors)
        return self.graph.op("Concat", *tensors, shape=(total,), axis=0)

    def _parted(self, value: Value, shapes: Sequence[Shape]) -> tuple[Value, ...]:
        if len(shapes) == 1:
            return (value,)
        sizes = [_length(shape) for shape in shapes]
        return self.graph.node("Split", [value, self.graph.ints(sizes)], [((n,), value.dtype) for n in sizes], axis=0)

    def _scaled(self, value: Value, factor: float | Value) -> Value:
        number = factor if isinstance(factor, Value) else self.graph.scalar(factor, "float32")
        return self.graph.pointwise("Mul", value, number)

    def _decayed(self, parameter: Value, grad: Value) -> Value:
        """The gradient of loss plus L2 penalty."""
        if not self.optimizer.weight_decay:
            return grad
        return self.graph.pointwise("Add", grad, self._scaled(parameter, self.optimizer.weight_decay))

    def _sgd(self, parameter: Value, grad: Value, state: dict[str, Value]) -> dict[str, Value]:
        graph, options = self.graph, self.optimizer
        direction = grad = self._decayed(parameter, grad)
        new: dict[str, Value] = {}
        if isinstance(options, SGD) and "momentum" in state:
            direction = graph.pointwise("Add", self._scaled(state["momentum"], options.momentum), grad)
            new["momentum"] = direction
            if options.nesterov:
                direction = graph.pointwise("Add", grad, self._scaled(direction, options.momentum))
        new[""] = graph.pointwise("Sub", parameter, self._scaled(direction, self.learning_rate))
        return new

    def _adam(self, parameter: Value, grad: Value, state: dict[str, Value]) -> dict[str, Value]:
        graph, options = self.graph, self.optimizer
        if not isinstance(options, Adam):
            return {}  # pragma: no cover - the caller chose by type
        grad = self._decayed(parameter, grad)
        first = graph.pointwise(
            "Add", self._scaled(state["exp_avg"], options.beta1), self._scaled(grad, 1 - options.beta1)
        )
        square = self._scaled(graph.pointwise("Mul", grad, grad), 1 - options.beta2)
        second = graph.pointwise("Add", self._scaled(state["exp_avg_sq"], options.beta2), square)
        # Algorithm 1 with the corrections for the zero start moved to the scalars.
        correction = graph.pointwise("Sqrt", self._correction(options.beta2))
        root = graph.pointwise("Div", graph.pointwise("Sqrt", second), correction)
        rate = graph.pointwise("Div", self.learning_rate, self._correction(options.beta1))
        ratio = graph.pointwise("Div", first, graph.pointwise("Add", root, graph.scalar(options.epsilon, "float32")))
        new = graph.pointwise("Sub", parameter, self._scaled(ratio, rate))
        return {"": new, "exp_avg": first, "exp_avg_sq": second}

    def _count(self) -> Value:
        """The number of this step, from 1, float32 ()."""
        if self._step is None:
            old = self.graph.input("step", (), "float32")
            self._step = self.graph.pointwise("Add", old, self.graph.scalar(1, "float32"))
            self.new["step"] = self._step
        return self._step

    def _correction(self, beta: float) -> Value:
        """1 - beta^step."""
        power = self.graph.pointwise("Pow", self.graph.scalar(beta, "float32"), self._count())
        return self.graph.pointwise("Sub", self.graph.scalar(1, "float32"), power)


def _length(shape: Shape) -> int:
    """Size of a parameter that is a vector; parameters do not depend on the batch size."""
    return at_batch(shape, 1)[0]
