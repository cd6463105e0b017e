"""What runs on a device. Never imports torch or the coordinator.

`reft_edge.agent.Predictor` predicts with the model that the device serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reft_edge.agent.serving.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for: the daemon is to stay without numpy and onnxruntime."""
    if name == "Predictor":
        from reft_edge.agent.serving.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
