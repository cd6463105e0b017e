"""How each process reaches the broker: through a proxy of its own, which can be cut, fallen silent, or be poor.

A cut is either one that both ends are told of (a router that restarts) or one that nobody is told of (a pulled cable).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import msgspec

from reft_edge.simulation.faults.lossy_way import LossyWay
from reft_edge.simulation.faults.words import COORDINATOR, Script
from reft_edge.simulation.links.disorder import Disorder
from reft_edge.simulation.links.mqtt_proxy import MqttProxy
from reft_edge.simulation.links.tcp_proxy import TcpProxy
from reft_edge.simulation.links.tunnel import TunnelShape
from reft_edge.wire.endpoint import BrokerSettings

POOR_LINK = TunnelShape(bytes_per_s=125_000, delay_s=0.1, loss=0.05)
"""1 Mbit/s, 200 ms for a round trip, and 5% of the packets lost."""


class Ways:
    """A proxy for each of `names`, in front of `broker`. A context manager."""

    def __init__(self, broker: BrokerSettings, names: Iterable[str], script: Script) -> None:
        self._broker = broker
        self.proxies: dict[str, TcpProxy] = {name: _proxy(broker, name, script) for name in names}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for proxy in self.proxies.values():
            self._stack.enter_context(proxy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def settings(self) -> Mapping[str, BrokerSettings]:
        """Where each connects to."""
        return {
            name: msgspec.structs.replace(self._broker, host=proxy.host, port=proxy.port)
            for name, proxy in self.proxies.items()
        }

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """`command` as it is started where its way begins."""
        proxy = self.proxies[name]
        return proxy.command(command) if isinstance(proxy, LossyWay) else list(command)

    def cut(self, names: Iterable[str], *, silent: bool) -> None:
        for name in names:
            proxy = self.proxies[name]
            proxy.freeze() if silent else proxy.cut()

    def restore(self, names: Iterable[str]) -> None:
        for name in names:
            self.proxies[name].thaw()
            self.proxies[name].restore()


def _proxy(broker: BrokerSettings, name: str, script: Script) -> TcpProxy:
    for fault in script.faults:
        if (fault.device or COORDINATOR) != name:
            continue
        if fault.kind == "disorder":
            disorder = Disorder(seed=script.seed, duplicate=0.1, delay=0.1, reorder=0.1, max_wait_s=1.0)
            return MqttProxy(broker.host, broker.port, disorder)
        if fault.kind == "poor-link":
            return LossyWay(broker.host, broker.port, msgspec.structs.replace(POOR_LINK, seed=script.seed))
    return TcpProxy(broker.host, broker.port)
