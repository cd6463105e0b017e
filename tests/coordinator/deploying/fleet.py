"""A federation with finished runs on a real broker, and what is done with it."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path

from reft_edge.coordinator.deploying.operations import deploy, prepare_deployment, roll_back
from reft_edge.coordinator.deploying.planning import Wishes
from reft_edge.coordinator.deploying.releases import release_run
from reft_edge.coordinator.deploying.site import open_site
from reft_edge.coordinator.settings import load_federation
from reft_edge.coordinator.store import Store
from tests.coordinator.deploying.serving_device import ServingDevice
from tests.coordinator.deploying.versions import finish_run, write_settings


def ignore(_progress):
    """Nobody looks."""


class Fleet:
    """A federation with finished runs, and devices as they are asked for."""

    def __init__(self, folder: Path, federation: str, broker, stack: ExitStack) -> None:
        self.folder = folder
        self.federation = federation
        self.broker = broker
        self._stack = stack
        self.devices: dict[str, ServingDevice] = {}
        self.configure()

    def configure(self, **settings) -> None:
        self.settings_file = write_settings(self.folder, self.federation, self.broker.settings, **settings)

    @property
    def results(self) -> Path:
        return self.folder / "federation"

    def device(self, name, behaviour="good") -> ServingDevice:
        self.devices[name] = self._stack.enter_context(ServingDevice(name, behaviour=behaviour, **self.place))
        return self.devices[name]

    @property
    def place(self):
        """Where a device lives."""
        return {"broker": self.broker.settings, "federation": self.federation, "directory": self.folder / "devices"}

    def site(self, clock=time.time):
        settings = load_federation(self.settings_file)
        return open_site(settings, self.folder, clock=clock)

    def deploy(self, version, listener=ignore, clock=time.time, **wishes):
        with self.site(clock) as site:
            site.settle()
            release = release_run(site.store, site.blobs, version, site.settings.model)
            prepared = prepare_deployment(site, release, Wishes(**wishes))
            return deploy(site, prepared, listener=listener)

    def roll_back(self, *devices, version=None):
        with self.site() as site:
            site.settle()
            return [one.progress for one in roll_back(site, devices, version=version, listener=ignore)]

    def finish_run(self, run, *, seed):
        finish_run(self.results, self.federation, run, seed=seed, at=float(seed))

    def deployment(self):
        """The latest, as it is stored."""
        with closing(Store(self.results)) as store:
            return store.latest_deployment(self.federation)

    def conditions(self):
        """As they are stored, by device."""
        with closing(Store(self.results)) as store:
            return [one.condition for one in store.conditions()]


def states(outcome):
    return {part.device: part.state for part in outcome.devices}
