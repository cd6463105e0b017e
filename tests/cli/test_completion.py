"""The script that completes commands in a shell, asked by a real bash."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.cli.completion import whole_parser
from reft_edge.cli.main import COMMANDS, main

Press = Callable[[str], set[str]]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "reft-edge"
    with path.open("w") as file:
        command = [sys.executable, "-m", "reft_edge", "completion", "bash"]
        subprocess.run(command, stdout=file, check=True, cwd=Path(__file__).parents[2])
    return path


@pytest.fixture
def press(script: Path, tmp_path: Path) -> Press:
    """What TAB offers at the end of a command line, in a folder with a few files."""
    for name in ("federation.toml", "board.toml"):
        (tmp_path / name).touch()
    (tmp_path / "features").mkdir()

    def tab(line: str) -> set[str]:
        words = shlex.split(line) + ([""] if line.endswith(" ") else [])
        asked = f"""
            source {shlex.quote(str(script))}
            COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1} COMP_LINE={shlex.quote(line)}
            COMP_POINT={len(line)}
            function=$(complete -p reft-edge | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
            $function reft-edge {shlex.quote(words[-1])} {shlex.quote(words[-2])} >/dev/null
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        bash = ["bash", "--norc", "--noprofile", "-c", asked]
        done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert not done.stderr
        return set(filter(None, done.stdout.splitlines()))

    return tab


def test_all_commands_are_offered(press: Press) -> None:
    assert press("reft-edge ") >= set(COMMANDS)


def test_a_command_that_was_begun_is_completed(press: Press) -> None:
    assert press("reft-edge de") == {name for name in COMMANDS if name.startswith("de")}
    assert press("reft-edge coordinator --new") == {"--new-run"}


def test_the_actions_of_a_command_are_offered(press: Press) -> None:
    assert press("reft-edge provision re") == {"revoke", "renew", "refresh-crl"}


def test_what_an_option_may_be_is_offered(press: Press) -> None:
    assert press("reft-edge agent --log-format ") == {"text", "json"}
    assert press("reft-edge coordinator --progress j") == {"json"}


def test_a_file_is_completed_as_a_file_and_a_folder_as_a_folder(press: Press) -> None:
    assert {"federation.toml", "features"} <= press("reft-edge coordinator fe")
    assert "board.toml" in press("reft-edge profile-device --output bo")
    assert press("reft-edge agent --directory fe") == {"features"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_offered(name: str, press: Press) -> None:
    (commands,) = (action for action in whole_parser()._actions if isinstance(action, argparse._SubParsersAction))
    options = {option for action in commands.choices[name]._actions for option in action.option_strings}
    assert press(f"reft-edge {name} --") == {option for option in options if option.startswith("--")}


def test_a_script_for_zsh_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef reft-edge\n")
    assert all(f"    {name}:" in printed for name in COMMANDS)
    assert ":the settings file:_files" in printed
