"""The size benchmark's section of RESULTS.md, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reft_edge.simulation.results.markdown import Goal, goals, table
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.simulation.sizes.records import Blob, Board, Form, SizeRun, SizeSettings, Variant

PAPERS_MODEL = "vgg16"

GOAL_WIRE_BYTES = 500_000
"""In each direction, in the first round: what travels then is the most."""


def section(path: Path) -> str:
    """Markdown, from the heading on. Raises `ConfigError` when `path` holds something else."""
    results = ResultsFile.read(path, SizeSettings, SizeRun)
    settings = results.settings
    runs = {(run.model, run.form): run for run in results.runs}
    plan = (
        f"Planned with the product for each board in `device_profiles/`: {settings.local_epochs} local epochs of "
        f"{settings.samples:,} samples, batches of {settings.batch_size}, a deadline of {settings.deadline_s:g} s, "
        f"weights and updates in {settings.codec}. *Planned* is the default planning; *limited* has "
        f"`[planning] limits = {{ weight_bytes = {settings.weight_bytes}, macs = {settings.macs} }}`, the paper's "
        f"pruned VGG16. Where boards get different variants, the first tables show the largest; in brackets is what a "
        "board cannot train, or not before the deadline.\n"
    )
    encoding = (
        "Bytes on the wire: blobs encoded by the product's codecs after "
        f"{settings.steps} training steps; int8 before and after lossless compression. Graphs and manifest travel once "
        "and are not in the other columns.\n"
    )
    parts = [
        "## Size and cost, without training\n",
        plan,
        goals(_goals(settings, runs)),
        _sizes(settings, runs),
        encoding,
        _wire(settings, runs),
    ]
    for model in settings.models:
        if forms := {form: runs[model, form] for _, form in _of(model, runs)}:
            parts += [f"### {model}, by board\n", _boards(settings, forms)]
    return "\n".join(parts)


def _goals(settings: SizeSettings, runs: Mapping[tuple[str, Form], SizeRun]) -> list[Goal]:
    run = runs.get((PAPERS_MODEL, "limited"))
    largest = _largest(run)
    if largest is None:
        return [Goal(what=f"{PAPERS_MODEL} as small as the paper's", wanted="", measured="", met=None)]
    down, up = (_blob(blobs, settings.codec) for blobs in (largest.down, largest.up))
    first_down = largest.graph_bytes + down.sent_bytes
    return [
        Goal(
            what=f"{PAPERS_MODEL} as planned, weights and buffers in float32",
            wanted=f"at most {settings.weight_bytes / 1e6:g} MB",
            measured=f"{largest.weight_bytes / 1e6:.3f} MB",
            met=largest.weight_bytes <= settings.weight_bytes,
        ),
        Goal(
            what="the same variant, multiply-accumulates",
            wanted=f"at most {settings.macs / 1e9:g} G",
            measured=f"{largest.forward_macs / 1e9:.4f} G",
            met=largest.forward_macs <= settings.macs,
        ),
        Goal(
            what=f"down in the first round, {down.codec} and the graphs",
            wanted=f"at most {GOAL_WIRE_BYTES / 1e6:g} MB",
            measured=f"{first_down / 1e6:.3f} MB",
            met=first_down <= GOAL_WIRE_BYTES,
        ),
        Goal(
            what=f"up, {up.codec}",
            wanted=f"at most {GOAL_WIRE_BYTES / 1e6:g} MB",
            measured=f"{up.sent_bytes / 1e6:.3f} MB",
            met=up.sent_bytes <= GOAL_WIRE_BYTES,
        ),
    ]


def _sizes(settings: SizeSettings, runs: Mapping[tuple[str, Form], SizeRun]) -> str:
    rows = []
    for run, variant in _largest_of_each(settings, runs):
        rows.append(
            (
                f"{run.model}, {run.form}",
                f"{variant.ratio:.1%}",
                f"{variant.parameters:,}",
                f"{variant.weight_bytes / 1e6:.2f}",
                f"{variant.weight_bytes / 2**20:.2f}",
                f"{variant.forward_macs / 1e6:.1f}",
                f"{variant.step_memory_bytes / 2**20:,.0f} MiB",
            )
        )
    return table(("model, form", "channels pruned", "parameters", "MB", "MiB", "MMACs", "tensors of a step"), rows)


def _wire(settings: SizeSettings, runs: Mapping[tuple[str, Form], SizeRun]) -> str:
    rows = []
    for run, variant in _largest_of_each(settings, runs):
        if variant.down:
            cells = [cell for blobs in (variant.down, variant.up) for cell in _blob_cells(blobs)]
            rows.append((f"{run.model}, {run.form}", *cells, f"{variant.graph_bytes / 1e3:.1f} kB"))
    columns = ("float32", "float16", "int8", "int8 compressed")
    header = [f"{way} {column}" for way in ("down,", "up,") for column in columns]
    return table(("MB", *header, "graphs, once"), rows)


def _blob_cells(blobs: Sequence[Blob]) -> list[str]:
    float32, float16, int8 = (_blob(blobs, codec) for codec in ("float32", "float16", "int8"))
    sizes = (float32.sent_bytes, float16.sent_bytes, int8.raw_bytes, int8.sent_bytes)
    return [f"{size / 1e6:.3f}" for size in sizes]


def _boards(settings: SizeSettings, runs: Mapping[Form, SizeRun]) -> str:
    header = ["board"]
    for form in runs:
        header += ["unpruned: memory", "round"] if form == "unpruned" else [f"{form}: parameters", "memory", "round"]
    rows = []
    for name in settings.boards:
        row = [name]
        for run in runs.values():
            row += _board_cells(next(board for board in run.boards if board.board == name), run)
        rows.append(row)
    return table(header, rows)


def _board_cells(board: Board, run: SizeRun) -> list[str]:
    """Figures of a plan that would not do are in brackets."""
    if board.ratio is None or board.round_s is None or board.peak_memory_bytes is None:
        return ["no part", "", ""][: 2 if run.form == "unpruned" else 3]
    cells = [f"{board.peak_memory_bytes / 2**20:,.0f} MiB", _duration(board.round_s)]
    if run.form != "unpruned":
        parameters = next(one.parameters for one in run.variants if one.ratio == board.ratio)
        cells.insert(0, f"{parameters:,}")
    return [f"({cell})" if board.obstacle else cell for cell in cells]


def _largest_of_each(settings: SizeSettings, runs: Mapping[tuple[str, Form], SizeRun]) -> list[tuple[SizeRun, Variant]]:
    found = [(runs[key], _largest(runs[key])) for model in settings.models for key in _of(model, runs)]
    return [(run, variant) for run, variant in found if variant is not None]


def _of(model: str, runs: Mapping[tuple[str, Form], SizeRun]) -> list[tuple[str, Form]]:
    return [key for key in runs if key[0] == model]


def _largest(run: SizeRun | None) -> Variant | None:
    return run.variants[0] if run is not None and run.variants else None


def _blob(blobs: Sequence[Blob], codec: str) -> Blob:
    return next(blob for blob in blobs if blob.codec == codec)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
