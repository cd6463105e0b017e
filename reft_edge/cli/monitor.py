"""Watch the fleet between runs: who is there, what each device serves, and how it is.

Takes the coordinator's place while nobody trains, until Ctrl-C: what devices tell of themselves is kept, for the
dashboard and for reft-edge devices, and devices that were away when a version was deployed can fetch it. It changes
nothing on a device that was not asked for by a deployment.

examples:
  reft-edge monitor federation.toml
  reft-edge monitor federation.toml --dashboard                     and look at http://localhost:8080/
  reft-edge monitor federation.toml --metrics 9464                  figures at http://127.0.0.1:9464/metrics
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from reft_edge.cli.processes import dashboard_beside, ending_on_sigterm
from reft_edge.cli.run_arguments import add_looking_arguments

_log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FEDERATION_TOML", help="the coordinator's settings file")
    add_looking_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from reft_edge.coordinator.settings import load_federation

    settings = load_federation(args.settings)
    from reft_edge.coordinator.deploying.monitor import Monitor
    from reft_edge.coordinator.deploying.site import open_site

    with (
        ending_on_sigterm(),
        open_site(settings, args.settings.resolve().parent) as site,
        dashboard_beside(args.settings, args.dashboard),
        _metrics(args.settings, args.metrics),
    ):
        print(f"Watching federation {settings.federation}   (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            Monitor(site, tell=lambda line: print(line, flush=True)).watch()
    return 0


@contextlib.contextmanager
def _metrics(settings: Path, address: str | None) -> Iterator[None]:
    """The fleet's figures, where an address is given."""
    if address is None:
        yield
        return
    from prometheus_client import CollectorRegistry

    from reft_edge.coordinator.fleet_metrics import FleetFigures
    from reft_edge.coordinator.run_files import find_fleet
    from reft_edge.metrics_page import serving

    registry = CollectorRegistry()
    registry.register(FleetFigures(lambda: find_fleet(settings)))
    with serving(registry, address) as url:
        _log.info("metrics: %s", url)
        yield
