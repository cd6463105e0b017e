"""Look at a federation in a browser: the fleet, a round and a deployment as they happen, curves, models, what was
rejected, and devices whose predictions depart from the others'.

Reads what the coordinator has written, on the machine where its output directory is, so it can be started before,
beside and after the coordinator, and shows the latest run. Pages change by themselves and need no internet. There is no
password: it listens on this machine only unless --host says otherwise; through ssh -L 8080:localhost:8080 it is seen
from elsewhere.

examples:
  reft-edge dashboard federation.toml                       http://localhost:8080/
  reft-edge dashboard federation.toml --port 8090
  reft-edge dashboard federation.toml --host 0.0.0.0        for a phone in the same trusted network
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from reft_edge.cli.run_arguments import port_number

_log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8080, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from reft_edge.coordinator.settings import load_federation
    from reft_edge.dashboard.serving import serve
    from reft_edge.dashboard.source import Source

    load_federation(args.settings)  # what is wrong with them is told before anything is served
    if not args.host.startswith("127.") and args.host not in ("localhost", "::1"):
        _log.warning("anybody who reaches %s:%d can read everything here", args.host, args.port)
    serve(
        Source(args.settings),
        host=args.host,
        port=args.port,
        ready=lambda address: print(f"Dashboard: {address}   (Ctrl-C ends it)", flush=True),
    )
    return 0
