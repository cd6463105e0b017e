"""docs/errors.md: every line that it quotes is said by reft-edge, and clumsy users meet lines that are on the page."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

import reft_edge
from reft_edge import errors
from reft_edge.cli.main import main
from tests.docs.machines import pattern

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
PACKAGE = Path(reft_edge.__file__).parent

_HEADING = re.compile(r"Exit code (\d+):")


def quoted() -> Iterator[tuple[int, str]]:
    """Exit code (0: of none) and message: the code that begins an item of a list, and that in it with `...`."""
    code, tokens = 0, MarkdownIt("commonmark").enable("table").parse(PAGE.read_text(encoding="utf-8"))
    in_list = 0
    for before, token in zip([None, *tokens], tokens, strict=False):
        in_list += {"bullet_list_open": 1, "bullet_list_close": -1}.get(token.type, 0)
        if before is not None and before.type == "heading_open":
            found = _HEADING.match(token.content)
            code = int(found[1]) if found else 0
        elif token.type == "inline" and in_list:
            spans = [child.content for child in token.children or [] if child.type == "code_inline"]
            yield from ((code, span) for number, span in enumerate(spans) if "..." in span or number == 0)


MESSAGES = [each for each in quoted() if not each[1].startswith("reft-edge ")]


@cache
def said() -> tuple[str, ...]:
    """Every text in the package's code; what an f-string fills in is an ellipsis."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


ELSEWHERE = ("Expected", "unrecognized arguments")
"""What msgspec and argparse say."""


def fixed_parts(message: str) -> list[str]:
    """What stands in the code as it stands on the page: between what changes, without punctuation around it."""
    pieces = (piece.strip(" '\":;,.[]()<>") for piece in re.split(r"\.\.\.|[:;] ", message))
    return [piece for piece in pieces if len(re.sub(r"\W", "", piece)) > 2 and piece not in ELSEWHERE]


@pytest.mark.parametrize("message", sorted({message for _, message in MESSAGES}))
def test_a_line_on_the_page_is_one_that_is_said(message: str) -> None:
    assert [piece for piece in fixed_parts(message) if not any(piece in text for text in said())] == []


def test_every_exit_code_has_its_line_in_the_table() -> None:
    codes = {each.exit_code for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)}
    in_table = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", PAGE.read_text())}
    assert in_table == codes | {0, 130}
    assert {code for code, _ in MESSAGES} == codes - {1} | {0}


Setup = Callable[[Path], object]


def edit(name: str, old: str, new: str) -> Setup:
    def do(project: Path) -> None:
        text = (project / name).read_text(encoding="utf-8")
        assert old in text, f"the starter project's {name} has changed: {old!r}"
        (project / name).write_text(text.replace(old, new), encoding="utf-8")

    return do


def write(name: str, text: str) -> Setup:
    return lambda project: (project / name).write_text(text, encoding="utf-8")


def arrays(**named: object) -> Setup:
    """The agent's data, as an archive."""

    def do(project: Path) -> None:
        np.savez(project / "own.npz", **named)  # type: ignore[arg-type]
        edit("press-1.toml", 'path = "data/press-1.csv"', 'path = "own.npz"')(project)

    return do


def model(body: str) -> Setup:
    """A network whose forward() ends as `body` says."""
    return write(
        "model.py",
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.layer = nn.Conv1d(3, 8, 5)\n        self.last = nn.Linear(8, 3)\n\n"
        f"    def forward(self, x):\n        y = self.layer(x)\n        {body}\n\n\n"
        "def build():\n    return Net()\n",
    )


def nothing(_project: Path) -> None:
    """The starter project as it is."""


COORDINATOR = "coordinator federation.toml --check --quiet"
AGENT = "agent press-1.toml --check --quiet"
FEDERATION, PRESS, CSV = "federation.toml", "press-1.toml", "data/press-1.csv"

CLUMSY: dict[str, tuple[int, str, Setup]] = {
    "a command's name": (2, "coordinater federation.toml", nothing),
    "a file that is not there": (2, "coordinator federaton.toml", nothing),
    "the agent's file": (2, "coordinator press-1.toml", nothing),
    "the federation's file": (2, "agent federation.toml", nothing),
    "no TOML": (2, COORDINATOR, edit(FEDERATION, "[broker]", "[broker")),
    "a key": (2, COORDINATOR, edit(FEDERATION, "local_epochs", "local_epoch")),
    "a key in the wrong table": (2, COORDINATOR, edit(FEDERATION, "rounds = 5", "local_epochs = 5")),
    "a missing key": (2, COORDINATOR, edit(FEDERATION, 'name = "model:build"', "")),
    "text for a number": (2, COORDINATOR, edit(FEDERATION, "rounds = 5", 'rounds = "five"')),
    "beyond its bounds": (2, COORDINATOR, edit(FEDERATION, "quorum = 0.6", "quorum = 60")),
    "a word that is none": (2, COORDINATOR, edit(FEDERATION, "local_epochs = 8", 'schedule = "cosin"')),
    "a name with a space": (2, COORDINATOR, edit(FEDERATION, 'federation = "presses"', 'federation = "my presses"')),
    "outputs and classes": (2, COORDINATOR, edit(FEDERATION, "input_shape", "n_outputs = 2\ninput_shape")),
    "a policy": (2, COORDINATOR, edit(FEDERATION, "[data]", '[planning]\npolicy = "fastest"\n[data]')),
    "two sources of data": (2, AGENT, edit(PRESS, "[data]", '[data]\nfunction = "m:f"')),
    "a folder that is in use": (2, "new .", nothing),
    "no enrolment file": (2, "agent --enrol press-9.enrol", nothing),
    "another file to enrol": (2, "agent --enrol model.py", nothing),
    "no provisioning": (2, "provision list", nothing),
    "a profile for a run": (2, "coordinator federation.toml --profile board.toml", nothing),
    "no data": (3, AGENT, edit(PRESS, CSV, "data/press1.csv")),
    "another kind of file": (3, AGENT, edit(PRESS, CSV, "model.py")),
    "a folder of recordings": (3, AGENT, edit(PRESS, CSV, "data")),
    "a column": (3, AGENT, edit(PRESS, "acceleration_x", "accel_x")),
    "an empty file": (3, AGENT, write(CSV, "")),
    "a word among numbers": (3, AGENT, write(CSV, "acceleration_x,acceleration_y,acceleration_z,state\n1,2,x,good\n")),
    "a short row": (3, AGENT, write(CSV, "acceleration_x,acceleration_y,acceleration_z,state\n1,2,good\n")),
    "no labels": (3, AGENT, edit(PRESS, 'target_column = "state"', "")),
    "a window that is too long": (3, AGENT, edit(PRESS, "window = 64", "window = 64000")),
    "a sample's shape": (3, COORDINATOR, edit(FEDERATION, "[3, 64]", "[64, 3]")),
    "a class": (3, COORDINATOR, edit(FEDERATION, '"bearing"]', '"gear"]')),
    "a sensor that was not there": (3, AGENT, arrays(inputs=np.full((4, 3, 64), np.nan), targets=[0, 0, 1, 1])),
    "arrays of other names": (3, AGENT, arrays(x=np.zeros((4, 3, 64)))),
    "lost rows": (3, AGENT, arrays(inputs=np.zeros((4, 3, 64)), targets=[0, 0, 1])),
    "objects": (3, AGENT, arrays(inputs=np.array([None, {}]))),
    "a model's name": (4, COORDINATOR, edit(FEDERATION, "model:build", "sensor_cn")),
    "a model's file": (4, COORDINATOR, edit(FEDERATION, "model:build", "modell:build")),
    "a model's function": (4, COORDINATOR, edit(FEDERATION, "model:build", "model:built")),
    "an import": (4, COORDINATOR, write("model.py", "import no_such_package\n")),
    "two classes for three": (4, COORDINATOR, model("return self.last(y.mean(2))[:, :2]")),
    "a branch on values": (4, COORDINATOR, model("return self.last(y.mean(2)) if y.mean() > 0 else x")),
    "a shape": (4, COORDINATOR, model("return self.last(y)")),
    "an operator": (4, COORDINATOR, model("return self.last(torch.fft.rfft(y).abs().mean(2))")),
    "two outputs": (4, COORDINATOR, model("return self.last(y.mean(2)), y")),
    "double precision": (4, COORDINATOR, model("return y.mean(2)[:, :3].double()")),
    "nothing that is served": (4, "predict data/test.csv --model press-1.toml", nothing),
    "no ONNX": (4, "predict data/test.csv --model run", nothing),
    "no model to predict with": (2, "serve global.onnx", nothing),
    "no broker": (7, AGENT, edit(PRESS, "port = 18831", "port = 1\nconnect_timeout_s = 0.5")),
    "a host": (7, AGENT, edit(PRESS, '"localhost"', '"no-such-host.invalid"')),
    "before the first run": (8, "status federation.toml", nothing),
    "a spool elsewhere": (9, AGENT, edit(PRESS, "spool/press-1", "/proc/spool")),
}  # fmt: skip


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starter") / "presses"
    assert main(["new", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(("code", "command", "setup"), CLUMSY.values(), ids=list(CLUMSY))
def test_what_a_clumsy_user_meets_is_on_the_page(
    code: int,
    command: str,
    setup: Setup,
    starter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shutil.copytree(starter, tmp_path / "presses"))
    setup(Path())
    capsys.readouterr()
    assert main(command.split()) == code
    message = capsys.readouterr().err.splitlines()[-1].partition(": error: ")[2]
    known = [pattern([line]) for of, line in MESSAGES if of == code]
    assert any(line.match(f"{message}\n") for line in known), message
