"""Keeps the fleet's record between runs: who is there, how each device is, and who comes late for what was deployed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_edge.coordinator.network_events import Disowned, FromDevice, LinkUp
from reft_edge.errors import one_line
from reft_edge.wire.deployment import Condition, Served
from reft_edge.wire.messages import Status

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.site import Site

LOOK_S = 1.0
"""How long at most to wait for a message, so that Ctrl-C is heard."""


class Monitor:
    """Use `watch` once. `tell`: gets a line for whatever is worth one."""

    def __init__(self, site: Site, *, tell: Callable[[str], None]) -> None:
        self._site = site
        self._tell = tell
        self._online: dict[str, bool] = {}
        self._serving: dict[str, Served | None] = {}

    def watch(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Listen until `stop`, or until a person interrupts it."""
        while not stop():
            event = self._site.listen(LOOK_S)
            match event:
                case LinkUp():
                    self._site.standing.keep_up(self._site.clock())
                case FromDevice(device=device, message=Status() as status):
                    self._note_presence(device, status.online)
                case FromDevice(device=device, message=Condition() as condition):
                    self._site.standing.hear(device, condition, self._site.clock())
                    self._note_serving(device, condition.serving)
                case Disowned(device=device):
                    self._tell(f"{device}: its certificate is no longer accepted")

    def _note_presence(self, device: str, online: bool) -> None:
        if self._online.get(device) != online:
            self._online[device] = online
            self._tell(f"{device} is {'online' if online else 'offline'}")

    def _note_serving(self, device: str, serving: Served | None) -> None:
        if device not in self._serving or self._serving[device] != serving:
            self._serving[device] = serving
            what = "nothing" if serving is None else f"version {serving.version}, {serving.model} {serving.precision}"
            self._tell(one_line(f"{device} serves {what}"))
