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
from collections.abc import Iterator
from typing import Any

from amqtt.broker import Broker

_SETTINGS_PLUGINS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
"""Anonymous access only: the plugins that log each packet and publish statistics cost a third of its throughput."""


class _Subscriptions(dict[str, list[tuple[Any, int]]]):
    """Topic filter -> (session, QoS). Iterates over a copy, because amqtt awaits, and so may change it, on the way."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))

    def items(self) -> Any:
        return list(super().items())


class _Broker(Broker):  # type: ignore[misc]  # amqtt ships no types
    """amqtt 0.12 with two faults mended that many short subscriptions bring out, as broadcast blocks do.

    A new client gets every retained message that anybody ever subscribed to, and filters that nobody uses any more are
    kept and matched against each message for ever.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._subscriptions = _Subscriptions()

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Any) -> None:
        for topic, subscribers in self._subscriptions.items():
            if not subscribers:
                del self._subscriptions[topic]
        if any(each.client_id == session.client_id for each, _ in self._subscriptions.get(subscription[0], [])):
            await super()._publish_retained_messages_for_subscription(subscription, session)


async def serve(address: str, port: int) -> None:
    """Run the broker until a signal ends the process, or standard input does."""
    broker = _Broker(
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
