"""What `reft-edge serve` tells Prometheus: requests, predictions by version, and how long they took.

Written here and not with prometheus-client, which takes 10 MiB of memory to add up a dozen numbers: on a board that is
as much as the model. Names and types follow Prometheus' conventions (text format 0.0.4).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from reft_edge.agent.serving.predictor import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper edges of the histogram's bins."""

_PREFIX = "reft_edge_serve"


class ServeMetrics:
    """Counters of one process. Any number of threads may use it at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._predictions: Counter[str] = Counter()
        self._bins = [0] * (len(SECONDS) + 1)
        self._seconds = 0.0

    def count_request(self, path: str, status: int) -> None:
        with self._lock:
            self._requests[path, status] += 1

    def count_predictions(self, version: str, n_samples: int, duration_s: float) -> None:
        """A request that was answered with predictions."""
        with self._lock:
            self._predictions[version] += n_samples
            self._bins[bisect_left(SECONDS, duration_s)] += 1
            self._seconds += duration_s

    def page(self, served: ServedModel | None) -> str:
        """Everything, in Prometheus' text format."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(served))

    def _lines(self, served: ServedModel | None) -> Iterator[str]:
        yield from _head("up", "gauge", "Whether a model is served.")
        yield f"{_PREFIX}_up {int(served is not None)}"
        if served is not None:
            yield from _head("model_info", "gauge", "What is served.")
            yield f"{_PREFIX}_model_info{_labels(version=served.version, model=served.model)} 1"
        yield from _head("requests_total", "counter", "Requests by what was answered.")
        for (path, status), count in sorted(self._requests.items()):
            yield f"{_PREFIX}_requests_total{_labels(path=path, status=str(status))} {count}"
        yield from _head("predictions_total", "counter", "Samples that were predicted.")
        for version, count in sorted(self._predictions.items()):
            yield f"{_PREFIX}_predictions_total{_labels(version=version)} {count}"
        yield from _head("prediction_seconds", "histogram", "Of a request: reading its body, predicting, answering.")
        edges = [f"{edge:g}" for edge in SECONDS] + ["+Inf"]
        for edge, count in zip(edges, accumulate(self._bins), strict=True):
            yield f"{_PREFIX}_prediction_seconds_bucket{_labels(le=edge)} {count}"
        yield f"{_PREFIX}_prediction_seconds_sum {self._seconds:.6f}"
        yield f"{_PREFIX}_prediction_seconds_count {sum(self._bins)}"


def _head(name: str, kind: str, about: str) -> Iterator[str]:
    yield f"# HELP {_PREFIX}_{name} {about}"
    yield f"# TYPE {_PREFIX}_{name} {kind}"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
