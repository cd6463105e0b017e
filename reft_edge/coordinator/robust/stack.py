"""All updates of a round side by side, without all of them in memory.

A robust rule compares what the devices sent for one entry, or one device's vector with another's, so it cannot add up
one update after another as the mean does. The updates are therefore written, once each, to a temporary file in the
layout of the *global* tensors, with NaN where a device's variant lacks the entry. Read back in slabs (the same range of
entries from every device) they are matrices (n_devices, n) in which devices with different variants stand in their
right places, and a rule only needs to know that NaN means "not held".

Disk: 4 bytes for each entry of the global model and each device (8 for integers). Memory: one update with its map and
two tensors of global size while writing, `SLAB_BYTES` a matrix while reading; neither grows with devices times model.
The file has no name, so a kill leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.coordinator.aggregation import ClientUpdate, check_fits
from reft_edge.errors import ResourceError

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

SLAB_BYTES = 16 * 2**20
"""16 MiB of float64 for all devices together. A rule makes a few copies of it: about 100 MiB in all."""


class UpdateStack:
    """The updates of one round. A context manager: leaving it frees the disk.

    `directory` holds the file; the system's place for temporary files by default. Boolean tensors are not in it:
    they do not move. Raises `FederationError` for an update that does not fit, `ResourceError` when the disk is full.
    """

    def __init__(
        self,
        global_tensors: Tensors,
        updates: Iterable[ClientUpdate],
        *,
        directory: Path | None = None,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        self._slab_bytes = slab_bytes
        self._shapes = {name: t.shape for name, t in global_tensors.items() if t.dtype != np.bool_}
        self._dtypes = {name: _stored_dtype(global_tensors[name]) for name in self._shapes}
        self._offsets: dict[str, int] = {}
        self._row_bytes = 0
        for name, shape in self._shapes.items():
            self._offsets[name] = self._row_bytes
            self._row_bytes += prod(shape) * self._dtypes[name].itemsize
        self.n_devices = 0
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as exc:
            raise _full(exc) from exc
        with ExitStack() as undo:
            undo.callback(self._file.close)
            for update in updates:
                check_fits(update, global_tensors)
                self._append(update)
                self.n_devices += 1
            undo.pop_all()

    def __enter__(self) -> UpdateStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that can move, in the model's order."""
        return tuple(self._shapes)

    def slabs(self, name: str) -> Iterator[tuple[slice, Array]]:
        """The tensor `name` in pieces: a range of flat entries of the global tensor, and what each device sent for it.

        That is float64 (n_devices, n), NaN where the device's variant lacks the entry.
        """
        n_entries, dtype = prod(self._shapes[name]), self._dtypes[name]
        n_slab = max(1, self._slab_bytes // (8 * max(1, self.n_devices)))
        for start in range(0, n_entries, n_slab):
            which = slice(start, min(start + n_slab, n_entries))
            values = np.empty((self.n_devices, which.stop - start), np.float64)
            for device in range(self.n_devices):
                offset = device * self._row_bytes + self._offsets[name] + start * dtype.itemsize
                values[device] = np.frombuffer(self._read(values.shape[1] * dtype.itemsize, offset), dtype)
            yield which, values

    def _append(self, update: ClientUpdate) -> None:
        for name, shape in self._shapes.items():
            placed = np.full(shape, np.nan, self._dtypes[name])
            if name in update.delta:
                update.channels.put(name, update.delta[name], into=placed)
            self._write(memoryview(placed.tobytes()))

    def _write(self, data: memoryview) -> None:
        try:
            while data:  # an unbuffered file may take a part
                data = data[self._file.write(data) :]
        except OSError as exc:
            raise _full(exc) from exc

    def _read(self, n_bytes: int, offset: int) -> bytes:
        parts = []
        while n_bytes:
            part = os.pread(self._file.fileno(), n_bytes, offset)
            if not part:
                raise ResourceError("the temporary file with the round's updates is shorter than what was written")
            parts.append(part)
            n_bytes, offset = n_bytes - len(part), offset + len(part)
        return b"".join(parts)


def _stored_dtype(tensor: Array) -> np.dtype[np.generic]:
    """float32 holds what devices send; integers and float64 need more."""
    return np.dtype(np.float32 if tensor.dtype in (np.float32, np.float16) else np.float64)


def _full(exc: OSError) -> ResourceError:
    return ResourceError(f"the round's updates cannot be laid side by side on the disk: {exc.strerror or exc}")
