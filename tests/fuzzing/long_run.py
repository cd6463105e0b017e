"""Fuzz everything that parses bytes from the network or from a file that somebody hands over.

Each target is run in a process of its own, one after another. With `--engine atheris` (coverage-guided, libFuzzer; the
extra `fuzz`) the inputs that reach new code are kept in the corpus folder and are where the next run begins. With
`--engine mutate` the same mutations of valid inputs are tried without looking at coverage: slower to find what is deep,
and available everywhere. An input that breaks a rule is saved, with the command that repeats it.

Prints a JSON summary; exits with 1 if anything was found, or if a target's process died.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tests.fuzzing.campaign import Campaign
from tests.fuzzing.shares import SHARES

DEFAULT_RUNS = 1_100_000
ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "fuzz-corpus"
MEMORY_DISK = Path("/dev/shm")  # noqa: S108 - only for speed; folders in it are made by tempfile

MAX_PROCESS_MIB = 3072
"""Resident memory at which libFuzzer calls it a leak: inputs of a target are measured one by one besides."""

INPUT_TIMEOUT_S = 60
"""When libFuzzer ends a process that hangs; a mere 2 s of CPU time is a finding already."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.one:
        return _run_one(args)
    if args.engine == "atheris" and importlib.util.find_spec("atheris") is None:
        print(
            "scripts/fuzz: atheris is not installed; it has wheels for Linux on x86-64 and Python 3.11 to 3.13: "
            "pip install 'reft-edge[fuzz]'. Without it: scripts/fuzz --engine mutate",
            file=sys.stderr,
        )
        return 2
    if args.target and args.target not in SHARES:
        print(f"scripts/fuzz: no target {args.target!r}; known are {', '.join(SHARES)}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(SHARES))
        return 0
    if args.input is not None:
        return _repeat(args)
    return _run_all(args, {args.target: 1.0} if args.target else SHARES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="", help="only this one (see --list)")
    parser.add_argument("--list", action="store_true", help="print the targets' names")
    parser.add_argument("--engine", choices=["atheris", "mutate"], default="atheris")
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS, help="inputs in all (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.0, help="at most this long for each target; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="kept between runs (%(default)s)")
    parser.add_argument("--input", type=Path, help="try this one file with --target, and nothing else")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser


def _repeat(args: argparse.Namespace) -> int:
    """Try one saved input; its error comes out as it is."""
    from tests.fuzzing.harness import run, silence
    from tests.fuzzing.targets import all_targets

    if not args.target:
        print("scripts/fuzz: --input needs --target", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory, silence(), ExitStack() as stack:
        target = all_targets(Path(directory), stack)[args.target]
        print("accepted" if run(target, args.input.read_bytes()) else "refused, as documented")
    return 0


# The parent: a process for each target.


def _run_all(args: argparse.Namespace, shares: Mapping[str, float]) -> int:
    began = time.monotonic()
    args.corpus.mkdir(parents=True, exist_ok=True)
    campaigns = []
    for name, share in shares.items():
        campaign = _run_process(args, name, max(1, round(args.runs * share / sum(shares.values()))))
        campaigns.append(campaign)
        print(
            f"{name}: {campaign.inputs} inputs, {campaign.accepted} accepted, {campaign.inputs_per_s:.0f}/s, "
            f"{campaign.peak_rss_bytes >> 20} MiB, {len(campaign.findings)} findings {campaign.ended}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
    n_findings = sum(len(campaign.findings) + bool(campaign.ended) for campaign in campaigns)
    summary = {
        "engine": args.engine,
        "seed": args.seed,
        "inputs": sum(campaign.inputs for campaign in campaigns),
        "accepted": sum(campaign.accepted for campaign in campaigns),
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_bytes": max(campaign.peak_rss_bytes for campaign in campaigns),
        "findings": n_findings,
        "targets": msgspec.to_builtins(campaigns),
    }
    print(json.dumps(summary, indent=1))
    return 1 if n_findings else 0


def _run_process(args: argparse.Namespace, name: str, runs: int) -> Campaign:
    record = args.corpus / f"{name}.json"
    record.unlink(missing_ok=True)
    options = ["--engine", args.engine, "--seed", str(args.seed), "--seconds", str(args.seconds)]
    command = [sys.executable, "-m", "tests.fuzzing.long_run", "--one", "--target", name, "--runs", str(runs), *options]
    log = args.corpus / f"{name}.log"
    disk = MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None
    with log.open("wb") as output, tempfile.TemporaryDirectory(dir=disk, prefix="reft-edge-fuzz-") as directory:
        ended = subprocess.run(
            [*command, "--corpus", str(args.corpus), "--record", str(record), "--directory", directory],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    campaign = Campaign(target=name, engine=args.engine)
    if record.exists():
        campaign = msgspec.json.decode(record.read_bytes(), type=Campaign)
    if ended.returncode != 0:
        campaign.ended = f"the process ended with {ended.returncode}; see {log}"
    return campaign


# The child: one target.


def _run_one(args: argparse.Namespace) -> int:
    folder = args.corpus / args.target
    folder.mkdir(parents=True, exist_ok=True)
    engine = _run_atheris if args.engine == "atheris" else _run_mutate
    with ExitStack() as stack:
        return engine(args, folder, args.directory, stack)


def _run_mutate(args: argparse.Namespace, folder: Path, directory: Path, stack: ExitStack) -> int:
    from tests.fuzzing.campaign import Recorder, mutate_seeds
    from tests.fuzzing.harness import silence
    from tests.fuzzing.targets import all_targets

    target = all_targets(directory, stack)[args.target]
    end = time.monotonic() + args.seconds if args.seconds else float("inf")
    recorder = Recorder(target, engine="mutate", crashes=args.corpus / "crashes", record=args.record)
    corpus = [path.read_bytes() for path in sorted(folder.iterdir())]
    with silence():
        mutate_seeds(target, corpus, recorder, runs=args.runs, seed=args.seed, enough=lambda: time.monotonic() > end)
    return 0


def _run_atheris(args: argparse.Namespace, folder: Path, directory: Path, stack: ExitStack) -> int:
    import atheris

    with atheris.instrument_imports(include=["reft_edge"]):
        from tests.fuzzing.targets import all_targets
    from tests.fuzzing.campaign import Recorder
    from tests.fuzzing.harness import silence
    from tests.fuzzing.mutation import MAX_INPUT_BYTES, mutate

    target = all_targets(directory, stack)[args.target]
    recorder = Recorder(target, engine="atheris", crashes=args.corpus / "crashes", record=args.record)
    seeds = directory / "seeds"
    seeds.mkdir()
    for number, data in enumerate(target.seeds):
        (seeds / f"{number}").write_bytes(data)

    def try_input(data: bytes) -> None:
        recorder.try_input(data)
        if recorder.campaign.inputs >= args.runs:
            recorder.save()

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        """A third of the mutations are libFuzzer's; ours know JSON and TOML, and often begin with a valid input again.

        What is parsed in C shows no coverage, so the corpus says little about how near to valid an input is.
        """
        rng = random.Random(seed)
        kind = rng.random()
        if kind < 0.3:
            changed: bytes = atheris.Mutate(data, len(data) + 64)
            return changed[:max_size]
        origin = data if kind < 0.6 else rng.choice(target.seeds)
        return mutate(origin, rng, target.seeds, text=target.text)[:max_size]

    options = [
        f"-runs={args.runs}",
        f"-seed={args.seed}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={INPUT_TIMEOUT_S}",
        f"-rss_limit_mb={MAX_PROCESS_MIB}",
        f"-artifact_prefix={args.corpus / 'crashes'}/{args.target}-",
        "-print_final_stats=1",
        *([f"-max_total_time={round(args.seconds)}"] if args.seconds else []),
    ]
    (args.corpus / "crashes").mkdir(exist_ok=True)
    with silence():
        atheris.Setup([sys.argv[0], *options, str(folder), str(seeds)], try_input, custom_mutator=change)
        recorder.save()
        atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
