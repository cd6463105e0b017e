"""A coordinator that only transfers: its network thread, without rounds or torch. A process, told by its argument.

It says when devices come and go, and what arrived from them.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from reft_edge.coordinator.network import Network
from reft_edge.coordinator.network_events import Arrived, Broken, FromDevice, LinkDown, LinkUp, NotArrived
from reft_edge.simulation.brokers import start_broker
from reft_edge.simulation.recovery import ends
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.messages import Status

CONNECT_TIMEOUT_S = 30.0
NAME = "coordinator"


def main() -> None:
    orders = msgspec.json.decode(sys.argv[1], type=ends.CoordinatorOrders)
    directory = Path(orders.directory)
    with ExitStack() as stack:
        if orders.own_broker:
            broker = orders.broker
            stack.enter_context(start_broker(directory=directory / "broker", port=broker.port, bind=broker.host))
        network = Network(
            orders.broker,
            federation=orders.federation,
            blobs=BlobStore(directory / NAME),
            max_parallel_uploads=orders.max_parallel_uploads,
        )
        for device in orders.devices:
            network.serve(device, [ref.sha256 for ref in orders.served])
        for device, ref in orders.pulled.items():
            network.pull(device, ref)
        network.start(wait_s=CONNECT_TIMEOUT_S)
        if orders.broadcast:
            network.broadcast(orders.served)
        while True:
            _tell(network.inbox.get())


def _tell(event: object) -> None:
    now = time.monotonic()
    match event:
        case LinkUp():
            ends.say(ends.Up(device=NAME, at=now))
        case LinkDown(reason=reason):
            ends.say(ends.Down(device=NAME, at=now, reason=reason))
        case FromDevice(device=device, message=Status(online=True)):
            ends.say(ends.Up(device=device, at=now))
        case FromDevice(device=device, message=Status(online=False)):
            ends.say(ends.Down(device=device, at=now, reason="its will, or its farewell"))
        case Arrived(device=device, sha256=sha256):
            ends.say(ends.Arrived(device=device, at=now, sha256=sha256))
        case NotArrived(device=device, reason=reason):
            ends.say(ends.Gone(device=device, at=now, reason=reason))
        case Broken(error=error):
            raise error
        case _:
            return


if __name__ == "__main__":
    main()
