"""Run a broker on this machine, for trying out: Mosquitto if it is installed, else the embedded one.

It asks nobody for a password and encrypts nothing, so it listens on this machine only unless --bind says otherwise. For
a fleet, run Mosquitto with the configuration in broker_config/.

examples:
  reft-edge broker                       on localhost:1883, until Ctrl-C
  reft-edge broker --port 1884 --kind embedded
  reft-edge broker --bind 0.0.0.0        for boards on the same trusted network
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from reft_edge.errors import BrokerError
from reft_edge.simulation.brokers import RunningBroker, start_broker

_log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=("auto", "mosquitto", "embedded"), default="auto", help="which broker (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=1883, help="TCP port; 0 for any free one (default: %(default)s)")
    parser.add_argument(
        "--bind", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--directory", type=Path, help="keep the broker's state and log here (default: a temporary directory)"
    )


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    if args.directory is not None:
        return _serve(args, args.directory)
    with tempfile.TemporaryDirectory(prefix="reft-edge-broker-") as directory:
        return _serve(args, Path(directory))


def _serve(args: argparse.Namespace, directory: Path) -> int:
    with start_broker(args.kind, directory=directory, port=args.port, bind=args.bind) as broker:
        print(f"{broker.kind} broker listens on {broker.address}; stop it with Ctrl-C", flush=True)
        if not args.bind.startswith("127.") and args.bind != "localhost":
            _log.warning("anybody who reaches %s can read and write; use it on a trusted network only", args.bind)
        try:
            status = broker.wait()
        except KeyboardInterrupt:
            print("broker stopped", file=sys.stderr)
            return 0
        raise _died(broker, status)


def _died(broker: RunningBroker, status: int | None) -> BrokerError:
    text = broker.log_path.read_text(encoding="utf-8", errors="replace").strip()
    last = text.splitlines()[-1][:500] if text else "it left no message"
    return BrokerError(f"the {broker.kind} broker ended with status {status}: {last}")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
