"""The benchmark of accuracy for bytes: its data, its methods, and what its table says."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from PIL import Image

from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.settings import TrainingSettings
from reft_edge.errors import DataError
from reft_edge.simulation.accuracy.methods import (
    CENTRAL,
    FEDAVG,
    FL_PQSU,
    MULTI_ROUND,
    ONE_SHOT,
    accuracy_settings,
    methods_of,
)
from reft_edge.simulation.accuracy.parts import CIFAR_CLASSES, CIFAR_RECORD_BYTES, kind_of, load_parts
from reft_edge.simulation.accuracy.records import (
    AccuracyRun,
    AccuracySettings,
    Central,
    Federated,
    Point,
    missing,
    outdated,
)
from reft_edge.simulation.accuracy.section import draw, section
from reft_edge.simulation.accuracy.selection import Selection
from reft_edge.simulation.accuracy.trial import Ground, play
from reft_edge.simulation.results.results_file import ResultsFile

PICTURES = AccuracySettings(
    data="pictures", model="vgg_tiny", input_shape=(3, 32, 32), n_private=20, n_public=8, n_test=6, ratios=(0.0, 0.5)
)
DIGITS = AccuracySettings(
    data="digits", model="mlp", input_shape=(1, 8, 8), n_private=1079, n_public=359, n_test=359, ratios=(0.0, 0.5)
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(DIGITS, data=None, alpha=1.0, seed=0, directory=tmp_path_factory.mktemp("blobs"))


def write_binary(folder):
    """Records whose label is their place's last digit, and whose pixels tell file and place."""
    folder.mkdir()
    for number, name in enumerate(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")):
        records = np.zeros((20, CIFAR_RECORD_BYTES), np.uint8)
        records[:, 0] = np.arange(20) % 10
        records[:, 1] = np.arange(20)
        records[:, 2] = number
        (folder / name).write_bytes(records.tobytes())


def write_pictures(folder):
    for part, n in (("train", 20), ("test", 10)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for place in range(n):
                pixels = np.full((32, 32, 3), 10 * place, np.uint8)
                pixels[..., 1] = label == "dog"
                Image.fromarray(pixels).save(folder / part / label / f"{place}.png")


def identities(dataset):
    return {sample.tobytes() for sample in dataset.inputs}


@pytest.mark.parametrize(("write", "kind"), [(write_binary, "cifar10"), (write_pictures, "pictures")])
def test_private_public_and_test_parts_are_disjoint_and_of_the_sizes_asked_for(tmp_path, write, kind):
    write(tmp_path / "data")
    assert kind_of(tmp_path / "data") == kind
    parts = load_parts(tmp_path / "data", PICTURES, alpha=1.0, seed=0)
    sets = [identities(parts.private), identities(parts.public), identities(parts.test)]
    assert [len(one) for one in sets] == [20, 8, 6]
    assert not sets[0] & sets[1]
    if kind == "cifar10":  # those pictures have equal ones in the test part
        assert not (sets[0] | sets[1]) & sets[2]
        assert np.array_equal(parts.private.targets, parts.private.inputs[:, 0, 0, 0] % 10)
        assert parts.n_classes == len(CIFAR_CLASSES)
    assert parts.public.targets is None
    assert sum(len(device) for device in parts.devices) == 20
    again = load_parts(tmp_path / "data", PICTURES, alpha=1.0, seed=0)
    assert np.array_equal(again.private.inputs, parts.private.inputs)


def test_data_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    write_binary(tmp_path / "data")
    with pytest.raises(DataError, match="has 40 training and 20 test samples; 108 and 6 are needed"):
        load_parts(tmp_path / "data", msgspec.structs.replace(PICTURES, n_private=100), alpha=1.0, seed=0)
    (tmp_path / "data" / "data_batch_1.bin").write_bytes(b"\0" * 5000)
    with pytest.raises(DataError, match=r"data_batch_1\.bin has 5000 bytes, no multiple of 3073"):
        load_parts(tmp_path / "data", PICTURES, alpha=1.0, seed=0)
    with pytest.raises(DataError, match="neither data_batch_1"):
        kind_of(tmp_path)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", ["digits", "pictures"])
def test_in_all_methods_a_device_makes_equally_many_passes_over_its_data(kind, quick):
    methods = methods_of(kind, quick=quick)
    passes = {m.epochs if isinstance(m, Central) else m.rounds * m.training.local_epochs for m in methods}
    assert len(passes) == 1
    assert len({method.name for method in methods}) == len(methods)
    assert {ONE_SHOT, MULTI_ROUND, FEDAVG, FL_PQSU, CENTRAL} <= {method.name for method in methods}


def federated(**changes):
    method = Federated(name="m", rounds=2, sizes="fitted", training=TrainingSettings(local_epochs=1))
    return msgspec.structs.replace(method, **changes)


def test_one_shot_is_one_exchange_and_distilling_moves_no_bytes(ground):
    plain = federated(rounds=1)
    taught = federated(rounds=1, distillation=DistillationSettings(epochs=1))
    runs = [play(ground, method) for method in (plain, taught)]
    assert [len(run.points) for run in runs] == [1, 1]
    assert runs[0].last.total_bytes == runs[1].last.total_bytes > 0
    assert runs[1].last.accuracy != runs[0].last.accuracy


def test_a_run_is_the_same_again_with_more_workers(ground):
    method = federated(distillation=DistillationSettings(epochs=1))
    assert play(ground, method).points == play(ground, method, n_parallel=2).points


def test_devices_of_the_smallest_size_move_fewer_bytes_than_fitted_ones_and_those_fewer_than_whole_ones(ground):
    totals = [
        play(ground, federated(rounds=1, sizes=sizes)).last.total_bytes for sizes in ("smallest", "fitted", "whole")
    ]
    assert totals == sorted(set(totals))


def test_a_device_is_silent_unless_its_loss_is_below_that_of_its_last_update():
    selection = Selection()
    losses = (2.0, 2.5, 1.9, 1.95, 1.9, 1.5)
    assert [selection.admits("a", loss) for loss in losses] == [True, False, True, False, False, True]
    assert selection.admits("b", 9.0)


def test_silent_devices_send_no_bytes_and_the_round_goes_on(ground, monkeypatch):
    monkeypatch.setattr(Selection, "admits", lambda _self, device, _loss: device == "device-0")
    speaking, silent = (play(ground, federated(rounds=1, selective=selective)).last for selective in (False, True))
    assert (speaking.silent, silent.silent) == (0, 1)
    assert silent.up_bytes < speaking.up_bytes
    assert silent.down_bytes == speaking.down_bytes


def test_central_training_has_an_accuracy_and_no_bytes(ground):
    run = play(ground, Central(name=CENTRAL, epochs=2, batch_size=32, learning_rate=0.05))
    assert run.last.total_bytes == 0
    assert run.last.accuracy > 0.8


def run_of(method, *, accuracy, total, seed=0, alpha=0.5):
    point = Point(
        round=1, accuracy=accuracy, merged=accuracy, down_bytes=total / 2, up_bytes=total / 2, largest_bytes=int(total)
    )
    return AccuracyRun(method=method, alpha=alpha, seed=seed, points=(point,), cpu_s=1.0)


def test_a_method_with_other_settings_is_measured_again():
    old = run_of(federated(rounds=2), accuracy=0.5, total=10)
    methods = (federated(rounds=3), federated(name="n"))
    assert outdated(methods, [old]) == [old]
    assert missing(methods, [old], alphas=(0.5,), seeds=1) == [(method, 0.5, 0) for method in methods]
    done = run_of(methods[0], accuracy=0.5, total=10)
    assert missing(methods, [done], alphas=(0.5,), seeds=1) == [(methods[1], 0.5, 0)]


def test_the_section_says_by_its_goals_what_was_measured(tmp_path):
    path = tmp_path / "accuracy.json"
    settings = accuracy_settings("digits", quick=True)
    file = ResultsFile.open(path, benchmark="accuracy", settings=settings, run_type=AccuracyRun)
    for seed, one_shot in ((0, 0.496), (1, 0.498)):
        file.add(run_of(federated(name=FEDAVG), accuracy=0.5, total=1e6, seed=seed))
        file.add(run_of(federated(name=ONE_SHOT), accuracy=one_shot, total=1e4, seed=seed))
        file.add(run_of(federated(name=MULTI_ROUND), accuracy=0.49, total=1e5, seed=seed))
        file.add(
            run_of(Central(name=CENTRAL, epochs=1, batch_size=1, learning_rate=1.0), accuracy=0.6, total=0, seed=seed)
        )
    text = section(path)
    assert text.startswith("## Accuracy for bytes\n")
    assert "| REFT one-shot | 49.7 ± 0.1 |" in text
    assert "| REFT one-shot: bytes | at most 1/50 of FedAvg's | 1/100.0 | met |" in text
    assert "| REFT one-shot: accuracy within 1 point of FedAvg | at least -1 points | -0.3 ± 0.1 points | met |" in text
    assert (
        "| REFT multi-round: accuracy at or above FedAvg | at least 0 points | -1.0 ± 0.0 points | **missed** |" in text
    )
    assert "| REFT multi-round: bytes | at most 1/20 of FedAvg's | 1/10.0 | **missed** |" in text
    picture = tmp_path / "accuracy.svg"
    draw(path, picture)
    assert "Dirichlet 0.5" in picture.read_text()
