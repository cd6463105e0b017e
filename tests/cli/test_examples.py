"""Every subcommand's help has examples, and each is a command line that its parser takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator

import pytest

from reft_edge.cli.main import COMMANDS, EPILOG, command_parser

SHELL = {"|", ">", "&&", "<", ";"}
"""What follows one of these is another program's."""


def examples(text: str) -> Iterator[str]:
    """The command lines of the section `examples:`, without what is said about them."""
    _, found, section = text.partition("examples:\n")
    assert found, "no section `examples:`"
    for line in section.split("\n\n")[0].splitlines():
        yield re.split(r" {2,}", line.strip())[0]


def parse(line: str) -> argparse.Namespace:
    """As the command itself would; nothing is executed."""
    words = shlex.split(line)
    assert words[0] == "reft-edge"
    end = next((index for index, word in enumerate(words) if word in SHELL), len(words))
    name, arguments = words[1], words[2:end]
    parser = command_parser(name, importlib.import_module(COMMANDS[name].module))
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_examples_that_it_takes(name: str) -> None:
    told = list(examples(importlib.import_module(COMMANDS[name].module).__doc__ or ""))
    assert any(line.split()[1] == name for line in told)
    for line in told:
        parse(line)


def test_the_examples_of_the_whole_are_taken_too() -> None:
    for line in examples(EPILOG):
        parse(line)


def test_a_wrong_example_would_be_found() -> None:
    with pytest.raises(SystemExit):
        parse("reft-edge status federation.toml --no-such-option")
    with pytest.raises(AssertionError, match="no section"):
        list(examples("Prints something."))
