"""What types the guides notices when a guide is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.guide import Command, File, GuideError, read_guide
from tests.docs.machines import GuideFailureError, changed, pattern, site

GUIDE = """# Steps

```toml
# settings/a.toml on board and laptop
x = 1
```

```console
board$ cat \\
    settings/a.toml
...
x = 1
board$ echo $HOME
...board
```

## Later

Not run:

```console not-run
board$ reboot
```
"""


def follow(folder: Path, text: str) -> None:
    page = folder / "guide.md"
    page.write_text(text, encoding="utf-8")
    with site(folder, substitutions={}) as machines:
        machines.follow(read_guide(page))


def test_blocks_are_files_and_commands_in_their_order(tmp_path: Path) -> None:
    page = tmp_path / "guide.md"
    page.write_text(GUIDE)
    first, later = read_guide(page)
    file, command, _ = first.steps
    assert isinstance(file, File)
    assert (file.machines, file.name, file.change) == (("board", "laptop"), "settings/a.toml", False)
    assert isinstance(command, Command)
    assert (command.text, command.expected) == ("cat \\\n    settings/a.toml", ("...", "x = 1"))
    assert (later.heading, later.steps, later.n_left_out) == ("Later", (), 1)


def test_what_holds_is_followed_on_every_machine(tmp_path: Path) -> None:
    follow(tmp_path, GUIDE)
    assert (tmp_path / "laptop" / "settings" / "a.toml").read_text().endswith("x = 1\n")


@pytest.mark.parametrize(
    ("written", "wrong", "message"),
    [
        ("x = 1\nboard$", "x = 2\nboard$", "did not say"),
        ("cat \\\n    settings/a.toml", "cat settings/b.toml", "ended with status 1"),
        ("x = 1\nboard$", "cat: error: no file\nboard$", "ended with status 0"),
        ("console\n", "console background\n", "did not say\n    ...\n    never"),
    ],
)
def test_what_does_not_hold_is_told_with_its_line(tmp_path: Path, written: str, wrong: str, message: str) -> None:
    text = GUIDE.replace(written, wrong, 1).replace("...\nx = 1", "...\nnever" if "never" in message else "...\nx = 1")
    with pytest.raises(GuideFailureError, match=message) as failure:
        follow(tmp_path, text)
    assert str(failure.value).startswith("line 9, on board: cat ")


def test_a_block_that_is_nothing_known_is_an_error(tmp_path: Path) -> None:
    for block in ("```toml\nx = 1\n```", "```yaml\nx: 1\n```", "```console\nls\n```"):
        (tmp_path / "guide.md").write_text(block)
        with pytest.raises(GuideError, match=r"line [12]"):
            read_guide(tmp_path / "guide.md")


def test_an_ellipsis_stands_for_the_rest_of_a_line_or_for_lines() -> None:
    shape = pattern(["begun ... s", "...", "done"])
    assert shape.search("begun 1.5 s\ndone\n")
    assert shape.search("before\nbegun 1.5  s\n1\n2\ndone\nafter\n")
    assert not shape.search("begun 1.5 s\nnot done\n")
    assert not shape.search("begun 1.5 minutes\ndone\n")


def test_a_change_stands_in_for_what_has_its_name() -> None:
    before = 'a = 1\nb = [2]  # two\n\n[data]\npath = "x"\nold = true\n\n[broker]\nb = 3\n'
    after = changed(before, 'b = 4\nc = 5\n\n[data]\npath = "y"\n')
    assert after == 'b = 4\nc = 5\n\na = 1\n\n[broker]\nb = 3\n\n[data]\npath = "y"\n'
