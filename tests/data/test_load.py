"""Loaders on real files: what is read, and what is said when it cannot be."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from reft_edge.data.describe import describe_dataset
from reft_edge.data.load import load_dataset
from reft_edge.data.pictures import decode_picture, read_picture
from reft_edge.data.settings import DataSettings
from reft_edge.errors import DataError

RNG = np.random.default_rng(7)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three cats and two dogs of 6x4 RGB pixels, lossless."""
    for name, count in (("cat", 3), ("dog", 2)):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for index in range(count):
            Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def load(base: Path, table: dict[str, object], **options: object):
    return load_dataset(msgspec.convert(table, DataSettings), base_dir=base, **options)  # type: ignore[arg-type]


def test_pictures_are_scaled_and_labelled_by_folder(tmp_path: Path, pictures: Path) -> None:
    data = load(tmp_path, {"path": "pictures"})
    assert data.inputs.shape == (5, 3, 4, 6)
    assert data.inputs.dtype == np.float32
    assert data.classes == ("cat", "dog")
    assert data.targets is not None
    assert data.targets.tolist() == [0, 0, 0, 1, 1]
    pixels = np.asarray(Image.open(pictures / "cat" / "1.png")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(data.inputs[1], pixels, atol=1e-6)


@pytest.mark.usefixtures("pictures")
def test_compact_pictures_become_the_same_floats(tmp_path: Path) -> None:
    compact = load(tmp_path, {"path": "pictures"}, compact=True)
    assert compact.inputs.dtype == np.uint8
    np.testing.assert_array_equal(compact.samples(slice(None)), load(tmp_path, {"path": "pictures"}).inputs)


@pytest.mark.usefixtures("pictures")
def test_pictures_take_the_models_shape_and_the_federations_order_of_classes(tmp_path: Path) -> None:
    data = load(tmp_path, {"path": "pictures"}, input_shape=(1, 8, 8), classes=("ant", "dog", "cat"))
    assert data.sample_shape == (1, 8, 8)
    assert data.targets is not None
    assert data.targets.tolist() == [2, 2, 2, 1, 1]


@pytest.mark.usefixtures("pictures")
def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    assert load(tmp_path, {"path": "pictures/cat"}).targets is None
    assert load(tmp_path, {"path": "pictures", "labelled": False}).targets is None


def test_a_broken_picture_is_refused_by_name_or_skipped(tmp_path: Path, pictures: Path) -> None:
    whole = (pictures / "cat" / "0.png").read_bytes()
    for index in range(10, 22):
        (pictures / "cat" / f"{index}.png").write_bytes(whole)
    (pictures / "dog" / "9.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"dog/9\.png.*cannot be read"):
        load(tmp_path, {"path": "pictures"})
    with pytest.raises(DataError, match=r"dog/9\.png"):
        describe_dataset(DataSettings(path="pictures"), base_dir=tmp_path, split_seed=0)
    assert len(load(tmp_path, {"path": "pictures", "broken": "skip"})) == 17
    for index in range(30, 33):
        (pictures / "dog" / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="4 of 21 pictures cannot be read"):
        load(tmp_path, {"path": "pictures", "broken": "skip"})


def test_a_description_counts_what_loading_and_splitting_give(tmp_path: Path, pictures: Path) -> None:
    settings = DataSettings(path="pictures", holdout_fraction=0.4)
    described = describe_dataset(settings, base_dir=tmp_path, split_seed=3)
    training, holdout = load_dataset(settings, base_dir=tmp_path).split(0.4, 3)
    assert (described.training_samples, described.holdout_samples) == (len(training), len(holdout))
    assert (described.input_shape, described.n_classes, described.pictures) == ((3, 4, 6), 2, True)
    Image.new("RGB", (9, 9)).save(pictures / "cat" / "9.png")
    assert describe_dataset(settings, base_dir=tmp_path, split_seed=3).input_shape == ()


def test_npz_keeps_floats_tokens_and_values(tmp_path: Path) -> None:
    inputs = RNG.normal(size=(4, 2, 3))
    np.savez(tmp_path / "a.npz", inputs=inputs, targets=RNG.normal(size=(4, 2)))
    data = load(tmp_path, {"path": "a.npz"})
    np.testing.assert_array_equal(data.inputs, inputs.astype(np.float32))
    assert data.targets is not None
    assert data.targets.dtype == np.float32
    assert data.n_classes is None
    np.savez(
        tmp_path / "b.npz", inputs=np.arange(8, dtype=np.int32).reshape(4, 2), targets=np.array([[1], [0], [1], [1]])
    )
    data = load(tmp_path, {"path": "b.npz", "classes": ["off", "on"]}, classes=["on", "off"])
    assert data.inputs.dtype == np.int64
    assert data.targets is not None
    assert data.targets.tolist() == [0, 1, 0, 0]


def test_csv_classes_values_and_windows(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(
        "x,y,label,load\n" + "".join(f"{i},{-i},{'ab'[i >= 5]},{i / 2}\n" for i in range(10))
    )
    data = load(tmp_path, {"path": "s.csv", "target_column": "label", "columns": ["y", "x"]})
    assert data.inputs[3].tolist() == [-3, 3]
    assert (data.classes, data.targets.tolist()) == (("a", "b"), [0] * 5 + [1] * 5)
    windows = load(tmp_path, {"path": "s.csv", "target_column": "label", "columns": ["x"], "window": 3, "stride": 2})
    assert windows.inputs.tolist() == [[[0, 1, 2]], [[2, 3, 4]], [[6, 7, 8]]]
    assert windows.targets.tolist() == [0, 0, 1]
    values = load(tmp_path, {"path": "s.csv", "target_column": ["load", "x"], "columns": ["y"]})
    assert values.targets.shape == (10, 2)
    grid = load(tmp_path, {"path": "s.csv", "target_column": "load", "columns": ["x", "y"]}, input_shape=(1, 2, 1))
    assert grid.inputs.shape == (10, 1, 2, 1)


def test_a_function_beside_the_settings_returns_anything(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("N = 3\n")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom neighbour import N\n"
        "def pair(): return np.ones((N, 2)), [0, 1, 1]\n"
        "def table(): return {'inputs': [[1.0]], 'targets': [0], 'classes': ['only']}\n"
        "def alone(): return np.ones((N, 2))\n"
        "def bad(): return 1 / 0\n"
    )
    assert load(tmp_path, {"function": "mine:pair"}).n_classes == 2
    assert load(tmp_path, {"function": "mine:table"}).classes == ("only",)
    assert load(tmp_path, {"function": "mine:alone"}).targets is None
    with pytest.raises(DataError, match="mine:bad raised ZeroDivisionError"):
        load(tmp_path, {"function": "mine:bad"})
    with pytest.raises(DataError, match="no function 'absent'"):
        load(tmp_path, {"function": "mine:absent"})


def test_what_belongs_to_one_recording_is_kept_from_either_form(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def windows(): return {'inputs': [[1.0], [2.0], [3.0]], 'targets': [0, 0, 0], 'recordings': [7, 7, 9]}\n"
    )
    np.savez(tmp_path / "w.npz", inputs=ONES, targets=[0, 0, 0], recordings=np.array([7, 7, 9], dtype=np.int32))
    for table in ({"function": "mine:windows"}, {"path": "w.npz"}):
        data = load(tmp_path, table)
        assert data.recordings is not None
        assert data.recordings.tolist() == [7, 7, 9]
        assert data.for_model(input_shape=data.sample_shape).recordings is data.recordings


NAN = np.full((3, 2), np.nan)
ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"inputs": NAN}, {}, "sample 0 are not finite"),
        ({"inputs": ONES * 1e300}, {}, "beyond the range of float32"),
        ({"inputs": np.array(["a", "b"])}, {}, "must be numbers"),
        ({"inputs": np.ones((0, 2))}, {}, "no samples"),
        ({"inputs": ONES, "targets": [0, 1]}, {}, "3 inputs and 2 targets"),
        ({"inputs": ONES, "targets": [0, -1, 1]}, {}, "class -1; classes start at 0"),
        ({"inputs": ONES, "targets": [0, 1, 5]}, {"classes": ["a", "b"]}, "class 5 is outside the federation's 0 to 1"),
        ({"inputs": ONES}, {"input_shape": (3,)}, r"a sample has shape \(2,\), the model takes \(3,\)"),
        ({"inputs": np.ones((3, 8, 6, 3))}, {"input_shape": (3, 8, 6)}, "store .channels, height, width"),
        ({"samples": ONES}, {}, "no array 'inputs'; it has samples"),
        ({"inputs": np.array([None, object()])}, {}, "is no .npz of plain arrays"),
    ],
)
def test_arrays_that_would_spoil_training_are_refused(
    tmp_path: Path, arrays: dict[str, object], options: dict[str, object], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        load(tmp_path, {"path": "x.npz"}, **options)


@pytest.mark.parametrize(
    ("files", "table", "options", "message"),
    [
        ({}, {"path": "nowhere"}, {}, "nowhere does not exist"),
        ({"d/notes.txt": "x"}, {"path": "d"}, {}, "has no pictures"),
        ({"d.json": "{}"}, {"path": "d.json"}, {}, "neither a folder nor"),
        ({"d.npz": "no zip"}, {"path": "d.npz"}, {}, "is no .npz of plain arrays"),
        ({"d.csv": "x,y\n1,a\n"}, {"path": "d.csv"}, {}, "row 2, column 'y': 'a' is not a number"),
        ({"d.csv": "x,y\n1\n"}, {"path": "d.csv"}, {}, "row 2: 1 values, the header has 2"),
        ({"d.csv": "x,y\n1,2\n"}, {"path": "d.csv", "target_column": "yy"}, {}, "no column 'yy'; did you mean 'y'"),
        ({"d.csv": "x,y\n1,2\n"}, {"path": "d.csv", "target_column": "y", "window": 2}, {}, "no whole window of 2"),
        (
            {"d.csv": "x,y\n1,cat\n"},
            {"path": "d.csv", "target_column": "y"},
            {"classes": ["cats", "dogs"]},
            "class 'cat' is not one of the federation's; did you mean 'cats'",
        ),
    ],
)
def test_files_of_no_use_are_refused_in_one_line(
    tmp_path: Path, files: dict[str, str], table: dict[str, object], options: dict[str, object], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, table, **options)
    assert "\n" not in str(caught.value)


def test_what_only_looks_like_a_picture_is_decoded_by_no_other_format_and_no_bomb_is_unpacked(tmp_path):
    postscript = tmp_path / "page.png"
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not a picture, or damaged"):
        read_picture(postscript, (1, 8, 8))
    large = io.BytesIO()
    Image.new("L", (300, 200)).save(large, format="PNG")
    with pytest.raises(DataError, match="body: the picture has 300 x 200 pixels; scale it down"):
        decode_picture(large, (1, 8, 8), called="body", max_pixels=59_999)
    assert decode_picture(large, (3, 8, 8), called="body", max_pixels=60_000).shape == (3, 8, 8)
