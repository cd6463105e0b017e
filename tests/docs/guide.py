"""A guide's steps, read from its Markdown: files to write and commands to type, in the order of the page.

What a reader sees is what counts:

* A block of TOML or Python whose first line is `# NAME`, `# NAME on MACHINE` or `# NAME on MACHINE and MACHINE` is a
  file; with `: change` behind it, its tables stand in for those of the same name in a file that is there already, and
  keys before them come to that file's top.
* In a console block `MACHINE$ ` begins a command, which goes on after a line that ends in a backslash; what follows is
  what it says, where `...` is anything. `^C` there: it is ended when it has said all that stands above. As a command
  it ends what was left running on that machine.
* Two words behind the kind of a block are not shown by GitHub: `background` leaves the commands running, `not-run`
  leaves the block out. A section with such a block says "not run" in words.
* A block of `text`, or without a kind, is a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

FILE_KINDS = ("toml", "python")
PICTURE_KINDS = ("", "text", "mermaid")

_FILE = re.compile(
    r"# (?P<name>[\w./-]+\.\w+)(?: on (?P<machines>[\w-]+(?:(?:, | and )[\w-]+)*))?(?P<change>: change)?"
)
_PROMPT = re.compile(r"(?P<machine>[a-z][\w-]*)?\$ (?P<command>.+)")


@dataclass(frozen=True, kw_only=True)
class File:
    """Text to put into a file, whole or (`change`) table by table; on every one of `machines`."""

    machines: tuple[str, ...]
    name: str
    text: str
    change: bool
    line: int


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to type on a machine. `expected`: what it says. `interrupted`: Ctrl-C ends it then."""

    machine: str
    text: str
    expected: tuple[str, ...]
    background: bool
    interrupted: bool
    line: int


Step = File | Command


class GuideError(Exception):
    """A block that is neither a file, nor commands, nor marked as not run."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it, up to the next heading."""

    heading: str
    prose: str
    steps: tuple[Step, ...]
    n_left_out: int


def read_guide(path: Path) -> list[Section]:
    """Sections in order. Raises `GuideError` with the line of a block that cannot be understood."""
    return list(_sections(MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))))


def _sections(tokens: list[Token]) -> Iterator[Section]:
    heading, prose, steps, n_left_out = "", [], list[Step](), 0
    for before, token in zip([None, *tokens], tokens, strict=False):
        if before is not None and before.type == "heading_open":
            if heading or steps:
                yield Section(heading=heading, prose="\n".join(prose), steps=tuple(steps), n_left_out=n_left_out)
            heading, prose, steps, n_left_out = token.content, [], [], 0
        elif token.type == "inline":
            prose.append(token.content)
        elif token.type == "fence":
            if "not-run" in token.info.split():
                n_left_out += 1
            else:
                steps.extend(_steps(token))
    yield Section(heading=heading, prose="\n".join(prose), steps=tuple(steps), n_left_out=n_left_out)


def _steps(fence: Token) -> Iterator[Step]:
    kind, *marks = fence.info.split() or [""]
    line = (fence.map or [0])[0] + 1
    if kind in FILE_KINDS:
        yield _file(fence.content, line)
    elif kind == "console":
        yield from _commands(fence.content, line, background="background" in marks)
    elif kind not in PICTURE_KINDS:
        raise GuideError(f"line {line}: a block of {kind!r} is neither a file nor commands, and not marked not-run")


def _file(content: str, line: int) -> File:
    first, _, rest = content.partition("\n")
    found = _FILE.match(first)
    if found is None:
        raise GuideError(f"line {line}: the block's first line does not name a file, as in `# agent.toml on board`")
    machines = tuple(re.split(", | and ", found["machines"])) if found["machines"] else ("",)
    change = found["change"] is not None
    return File(machines=machines, name=found["name"], text=rest if change else content, change=change, line=line)


def _commands(content: str, line: int, *, background: bool) -> Iterator[Command]:
    machine, command, said, begun = "", "", list[str](), 0

    def done() -> Command:
        interrupted = bool(said) and said[-1] == "^C"
        expected = tuple(said[:-1] if interrupted else said)
        return Command(
            machine=machine, text=command, expected=expected, background=background, interrupted=interrupted, line=begun
        )

    for number, text in enumerate(content.splitlines(), start=line + 1):
        prompt = _PROMPT.fullmatch(text)
        if prompt is not None:
            if command:
                yield done()
            machine, command, said, begun = prompt["machine"] or "", prompt["command"], [], number
        elif not command:
            raise GuideError(f"line {number}: {text!r} comes before any prompt, which ends in `$ `")
        elif not said and command.endswith("\\"):
            command += f"\n{text}"
        else:
            said.append(text)
    if command:
        yield done()
