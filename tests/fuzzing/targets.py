"""All fuzzing targets, by name."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.fuzzing import coordinator_targets, file_targets, serving_targets, wire_targets
from tests.fuzzing.harness import Target


def all_targets(directory: Path, stack: ExitStack) -> dict[str, Target]:
    """Every target by its name. `directory`: where they may write, better on a disk in memory; `stack` closes it."""
    made = [
        *wire_targets.targets(directory),
        *file_targets.targets(directory),
        *serving_targets.targets(directory),
        *coordinator_targets.targets(directory, stack),
    ]
    return {target.name: target for target in made}
