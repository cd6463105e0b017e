"""The embedded broker as a program of its own: `python -m reft_edge.simulation.embedded_broker ADDRESS PORT`.

amqtt in a process of its own, so that it neither shares an interpreter lock with whom it serves nor outlives a crash of
theirs. It speaks MQTT 3.1.1 only and keeps everything in memory; it lets everybody in.

It ends on SIGTERM, and when its standard input closes, which the kernel does when the parent process dies.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from amqtt.broker import Broker

_SETTINGS_PLUGINS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
"""Anonymous access only: the plugins that log each packet and publish statistics cost a third of its throughput."""


async def serve(address: str, port: int) -> None:
    """Run the broker until a signal ends the process, or standard input does."""
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{address}:{port}"}},
            "plugins": _SETTINGS_PLUGINS,
        }
    )
    await broker.start()
    await _parent_gone()
    # Everything is in memory, so an orderly shutdown saves nothing, and it takes seconds when clients are connected.
    signal.raise_signal(signal.SIGTERM)


async def _parent_gone() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
