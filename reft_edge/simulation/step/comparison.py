"""Run both sides by turns: only ratios of neighbours in time mean anything on a machine that others use too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import reft_edge
from reft_edge.bundle.bundle import Bundle
from reft_edge.errors import ResourceError
from reft_edge.simulation.children import end_with_parent
from reft_edge.simulation.step.child import GEMM_SIZE
from reft_edge.simulation.step.records import StepRun, StepSettings

_PRODUCT_FLOPS = 2 * GEMM_SIZE**3
_WARM_UPS = 3
_MAX_RUNS = 200
"""Runs in a turn, however short they are."""

_BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Side:
    """One child process, see `child`; a context manager that ends it."""

    def __init__(self, *arguments: str, threads: int = 1) -> None:
        package_root = str(Path(reft_edge.__file__).resolve().parents[1])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        limits = dict.fromkeys(_BLAS_THREADS, str(threads))
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reft_edge.simulation.step.child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits, "PYTHONPATH": os.pathsep.join(paths)},
            preexec_fn=end_with_parent(),
        )
        self.peak_bytes = 0
        self.turns: list[tuple[float, float]] = []
        """Median seconds and processor seconds of a run, turn by turn."""
        self.n_runs = 1

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, n_runs: int) -> tuple[float, float]:
        """Median seconds and processor seconds of so many runs. Raises `ResourceError` when the child has ended."""
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the child was started without pipes")  # pragma: no cover - it is not
        try:
            self._process.stdin.write(f"{n_runs}\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as exc:
            raise ResourceError(f"the process for {' '.join(self._arguments[:2])} has ended; see above") from exc
        self.peak_bytes = answer["peak_bytes"]
        wall, cpu = zip(*answer["times"], strict=True)
        return median(wall), median(cpu)

    def warm_up(self, turn_s: float) -> None:
        """Run a few times, and find how many runs make a turn."""
        seconds, _ = self.run(_WARM_UPS)
        self.n_runs = min(max(int(turn_s / seconds), 1), _MAX_RUNS)

    def turn(self) -> None:
        self.turns.append(self.run(self.n_runs))

    def finish(self) -> None:
        """Wait for a child that only has one thing to do. Raises `ResourceError` when it fails."""
        if self._process.wait() != 0:
            raise ResourceError(f"the process for {' '.join(self._arguments)} failed; see above")


def compare(model: str, threads: int, settings: StepSettings) -> StepRun:
    """One model with one number of threads. Raises `ResourceError` when a child dies."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        bundle = _compile(model, directory)
        batch, spin = str(settings.batch_size), "spin" if settings.spin else "wait"
        ours, theirs, gemm, blas = sides = [
            stack.enter_context(side)
            for side in (
                Side("ours", directory, batch, str(threads), spin),
                Side("torch", model, batch, str(threads), threads=threads),
                Side("onnxruntime-product", str(threads)),
                Side("numpy-product", threads=threads),
            )
        ]
        for side in sides:
            side.warm_up(settings.turn_s if side in (ours, theirs) else settings.turn_s / 4)
        for _ in range(settings.turns):
            for side in sides:
                side.turn()
        cost = bundle.manifest.cost
        return StepRun(
            model=model,
            threads=threads,
            parameters=cost.parameters,
            forward_macs=cost.forward_macs,
            graph_bytes=len(bundle.training_graph),
            step_flops=cost.step_flops_per_sample * settings.batch_size,
            ours_s=median(wall for wall, _ in ours.turns),
            theirs_s=median(wall for wall, _ in theirs.turns),
            time_ratio=_ratio(ours, theirs, 0),
            cpu_ratio=_ratio(ours, theirs, 1),
            ours_peak_bytes=ours.peak_bytes,
            theirs_peak_bytes=theirs.peak_bytes,
            gemm_flops_per_s=_peak_rate(gemm.turns),
            blas_flops_per_s=_peak_rate(blas.turns),
            peak_share=_peak_share(cost.step_flops_per_sample * settings.batch_size, ours, gemm, blas),
        )


def _compile(model: str, directory: str) -> Bundle:
    with Side("compile", directory, model) as side:
        side.finish()
    return Bundle.open(directory)


def _ratio(ours: Side, theirs: Side, which: int) -> float:
    return median(a[which] / b[which] for a, b in zip(ours.turns, theirs.turns, strict=True))


def _peak_rate(turns: Sequence[tuple[float, float]]) -> float:
    """FLOP/s of the best turn: a limit is what the machine can do."""
    return _PRODUCT_FLOPS / min(wall for wall, _ in turns)


def _peak_share(step_flops: int, ours: Side, *products: Side) -> float:
    """Median over the turns of our FLOP/s over the best product's in the same turn."""
    peaks = [_PRODUCT_FLOPS / min(wall for wall, _ in turn) for turn in zip(*(p.turns for p in products), strict=True)]
    shares = [step_flops / wall / peak for (wall, _), peak in zip(ours.turns, peaks, strict=True)]
    return float(median(shares))
