"""A page that stays open while a real coordinator is killed and started again, and devices train for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from reft_edge.dashboard.parts import PAGES
from reft_edge.simulation.dashboard.looking import dashboard
from tests.coordinator.device import Device
from tests.coordinator.points import ONE_KIND, address, points, write_federation
from tests.dashboard.browsing import LAPTOP, browser, wait_for_text

pytestmark = [pytest.mark.browser, pytest.mark.slow]


class HeldDevice(Device):
    """Trains when it is let go."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.go = threading.Event()

    def _train(self, task) -> None:
        assert self.go.wait(100)
        super()._train(task)


@contextmanager
def coordinator(settings: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "reft_edge", "coordinator", str(settings), "--events"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@ONE_KIND
@pytest.mark.timeout(240)
def test_an_open_page_goes_on_when_the_coordinator_is_killed_and_comes_back(tmp_path, own_broker, federation):
    settings = write_federation(tmp_path, own_broker, federation, 3, rounds=1, ratios=(0.0,), deadline_s=120, epochs=1)
    with ExitStack() as stack:
        served = stack.enter_context(dashboard(settings))
        page = stack.enter_context(browser(LAPTOP))
        page.get(served.address + PAGES["Round"])
        wait_for_text(page, "nothing yet", "has no store yet")
        page.execute_script("window.loadedOnce = true")
        held = [
            stack.enter_context(
                kind(
                    name,
                    points(60, 10 + index),
                    broker=address(own_broker),
                    federation=federation,
                    directory=tmp_path / "devices",
                    behaviour=behaviour,
                )
            )
            for index, (name, kind, behaviour) in enumerate(
                (("good-one", Device, "good"), ("hostile-one", Device, "nan"), ("slow-one", HeldDevice, "good"))
            )
        ][2]
        stack.callback(held.go.set)
        first = stack.enter_context(coordinator(settings))
        wait_for_text(page, "running", "good-one", "received 1", "rejected 1", "not finite", "waiting 1")
        first.send_signal(signal.SIGKILL)
        wait_for_text(page, "interrupted", "the coordinator is not running", "received 1", "rejected 1")
        second = stack.enter_context(coordinator(settings))
        wait_for_text(page, "running", "devices train", "received 1", "rejected 1")
        held.go.set()
        wait_for_text(page, "finished", "merged 2", "rejected 1")
        assert second.wait(30) == 0
        assert page.execute_script("return window.loadedOnce") is True
