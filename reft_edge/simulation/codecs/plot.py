"""Accuracy against bytes: a point for each way, a colour and marker for each codec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from reft_edge.simulation.codecs.records import DOWN, UP, CodecRun, CodecSettings, Way
from reft_edge.simulation.codecs.summary import Summary, summaries
from reft_edge.simulation.results.figures import SERIES, drawing
from reft_edge.wire.codec_names import Codec, codec_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, settings: CodecSettings, runs: Sequence[CodecRun]) -> None:
    """Two panels: ways up by bytes up, ways down by bytes down, both of all devices and rounds."""
    found = summaries(runs, target=settings.target_accuracy)
    with drawing(path, columns=2, width=5.6, height=4.6) as (up, down):
        _panel(up, [found[way] for way in UP if way in found], lambda way: way.update, lambda one: one.up_bytes)
        _panel(down, [found[way] for way in DOWN if way in found], lambda way: way.delta, lambda one: one.down_bytes)
        up.set_xlabel("MB up")
        down.set_xlabel("MB down, without graphs")
        up.set_ylabel("accuracy at the end, %")


def _panel(
    axes: Axes,
    found: Sequence[Summary],
    codec_of: Callable[[Way], Codec | None],
    bytes_of: Callable[[Summary], tuple[int, ...]],
) -> None:
    kinds: dict[str, list[Summary]] = {}
    for summary in found:
        codec = codec_of(summary.way)
        kinds.setdefault("whole, float16" if codec is None else codec_text(codec).split()[0], []).append(summary)
    for look, (kind, members) in zip(SERIES, kinds.items(), strict=False):
        megabytes = [fmean(bytes_of(one)) / 1e6 for one in members]
        axes.scatter(megabytes, [100 * fmean(one.accuracy) for one in members], label=kind, **look.points)
    axes.set_xscale("log")
    if kinds:
        axes.legend()
