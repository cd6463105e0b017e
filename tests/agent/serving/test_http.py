"""Real requests to a real server: right ones are answered, wrong ones get one line of JSON, and no swap costs one."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reft_edge.agent.serving import http_server
from reft_edge.agent.serving.http_app import PredictionApp
from reft_edge.agent.serving.http_body import MAX_BODY_BYTES, MAX_JSON_BYTES, MAX_SAMPLES
from reft_edge.agent.serving.http_server import HttpServer
from reft_edge.agent.serving.predictor import Predictor
from reft_edge.agent.serving.slots import Slots
from reft_edge.errors import ModelError, ResourceError
from tests.agent.serving.onnx_files import SHAPE, linear_onnx, serve

TIMEOUT_S = 60


@dataclass
class Running:
    """A server in a thread, and a client for single requests."""

    server: HttpServer
    thread: threading.Thread

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.server.host, self.server.port, timeout=TIMEOUT_S)

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def post(self, body: bytes, **headers: str) -> tuple[int, dict]:
        status, answer, _ = self.ask("POST", "/predict", body, **headers)
        return status, json.loads(answer)

    def refused(self, body: bytes, **headers: str) -> tuple[int, str]:
        status, answer = self.post(body, **headers)
        assert answer.keys() == {"error"}
        assert "\n" not in answer["error"]
        return status, answer["error"]

    def end(self) -> None:
        self.server.stop()
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def start_it(source: Path, *, app: Callable | None = None, threads: int = 2) -> Running:
        predictor = Predictor(source)
        server = HttpServer(app or PredictionApp(predictor), host="127.0.0.1", port=0, threads=threads)
        thread = threading.Thread(target=server.run, kwargs={"each_turn": predictor.refresh}, daemon=True)
        begun.append(Running(server, thread))
        thread.start()
        return begun[-1]

    yield start_it
    for each in begun:
        if each.thread.is_alive():
            each.end()


@pytest.fixture
def birds(start, tmp_path: Path) -> Running:
    """Serves a file with class names, for gray pictures of 4 x 4; its second output is the sample's sum."""
    data = linear_onnx([2.0, 1.0], metadata={"classes": '["robin", "süß"]', "run": "run-3"})
    (tmp_path / "birds.onnx").write_bytes(data)
    return start(tmp_path / "birds.onnx")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool" / "serving").mkdir(parents=True)
    return tmp_path / "spool"


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, "white").save(file, format=kind)
    return file.getvalue()


def test_an_array_is_answered_sample_by_sample(birds):
    status, answer = birds.post(npy(np.ones((2, *SHAPE), np.float32)))
    assert (status, answer["version"], answer["model"]) == (200, "run-3", "birds")
    one, two = answer["predictions"]
    assert one == two
    assert (one["label"], one["index"], one["outputs"]) == ("robin", 0, [2.0, 1.0])
    assert one["confidence"] == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM"])
def test_a_picture_of_any_size_and_kind_is_one_sample(birds, kind):
    assert birds.post(picture(kind))[1]["predictions"][0]["label"] == "robin"


def test_a_picture_is_scaled_as_the_readers_of_training_data_do_it(start, tmp_path):
    (tmp_path / "sum.onnx").write_bytes(linear_onnx([0, 0], gain=1, metadata={"task": "regression"}))
    _, answer = start(tmp_path / "sum.onnx").post(picture(size=(4, 4)))
    assert answer["predictions"] == [{"outputs": [pytest.approx(16)] * 2}]


def test_json_and_every_layout_of_npy_say_the_same(birds):
    array = np.arange(32, dtype=np.float32).reshape(2, *SHAPE)
    expected = birds.post(npy(array))
    assert expected[0] == 200
    assert birds.post(json.dumps({"inputs": array.tolist()}).encode()) == expected
    for other in (array.astype(">f4"), array.astype(np.float64), np.asfortranarray(array), array.astype(np.int64)):
        assert birds.post(npy(other)) == expected
    assert birds.post(npy(array, version=(2, 0))) == expected


def test_a_body_in_chunks_is_taken(birds):
    connection = birds.connect()
    data = npy(np.ones((1, *SHAPE), np.float32))
    connection.request("POST", "/predict", iter([data[:7], data[7:100], data[100:]]), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 200
    connection.close()


def test_what_is_served_describes_itself(birds):
    status, body, headers = birds.ask("GET", "/model")
    found = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert found["input"] == {"shape": [1, 4, 4], "dtype": "float32", "pictures": True}
    assert found["output"] == {"shape": [2], "classes": ["robin", "süß"]}
    assert (found["version"], found["task"]) == ("run-3", "classification")


def test_a_plain_page_says_how_to_use_it(birds):
    status, body, headers = birds.ask("GET", "/", Host="pi.local:8090")
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert b"curl --data-binary @picture.jpg http://pi.local:8090/predict" in body


def test_only_the_head_is_sent_where_only_it_is_asked_for(birds):
    status, body, headers = birds.ask("HEAD", "/health")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


def test_health_waits_for_the_first_version_and_follows_an_undoing(start, spool):
    running = start(spool)
    status, body, headers = running.ask("GET", "/health")
    assert (status, headers["Retry-After"]) == (503, "5")
    assert "deploy one" in json.loads(body)["error"]
    assert running.refused(b"{}")[0] == 503
    assert b"reft_edge_serve_up 0" in running.ask("GET", "/metrics")[1]
    serve(spool, "v1", linear_onnx([0, 1]))
    assert running.ask("GET", "/health")[:2] == (200, b'{"status":"ok","version":"v1"}\n')
    Slots(spool / "serving").roll_back()
    while running.ask("GET", "/health")[0] == 200:
        pass
    assert running.ask("GET", "/health")[0] == 503


def test_a_version_is_taken_up_although_nobody_asks(spool, monkeypatch):
    monkeypatch.setattr(http_server, "_TURN_S", 0.02)
    predictor = Predictor(spool)
    server = HttpServer(PredictionApp(predictor), host="127.0.0.1", port=0, threads=1)
    loaded = threading.Event()

    def look() -> None:
        predictor.refresh()
        if predictor._served is not None:
            loaded.set()

    thread = threading.Thread(target=server.run, kwargs={"each_turn": look}, daemon=True)
    thread.start()
    serve(spool, "v1", linear_onnx([0, 1]))
    assert loaded.wait(TIMEOUT_S)
    server.stop()
    thread.join(TIMEOUT_S)


SAMPLE = np.ones((1, *SHAPE), np.float32)
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 4, 4), }\n"


def npy_of(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


BAD = {
    "nothing": (b"", 400, "the body is empty"),
    "no picture": (b"GIF89a but no more", 400, "the body: the picture cannot be read"),
    "half a picture": (picture("JPEG", size=(90, 90))[:200], 400, "the picture cannot be read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", 400, "not a picture"),
    "TIFF": (picture("TIFF"), 400, "not a picture"),
    "a large picture": (picture("PNG", "1", (5001, 5000)), 400, "has 5001 x 5000 pixels"),
    "JSON without inputs": (b'{"x": 1}', 400, 'the body is not {"inputs": [...]}'),
    "half JSON": (b'{"inputs": [[1, 2', 400, 'the body is not {"inputs": [...]}'),
    "a deep list": (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, 'the body is not {"inputs": [...]}'),
    "lists too deep for an array": (b'{"inputs": ' + b"[" * 90 + b"1" + b"]" * 90 + b"}", 400, "inputs "),
    "another shape": (b'{"inputs": [[1, 2]]}', 400, "inputs have shape (1, 2); birds.onnx takes (n, 1, 4, 4) float32"),
    "uneven rows": (b'{"inputs": [[1, 2], [1]]}', 400, "inputs do not make one array"),
    "many samples": (npy(np.zeros((MAX_SAMPLES + 1, *SHAPE), np.uint8)), 400, "10001 samples are more than 10000"),
    "text": (b'{"inputs": ["a"]}', 400, "inputs have shape (1,)"),
    "too much JSON": (b'{"inputs": [' + b" " * MAX_JSON_BYTES, 400, "send an array as .npy"),
    "not a number": (npy(SAMPLE * np.nan), 400, "inputs of sample 0 have NaN"),
    "npy of objects": (npy(np.array([None]), allow_pickle=True), 400, "not of an array of numbers"),
    "npy of records": (npy(np.zeros(1, dtype=[("a", "f4")])), 400, "not of an array of numbers"),
    "npy of text": (npy(np.array(["a"])), 400, "not of an array of numbers"),
    "npy that claims more": (npy_of(HEADER.replace(b"(1,", b"(99999999999,"), b"1234"), 400, "bytes, and has 4"),
    "npy that has more": (npy(SAMPLE) + b"1234", 400, "64 bytes, and has 68"),
    "npy without an end": (b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f4', 'fortran_order': False, 'shape': (1,)", 400, ""),
    "npy of a version to come": (npy(SAMPLE).replace(b"Y\x01", b"Y\x09", 1), 400, "a version that is not known"),
    "npy of eight bytes": (b"\x93NUMPY\x01\x00", 400, "a version that is not known"),
    "npy of a shape that is none": (npy_of(HEADER.replace(b"(1, ", b"(1  "), b"\0" * 64), 400, "not of an array of"),
    "npy that is code": (npy_of(b"{'descr': __import__('os').abort(), 'shape': (1,)}"), 400, "not of an array of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_a_4xx_with_one_line(birds, name):
    body, status, message = BAD[name]
    found, text = birds.refused(body)
    assert found == status
    assert message in text


def test_a_server_may_be_told_to_end_again_and_again(start, tmp_path):
    """As by somebody who presses Ctrl-C until it ends."""
    (tmp_path / "m.onnx").write_bytes(linear_onnx([0, 1]))
    running = start(tmp_path / "m.onnx")
    while running.thread.is_alive():
        running.server.stop()
    running.end()


def test_a_form_an_archive_and_a_picture_for_a_model_of_other_things_are_of_no_known_type(birds, start, tmp_path):
    assert birds.refused(b"--x", **{"Content-Type": "multipart/form-data; boundary=x"})[0] == 415
    archive = io.BytesIO()
    np.savez(archive, inputs=np.ones((2, *SHAPE)))
    assert birds.refused(archive.getvalue()) == (415, "archives (.npz) are not taken; send one array as .npy")
    (tmp_path / "sensor.onnx").write_bytes(linear_onnx([0, 1], shape=(6,)))
    status, text = start(tmp_path / "sensor.onnx").refused(picture())
    assert status == 415
    assert text.startswith("sensor.onnx takes (n, 6) float32; send an array")


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/predict", 405, "POST"),
        ("POST", "/model", 405, "GET"),
        ("DELETE", "/", 405, "GET"),
        ("GET", "/x", 404, None),
    ],
)
def test_what_is_not_there_says_so(birds, method, path, status, allowed):
    found, body, headers = birds.ask(method, path)
    assert (found, headers["Allow"]) == (status, allowed)
    assert json.loads(body).keys() == {"error"}


def raw(running: Running, data: bytes) -> bytes:
    """Send bytes that need be no HTTP; what is answered until the server closes."""
    with socket.create_connection((running.server.host, running.server.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(data)
        answer = b""
        with suppress(ConnectionResetError):  # it does not read all of what is too large
            while piece := connection.recv(65536):
                answer += piece
        return answer


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), 413),
        (b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000 + b"\r\n\r\n", 431),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400),
    ],
)
def test_what_never_reaches_the_application_is_json_too(birds, request_bytes, status):
    head, _, body = raw(birds, request_bytes).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body).keys() == {"error"}
    assert birds.ask("GET", "/health")[0] == 200


def test_an_error_of_ours_is_a_5xx_without_a_traceback(birds, monkeypatch):
    def fail(*_: object, **__: object):
        raise ModelError("the model fails on 1 samples")

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", fail)
        assert birds.refused(npy(SAMPLE)) == (500, "the model fails on 1 samples")
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", lambda *_, **__: 1 / 0)
        status, text = birds.refused(npy(SAMPLE))
    assert status == 500
    assert "Traceback" not in text
    assert "division" not in text
    assert birds.post(npy(SAMPLE))[0] == 200


def test_metrics_count_requests_and_predictions(birds):
    birds.post(npy(np.ones((5, *SHAPE), np.float32)))
    birds.post(b"")
    birds.ask("GET", "/a/b/c")
    lines = birds.ask("GET", "/metrics")[1].decode().splitlines()
    assert 'reft_edge_serve_predictions_total{version="run-3"} 5' in lines
    assert 'reft_edge_serve_requests_total{path="/predict",status="200"} 1' in lines
    assert 'reft_edge_serve_requests_total{path="/predict",status="400"} 1' in lines
    assert 'reft_edge_serve_requests_total{path="other",status="404"} 1' in lines
    assert 'reft_edge_serve_model_info{version="run-3",model="birds"} 1' in lines
    assert 'reft_edge_serve_prediction_seconds_bucket{le="+Inf"} 1' in lines


def test_prometheus_reads_the_metrics(birds):
    from prometheus_client.parser import text_string_to_metric_families

    birds.post(npy(SAMPLE))
    families = {each.name: each for each in text_string_to_metric_families(birds.ask("GET", "/metrics")[1].decode())}
    assert families["reft_edge_serve_predictions"].samples[0].value == 1
    assert families["reft_edge_serve_prediction_seconds"].type == "histogram"


def test_a_port_that_is_taken_is_one_line(birds):
    with pytest.raises(ResourceError, match=rf"nobody can listen at 127\.0\.0\.1:{birds.server.port}: .*--port"):
        HttpServer(lambda *_: [], host="127.0.0.1", port=birds.server.port, threads=1)


def test_stopping_answers_what_has_begun_and_closes_what_is_idle(start, tmp_path):
    (tmp_path / "m.onnx").write_bytes(linear_onnx([0, 1]))
    begun, may_end = threading.Semaphore(0), threading.Event()

    def slow(environ, start_response):
        begun.release()
        assert may_end.wait(TIMEOUT_S)
        start_response("200 OK", [("Content-Length", "5")])
        return [environ["wsgi.input"].read(5)]

    running = start(tmp_path / "m.onnx", app=slow, threads=1)
    idle = running.connect()
    idle.connect()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(running.ask, "POST", "/predict", b"%05d" % number) for number in range(2)]
        assert begun.acquire(timeout=TIMEOUT_S)
        channels = running.server._server.active_channels
        while len(channels) < 3 or sum(len(each.requests) for each in list(channels.values())) < 2:
            may_end.wait(0.001)  # until one is being answered, one waits for the thread, and one is idle
        running.server.stop()
        assert idle.sock.recv(1) == b"", "closed"
        with pytest.raises(ConnectionRefusedError):
            running.connect().connect()
        may_end.set()
        assert [call.result(TIMEOUT_S)[:2] for call in calls] == [(200, b"00000"), (200, b"00001")]
    running.thread.join(TIMEOUT_S)
    assert not running.thread.is_alive()
    idle.close()


N_CLIENTS = 4
N_SWAPS = 50


def numbered(number: int) -> bytes:
    """A model that says its number in each output."""
    return linear_onnx([number, number + 0.5, number])


def test_fifty_swaps_under_load_cost_no_request_and_mix_no_versions(start, spool):
    serve(spool, "v0", numbered(0))
    running = start(spool, threads=2)
    stop = threading.Event()
    seen = [0] * N_CLIENTS

    def client(index: int) -> int:
        connection, body, calls = running.connect(), npy(np.ones((3, *SHAPE), np.float32)), 0
        while not stop.is_set():
            connection.request("POST", "/predict", body)
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, text
            found = json.loads(text)
            number = int(found["version"].removeprefix("v"))
            assert [each["outputs"] for each in found["predictions"]] == [[number, number + 0.5, number]] * 3
            assert number >= seen[index], "a connection sees versions in their order"
            seen[index], calls = number, calls + 1
        connection.close()
        return calls

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        try:
            clients = [pool.submit(client, index) for index in range(N_CLIENTS)]
            for number in range(1, N_SWAPS + 1):
                serve(spool, f"v{number}", numbered(number))
                while min(seen) < number and not any(each.done() for each in clients):
                    stop.wait(0.001)
        finally:
            stop.set()
        calls = [each.result() for each in clients]
    assert seen == [N_SWAPS] * N_CLIENTS
    assert min(calls) > N_SWAPS
