"""A way's runs, one for each seed, in the numbers that table and plot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from reft_edge.simulation.codecs.records import CodecRun, Way

LAST_ROUNDS = 3
"""Over which the final accuracy is the mean: one round's goes up and down by a point."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One way; each tuple has a number for each seed."""

    way: Way
    message_bytes: tuple[int, ...]
    encode_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    relative_error: tuple[float, ...]
    one_shot_accuracy: tuple[float, ...]
    accuracy: tuple[float, ...]
    """Mean of the last rounds."""
    up_bytes: tuple[int, ...]
    """Of all devices in all rounds; so is `down_bytes`."""
    down_bytes: tuple[int, ...]
    to_target: tuple[int | None, ...]
    """Bytes up and down until the target accuracy was first reached; None where it never was."""
    rejected: int

    @property
    def total_bytes(self) -> float:
        """Up and down, mean over the seeds."""
        return fmean(up + down for up, down in zip(self.up_bytes, self.down_bytes, strict=True))


def summaries(runs: Sequence[CodecRun], *, target: float) -> dict[Way, Summary]:
    """By way, in the order in which they first came."""
    ways = dict.fromkeys(run.way for run in runs)
    return {way: _summary(way, [run for run in runs if run.way == way], target) for way in ways}


def _summary(way: Way, runs: Sequence[CodecRun], target: float) -> Summary:
    runs = sorted(runs, key=lambda run: run.seed)
    return Summary(
        way=way,
        message_bytes=tuple(run.message.n_bytes for run in runs),
        encode_s=tuple(run.message.encode_s for run in runs),
        decode_s=tuple(run.message.decode_s for run in runs),
        relative_error=tuple(run.message.relative_error for run in runs),
        one_shot_accuracy=tuple(run.message.one_shot_accuracy for run in runs),
        accuracy=tuple(fmean(run.accuracy[-LAST_ROUNDS:]) for run in runs),
        up_bytes=tuple(sum(run.up_bytes) for run in runs),
        down_bytes=tuple(sum(run.down_bytes) for run in runs),
        to_target=tuple(_bytes_to(run, target) for run in runs),
        rejected=sum(run.rejected for run in runs),
    )


def _bytes_to(run: CodecRun, target: float) -> int | None:
    for number, accuracy in enumerate(run.accuracy, start=1):
        if accuracy >= target:
            return sum(run.up_bytes[:number]) + sum(run.down_bytes[:number])
    return None
