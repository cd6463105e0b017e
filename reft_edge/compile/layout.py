"""Tensors that a training graph keeps with the batch axis last.

onnxruntime takes a convolution picture by picture: its products are as wide as a picture has positions, and threads
meet once a picture. With the batch behind the positions, (channels, *positions, n_batch), the same operator sees one
picture that is as wide as the batch. Products are then wide however small the pictures are, shifted pictures are copied
in runs of a batch, the entries of a channel are one row, for batch norm's sums, and the places of a pooling window are
whole runs that are compared at once.

Only training graphs use it: inference must be quick for one sample, too. Rules that take such tensors say so when they
are registered; all others get the batch first, through a transposition.
"""

from __future__ import annotations

from dataclasses import dataclass

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.symbols import Dim, Shape, n_elements


@dataclass(frozen=True)
class BatchLast:
    """A tensor whose first axis is stored behind all others."""

    stored: Value

    @property
    def shape(self) -> Shape:
        """As torch has it: (n_batch, channels, *positions)."""
        return (self.stored.shape[-1], *self.stored.shape[:-1])

    @property
    def rank(self) -> int:
        return self.stored.rank

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def channels(self) -> Dim:
        return self.stored.shape[0]


def behind(shape: Shape) -> Shape:
    """A shape with its first axis moved behind the others."""
    return (*shape[1:], shape[0])


def batch_first(graph: GraphBuilder, value: BatchLast) -> Value:
    """The tensor as torch stores it."""
    last = value.rank - 1
    return graph.transpose(value.stored, (last, *range(last)))


def batch_last(graph: GraphBuilder, value: Value | BatchLast, rank: int | None = None) -> Value:
    """The tensor as stored with the batch last; a smaller one so that it broadcasts against others of `rank`."""
    if isinstance(value, BatchLast):
        return value.stored
    if value.rank == 0:
        return value
    missing = max((rank or value.rank) - value.rank, 0)
    shape: Shape = (*((1,) * missing), *value.shape)
    if shape[0] == 1:
        return graph.reshape(value, behind(shape))
    return graph.transpose(value, (*range(1, value.rank), 0))


def rows(graph: GraphBuilder, value: Value) -> Value:
    """One row a channel: (channels, positions * n_batch)."""
    return graph.reshape(value, (value.shape[0], n_elements(value.shape[1:])))
