"""Settings and finished runs of the size benchmark, as its JSON holds them. SI base units."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

BENCHMARK = "size"

Form: TypeAlias = Literal["unpruned", "planned", "limited"]
"""`planned`: by the default planning, for each board as much as it can do before the deadline. `limited`: the same with
the paper's size as [planning] limits, which hold for the fastest board too."""

FORMS: tuple[Form, ...] = ("unpruned", "planned", "limited")


class SizeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is planned, and how the updates come about whose encoded bytes are counted."""

    models: tuple[str, ...] = ("vgg16", "resnet18", "mobilenet_v2")
    boards: tuple[str, ...]
    """Profiles below device_profiles/, without `.toml`."""
    weight_bytes: int = 1_800_000
    """With `macs` the size of the paper's pruned VGG16 (arXiv 2308.13662), whose FLOPs are multiply-accumulates."""
    macs: int = 70_000_000
    samples: int = 1000
    """Of each board, to plan for."""
    local_epochs: int = 2
    batch_size: int = 32
    deadline_s: float = 600.0
    codec: Literal["int8", "float16", "float32"] = "int8"
    """Of weights and updates in plans."""
    steps: int = 32
    """Of training before weights and update are encoded."""
    learning_rate: float = 0.01
    seed: int = 0


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """One encoded blob."""

    codec: str
    raw_bytes: int
    """Before lossless compression."""
    sent_bytes: int


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled variant."""

    ratio: float
    parameters: int
    weight_bytes: int
    """State in float32: parameters and buffers."""
    forward_macs: int
    step_memory_bytes: int
    """Tensors alive at the peak of a training step, for the settings' batch; without the runtime and the worker."""
    graph_bytes: int
    """Manifest and both graphs, which travel once."""
    down: tuple[Blob, ...] = ()
    """The trained weights, in several codecs; empty where no wire was measured."""
    up: tuple[Blob, ...] = ()
    """What training added to them."""


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """One board's part of a plan; without a ratio it takes none."""

    board: str
    ratio: float | None = None
    round_s: float | None = None
    peak_memory_bytes: float | None = None
    """Of the worker process, an upper bound."""
    obstacle: str = ""
    """Why it cannot train this, or not in time."""


class SizeRun(msgspec.Struct, frozen=True, kw_only=True):
    """One model in one form."""

    model: str
    form: Form
    variants: tuple[Variant, ...]
    """Those that boards use, the largest first."""
    boards: tuple[Board, ...]
