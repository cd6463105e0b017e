"""Flag Aggregator (Almasi et al., arXiv 2302.05865): the mean, projected on the subspace that explains most devices.

With the updates as columns, divided by their lengths, G = [g_1 ... g_n], the paper calls v_a = |Y' g_a|^2 the share of
device a that an m-dimensional subspace with orthonormal basis Y explains, and takes the Y that is most likely when the
shares follow a Beta density: Y minimises  sum_a sqrt(1 - v_a), which cares less for what lies far outside than least
squares would. It is found by iteratively reweighted least squares: Y are the m first left singular vectors of
G W^(1/2) with W = diag(1 / sqrt(1 - v_a)), then v again, and so on. m is (n + 1) / 2, rounded up. The step is

    d = 1/n  Y Y' sum_a s_a g_a.

Only inner products are needed. With K = G'G and its root R = K^(1/2), the columns of R lie to each other as those of G
do, so everything happens in n dimensions, and as Y = G R^+ U for U found there, d = 1/n sum_a c_a g_a with

    c = R^+ U U' R s.

What was adapted:

- s_a, a length. The authors' program joins unit vectors (and divides by m), which forgets how far to step and makes
  much of a device that learned nothing; updates as they are would let one long update take the whole step. Here s_a is
  the device's own length, cut to the median of the cohort's, and the sum is divided by n, so that equal updates move
  the model by that update.
- Variants that differ. A missing entry is 0 in inner products, so K stays a matrix of inner products (and positive
  semi-definite). Lengths are compared for each entry held, |x_a| / sqrt(|S_a|), so that a large variant is not cut for
  being large. An entry that k of n devices hold moves by n / k times its part of d, as in the mean over those k.
- The paper's second term, over pairs of devices (its weight lambda), is left out; 0 is the authors' default.

With m = n and equal lengths it is the mean. It is not a rule with a breakdown point: a projection does not know signs,
so an update turned round lies in the subspace as well as the honest one did, and a few updates orthogonal to all others
may well get a dimension of their own. What it does is to bound lengths and to take out directions that few share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from reft_edge.types import Array

MAX_ITERATIONS = 20
"""The weights settle within a few; the authors stop after one."""

TOLERANCE = 1e-9
"""Of the explained shares, from one iteration to the next."""

_SMALLEST_SHARE = 1e-7
"""Added to 1 - v, so that a device explained wholly has a finite weight (the authors' value)."""

_SMALLEST_EIGENVALUE = 1e-10
"""Of K, relative to the largest: below it, directions are rounding."""


def factors(products: Array, n_held: Array, dimensions: int) -> Array:
    """What each update is multiplied with before the mean over the devices that hold an entry; ones are the mean.

    `products`: inner products of the updates, float64 (n, n); `n_held`: parameters that each holds, (n,). Returns
    float64 (n,), with 0 for an update that is 0.
    """
    lengths = np.sqrt(np.diagonal(products))
    moving = lengths > 0
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=moving)
    root, pseudo_inverse = _roots(products * np.outer(inverse, inverse))
    basis = _fit(root, dimensions)
    cut = _cut_lengths(lengths, n_held)
    result: Array = pseudo_inverse @ (basis @ (basis.T @ (root @ cut))) * inverse
    return result


def combine(values: Array, multipliers: Array) -> Array:
    """The step of each column of `values`, float64 (n_devices, n) with NaN where not held, to (n,), NaN where nobody
    holds it. `multipliers` are those of `factors`."""
    held = ~np.isnan(values)
    total = multipliers @ np.where(held, values, 0.0)
    n_held = np.count_nonzero(held, axis=0)
    step: Array = np.divide(total, n_held, out=np.full(total.shape, np.nan), where=n_held > 0)
    return step


def _roots(gram: Array) -> tuple[Array, Array]:
    """Symmetric square root of a Gram matrix and its pseudo-inverse, both (n, n)."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > _SMALLEST_EIGENVALUE * max(float(eigenvalues[-1]), 0.0)
    roots = np.sqrt(np.where(kept, eigenvalues, 0.0))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=kept)
    return (vectors * roots) @ vectors.T, (vectors * inverses) @ vectors.T


def _fit(points: Array, dimensions: int) -> Array:
    """An orthonormal basis (n, m) of the subspace that explains the columns of `points`, unit vectors (n, n)."""
    weights = np.ones(len(points))
    shares = np.full(len(points), np.inf)
    for _ in range(MAX_ITERATIONS):
        basis: Array = np.linalg.svd(points * np.sqrt(weights))[0][:, :dimensions]
        before, shares = shares, np.square(basis.T @ points).sum(axis=0)
        if np.abs(shares - before).max() < TOLERANCE:
            break
        weights = 1.0 / np.sqrt(np.maximum(1.0 - shares, 0.0) + _SMALLEST_SHARE)
    return basis


def _cut_lengths(lengths: Array, n_held: Array) -> Array:
    """Lengths of the updates, none longer for an entry held than the median of those that are not 0."""
    scales = np.sqrt(np.maximum(n_held, 1.0))
    per_entry = lengths / scales
    if not (per_entry > 0).any():
        return lengths
    cut: Array = np.minimum(per_entry, np.median(per_entry[per_entry > 0])) * scales
    return cut
