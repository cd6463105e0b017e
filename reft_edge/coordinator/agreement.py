"""Teachers' weights by agreement: who says what the cohort says counts more.

KnFu (Seyedmohammadi et al., arXiv 2403.11892) fuses, for each client, the knowledge of the others on shared public data
with weights that fall exponentially with a Kullback-Leibler divergence, at a rate beta, so that a client learns from
those who know something for it. What was adapted:

- There is one student and no client's view of its own, so a teacher is compared with the cohort: with the median of all
  teachers' probabilities, class by class and rescaled to sum to 1, for each public sample. Less than half of the
  teachers cannot move it out of what the others say.
- Divergences are taken sample by sample and then averaged, instead of between average distributions: a teacher with
  flipped labels has the same average as an honest one when classes are balanced.
- Probabilities are those at temperature 1, whatever the student is taught with, and beta is 1. Chosen among 14 ways to
  weigh or join teachers on 3 seeds of scripts/benchmarks/attacks; KnFu's beta of 10, with probabilities at temperature
  4, came half a point lower there, less than seeds differ. An honest teacher that knows few classes diverges as well,
  so a sharper weight throws away what only few devices know.

With the median r and teacher k's probabilities p_k on public sample x:

    w_k  proportional to  exp(-beta D_k),      D_k = mean over x of KL( r(x) || p_k(x) ).

For regression D_k is the squared distance to the median output, in units of its median over the teachers.

Numbers of samples do not count here: they are the device's own word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from reft_edge.types import Array

BETA = 1.0

_SMALLEST_PROBABILITY = 1e-9
"""A class that a teacher rules out costs at most 21 nats a sample."""


def agreement_weights(divergences: Array) -> Array:
    """Weights that sum to 1, float64 (n_teachers,), from each teacher's divergence from the cohort."""
    weights = np.exp(-BETA * (divergences - divergences.min()))
    shares: Array = weights / weights.sum()
    return shares


def divergences_of_classes(probabilities: Sequence[Array]) -> Array:
    """D_k of each teacher, float64 (n_teachers,); `probabilities`: one (n_public, n_classes) for each."""
    cohort = np.median(np.stack(probabilities), axis=0) + _SMALLEST_PROBABILITY
    cohort /= cohort.sum(axis=-1, keepdims=True)
    log_cohort = np.log(cohort)
    found = [(cohort * (log_cohort - np.log(p + _SMALLEST_PROBABILITY))).sum(axis=-1).mean() for p in probabilities]
    return np.array(found)


def divergences_of_values(outputs: Sequence[Array]) -> Array:
    """The same for regression; `outputs`: one (n_public, *output_shape) for each teacher."""
    cohort = np.median(np.stack(outputs), axis=0)
    found = np.array([np.square(values - cohort, dtype=np.float64).mean() for values in outputs])
    usual = float(np.median(found))
    return found / usual if usual > 0 else np.where(found > 0, np.inf, 0.0)
