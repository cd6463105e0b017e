"""Structured pruning: a smaller module out of a larger one, and the map between the two.

`Pruner` traces a module once, finds which channels can go (`compile.dependencies`), proves for each group of channels
that the smaller module is the larger one with those channels switched off (`compile.equivalence`), and ranks them by an
importance that does not depend on the ratio. Every variant it then makes takes well under a second, is the same for the
same weights and options, and holds a subset of the channels of each larger one.

The model's outputs are never pruned, nor is what cannot be pruned safely: such channels stay whole. A model of which
nothing can be pruned is an error. The module given is not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from reft_edge.compile.balance import balance
from reft_edge.compile.dependencies import ChannelGroup, Dissection
from reft_edge.compile.equivalence import agrees
from reft_edge.compile.importance import Importance, find_importance, score
from reft_edge.compile.sizes import Size, SizeModel, measure, run
from reft_edge.errors import ConfigError, ModelError, PlanError

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.compile.channels import ChannelMap
    from reft_edge.types import IntArray

logger = logging.getLogger(__name__)

Scope = Literal["uniform", "global"]
"""`uniform`: the same ratio in every group. `global`: one ranking over all groups, so that each loses what matters
least; no group falls below `GLOBAL_FLOOR`."""

GLOBAL_FLOOR = 1 / 16
"""Under global ranking every group keeps at least this share, lest one layer vanish and cut the model in two."""

_STEPS = 1024
"""Ratios that a budget is searched over: multiples of 1/1024, finer than any layer of usual width can tell apart."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A pruned module on the CPU, with its weights, and where its tensors lie in the global ones."""

    module: nn.Module
    channels: ChannelMap
    ratio: float
    """Share of the channels that was asked to go."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper limits; what is None is not limited."""

    parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates of one sample's forward pass."""
    weight_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.parameters is None and self.macs is None and self.weight_bytes is None:
            raise ConfigError("a budget needs a limit: parameters, macs or weight_bytes")

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are set, by the fields of `Size`."""
        every = {"parameters": self.parameters, "macs": self.macs, "weight_bytes": self.weight_bytes}
        return {quantity: limit for quantity, limit in every.items() if limit is not None}

    def allows(self, size: Size) -> bool:
        return all(getattr(size, quantity) <= limit for quantity, limit in self.limits.items())

    def __str__(self) -> str:
        units = {"parameters": "parameters", "macs": "multiply-accumulates", "weight_bytes": "bytes"}
        return ", ".join(f"{limit:,} {units[quantity]}" for quantity, limit in self.limits.items())


class Pruner:
    """Makes variants of one module with its present weights.

    `input_shape`: one sample, without the batch axis. `importance`: "magnitude", "random", "first", or a function
    (`compile.importance`); `seed` is for "random". Raises `ModelError` when the module cannot be traced or run, or when
    none of its channels can go.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        input_shape: tuple[int, ...],
        importance: str | Importance = "magnitude",
        input_dtype: str = "float32",
        scope: Scope = "uniform",
        seed: int = 0,
    ) -> None:
        if scope not in ("uniform", "global"):
            raise ConfigError(f"unknown scope {scope!r}; known are uniform, global")
        function = find_importance(importance)
        for name, value in module.state_dict().items():
            if not isinstance(value, torch.Tensor):
                raise ModelError(f"the model's state {name!r} is {type(value).__name__}; only tensors can be pruned")
        self._module = module
        self._scope = scope
        self._example = _example(module, input_shape, input_dtype, n_samples=1)
        run(module, self._example)
        self._check_example = _example(module, input_shape, input_dtype, n_samples=2)
        run(module, self._check_example)
        self.groups = self._safe_groups()
        self._sizes = SizeModel(module, self.groups, self._example)
        tensors = {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}
        trained = {name for name, _ in module.named_parameters()}
        self._scores = {group.name: score(group, tensors, trained, function, seed) for group in self.groups}
        # Ties are broken by position, so that equal weights give equal variants.
        self._order: dict[str, IntArray] = {
            name: np.argsort(-scores, kind="stable") for name, scores in self._scores.items()
        }
        self._balanced: dict[tuple[Budget, int], dict[str, int]] = {}

    def prune(self, ratio: float, *, round_to: int = 1, within: Budget | None = None) -> Variant:
        """The variant without the share `ratio`, in [0, 1), of the channels of each group.

        Each group keeps at least one channel; `round_to` rounds the number it keeps down to a multiple, where there
        are as many. With `within`, `ratio` is the share of all channels that goes, and each group loses the same share
        of what the balanced variant of that budget keeps; `ratio` is then at least that variant's.
        """
        if within is None:
            return self._variant(self._kept(ratio, round_to), ratio)
        return self._variant(self._kept_within(within, ratio, round_to), ratio)

    def fit(self, budget: Budget, *, round_to: int = 1, balanced: bool = False) -> Variant:
        """The variant with the smallest ratio that `budget` allows. Raises `PlanError` when none does.

        `balanced`: each group gets a width of its own, so that no limit is left unused (`compile.balance`); the
        variant's ratio is then the share of all channels that went.
        """
        if balanced:
            return self._fit_balanced(budget, round_to)

        def predicted(step: int) -> bool:
            return budget.allows(self._sizes.size(self._kept(step / _STEPS, round_to)))

        def measured(step: int) -> bool:
            return budget.allows(measure(self.prune(step / _STEPS, round_to=round_to).module, self._example.cpu()))

        step = _smallest(predicted, _STEPS)
        if step is None or not measured(step):  # predictions may be too large, in models that split channels too small
            step = _smallest(measured, _STEPS)
        if step is None:
            raise self._too_small(budget, self.prune(1 - 1 / _STEPS, round_to=round_to))
        return self.prune(step / _STEPS, round_to=round_to)

    def _fit_balanced(self, budget: Budget, round_to: int) -> Variant:
        kept = self._kept_balanced(budget, round_to)
        variant = self._variant(kept, self._share_gone(kept))
        if not budget.allows(measure(variant.module, self._example.cpu())):
            raise PlanError(f"the widths of this model cannot be balanced within {budget}; prune it uniformly")
        return variant

    def _kept_balanced(self, budget: Budget, round_to: int) -> dict[str, int]:
        """Solved once for each budget: it takes seconds for a large model."""
        key = (budget, round_to)
        if key not in self._balanced:
            kept = balance(self._sizes, budget.limits, round_to=round_to)
            if kept is None:
                least = {group.name: min(round_to, group.n_units) for group in self.groups}
                raise self._too_small(budget, self._variant(least, 1.0))
            self._balanced[key] = kept
        return self._balanced[key]

    def _kept_within(self, budget: Budget, ratio: float, round_to: int) -> dict[str, int]:
        largest = self._kept_balanced(budget, round_to)
        least_ratio = self._share_gone(largest)
        if not least_ratio <= ratio < 1:
            raise ConfigError(
                f"within {budget} a pruning ratio is at least {least_ratio:.4g} and below 1, not {ratio!r}"
            )
        share = (1 - ratio) / (1 - least_ratio)
        return {name: _fewer(n, share, round_to) for name, n in largest.items()}

    def _share_gone(self, kept: Mapping[str, int]) -> float:
        return 1 - sum(kept.values()) / sum(group.n_units for group in self.groups)

    def _too_small(self, budget: Budget, smallest: Variant) -> PlanError:
        least = measure(smallest.module, self._example.cpu())
        return PlanError(
            f"no variant fits {budget}: the smallest has {least.parameters:,} parameters, "
            f"{least.macs:,} multiply-accumulates and {least.weight_bytes:,} bytes"
        )

    def _kept(self, ratio: float, round_to: int) -> dict[str, int]:
        """How many units each group keeps."""
        if not 0 <= ratio < 1:
            raise ConfigError(f"a pruning ratio is at least 0 and below 1, not {ratio!r}")
        if round_to < 1:
            raise ConfigError(f"round_to is at least 1, not {round_to!r}")
        if self._scope == "uniform":
            return {group.name: _fewer(group.n_units, 1 - ratio, round_to) for group in self.groups}
        kept = self._kept_globally(ratio)
        return {
            group.name: max(kept[group.name] // round_to * round_to, min(round_to, group.n_units))
            for group in self.groups
        }

    def _kept_globally(self, ratio: float) -> dict[str, int]:
        """The units above one threshold for all groups, and at least `GLOBAL_FLOOR` of each group."""
        scores = np.concatenate([self._scores[group.name] for group in self.groups])
        n_kept = max(1, int(len(scores) * (1 - ratio) + 1e-9))
        threshold = np.sort(scores)[::-1][n_kept - 1]
        return {
            group.name: max(int((self._scores[group.name] >= threshold).sum()), ceil(group.n_units * GLOBAL_FLOOR))
            for group in self.groups
        }

    def _variant(self, kept: Mapping[str, int], ratio: float) -> Variant:
        removals = {name: sorted(self._order[name][n:].tolist()) for name, n in kept.items()}
        module, channels = Dissection(self._module, self._example).cut(removals)
        run(module, self._check_example.cpu())
        return Variant(module=module, channels=channels, ratio=ratio)

    def _safe_groups(self) -> tuple[ChannelGroup, ...]:
        """The groups whose channels can go. All at once is the usual case; else each is tried alone."""
        groups = Dissection(self._module, self._example).groups
        if groups and self._is_safe(groups):
            return groups
        safe: tuple[ChannelGroup, ...] = ()
        for group in groups:
            if self._is_safe((*safe, group)):
                safe += (group,)
            else:
                logger.debug("the channels of %s stay whole: the model depends on their number", group.name)
        if not safe:
            raise ModelError(
                "no channel of the model can be pruned: each belongs to its output, or the model's code depends on it"
            )
        return safe

    def _is_safe(self, groups: tuple[ChannelGroup, ...]) -> bool:
        """Whether a variant without every second unit of `groups` computes the model with those switched off."""
        removals = {group.name: range(0, group.n_units - 1, 2) for group in groups}
        try:
            module, channels = Dissection(self._module, self._example).cut(removals)
        except ModelError:
            return False
        return agrees(module, channels, self._module, self._check_example)


def prune(
    module: nn.Module,
    *,
    input_shape: tuple[int, ...],
    ratio: float,
    importance: str | Importance = "magnitude",
    input_dtype: str = "float32",
    scope: Scope = "uniform",
    round_to: int = 1,
    seed: int = 0,
) -> Variant:
    """One variant of `module`; see `Pruner` for the arguments and for more than one."""
    pruner = Pruner(
        module, input_shape=input_shape, importance=importance, input_dtype=input_dtype, scope=scope, seed=seed
    )
    return pruner.prune(ratio, round_to=round_to)


def prune_to(
    module: nn.Module,
    *,
    input_shape: tuple[int, ...],
    budget: Budget,
    importance: str | Importance = "magnitude",
    input_dtype: str = "float32",
    scope: Scope = "uniform",
    round_to: int = 1,
    seed: int = 0,
    balanced: bool = False,
) -> Variant:
    """The largest variant of `module` within `budget`; see `Pruner.fit`."""
    pruner = Pruner(
        module, input_shape=input_shape, importance=importance, input_dtype=input_dtype, scope=scope, seed=seed
    )
    return pruner.fit(budget, round_to=round_to, balanced=balanced)


def _fewer(n: int, share: float, round_to: int) -> int:
    """The part `share` of `n` units, down to a multiple of `round_to`, and never none."""
    return max(int(n * share + 1e-9) // round_to * round_to, min(round_to, n))


def _smallest(holds: Callable[[int], bool], end: int) -> int | None:
    """The smallest number below `end` for which a monotone condition holds, by bisection; None if it never does."""
    low, high = 0, end  # holds(high) is true, or high is `end`
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low if low < end else None


def _example(module: nn.Module, input_shape: tuple[int, ...], input_dtype: str, *, n_samples: int) -> torch.Tensor:
    """A random input on the device of the module, the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    shape = (n_samples, *input_shape)
    if input_dtype == "float32":
        example = torch.randn(shape, generator=generator)
    elif input_dtype == "int64":
        sizes = [layer.num_embeddings for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
        example = torch.arange(prod(shape)).reshape(shape) % min(sizes, default=2)
    else:
        raise ConfigError(f"input dtype {input_dtype!r} is not float32 or int64")
    parameter = next(module.parameters(), None)
    return example if parameter is None else example.to(parameter.device)
