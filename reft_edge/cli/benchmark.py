"""Measure on this board what models cost: time of one sample, samples a second, memory, and warmth.

Prints 50th, 95th and 99th percentile of the time of one sample, throughput in batches, the process's proportional
memory (PSS) and what of it came with the model, and the temperature before and after. Several files, for example a
model in both precisions, stand side by side; each is measured in a process of its own, one after the other. Close what
else computes meanwhile; a warning says when something did.

Inputs are random numbers of the model's shape. With --data they are real ones, and accuracy is shown too (or the mean
squared error): a folder of pictures by class, an .npz with `inputs` and `targets`, or a .csv that [data] of the agent's
settings describes, where an agent.toml is measured.

examples:
  reft-edge benchmark                                             what agent.toml's device serves
  reft-edge benchmark global.onnx global.int8.onnx --threads 2
  reft-edge benchmark global.onnx --data pictures --batch 1,16,64
  reft-edge benchmark global.onnx --seconds 30 --json | jq '.models[0].latency_p99_s'
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from reft_edge.agent.settings import AgentSettings
from reft_edge.cli.run_arguments import at_least_one
from reft_edge.data.settings import DataSettings
from reft_edge.errors import ConfigError
from reft_edge.profiling.load import NOTABLE_SHARE

if TYPE_CHECKING:
    from reft_edge.agent.serving.benchmark import ModelFigures


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        type=Path,
        nargs="*",
        metavar="MODEL",
        help="an .onnx file, an agent.toml or an agent's spool (default: agent.toml)",
    )
    parser.add_argument(
        "--threads", type=at_least_one, default=1, metavar="N", help="cores to compute on (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=_sizes, default=(8, 32), metavar="N,...", help="sizes of batches for throughput (default: 8,32)"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=10.0, metavar="S", help="for each model (default: %(default)g)"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="a folder, an .npz or a .csv with targets")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    models: Sequence[Path] = args.models or [Path("agent.toml")]
    if missing := [model for model in models if not model.exists()]:
        raise ConfigError(f"{missing[0]}: no such file; name an agent.toml, an agent's spool or an .onnx file")
    figures: list[ModelFigures] = []
    for model in models:
        if len(models) == 1:
            figures.append(_measure(model, args))
            continue
        if not args.quiet:
            print(f"reft-edge benchmark: measuring {model}, about {args.seconds:g} s", file=sys.stderr, flush=True)
        code, found = _measure_apart(model, args)
        if code:
            return code
        figures += found
    for each in () if args.quiet else figures:
        for warning in _warnings(each):
            print(f"reft-edge benchmark: warning: {each.name}: {warning}", file=sys.stderr)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode({"models": figures}), indent=1).decode())
    else:
        print("\n".join(_table(figures)))
    return 0


def _measure(model: Path, args: argparse.Namespace) -> ModelFigures:
    from reft_edge.agent.serving.benchmark import Plan, benchmark

    data = None if args.data is None else _data_settings(model, args.data)
    return benchmark(model, Plan(threads=args.threads, batches=args.batch, seconds=args.seconds, data=data))


def _measure_apart(model: Path, args: argparse.Namespace) -> tuple[int, list[ModelFigures]]:
    """In a process of its own, which says on standard error what is wrong; its exit code, and what it found."""
    from reft_edge.agent.serving.benchmark import ModelFigures

    command = [sys.executable, "-m", "reft_edge", "benchmark", "--json", "--quiet"]
    command += ["--threads", str(args.threads), "--seconds", str(args.seconds)]
    command += ["--batch", ",".join(map(str, args.batch))]
    command += [] if args.data is None else ["--data", str(args.data)]
    done = subprocess.run([*command, "--", str(model)], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return done.returncode, []
    return 0, msgspec.json.decode(done.stdout, type=dict[str, list[ModelFigures]])["models"]


def _data_settings(model: Path, path: Path) -> DataSettings:
    """How `path` is read: as the agent's own data are, where there is an agent."""
    if model.suffix != ".toml":
        return DataSettings(path=str(path.absolute()))
    settings = AgentSettings.read(model).data
    return msgspec.structs.replace(settings, path=str(path.absolute()), function="", shape=())


def _warnings(figures: ModelFigures) -> Iterator[str]:
    if figures.others_share > NOTABLE_SHARE:
        yield f"other processes took {figures.others_share:.0%} of the processors; it would be faster without them"
    if figures.throttled:
        yield "the board slowed itself down; cool it, or take the figures for those of a warm board"


def _table(figures: Sequence[ModelFigures]) -> Iterator[str]:
    """A column for each model."""
    names = [each.name for each in figures]
    widths = [max(len(name), 12) for name in names]

    def row(label: str, values: Sequence[str]) -> str:
        cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        return f"{label:<24}{'  '.join(cells)}".rstrip()

    def all_of(label: str, value: Callable[[ModelFigures], str]) -> str:
        return row(label, [value(each) for each in figures])

    yield row("", names)
    yield all_of("version", lambda each: each.version)
    yield all_of("one sample, p50", lambda each: _milliseconds(each.latency_p50_s))
    yield all_of("            p95", lambda each: _milliseconds(each.latency_p95_s))
    yield all_of("            p99", lambda each: _milliseconds(each.latency_p99_s))
    for rates in zip(*(each.throughput for each in figures), strict=True):
        yield row(f"batches of {rates[0].batch}", [f"{rate.per_s:,.0f} /s" for rate in rates])
    yield all_of("load", lambda each: _milliseconds(each.load_s))
    yield all_of("memory, process (PSS)", lambda each: _mebibytes(each.pss_bytes))
    yield all_of("        of the model", lambda each: _mebibytes(each.model_bytes))
    if any(each.accuracy is not None for each in figures):
        yield all_of("accuracy", lambda each: "-" if each.accuracy is None else f"{each.accuracy:.2%}")
    if any(each.mse is not None for each in figures):
        yield all_of("mean squared error", lambda each: "-" if each.mse is None else f"{each.mse:.6g}")
    yield all_of("temperature", _temperature)
    yield all_of("throttled", lambda each: {None: "not told", True: "YES", False: "no"}[each.throttled])
    first = figures[0]
    samples = f"{first.samples} samples of {first.inputs}" if first.samples else "random inputs"
    yield ""
    yield f"{first.threads} {'thread' if first.threads == 1 else 'threads'}, {samples}"


def _temperature(figures: ModelFigures) -> str:
    before, after = figures.temperature_before_celsius, figures.temperature_after_celsius
    return "not told" if before is None or after is None else f"{before:.0f} to {after:.0f} °C"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(at_least_one(each) for each in text.split(","))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds
