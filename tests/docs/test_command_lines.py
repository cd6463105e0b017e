"""README and docs/: every command line of ours is one that its command takes, also where nothing is run."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from reft_edge.agent.settings import AgentSettings
from reft_edge.cli.main import COMMANDS, command_parser
from reft_edge.coordinator.settings import FederationSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SCRIPTS = {"provision": "provision", "run_agent": "agent", "run_coordinator": "coordinator", "demo": "demo"}
"""What the scripts of that name add."""


def blocks(page: Path, kind: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.split()[:1] == [kind]:
            yield token


def command_lines(page: Path) -> Iterator[list[str]]:
    """Arguments of `reft-edge` in the page's console blocks, the command first."""
    for block in blocks(page, "console"):
        for line in block.content.replace("\\\n", " ").splitlines():
            found = re.match(r"[\w-]*\$ (?:sudo )?(?:\S*/)?(?P<program>\S+)(?P<rest>.*)", line)
            if found and found["program"] in ("reft-edge", *SCRIPTS):
                words = shlex.split(re.split(r" && | \| | > ", found["rest"])[0], comments=True)
                yield words if found["program"] == "reft-edge" else [SCRIPTS[found["program"]], *words]


LINES = [(page.name, line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[" ".join(line)[:60] for _, line in LINES])
def test_a_command_line_is_understood(page: str, line: list[str]) -> None:
    assert line[0] in COMMANDS, page
    command_parser(line[0], importlib.import_module(COMMANDS[line[0]].module)).parse_args(line[1:])


def test_the_readmes_settings_are_settings() -> None:
    known = {field.name for kind in (AgentSettings, FederationSettings) for field in msgspec.structs.fields(kind)}
    for block in blocks(ROOT / "README.md", "toml"):
        assert set(tomllib.loads(block.content)) <= known


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """File and heading of each link that stays in the repository."""
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield page.parent / target if target else page, heading


def headings(page: Path) -> set[str]:
    """As GitHub names them in links."""
    lines = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [str(target) for target, _ in links(page) if not target.exists()] == []
    assert [heading for target, heading in links(page) if heading and heading not in headings(target)] == []
