"""Settings, rows and finished runs of the codecs benchmark, as its JSON holds them. SI base units."""

from __future__ import annotations

import msgspec

from reft_edge.wire.codec_names import (
    Codec,
    Float32,
    Int4,
    Int8,
    LayerWise,
    RandomK,
    Selective,
    TopK,
    codec_text,
)
from reft_edge.wire.compensation_names import (
    Compensation,
    DeepGradientOptions,
    EControlOptions,
    EF21Options,
    ErrorFeedbackOptions,
    Uncompensated,
)

BENCHMARK = "codecs"


class CodecSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One cohort on digits and how it trains; every row of a seed begins with the same model, data and batches."""

    model: str = "digits_cnn"
    ratios: tuple[float, ...] = (0.0, 0.0, 0.25, 0.25, 0.5, 0.5)
    """Pruning ratio of each device."""
    alpha: float = 0.3
    """Of the Dirichlet split: the smaller, the fewer classes a device sees."""
    rounds: int = 12
    local_epochs: int = 1
    learning_rate: float = 0.05
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    one_shot_epochs: int = 16
    """Local epochs of the one exchange in which nothing can be made up for later."""
    target_accuracy: float = 0.9
    """Bytes are counted until the model is as good as this, and to the end."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How updates travel up, and weights down."""

    update: Codec = Int8()
    compensation: Compensation = ErrorFeedbackOptions()
    delta: Codec | None = None
    """Of the weights' difference from the second round on; None: whole, in float16, in every round."""

    @property
    def name(self) -> str:
        method = msgspec.to_builtins(self.compensation)["name"].replace("_", " ")
        up = codec_text(self.update) + ("" if isinstance(self.compensation, Uncompensated) else f" + {method}")
        return up if self.delta is None else f"{up}, down {codec_text(self.delta)}"


_EXACT, _FEEDBACK = Uncompensated(), ErrorFeedbackOptions()

UP: tuple[Way, ...] = (
    Way(update=Float32(), compensation=_EXACT),
    Way(update=Int8(), compensation=_EXACT),
    Way(update=Int8(), compensation=_FEEDBACK),
    Way(update=Int8(stochastic=True), compensation=_EXACT),
    Way(update=Int4(), compensation=_EXACT),
    Way(update=Int4(), compensation=_FEEDBACK),
    Way(update=Int4(stochastic=True), compensation=_EXACT),
    Way(update=Int4(), compensation=EF21Options()),
    Way(update=TopK(fraction=0.05), compensation=_EXACT),
    Way(update=TopK(fraction=0.05), compensation=_FEEDBACK),
    Way(update=TopK(fraction=0.05), compensation=EF21Options()),
    Way(update=TopK(fraction=0.05), compensation=EControlOptions()),
    Way(update=TopK(fraction=0.05), compensation=DeepGradientOptions()),
    Way(update=TopK(fraction=0.01), compensation=_FEEDBACK),
    Way(update=RandomK(fraction=0.05), compensation=_FEEDBACK),
    Way(update=RandomK(fraction=0.05, unbiased=True), compensation=_EXACT),
    Way(update=LayerWise(error_budget=0.3), compensation=_FEEDBACK),
    Way(update=LayerWise(error_budget=0.5), compensation=_EXACT),
    Way(update=LayerWise(error_budget=0.5), compensation=_FEEDBACK),
    Way(update=LayerWise(error_budget=0.5), compensation=EF21Options()),
    Way(update=LayerWise(error_budget=0.5), compensation=EControlOptions()),
    Way(update=LayerWise(error_budget=0.7), compensation=_FEEDBACK),
    Way(update=LayerWise(error_budget=0.85), compensation=_FEEDBACK),
    Way(update=Selective(threshold=0.02), compensation=_FEEDBACK),
    Way(update=Selective(threshold=0.1), compensation=_FEEDBACK),
)
"""Updates in every codec, weights whole in float16."""

DOWN: tuple[Way, ...] = (
    Way(),
    Way(delta=Int8()),
    Way(delta=Int4()),
    Way(delta=TopK(fraction=0.05)),
    Way(delta=LayerWise(error_budget=0.3)),
    Way(delta=LayerWise(error_budget=0.5)),
    Way(delta=LayerWise(error_budget=0.7)),
    Way(update=LayerWise(error_budget=0.3), delta=Int8()),
    Way(update=LayerWise(error_budget=0.3), delta=LayerWise(error_budget=0.3)),
    Way(update=LayerWise(error_budget=0.5), delta=LayerWise(error_budget=0.3)),
    Way(update=LayerWise(error_budget=0.5), delta=LayerWise(error_budget=0.5)),
)
"""Weights in every codec, updates in int8; and both coarse at once."""

WAYS: tuple[Way, ...] = tuple(dict.fromkeys((*UP, *DOWN)))

QUICK: tuple[Way, ...] = tuple(
    way
    for way in WAYS
    if way.update in (Float32(), Int8(), Int4(), TopK(fraction=0.05), LayerWise(error_budget=0.3))
    and way.compensation in (_FEEDBACK, Uncompensated())
    and way.delta in (None, Int8(), LayerWise(error_budget=0.3))
)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One update under one codec, without compensation. Times are of the processor."""

    n_bytes: int
    encode_s: float
    decode_s: float
    relative_error: float
    """Norm of the error over the norm, of all parameters and statistics of two axes or more."""
    one_shot_accuracy: float
    """On the test data, mean over the devices' models after a one-shot round, as the coordinator rebuilds them."""


class CodecRun(msgspec.Struct, frozen=True, kw_only=True):
    """One way with one seed."""

    way: Way
    seed: int
    message: Message
    """The same update for every way of a seed: device 0's of the third round of an uncompressed federation."""
    accuracy: tuple[float, ...]
    """On the test data, after each round."""
    up_bytes: tuple[int, ...]
    """Of all devices, by rounds; `down_bytes` without graphs."""
    down_bytes: tuple[int, ...]
    rejected: int
    """Updates that the coordinator's checks refused."""
