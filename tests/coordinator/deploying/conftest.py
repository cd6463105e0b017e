"""A federation with one finished run, `run-1`."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.coordinator.deploying.fleet import Fleet


@pytest.fixture
def fleet(tmp_path, federation, broker):
    with ExitStack() as stack:
        made = Fleet(tmp_path, federation, broker, stack)
        made.finish_run("run-1", seed=1)
        yield made
