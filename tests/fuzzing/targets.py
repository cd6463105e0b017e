"""All fuzzing targets, by name."""

from __future__ import annotations

from pathlib import Path

from tests.fuzzing import coordinator_targets, file_targets, wire_targets
from tests.fuzzing.harness import Target


def all_targets(directory: Path) -> dict[str, Target]:
    """Every target by its name; `directory` is where they may write, better on a disk in memory."""
    made = [
        *wire_targets.targets(directory),
        *file_targets.targets(directory),
        *coordinator_targets.targets(directory),
    ]
    return {target.name: target for target in made}
