"""`reft-edge profile-device` as a user runs it. What it measures is checked for being there, not for speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reft_edge.cli.main import main
from reft_edge.cli.profile_device import table
from reft_edge.profiling.profile import DeviceProfile

PROFILES = Path(__file__).parents[2] / "device_profiles"


@pytest.mark.slow
def test_quick_json_and_output_agree_and_can_be_planned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "board.toml"
    code = main(["profile-device", "--quick", "--json", "--threads", "1", "--name", "bench", "--output", str(path)])
    printed = capsys.readouterr()
    assert code == 0
    document = json.loads(printed.out)
    profile = DeviceProfile.read(path)
    assert document == {
        **json.loads(json.dumps(profile.to_table())),
        "theoretical_flops_per_s": profile.theoretical_flops_per_s,
        "warnings": document["warnings"],
    }
    assert profile.name == "bench"
    for quantity in (
        profile.training_flops_per_s,
        profile.gemm_flops_per_s,
        profile.memory_bandwidth_bytes_per_s,
        profile.memory_available_bytes,
        profile.runtime_base_bytes,
        profile.disk_free_bytes,
    ):
        assert quantity is not None
        assert quantity.basis == "measured"
        assert "quick" in quantity.source
        assert quantity.value > 0
    assert profile.planning_flops_per_s == profile.training_flops_per_s.value  # type: ignore[union-attr]
    assert 20 * 2**20 < profile.planning_base_bytes < 500 * 2**20
    assert "training steps" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--output", "missing/board.toml"], 2, "missing"),
        (["--username", "pi-01"], 2, "--broker"),
        (["--agent", "missing.toml"], 2, "missing.toml"),
        (["--agent", "agent.toml", "--broker", "localhost"], 2, "leave out --broker"),
        (["--broker", "localhost", "--password-file", "secret"], 2, "--username"),
        (["--broker", "localhost", "--username", "pi-01", "--password-file", "missing"], 2, "missing"),
        (["--broker", "localhost:many"], 2, "localhost:many"),
        (["--broker", "no-such-host.invalid", "--quick"], 7, "no-such-host.invalid"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile-device", "--quiet", *arguments]) == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_threads_must_be_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["profile-device", "--threads", "0"])
    assert exit_info.value.code == 2
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_table_shows_theory_beside_measurement_and_says_what_is_unknown(path: Path) -> None:
    profile = DeviceProfile.read(path)
    text = "\n".join(table(profile))
    assert f"{profile.theoretical_flops_per_s / 1e9:.1f} GFLOP/s" in text
    assert ("unknown" in text) == (profile.runtime_base_bytes is None)
    assert "nan " not in text
