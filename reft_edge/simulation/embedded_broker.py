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
    """Run the broker until SIGTERM, SIGINT or the end of standard input."""
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{address}:{port}"}},
            "plugins": _SETTINGS_PLUGINS,
        }
    )
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, done.set)
    parent = asyncio.ensure_future(_parent_gone())
    parent.add_done_callback(lambda _: done.set())
    await broker.start()
    await done.wait()
    parent.cancel()
    await broker.shutdown()


async def _parent_gone() -> None:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    try:
        while await reader.read(4096):
            pass
    finally:
        transport.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
