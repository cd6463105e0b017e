"""How much memory training a variant takes: one formula, for the planner and for the device that is asked.

Meant as an upper bound, because a worker that runs out of memory has cost a round, and one that was given a smaller
variant has cost a little accuracy.
"""

from __future__ import annotations

from reft_edge.bundle.manifest import Cost

SESSION_BYTES = 28 * 2**20
"""What a worker's other code and its open sessions add to the runtime. Measured with onnxruntime 1.31 on x86-64: 20 MiB
for an MLP, 22 to 26 MiB for small convolutional nets, workspace included."""

ACTIVATION_FACTOR = 1.25
"""A step takes more than its activations' own bytes: convolutions need a workspace, and onnxruntime's arena is not as
tight as the count. Measured per sample, with batches of 8 to 64: 1.16 (MobileNetV2), 1.18 (ResNet), 1.33 (VGG, whose
activations are few)."""

PREDICTION_FACTOR = 2.0
"""The same for the inference graph, which judges the holdout with batches of the same size. Its arena is another, and
neither gives anything back. Measured: 2.0 (VGG); it is a tenth of a step's activations, so others hardly tell."""

WEIGHT_COPIES = 7
"""Copies of the weights that a worker holds at its peak besides the training step's own. That is when the update is
encoded: received, trained, their difference, what is encoded of it, and two residuals. Measured with VGG16 pruned to 19
and to 4.7 million parameters: 5 in a first round, 6 with a residual of the round before."""

STATE_COPIES = 5
"""More for each further tensor that a compensation keeps for each of the weights', beside the residual that is counted
above: the old one, the new one, and that as bytes, in one piece and compressed when it is written."""

LEAST_SHARE = 0.6
"""Of the bound, what a model may really take. A device refuses only what does not fit even so, and a planner that has
measured less believes no less; so what a planner assigns, the device takes."""


def model_memory_bytes(
    cost: Cost, *, weight_bytes: float, batch_size: int, data_bytes: float, kept_states: int = 1
) -> float:
    """Upper bound of what a model in training and its data add to a worker.

    `weight_bytes`: of the state in float32; `data_bytes`: of all samples that the device holds; `kept_states`: tensors
    that are kept from update to update, for each of the weights'.
    """
    per_sample = ACTIVATION_FACTOR * cost.memory_per_sample_bytes + PREDICTION_FACTOR * cost.prediction_bytes_per_sample
    copies = WEIGHT_COPIES + STATE_COPIES * max(0, kept_states - 1)
    return SESSION_BYTES + cost.memory_fixed_bytes + batch_size * per_sample + copies * weight_bytes + data_bytes
