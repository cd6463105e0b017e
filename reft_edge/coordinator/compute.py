"""Where the coordinator computes: the GPU when torch has one, else the processor.

A module is moved for the work and moved back afterwards, so callers always find it on the processor, where weights
become numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def compute_device() -> torch.device:
    """The device for numeric work on the coordinator."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def on_compute_device(module: nn.Module) -> Iterator[torch.device]:
    """Move `module` to the compute device, in place, and back to the processor on leaving."""
    device = compute_device()
    module.to(device)
    try:
        yield device
    finally:
        module.to("cpu")
