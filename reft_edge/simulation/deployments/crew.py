"""The processes of a site: its broker, agents that come and go, and the commands of an operator.

All are started as a person would start them. An agent that was killed is started again with the same files, as under a
service manager; a command that was killed is given again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Self

import msgspec

from reft_edge.errors import FederationError
from reft_edge.simulation.children import Children
from reft_edge.simulation.deployments.site import Site
from reft_edge.simulation.faults.cast import Ice, Player, worker_of
from reft_edge.simulation.faults.disk import Disk
from reft_edge.simulation.run_directory import FEDERATION_FILE

LOOK_S = 0.01
"""Between two looks at files."""

COMMAND_TIMEOUT_S = 300.0


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A command that has come to its end. Unix times."""

    status: int
    began_at: float
    ended_at: float
    said: str
    """Its last line."""

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began_at


class Command(Player):
    """One command of the operator."""

    def __init__(self, *arguments: str, site: Site, children: Children) -> None:
        command = [sys.executable, "-m", "reft_edge", *arguments]
        super().__init__(arguments[0], command, directory=site.directory, children=children)
        self._began_at = 0.0

    def start(self) -> None:
        self._began_at = time.time()
        super().start()

    def wait(self, *, timeout_s: float = COMMAND_TIMEOUT_S, look: Callable[[], None] | None = None) -> Ended:
        """Until it ends by itself; `look` is called often meanwhile. Raises `FederationError`."""
        end = time.monotonic() + timeout_s
        while self.status is None:
            if time.monotonic() > end:
                raise FederationError(f"{self.name} takes longer than {timeout_s:g} s: {self.obituary()}")
            if look is not None:
                look()
            time.sleep(LOOK_S)
        status, ended_at = self.status, time.time()
        return Ended(status=status or 0, began_at=self._began_at, ended_at=ended_at, said=self.obituary())


class Crew:
    """Agents of all devices, and commands; as a context manager, all of them are gone at the end of the block.

    `disks`: of devices whose spool is on one of its own, which can be filled.
    """

    def __init__(self, site: Site, *, disks: Mapping[str, Disk] = MappingProxyType({})) -> None:
        self.site = site
        self.disks = disks
        self.broker = site.broker
        self.ice = Ice()
        self._children = Children()
        self.coordinator = self.command("deploy", FEDERATION_FILE)
        """Who has the coordinator's place: the last `deploy` or `rollback`, at work or not."""
        self.agents: Mapping[str, Player] = {device: self._agent(device) for device in site.devices}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._children.stop()

    def start_agents(self) -> None:
        for agent in self.agents.values():
            agent.start()

    def command(self, *arguments: str) -> Command:
        """Of the operator, as `deploy`, `rollback`; started by the caller."""
        return Command(*arguments, site=self.site, children=self._children)

    def deploy(self, *arguments: str, look: Callable[[], None] | None = None) -> Ended:
        """`reft-edge deploy federation.toml ...`, to its end."""
        return self._run("deploy", *arguments, look=look)

    def roll_back(self, *arguments: str, look: Callable[[], None] | None = None) -> Ended:
        return self._run("rollback", *arguments, look=look)

    def serve(self, device: str, port: int) -> Player:
        """`reft-edge serve` of one device, started."""
        settings = str(self.site.agent_file(device).relative_to(self.site.directory))
        player = self.command("serve", settings, "--port", str(port))
        player.start()
        return player

    def worker(self, device: str) -> int | None:
        """Process id of the agent's worker; None when it has none."""
        return worker_of(self.agents[device])

    def died(self) -> list[str]:
        """About agents that ended without having been killed."""
        return [agent.obituary() for agent in self.agents.values() if not agent.killed and agent.status is not None]

    def _run(self, command: str, *arguments: str, look: Callable[[], None] | None) -> Ended:
        self.coordinator = self.command(command, FEDERATION_FILE, *arguments)
        self.coordinator.start()
        return self.coordinator.wait(look=look)

    def _agent(self, device: str) -> Player:
        settings = str(self.site.agent_file(device).relative_to(self.site.directory))
        command = [sys.executable, "-m", "reft_edge", "agent", settings]
        return Player(f"agent-{device}", command, directory=self.site.directory, children=self._children)
