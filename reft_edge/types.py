"""Type aliases that several packages share. Imports nothing heavy at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]
    FloatArray: TypeAlias = NDArray[np.float32]
    IntArray: TypeAlias = NDArray[np.int64]
    Tensors: TypeAlias = Mapping[str, Array]
    """Named tensors, under the names of a torch module's `state_dict()`."""
