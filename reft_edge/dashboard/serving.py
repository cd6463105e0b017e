"""Serve the pages: one process, one federation, no request to anywhere else.

NiceGUI brings scripts, styles and fonts along, so the pages work where there is no internet. There is no password: who
reaches the port reads everything, and can change nothing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from nicegui import app, ui

from reft_edge.dashboard.pages import register
from reft_edge.dashboard.source import Source
from reft_edge.errors import ReftError, ResourceError

POLL_S = 0.5
"""How often the run's files are looked at."""

RECONNECT_S = 30.0
"""A phone that sleeps for less than this finds its page as it left it; otherwise the page is loaded again."""

_log = logging.getLogger(__name__)


def serve(source: Source, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until the process is interrupted. `ready` gets the address once somebody can look.

    Raises `ResourceError` when nobody can listen there.
    """
    _check_free(host, port)
    register(source)
    app.on_startup(lambda: ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/"))
    app.on_startup(lambda: _follow(source))
    ui.run(
        host=host,
        port=port,
        title="reft-edge",
        dark=None,  # as the reader's system is
        reload=False,
        show=False,
        show_welcome_message=False,
        reconnect_timeout=RECONNECT_S,
    )


async def _follow(source: Source) -> None:
    """Keep the source up to date. Reading may wait for a disk, so it is done beside the event loop."""
    told = ""
    while True:
        try:
            await asyncio.to_thread(source.refresh)
            told = ""
        except ReftError as exc:  # settings that are being edited, a disk that is away: look again
            if str(exc) != told:
                told = str(exc)
                _log.warning("%s", told)
        await asyncio.sleep(POLL_S)


def _check_free(host: str, port: int) -> None:
    """Raise `ResourceError` unless somebody can listen there: the server itself would only log it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        raise ResourceError(f"the dashboard cannot listen at {host}:{port}: {exc.strerror or exc}") from exc
