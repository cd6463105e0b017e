"""The shipped reference step runs, counts its operations, and is what scripts/make_reference_step makes today."""

from __future__ import annotations

import runpy
from importlib.resources import files
from pathlib import Path

import pytest

from reft_edge.agent.reference_step import FOLDER, matrix_product, reference_bundle, training_steps
from reft_edge.agent.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_reference_step"


def test_a_step_trains_and_stays_finite_however_often_it_is_repeated() -> None:
    step = training_steps(threads=1)[0]
    losses = [step.run() for _ in range(3)]
    assert losses[0] == pytest.approx(losses[2], rel=0.01)  # the learning rate is next to nothing
    # Forward and both gradients of every sample, a multiply-accumulate counted as 2; the input needs no gradient.
    assert 5.5 < step.flops / step.batch_size / reference_bundle().manifest.cost.forward_macs < 6.5


def test_the_drawn_weights_fit_the_manifest_and_its_hash() -> None:
    bundle = reference_bundle()
    state = Trainer(bundle, threads=1).state()
    assert state.keys() == {spec.name for spec in bundle.manifest.tensors}


def test_the_matrix_product_counts_a_multiplication_and_an_addition_an_entry() -> None:
    product = matrix_product(threads=1)
    (result,) = product.run()  # type: ignore[misc]
    assert product.flops == 2 * result.shape[0] ** 3


def test_what_is_shipped_is_small_and_what_the_script_makes_today() -> None:
    folder = files("reft_edge") / FOLDER
    assert sum(len(path.read_bytes()) for path in folder.iterdir()) < 100_000
    made = runpy.run_path(str(SCRIPT))
    bundle, shipped = made["reference_bundle"](), reference_bundle()
    again = "the compiler makes other graphs now; run scripts/make_reference_step"
    assert bundle.manifest.cost.step_flops_per_sample == pytest.approx(
        shipped.manifest.cost.step_flops_per_sample, rel=0.05
    ), again
    assert bundle.manifest.parameters == shipped.manifest.parameters, again
