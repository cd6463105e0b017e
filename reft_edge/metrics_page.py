"""A page for Prometheus: figures of a process, served over HTTP on a port of their own.

The page has no password: it listens on this machine only unless an address is given. prometheus-client is loaded when
something is served, and not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reft_edge.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

PREFIX = "reft_edge"
"""Of every metric's name."""


@contextmanager
def serving(registry: Collector, address: str) -> Iterator[str]:
    """Serve `registry` at `address`, PORT or HOST:PORT, for the length of the block; gives the page's URL.

    Port 0 takes any free one. Raises `ConfigError` for no address, `ResourceError` when nobody can listen there.
    """
    from prometheus_client import start_http_server

    host, port = parse_address(address)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as exc:
        raise ResourceError(f"metrics cannot be served at {host}:{port}: {exc.strerror or exc}") from exc
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of PORT or HOST:PORT. Raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    if not (port.isdecimal() and int(port) < 65536) or (":" in text and not host):
        raise ConfigError(f"{text!r} is neither PORT nor HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)
