"""Where transfers are measured on this machine: a broker, and a link to it for each side that can be slowed and cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from reft_edge.bundle.manifest import BlobRef
from reft_edge.simulation.brokers import start_broker
from reft_edge.simulation.links.tcp_proxy import TcpProxy
from reft_edge.simulation.recovery import ends
from reft_edge.simulation.recovery.coordinator_end import NAME
from reft_edge.simulation.recovery.pair import SIDES, Pair, Side
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.endpoint import BrokerSettings

FEDERATION = "recovery"


class Stage:
    """As a context manager; processes, links and broker are gone at the end of the block."""

    def __init__(
        self,
        directory: Path,
        *,
        devices: int = 1,
        keepalive_s: int = 30,
        make_link: Callable[[str, int], TcpProxy] = TcpProxy,
    ) -> None:
        self.directory = directory
        self.devices = tuple(f"device-{number}" for number in range(devices))
        self.pair = Pair(directory)
        self.broker = start_broker("mosquitto", directory=directory / "broker")
        self.links = {side: make_link(self.broker.host, self.broker.port) for side in SIDES}
        self._keepalive_s = keepalive_s

    def put(self, side: Side, n_bytes: int, *, device: int = 0) -> BlobRef:
        """A blob of random bytes in the store of one end."""
        name = NAME if side == "coordinator" else self.devices[device]
        return BlobStore(self.directory / name).put(random.Random(device).randbytes(n_bytes))

    def start_device(self, *wanted: BlobRef, broadcast: bool = False) -> None:
        self.pair.start(
            ends.DeviceOrders(
                broker=self._settings("device"),
                federation=FEDERATION,
                directory=str(self.directory),
                devices=self.devices,
                wanted=wanted,
                broadcast=broadcast,
            )
        )

    def start_coordinator(
        self, *served: BlobRef, broadcast: bool = False, pulled: dict[str, BlobRef] | None = None
    ) -> None:
        self.pair.start(
            ends.CoordinatorOrders(
                broker=self._settings("coordinator"),
                federation=FEDERATION,
                directory=str(self.directory),
                served=served,
                devices=self.devices,
                broadcast=broadcast,
                pulled=pulled or {},
            )
        )

    def travelled(self, side: Side, *, up: bool) -> int:
        """Bytes on one side's link; `up`: from devices to the coordinator."""
        link = self.links[side]
        return link.bytes_up if (side == "device") == up else link.bytes_down

    def __enter__(self) -> Self:
        for link in self.links.values():
            link.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pair.stop()
        for link in self.links.values():
            link.stop()
        self.broker.stop()

    def _settings(self, side: Side) -> BrokerSettings:
        link = self.links[side]
        return BrokerSettings(host=link.host, port=link.port, mqtt_version="5", keepalive_s=self._keepalive_s)
