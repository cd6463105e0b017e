"""What a model says about samples, and which model said it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_edge.types import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of `n` samples, all by one version."""

    version: str
    """What was deployed; of a plain ONNX file the run that it comes from, or its name."""
    model: str
    """Which of the version's models, for example `variant-0.50`."""
    outputs: FloatArray
    """(n, ...): as the model gives them."""
    probabilities: FloatArray | None
    """(n, n_classes), each row with sum 1; None for a model that predicts numbers and not classes."""
    classes: tuple[str, ...] = ()
    """Names in the order of the outputs; empty where they have none."""

    def __len__(self) -> int:
        return len(self.outputs)

    @property
    def indices(self) -> IntArray | None:
        """(n,): the most likely class; None for a model that predicts numbers."""
        return None if self.probabilities is None else self.probabilities.argmax(axis=1)

    @property
    def labels(self) -> tuple[str, ...]:
        """The most likely class by name, or by index where classes have no names; () where there are no classes."""
        indices = self.indices
        if indices is None:
            return ()
        return tuple(self.classes[index] if self.classes else str(index) for index in indices.tolist())

    @property
    def confidence(self) -> FloatArray | None:
        """(n,): the probability of the most likely class; None for a model that predicts numbers."""
        if self.probabilities is None:
            return None
        highest: FloatArray = self.probabilities.max(axis=1)
        return highest

    def rows(self) -> list[dict[str, object]]:
        """Each sample's outputs and, of a classifier, label, its index and its probability, for JSON."""
        outputs = self.outputs.tolist()
        indices, confidence = self.indices, self.confidence
        if indices is None or confidence is None:
            return [{"outputs": each} for each in outputs]
        columns = zip(self.labels, indices.tolist(), confidence.tolist(), outputs, strict=True)
        return [
            {"label": label, "index": index, "confidence": share, "outputs": each}
            for label, index, share, each in columns
        ]
