"""Starting a child process that reads from us and answers, each over a pipe: the worker, and who looks at certificates.

With `posix_spawn`: the `subprocess` module would stay in the daemon with a megabyte.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import reft_edge
from reft_edge.errors import ResourceError

_PACKAGE_PARENT = str(Path(reft_edge.__file__).resolve().parent.parent)
"""A child runs the same package as the daemon, wherever that was imported from."""


class Child(NamedTuple):
    """A running process; whoever started it closes both descriptors and waits for its end."""

    pid: int
    requests: int
    """Descriptor of the end that we write, its standard input."""
    answers: int
    """Descriptor of the end that we read, its standard output."""


def start_child(module: str, *arguments: str) -> Child:
    """Run a module of this package with these arguments. Raises `ResourceError` if no process can be started."""
    requests_in, requests_out = os.pipe()
    answers_in, answers_out = os.pipe()
    command = [sys.executable, "-m", module, *arguments]
    actions = [(os.POSIX_SPAWN_DUP2, requests_in, 0), (os.POSIX_SPAWN_DUP2, answers_out, 1)]
    try:
        pid = os.posix_spawn(sys.executable, command, _environment(), file_actions=actions)
    except OSError as exc:
        os.close(requests_out)
        os.close(answers_in)
        raise ResourceError(f"no process can be started: {exc.strerror or exc}") from exc
    finally:
        os.close(requests_in)
        os.close(answers_out)
    return Child(pid, requests_out, answers_in)


def _environment() -> dict[str, str]:
    """The daemon's, with settings that keep a small process small."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (_PACKAGE_PARENT, os.environ.get("PYTHONPATH")))),
        # Each allocator arena reserves and fragments memory of its own; onnxruntime's threads allocate little.
        "MALLOC_ARENA_MAX": "2",
        # numpy multiplies no matrices here; its thread pool would only take memory.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
