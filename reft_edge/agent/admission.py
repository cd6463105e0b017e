"""Whether a task fits this device, before anything large is fetched. Pure; loads no numpy.

The planner has asked the same questions; here the device answers for itself, with what is true now.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from reft_edge.agent.settings import Limits
from reft_edge.bundle.manifest import BlobRef, CrossEntropy, Manifest
from reft_edge.bundle.memory import LEAST_SHARE, model_memory_bytes
from reft_edge.data.description import DataDescription
from reft_edge.profiling.profile import RUNTIME_BASE_BYTES, DeviceProfile
from reft_edge.wire.compensation_names import kept_states
from reft_edge.wire.messages import Task


def task_parts(
    manifest: Manifest, task: Task, *, has_weights: Callable[[str], bool] = lambda _: False, whole: bool = False
) -> tuple[BlobRef, ...]:
    """The blobs to fetch for a task, besides the manifest; see `weights_parts`."""
    return (manifest.training_graph, manifest.inference_graph, *weights_parts(task, has_weights, whole=whole))


def weights_parts(task: Task, has_weights: Callable[[str], bool], *, whole: bool) -> tuple[BlobRef, ...]:
    """What to fetch for the task's weights: nothing, the delta, or the whole.

    `has_weights` tells whether the weights of a blob (SHA-256) are in the spool, fetched or rebuilt. `whole`: a delta
    is of no use.
    """
    if task.delta is None or whole:
        return (task.weights.blob,)
    if has_weights(task.weights.blob.sha256):
        return ()
    return (task.delta.blob if has_weights(task.delta.base) else task.weights.blob,)


def refusal(
    manifest: Manifest,
    task: Task,
    *,
    limits: Limits,
    profile: DeviceProfile | None,
    data: DataDescription | None,
) -> str | None:
    """Why this device does not do this task; None if it does. What is not known yet does not speak against it."""
    model_bytes = sum(ref.size_bytes for ref in task_parts(manifest, task))
    if model_bytes > limits.max_model_bytes:
        return f"the model has {model_bytes} bytes, [limits] max_model_bytes = {limits.max_model_bytes}"
    needed = memory_needed(manifest, task, profile, data)
    granted = limits.memory_bytes or (profile.planning_memory_bytes if profile is not None else None)
    if granted is not None and needed > granted:
        return (
            f"training {manifest.model!r} with batch size {task.plan.batch_size} takes at least "
            f"{needed / 2**20:.0f} MiB, this device grants {granted / 2**20:.0f} MiB"
        )
    return None if data is None else _data_refusal(manifest, task, data)


def memory_needed(manifest: Manifest, task: Task, profile: DeviceProfile | None, data: DataDescription | None) -> float:
    """Peak bytes of the worker that a task takes at least: the planner's formula, at the lower end of what it bounds.

    The planner may know from earlier rounds that this device needs less than the bound.
    """
    base = profile.planning_base_bytes if profile is not None else RUNTIME_BASE_BYTES
    n_samples, batch_size = 0, task.plan.batch_size
    if data is not None:
        n_samples = data.training_samples + data.holdout_samples
        batch_size = min(batch_size, max(1, data.training_samples))
    return base + LEAST_SHARE * model_memory_bytes(
        manifest.cost,
        weight_bytes=manifest.weight_bytes,
        batch_size=batch_size,
        data_bytes=n_samples * manifest.sample_bytes,
        kept_states=kept_states(task.plan.compensation),
    )


def _data_refusal(manifest: Manifest, task: Task, data: DataDescription) -> str | None:
    if data.training_samples == 0:
        return "this device has no training samples"
    shape = manifest.input.shape
    if data.pictures and len(shape) != 3:
        return f"this device has pictures, the model takes samples of shape {shape}"
    if not data.pictures and data.input_shape and prod(data.input_shape) != prod(shape):
        return f"this device's samples have shape {data.input_shape}, the model takes {shape}"
    if isinstance(manifest.loss, CrossEntropy):
        if data.n_classes is None:
            return "this device's targets are numbers, the model predicts classes"
        n_outputs = manifest.output.shape[0] if manifest.output.shape else 0
        if not task.classes and data.n_classes > n_outputs:
            return f"this device's data have {data.n_classes} classes, the model has {n_outputs} outputs"
        if task.classes and (unknown := sorted(set(data.classes) - set(task.classes))):
            return f"this device's class {unknown[0]!r} is not one of the federation's {', '.join(task.classes)}"[:500]
        if task.classes and data.n_classes > len(task.classes):
            return f"this device's data have {data.n_classes} classes, the federation has {len(task.classes)}"
    return None
