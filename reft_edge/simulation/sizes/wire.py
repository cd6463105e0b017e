"""Bytes of blobs that a device would really be sent and would really send.

Fresh weights and made-up updates compress otherwise than real ones, so a variant is trained first, by the device's own
trainer: scikit-learn's digits, enlarged four times and in three equal channels, for as many steps as a small device's
first round has. The weights afterwards are what the next round sends down; what they gained is the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from reft_edge.agent.trainer import Trainer
from reft_edge.data.dataset import Dataset, batches
from reft_edge.errors import ModelError
from reft_edge.simulation.digits import load_digits_split
from reft_edge.simulation.sizes.records import Blob
from reft_edge.wire.codec_names import Codec, Float16, Float32, Int8, codec_text
from reft_edge.wire.codecs import encode_tensors

if TYPE_CHECKING:
    from reft_edge.bundle.bundle import Bundle
    from reft_edge.simulation.sizes.records import SizeSettings
    from reft_edge.types import FloatArray, IntArray, Tensors

CODECS: tuple[Codec, ...] = (Float32(), Float16(), Int8())

ENLARGED = 4
"""Digits have 8 x 8 pixels, the models' pictures 32 x 32."""


def blobs(bundle: Bundle, settings: SizeSettings) -> tuple[tuple[Blob, ...], tuple[Blob, ...]]:
    """Encoded weights and encoded update, in every codec. Raises `ModelError` for models of other pictures."""
    before = bundle.tensors()
    after = _trained(bundle, settings)
    update = {name: after[name] - before[name] for name in before}
    return _encoded(after), _encoded(update)


def _encoded(tensors: Tensors) -> tuple[Blob, ...]:
    made = []
    for codec in CODECS:
        data = encode_tensors(tensors, codec)
        raw = zstandard.frame_content_size(data)
        made.append(Blob(codec=codec_text(codec), raw_bytes=raw, sent_bytes=len(data)))
    return tuple(made)


def _trained(bundle: Bundle, settings: SizeSettings) -> Tensors:
    shape = bundle.manifest.input.shape
    if shape != (3, 8 * ENLARGED, 8 * ENLARGED):
        raise ModelError(f"model {bundle.manifest.model!r} takes inputs of shape {shape}; this is for (3, 32, 32)")
    trainer = Trainer(bundle, threads=1, seed=settings.seed)  # one thread: sums are the same wherever it runs
    for inputs, targets in _batches(settings):
        trainer.step(inputs, targets, settings.learning_rate)
    return trainer.state()


def _batches(settings: SizeSettings) -> Iterator[tuple[FloatArray, IntArray]]:
    """The digits over and over, in a new order each time, for as many steps as are asked for."""
    digits = load_digits_split(1, alpha=1.0, seed=settings.seed).private
    rng = np.random.default_rng(settings.seed)
    left = settings.steps
    while left:
        for inputs, targets in batches(Dataset(inputs=digits.inputs, targets=digits.targets), settings.batch_size, rng):
            large = inputs.repeat(ENLARGED, axis=2).repeat(ENLARGED, axis=3).repeat(3, axis=1)
            yield np.ascontiguousarray(large), targets
            left -= 1
            if not left:
                return
