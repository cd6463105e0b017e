"""The codecs benchmark's section of RESULTS.md, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from reft_edge.simulation.codecs.records import DOWN, UP, CodecRun, CodecSettings, Way
from reft_edge.simulation.codecs.summary import LAST_ROUNDS, Summary, summaries
from reft_edge.simulation.results.markdown import Goal, goals, spread, table
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.wire.codec_names import Float32, Int8, LayerWise, codec_text
from reft_edge.wire.compensation_names import Uncompensated

BASELINE = Way(update=Float32(), compensation=Uncompensated())
"""What accuracies are compared with."""

BEFORE = Way(update=Int8())
"""What the product did before there was a choice."""

CHOSEN = Way(update=LayerWise(error_budget=0.3), delta=LayerWise(error_budget=0.3))
"""The defaults of a federation."""

MESSAGE = """\
The unpruned device's update of the third round, encoded without compensation: bytes on the wire, the error's norm over
the update's, processor time. *One-shot*: accuracy in % of the devices' models when one exchange is all there is, as the
coordinator rebuilds them; they teach the global model, and no later round makes up for what a codec left out.
"""

ACCURACY_SLACK = 0.01
"""A way is as good as the baseline when its mean accuracy is at most this below."""


def section(path: Path) -> str:
    """Markdown, from the heading on. Raises `ConfigError` when `path` holds something else."""
    results = ResultsFile.read(path, CodecSettings, CodecRun)
    settings = results.settings
    found = summaries(results.runs, target=settings.target_accuracy)
    parts = ["## Codecs: bytes, time and error, and accuracy for bytes\n", _task(settings)]
    parts += [goals(_goals(found)), "### One message\n", MESSAGE, _messages(found)]
    parts += ["### Updates, with whole float16 weights on the way down\n", _federations(found, UP)]
    parts += ["### Weights from the second round on, and both ways\n", _federations(found, DOWN)]
    return "\n".join(parts)


def _task(settings: CodecSettings) -> str:
    ratios = ", ".join(f"{ratio:g}" for ratio in settings.ratios)
    return (
        f"{settings.model} on digits, {len(settings.ratios)} devices pruned by {ratios}, Dirichlet {settings.alpha:g}, "
        f"{settings.rounds} rounds of {settings.local_epochs} local epochs, merged and not distilled; seeds "
        f"{', '.join(str(seed) for seed in settings.seeds)}. Accuracy is the mean of the last {LAST_ROUNDS} rounds; "
        "bytes are of all devices and rounds, without the graphs, which travel once. *MB to target*: up and down until "
        f"a round first reached {settings.target_accuracy:.0%}, mean over the seeds that did.\n"
    )


def _goals(found: Mapping[Way, Summary]) -> list[Goal]:
    """The default must cost no accuracy, and fewer bytes than int8 did."""
    wanted = f"at most {100 * ACCURACY_SLACK:g} point below float32"
    what = f"{CHOSEN.name}: accuracy"
    if not {BASELINE, BEFORE, CHOSEN} <= found.keys():
        return [Goal(what=what, wanted=wanted, measured="", met=None)]
    baseline, before, chosen = found[BASELINE], found[BEFORE], found[CHOSEN]
    difference = fmean(chosen.accuracy) - fmean(baseline.accuracy)
    one_shot = fmean(chosen.one_shot_accuracy) - fmean(baseline.one_shot_accuracy)
    factor = before.total_bytes / chosen.total_bytes
    return [
        Goal(
            what=what,
            wanted=wanted,
            measured=f"{100 * difference:+.1f} points",
            met=difference >= -ACCURACY_SLACK,
        ),
        Goal(
            what="the same, of the teachers of a one-shot round",
            wanted=wanted,
            measured=f"{100 * one_shot:+.1f} points",
            met=one_shot >= -ACCURACY_SLACK,
        ),
        Goal(
            what="bytes up and down, against int8 updates and float16 weights",
            wanted="fewer",
            measured=f"1/{factor:.1f}",
            met=factor > 1,
        ),
    ]


def _messages(found: Mapping[Way, Summary]) -> str:
    """A row for each codec; the same message whatever compensates."""
    by_codec = {codec_text(summary.way.update): summary for summary in found.values()}
    largest = max((fmean(one.message_bytes) for one in by_codec.values()), default=1.0)
    rows = [
        (
            name,
            spread(one.message_bytes, scale=1e-3),
            f"{largest / fmean(one.message_bytes):.1f}",
            f"{100 * fmean(one.relative_error):.1f}%",
            spread(one.one_shot_accuracy, scale=100),
            f"{1e3 * fmean(one.encode_s):.1f} ms",
            f"{1e3 * fmean(one.decode_s):.1f} ms",
        )
        for name, one in by_codec.items()
    ]
    return table(("codec", "kB", "times smaller", "error", "one-shot", "encode", "decode"), rows)


def _federations(found: Mapping[Way, Summary], ways: tuple[Way, ...]) -> str:
    """Nothing measured of them: a line that says so."""
    rows = [
        (
            one.way.name,
            spread(one.accuracy, scale=100),
            spread(one.up_bytes, scale=1e-6, digits=2),
            spread(one.down_bytes, scale=1e-6, digits=2),
            *_to_target(one),
            str(one.rejected),
        )
        for one in (found[way] for way in ways if way in found)
    ]
    if not rows:
        return "Not measured.\n"
    return table(("way", "accuracy, %", "MB up", "MB down", "MB to target", "seeds", "rejected"), rows)


def _to_target(one: Summary) -> tuple[str, str]:
    reached = [n_bytes for n_bytes in one.to_target if n_bytes is not None]
    return (spread(reached, scale=1e-6, digits=2) if reached else "", f"{len(reached)} of {len(one.to_target)}")
