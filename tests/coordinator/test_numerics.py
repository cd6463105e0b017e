"""Properties of batch-norm re-estimation, evaluation and distillation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from reft_edge.bundle.manifest import CrossEntropy, MeanSquaredError
from reft_edge.coordinator.batch_norm import reestimate_batch_norm
from reft_edge.coordinator.distillation import distil
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.ensemble import Teacher, ensemble_targets
from reft_edge.coordinator.evaluation import evaluate, measure
from reft_edge.data.dataset import Dataset
from reft_edge.errors import DataError, FederationError


def network(seed=0, n_outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, n_outputs)
    )


def images(n=64, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, (n, 1, 6, 6)).astype(np.float32)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_reestimation_gives_the_data_s_statistics_and_changes_nothing_else():
    module, inputs = network(), images(70)
    module.train()
    before, modes = state(module), [child.training for child in module.modules()]
    assert reestimate_batch_norm(module, inputs, batch_size=32) == 1
    after = state(module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert [child.training for child in module.modules()] == modes
    assert module[1].momentum == 0.1
    batches = [module[0](torch.as_tensor(inputs[s : s + 32])) for s in (0, 32)]  # the rest of 6 is left out
    torch.testing.assert_close(after["1.running_mean"], torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(after["1.running_var"], torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    reestimate_batch_norm(module, inputs, batch_size=32)
    assert all(torch.equal(tensor, after[name]) for name, tensor in state(module).items())


def test_without_batch_norm_nothing_is_computed_and_one_sample_is_refused():
    assert reestimate_batch_norm(nn.Linear(2, 2), np.zeros((0, 2), np.float32)) == 0
    with pytest.raises(DataError, match="at least 2"):
        reestimate_batch_norm(network(), images(1))


def test_evaluation_is_torch_s_loss_and_accuracy_whatever_the_batch_size():
    module, inputs = network(), images()
    labels = np.random.default_rng(1).integers(0, 3, len(inputs))
    outputs = module.eval()(torch.as_tensor(inputs)).detach()
    module.train()
    for batch_size in (7, 256):
        metrics = evaluate(module, Dataset(inputs=inputs, targets=labels), batch_size=batch_size)
        assert metrics.loss == pytest.approx(
            functional.cross_entropy(outputs, torch.as_tensor(labels)).item(), rel=1e-5
        )
        assert metrics.accuracy == (outputs.numpy().argmax(1) == labels).mean()
        assert (metrics.n, metrics.mse) == (64, None)
    assert module.training
    wanted = outputs.numpy() + 1.0
    assert evaluate(module, Dataset(inputs=inputs, targets=wanted)).mse == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(DataError, match="none"):
        evaluate(module, Dataset(inputs=inputs))
    with pytest.raises(DataError, match="0 to 5"):
        measure([np.zeros((2, 3))], np.array([0, 5]))


def test_ensemble_is_the_weighted_mean_by_samples_or_uniform():
    sharp, flat = np.array([[9.0, 0.0, 0.0]], np.float32), np.zeros((1, 3), np.float32)
    teachers = [Teacher(name="a", outputs=sharp, samples=3), Teacher(name="b", outputs=flat, samples=1)]

    def target(loss=None, **options):
        settings = DistillationSettings(temperature=1.0, pooling="mean", **options)
        return ensemble_targets(teachers, settings=settings, loss=loss or CrossEntropy(), n_public=1)

    p = np.exp(sharp) / np.exp(sharp).sum()
    np.testing.assert_allclose(target(), 0.75 * p + 0.25 / 3, rtol=1e-5)
    np.testing.assert_allclose(target(weights="uniform"), 0.5 * p + 0.5 / 3, rtol=1e-5)
    np.testing.assert_allclose(target(loss=MeanSquaredError()), 0.75 * sharp, rtol=1e-6)


def teacher_of(module, inputs, name="teacher"):
    with torch.no_grad():
        return Teacher(name=name, outputs=module.eval()(torch.as_tensor(inputs)).numpy(), samples=10)


@pytest.mark.parametrize("loss", [CrossEntropy(), MeanSquaredError()])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_student_approaches_its_teacher_without_labels_and_the_same_seed_gives_the_same_student(loss, optimizer):
    inputs = images()
    teachers = [teacher_of(network(1), inputs)]
    settings = DistillationSettings(epochs=12, batch_size=21, learning_rate=5e-3, optimizer=optimizer)
    students = [network(2), network(2)]
    noise = torch.random.get_rng_state()
    results = [distil(s, teachers, inputs, settings=settings, loss=loss, seed=5) for s in students]
    assert torch.equal(torch.random.get_rng_state(), noise)  # global random state is left alone
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))
    assert results[0].losses[-1] < 0.7 * results[0].losses[0]
    assert results[0].kept_epoch == results[0].epochs_run == 12
    assert results[0].held_out_after is None
    assert all(tensor.is_contiguous() for tensor in students[0].state_dict().values())


def test_with_labels_the_student_never_gets_worse_than_the_merged_model():
    inputs = images(80)
    student = network(3)
    labels = teacher_of(student, inputs).outputs.argmax(1)  # the merged model is right everywhere
    before = state(student)
    wrong = Teacher(name="wrong", outputs=-teacher_of(copy.deepcopy(student), inputs).outputs * 5, samples=1)
    settings = DistillationSettings(epochs=20, learning_rate=1e-2, patience=3)
    seen = []
    result = distil(student, [wrong], inputs, settings=settings, labels=labels, progress=seen.append)
    assert result.kept_merged
    assert result.epochs_run == len(seen) == 3  # patience
    assert result.held_out_after == result.held_out_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(student).items())


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_student_that_diverges_is_thrown_away(with_labels):
    inputs = images()
    student = network(3)
    before = state(student)
    teachers = [Teacher(name="far", outputs=np.full((64, 3), 1e20, np.float32), samples=1)]
    labels = np.zeros((64, 3), np.float32) if with_labels else None
    settings = DistillationSettings(optimizer="sgd", learning_rate=100)
    result = distil(student, teachers, inputs, settings=settings, loss=MeanSquaredError(), labels=labels)
    assert result.kept_merged
    assert result.epochs_run < settings.epochs
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(student).items())


def test_with_labels_the_best_epoch_is_kept():
    inputs = images(200)
    master = network(1)
    labels = teacher_of(master, inputs).outputs.argmax(1)
    result = distil(
        student := network(2),
        [teacher_of(master, inputs)],
        inputs,
        settings=DistillationSettings(epochs=10, learning_rate=5e-3),
        labels=labels,
    )
    assert result.kept_epoch > 0
    assert result.held_out_after.score > result.held_out_before.score
    assert (
        evaluate(student, Dataset(inputs=inputs, targets=labels)).accuracy
        > evaluate(network(2), Dataset(inputs=inputs, targets=labels)).accuracy
    )


@pytest.mark.parametrize(
    ("teachers", "error"),
    [
        ([], FederationError),
        ([Teacher(name="short", outputs=np.zeros((3, 3), np.float32), samples=1)], FederationError),
        ([Teacher(name="nan", outputs=np.full((64, 3), np.nan, np.float32), samples=1)], FederationError),
        ([Teacher(name="empty", outputs=np.zeros((64, 3), np.float32), samples=0)], FederationError),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teachers, error):
    with pytest.raises(error):
        distil(network(), teachers, images(), settings=DistillationSettings())
