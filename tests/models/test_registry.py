from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from reft_edge.errors import ModelError
from reft_edge.models import ZOO, build_model


@pytest.mark.parametrize("name", ZOO)
def test_every_zoo_model_maps_a_batch_of_its_usual_shape_to_its_outputs(name: str) -> None:
    entry = ZOO[name]
    model = build_model(name, input_shape=entry.input_shape, n_outputs=entry.n_outputs).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, *entry.input_shape)).shape == (2, entry.n_outputs)


def test_vgg16_is_the_papers_network() -> None:
    model = build_model("vgg16", input_shape=(3, 32, 32), n_outputs=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 33_646_666


def test_a_users_function_gets_the_arguments_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build(n_outputs):\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, n_outputs))\n"
    )
    model = build_model("mine:build", input_shape=(2, 2), n_outputs=3, base_dir=tmp_path)
    assert model(torch.zeros(1, 2, 2)).shape == (1, 3)


def test_a_users_file_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "widths.py").write_text("WIDTH = 7\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom widths import WIDTH\ndef build():\n    return nn.Linear(2, WIDTH)\n"
    )
    model = build_model("mine:build", input_shape=(2,), n_outputs=7, base_dir=tmp_path)
    assert model.out_features == 7
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("reference", "source", "message"),
    [
        ("vgg61", "", "did you mean 'vgg16'"),
        ("other:build", "", "no file"),
        ("mine:biuld", "def build():\n    return 1\n", "did you mean 'build'"),
        ("mine:build", "def build():\n    return 1\n", "returned int, not a torch.nn.Module"),
        ("mine:build", "def build(:\n", "SyntaxError"),
        ("mine:build", "import nothing_of_that_name\n", "ModuleNotFoundError"),
        ("mine:build", "def build():\n    raise ValueError('no width')\n", "no width"),
    ],
)
def test_a_wrong_reference_says_what_is_wrong(tmp_path: Path, reference: str, source: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ModelError, match=message):
        build_model(reference, input_shape=(1, 8, 8), n_outputs=2, base_dir=tmp_path)
