"""What tests of several packages share: real brokers, and names that keep tests on one broker apart."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

from reft_edge.simulation.brokers import BrokerKind, RunningBroker, find_mosquitto, start_broker

NO_SKIPS_VARIABLE = "REFT_EDGE_NO_SKIPS"
"""Set to 1 where everything must be installed, as in CI: then a missing part is a failure, not a skip."""

BROKER_KINDS = ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)]

# Before torch is loaded, here and in processes that tests start. The networks in tests are tiny: with more threads a
# convolution takes 5 ms instead of 10 us on a busy machine, because they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where the tests run in the background, Ctrl-C is ignored, and children would inherit that; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time: whether a change is right must not depend on luck. scripts/fuzz looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast ones first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get(NO_SKIPS_VARIABLE) == "1":
        pytest.fail(f"{reason}, and {NO_SKIPS_VARIABLE}=1")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def mosquitto_program() -> str:
    """Path of Mosquitto; tests that use it skip where it is missing. Mark them `mosquitto`."""
    return find_mosquitto() or skip_or_fail("mosquitto is not installed")


def _start(kind: BrokerKind, directory: Path) -> RunningBroker:
    if kind == "mosquitto" and find_mosquitto() is None:
        skip_or_fail("mosquitto is not installed")
    return start_broker(kind, directory=directory)


@pytest.fixture(scope="session", params=BROKER_KINDS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A running broker of each kind, shared by all tests: use the `federation` fixture, and do not stop it."""
    with _start(request.param, tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(params=BROKER_KINDS)
def own_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    """A broker of each kind for one test, which may kill and restart it."""
    with _start(request.param, tmp_path / "broker") as running:
        yield running


@pytest.fixture
def federation() -> str:
    """A name that no other test uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"
