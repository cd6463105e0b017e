"""What the coordinator is told names files, and not where on the device they lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from reft_edge.agent.reasons import for_coordinator

BASE = Path("/home/My Board/agent")
FOLDERS = {BASE, BASE / "spool", Path("/media/sd card")}


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("/home/My Board/agent/spool/serving/check: no room; free some", "check: no room; free some"),
        ("/home/My Board/agent/spool/current.json: No space left", "current.json: No space left"),
        ("/media/sd card/data/cat/1.png is no picture", "1.png is no picture"),
        ("'/etc/reft/agent.toml' (line 3): /var/lib/x", "'agent.toml' (line 3): x"),
        ("at /src/core/cpu/reshape.h:91 it failed", "at reshape.h:91 it failed"),
        ("1/2 of n/a; see https://example.org/a/b", "1/2 of n/a; see https://example.org/a/b"),
        ("data/samples.npz has no array\n'inputs'", "data/samples.npz has no array 'inputs'"),
        ("", ""),
    ],
)
def test_paths_are_cut_to_their_last_names_and_all_else_is_left(reason: str, told: str) -> None:
    assert for_coordinator(reason, FOLDERS) == told
