"""`[aggregation]`: how updates become one step of the global model. Values and defaults only, no numpy.

Not part of what makes a run this run: a rule decides how a round's updates are joined, and what is stored between
rounds are weights of the same model under every rule. So it may change between restarts, as `[distillation]` may: who
finds out in the middle of a run that a device is hostile should not have to begin anew. A round that was cut off in its
merge is merged again, whole, with the new rule.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

_ROUNDING = 1e-9
"""A share of 0.2 of 15 devices is 3 of them, though 0.2 * 15 is a little above 3 in floating point."""


class AggregationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which rule merges the updates, and what it assumes."""

    rule: Literal["mean", "trimmed_mean", "median", "monna", "flag"] = "mean"
    """`mean` trusts every device and weighs it by its samples; the others count every device alike
    (`coordinator.robust`)."""
    divide_by: Literal["holders", "cohort"] = "holders"
    """For `mean`, where devices hold different parts of the model: what the sum of an entry's changes is divided by.
    That is the weights of those that hold the entry, or of all that took part: then what few devices hold moves less,
    and does not run after their few classes. Over several rounds `cohort` merges better models (digits, Dirichlet 0.1,
    5 rounds, 3 seeds: 92% against 74%, and after distilling 93% against 91%), in a single one worse."""
    hostile: Annotated[int, Meta(ge=0, le=1_000_000)] | Annotated[float, Meta(ge=0, lt=0.5)] = 0.2
    """Devices that may be hostile: how many (a whole number), or which share of those that took part in the round
    (below 0.5, rounded up). `trimmed_mean` and `monna` use it."""
    subspace: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """For `flag`: dimensions of the subspace that the updates are projected on. By default (n + 1) / 2 of the n devices
    that took part, rounded up, as in the paper."""

    def n_hostile(self, n_devices: int) -> int:
        """How many of `n_devices` to assume hostile: less than half of them, whatever the settings say."""
        wanted = self.hostile if isinstance(self.hostile, int) else ceil(self.hostile * n_devices - _ROUNDING)
        return max(0, min(wanted, (n_devices - 1) // 2))

    def n_dimensions(self, n_devices: int) -> int:
        """Dimensions of the subspace of `flag`."""
        return min(self.subspace or ceil((n_devices + 1) / 2), n_devices)
