"""What a fuzzing target is, and what every input is held to: documented errors only, bounded time, bounded memory.

A target takes bytes. Where the code under test takes a sequence of events, the bytes are a program for it, read through
`Choices`. The same targets serve the short run in the tests and the long one, `scripts/fuzz`.
"""

from __future__ import annotations

import contextlib
import logging
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

MAX_SECONDS = 5.0
"""CPU time of one input. Most take microseconds, the largest a second while allocations are counted, and twice that in
a process that holds much already; a hang, or work that grows faster than the input, takes longer."""

MAX_ERROR_CHARACTERS = 2100
"""Errors about what came from the network are logged: a peer must not choose their length, nor break their line."""


MAX_PROGRAM_BYTES = 400
"""Some hundred events: what takes more is not found by chance, and longer programs only cost time."""


class BrokenRuleError(Exception):
    """An input did what none may do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that parses bytes from elsewhere.

    `check` raises one of `errors`, or nothing; it asserts what must hold of what it accepts. `seeds` are valid inputs
    to begin with. `memory_bytes` is what one input may take at its peak, whatever it claims.
    """

    name: str
    check: Callable[[bytes], None]
    seeds: Sequence[bytes]
    errors: tuple[type[Exception], ...]
    memory_bytes: int
    text: bool = False
    """Whether inputs are JSON or TOML, so that structure-aware mutation is of use."""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No logs: what is refused is logged, and that is most of it."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run(target: Target, data: bytes) -> bool:
    """Try one input; whether it was accepted.

    Allocations of Python, numpy and msgspec are counted; what counts them keeps some KiB an input itself. Raises
    `BrokenRuleError`, or whatever the target should not have raised.
    """
    accepted = True
    tracemalloc.start(1)
    began = time.thread_time()
    try:
        target.check(data)
    except target.errors as exc:
        accepted = False
        _check_error(exc)
    finally:
        seconds = time.thread_time() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if seconds > MAX_SECONDS:
        raise BrokenRuleError(f"{seconds:.1f} s of CPU time for an input of {len(data)} bytes")
    if peak > target.memory_bytes:
        raise BrokenRuleError(f"{peak} bytes allocated for an input of {len(data)} bytes")
    return accepted


def _check_error(error: Exception) -> None:
    """One bounded line that can be printed and logged."""
    text = str(error)
    if len(text) > MAX_ERROR_CHARACTERS:
        raise BrokenRuleError(f"an error of {len(text)} characters: {text[:100]!r}") from error
    if not text.isprintable():
        raise BrokenRuleError(f"an error with control characters: {text!r}") from error


class Choices:
    """A program in bytes: each decision takes the next byte; a program that has ended decides 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data[:MAX_PROGRAM_BYTES]
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there is more to decide."""
        return self._at < len(self._data)

    def below(self, limit: int) -> int:
        """0 to `limit` - 1, of at most 256."""
        value = self._data[self._at] if self else 0
        self._at += 1
        return value % limit

    def one_of(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or what is left."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken
