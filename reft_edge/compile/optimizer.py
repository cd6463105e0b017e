"""Optimizer updates in ONNX: what `torch.optim.SGD` and `torch.optim.Adam` compute, one parameter after another.

Optimizer state travels through the graph as inputs and outputs beside the parameters. A fresh state is all zeros, for both
optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reft_edge.bundle.manifest import SGD, Adam, Optimizer
from reft_edge.compile.graph import GraphBuilder, Value


@dataclass
class Updates:
    """Adds the updates of all parameters to a graph."""

    graph: GraphBuilder
    optimizer: Optimizer
    learning_rate: Value
    new: dict[str, Value] = field(default_factory=dict)
    """Updated parameters and state, by the names of their inputs."""
    _step: Value | None = None

    def add(self, name: str, parameter: Value, grad: Value) -> None:
        """Update one parameter with its gradient."""
        if isinstance(self.optimizer, SGD):
            self._sgd(self.optimizer, name, parameter, grad)
        else:
            self._adam(self.optimizer, name, parameter, grad)

    def _scaled(self, value: Value, factor: float | Value) -> Value:
        number = factor if isinstance(factor, Value) else self.graph.scalar(factor, "float32")
        return self.graph.pointwise("Mul", value, number)

    def _sgd(self, options: SGD, name: str, parameter: Value, grad: Value) -> None:
        graph = self.graph
        if options.weight_decay:
            grad = graph.pointwise("Add", grad, self._scaled(parameter, options.weight_decay))
        direction = grad
        if options.momentum:
            key = f"momentum/{name}"
            old = graph.input(key, parameter.shape, "float32")
            direction = graph.pointwise("Add", self._scaled(old, options.momentum), grad)
            self.new[key] = direction
            if options.nesterov:
                direction = graph.pointwise("Add", grad, self._scaled(direction, options.momentum))
        self.new[name] = graph.pointwise("Sub", parameter, self._scaled(direction, self.learning_rate))

    def _adam(self, options: Adam, name: str, parameter: Value, grad: Value) -> None:
        graph = self.graph
        first_key, second_key = f"exp_avg/{name}", f"exp_avg_sq/{name}"
        first = graph.input(first_key, parameter.shape, "float32")
        second = graph.input(second_key, parameter.shape, "float32")
        if options.weight_decay:
            grad = graph.pointwise("Add", grad, self._scaled(parameter, options.weight_decay))
        first = graph.pointwise("Add", self._scaled(first, options.beta1), self._scaled(grad, 1 - options.beta1))
        square = graph.pointwise("Mul", grad, grad)
        second = graph.pointwise("Add", self._scaled(second, options.beta2), self._scaled(square, 1 - options.beta2))
        self.new[first_key], self.new[second_key] = first, second
        # Algorithm 1 with the corrections for the zero start moved to the scalars.
        root = graph.pointwise("Div", graph.pointwise("Sqrt", second), self._root_correction(options))
        rate = graph.pointwise("Div", self.learning_rate, self._correction(options.beta1))
        ratio = graph.pointwise("Div", first, graph.pointwise("Add", root, graph.scalar(options.epsilon, "float32")))
        self.new[name] = graph.pointwise("Sub", parameter, self._scaled(ratio, rate))

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

    def _root_correction(self, options: Adam) -> Value:
        return self.graph.pointwise("Sqrt", self._correction(options.beta2))
