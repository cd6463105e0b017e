"""Serve the pages: one process, one federation, no request to anywhere else.

NiceGUI brings scripts, styles and fonts along, so the pages work where there is no internet. There is no password: who
reaches the port reads everything, and can change nothing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from nicegui import Event, app, ui

from reft_edge.dashboard.pages import register
from reft_edge.dashboard.source import Source
from reft_edge.errors import ReftError, ResourceError

POLL_S = 0.1
"""How often the run's files are looked at: a person sees no delay, and a look at three files costs next to nothing."""

REST_S = 0.25
"""Until the next look after something has changed: where 200 devices report, changes are taken together."""

TICK_S = 2.0
"""How often pages are told even so, for what they had put off."""

RECONNECT_S = 30.0
"""A phone that sleeps for less than this finds its page as it left it; otherwise the page is loaded again."""

_log = logging.getLogger(__name__)


def serve(source: Source, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until the process is interrupted. `ready` gets the address once somebody can look.

    Raises `ResourceError` when nobody can listen there.
    """
    _check_free(host, port)
    news = Event[[]]()
    register(source, news)
    app.on_startup(lambda: ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/"))
    app.on_startup(lambda: _follow(source, news))
    ui.run(
        host=host,
        port=port,
        title="reft-edge",
        dark=None,  # as the reader's system is
        tailwind=False,  # style.css is all that the pages need, and a tenth of a second sooner there
        reload=False,
        show=False,
        show_welcome_message=False,
        reconnect_timeout=RECONNECT_S,
    )


async def _follow(source: Source, news: Event[[]]) -> None:
    """Keep the source up to date, and tell pages. Reading may wait for a disk, so it is done beside the event loop."""
    told = ""
    told_at = 0.0
    while True:
        changed = False
        try:
            changed = await asyncio.to_thread(source.refresh)
            told = ""
        except ReftError as exc:  # settings that are being edited, a disk that is away: look again
            if str(exc) != told:
                told = str(exc)
                _log.warning("%s", told)
        now = asyncio.get_running_loop().time()
        if changed or now >= told_at + TICK_S:
            told_at = now
            news.emit()
        await asyncio.sleep(REST_S if changed else POLL_S)


def _check_free(host: str, port: int) -> None:
    """Raise `ResourceError` unless somebody can listen there: the server itself would only log it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        raise ResourceError(f"the dashboard cannot listen at {host}:{port}: {exc.strerror or exc}") from exc
