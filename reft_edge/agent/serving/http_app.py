"""The local HTTP endpoint as a WSGI application: pictures and arrays in, predictions out.

    POST /predict   a picture, an array as .npy, or JSON {"inputs": [...]}
    GET /model      what is served, and what it takes
    GET /health     200, or 503 until something is served
    GET /metrics    for Prometheus
    GET /           how to use it

Whatever is wrong is one line of JSON, {"error": ...}: 4xx where the request is, 5xx where we are. A model that is
switched to meanwhile costs no request: a body is read for the version that then predicts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from reft_edge.agent.serving import http_metrics
from reft_edge.agent.serving.http_body import MAX_BODY_BYTES, UnknownBodyError, read_inputs
from reft_edge.agent.serving.predictor import NothingServedError, Predictor, ServedModel
from reft_edge.errors import DataError, ReftError, ResourceError

if TYPE_CHECKING:
    from reft_edge.agent.serving.prediction import Prediction

    Environ = dict[str, Any]
    StartResponse = Callable[[str, list[tuple[str, str]]], object]

USAGE = """\
reft-edge serve: predicts with the model that this device serves.

POST /predict   the body is a picture, an array saved as .npy, or JSON {"inputs": [...]}; at most 32 MiB
GET /model      what is served, and what it takes
GET /health     200, or 503 until something is served
GET /metrics    for Prometheus

examples:
  curl --data-binary @picture.jpg HERE/predict
  curl --data-binary @samples.npy HERE/predict
  curl --json '{"inputs": [[0.1, 0.2, 0.3]]}' HERE/predict
"""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is answered."""

    status: HTTPStatus = HTTPStatus.OK
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class RequestError(ReftError):
    """A request that cannot be answered, whatever its body is."""

    def __init__(self, status: HTTPStatus, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers


class PredictionApp:
    """The WSGI application over `predictor`. Any number of threads may call it at a time."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._metrics = http_metrics.ServeMetrics()
        self._routes: Mapping[str, tuple[str, Callable[[Environ], Response]]] = {
            "/predict": ("POST", self._predict),
            "/model": ("GET", self._model),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._show_metrics),
            "/": ("GET", self._usage),
        }

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO") or "/"
        try:
            response = self._answer(path, environ)
        except ReftError as exc:
            response = _refusal(exc)
        self._metrics.count_request(path if path in self._routes else "other", response.status)
        start_response(
            f"{response.status.value} {response.status.phrase}",
            [
                ("Content-Type", response.content_type),
                ("Content-Length", str(len(response.body))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                *response.headers.items(),
            ],
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [response.body]

    def _answer(self, path: str, environ: Environ) -> Response:
        if path not in self._routes:
            raise RequestError(HTTPStatus.NOT_FOUND, f"there is nothing at {path!r}; GET / says what there is")
        method, answer = self._routes[path]
        asked = environ["REQUEST_METHOD"]
        if asked != method and (asked, method) != ("HEAD", "GET"):
            raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {method}, not {asked}", Allow=method)
        return answer(environ)

    def _predict(self, environ: Environ) -> Response:
        begun = time.perf_counter()
        body = _body(environ)
        served = self._predictor.served()
        inputs = read_inputs(body, environ.get("CONTENT_TYPE", ""), served.onnx)
        prediction = self._predictor.predict(inputs, by=served)
        response = _json(answer_of(prediction))
        self._metrics.count_predictions(prediction.version, len(prediction), time.perf_counter() - begun)
        return response

    def _model(self, _: Environ) -> Response:
        return _json(description_of(self._predictor.served()))

    def _health(self, _: Environ) -> Response:
        return _json({"status": "ok", "version": self._predictor.served().version})

    def _show_metrics(self, _: Environ) -> Response:
        try:
            served = self._predictor.served()
        except NothingServedError:
            served = None
        return Response(body=self._metrics.page(served).encode(), content_type=http_metrics.CONTENT_TYPE)

    def _usage(self, environ: Environ) -> Response:
        here = f"http://{environ.get('HTTP_HOST') or 'localhost'}"
        return Response(body=USAGE.replace("HERE", here).encode(), content_type="text/plain; charset=utf-8")


def answer_of(prediction: Prediction) -> dict[str, object]:
    """What is said of a prediction."""
    return {"version": prediction.version, "model": prediction.model, "predictions": prediction.rows()}


def description_of(served: ServedModel) -> dict[str, object]:
    """What is served, and what it takes."""
    onnx = served.onnx
    return {
        "version": served.version,
        "model": served.model,
        "deployment": served.deployment,
        "precision": served.precision,
        "sha256": served.sha256,
        "input": {"shape": onnx.sample_shape, "dtype": onnx.dtype.name, "pictures": onnx.takes_pictures},
        "output": {"shape": onnx.output_shape, "classes": onnx.classes},
        "task": "classification" if onnx.is_classifier else "regression",
    }


def _body(environ: Environ) -> bytes:
    """The request's body. The server bounds it, too; without a length it has found the end."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isdecimal():
        raise RequestError(HTTPStatus.BAD_REQUEST, f"Content-Length {length!r} is not a number")
    if int(length) > MAX_BODY_BYTES:
        raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY_BYTES} bytes")
    body: bytes = environ["wsgi.input"].read(int(length))
    return body


def _refusal(error: ReftError) -> Response:
    headers: Mapping[str, str] = {}
    if isinstance(error, RequestError):
        status, headers = error.status, error.headers
    elif isinstance(error, UnknownBodyError):
        status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    elif isinstance(error, DataError):
        status = HTTPStatus.BAD_REQUEST
    elif isinstance(error, (NothingServedError, ResourceError)):
        status, headers = HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "5"}
    else:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    return _json({"error": str(error)}, status=status, headers=headers)


def _json(value: object, *, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status=status, body=msgspec.json.encode(value) + b"\n", headers=headers or {})
