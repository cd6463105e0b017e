"""What every subcommand shares: one line for a mistake, and readers that go away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import reft_edge
from reft_edge.cli.main import COMMANDS, main

PROFILE = Path(__file__).parents[2] / "device_profiles" / "jetson-nano.toml"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--no-such-option"])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"reft-edge {command}: error: ")
    assert line.endswith(f"see reft-edge {command} --help")


@pytest.mark.parametrize("command", ["agent", "coordinator", "quarantine"])
def test_settings_that_are_no_settings_are_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n")
    for path, message in (
        (tmp_path, "Is a directory"),
        (picture, "not a text file"),
        (tmp_path / "no", "no such file"),
    ):
        assert main([command, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "JSON"])
def test_a_reader_that_goes_away_is_no_error(options: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(Path(reft_edge.__file__).parents[1])
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "reft_edge", "plan", "--model", "mlp", "--quiet", *options]
    command += ["--profile", str(PROFILE)]
    with os.fdopen(write_end, "wb") as output:
        ended = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
