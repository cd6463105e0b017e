"""A short run of all fuzzing targets, the same inputs every time. The long one is scripts/fuzz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzzing.harness import Target, run, silence
from tests.fuzzing.shares import SHARES
from tests.fuzzing.strategies import inputs
from tests.fuzzing.targets import all_targets

EXAMPLES = 150


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with silence(), ExitStack() as stack:
        yield all_targets(tmp_path_factory.mktemp("fuzzing"), stack)


def test_every_target_has_a_share_and_takes_one_of_its_seeds(targets: dict[str, Target]) -> None:
    assert targets.keys() == SHARES.keys()
    for name, target in targets.items():
        accepted = [run(target, seed) for seed in target.seeds]
        assert any(accepted), f"{name} refuses all of its seeds: nothing behind its first check is tried"


@pytest.mark.parametrize("name", SHARES)
def test_only_documented_errors_in_bounded_time_and_memory(targets: dict[str, Target], name: str) -> None:
    target = targets[name]

    @settings(
        max_examples=max(10, round(EXAMPLES * SHARES[name])),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target))
    def try_input(data: bytes) -> None:
        run(target, data)

    try_input()
