"""Answer predictions over HTTP on this device, with the model that it serves.

Follows what is deployed: a new version takes over without a request that fails or waits, and a rollback too. Until
something is served, predictions and GET /health are answered with 503.

  POST /predict   the body is a picture, an array saved as .npy, or JSON {"inputs": [...]}
  GET /model      what is served, and what it takes
  GET /health     for a watchdog
  GET /metrics    for Prometheus
  GET /           how to use it

A prediction is {"version": ..., "model": ..., "predictions": [{"label": ..., "confidence": ..., ...}]}, an error is
{"error": ...}. There is no password: it listens on this machine only unless --host says otherwise. Ctrl-C or SIGTERM
answers what has begun, then ends.

examples:
  reft-edge serve agent.toml                                http://127.0.0.1:8090/
  reft-edge serve agent.toml --host 0.0.0.0 --threads 2     for cameras in the same trusted network
  reft-edge serve global.onnx --port 8091                   one file, for trying it out
"""

from __future__ import annotations

import argparse
import logging
import signal
from pathlib import Path
from types import FrameType

from reft_edge import logs
from reft_edge.agent.settings import AgentSettings, Limits
from reft_edge.cli.run_arguments import at_least_one, port_number

_log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        default=Path("agent.toml"),
        metavar="MODEL",
        help="an agent.toml, an agent's spool or an .onnx file (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8090, help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=at_least_one,
        metavar="N",
        help="requests to work on at a time, each on a core of its own (default: one a core, at most 4)",
    )
    parser.add_argument("--json", action="store_true", help="print the address as one JSON document")


def run(args: argparse.Namespace) -> int:
    from reft_edge.agent.serving.http_app import PredictionApp
    from reft_edge.agent.serving.http_server import HttpServer
    from reft_edge.agent.serving.predictor import Predictor

    if args.model.suffix == ".toml":
        logs.process_is_about(logs.Subject(device=AgentSettings.read(args.model).device))
    with Predictor(args.model) as predictor:
        threads = args.threads or Limits().n_threads
        server = HttpServer(PredictionApp(predictor), host=args.host, port=args.port, threads=threads)
        if not args.host.startswith("127.") and args.host not in ("localhost", "::1"):
            _log.warning("anybody who reaches %s:%d can use this model; there is no password", args.host, args.port)

        def stop(_number: int, _frame: FrameType | None) -> None:
            server.stop()

        previous = [(number, signal.signal(number, stop)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            if args.json:
                print(f'{{"address": "{server.address}"}}', flush=True)
            else:
                print(f"Serving at {server.address}   (Ctrl-C ends it)", flush=True)
            server.run(each_turn=predictor.refresh)
        finally:
            for number, handler in previous:
                signal.signal(number, handler)
    return 0
