"""Many inputs for one target: what was tried, what was found, what it took. Findings do not end a campaign.

One finding is kept for each place in the code and kind of error, with its input as a file, so that a million inputs
that fail alike are one line to read.
"""

from __future__ import annotations

import hashlib
import random
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tests.fuzzing.harness import Target, run
from tests.fuzzing.mutation import mutate

MAX_POOL = 300
"""Accepted inputs that the seeded mutator goes on from, beside the seeds."""


class Finding(msgspec.Struct, kw_only=True):
    """An input that broke a rule."""

    error: str
    place: str
    """File and line where it was raised."""
    input: str
    """File that holds it."""
    repeat: str
    """Command that tries it again."""
    times: int = 1


class Campaign(msgspec.Struct, kw_only=True):
    """What became of one target."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    """Inputs that were taken as valid: if there are none, nothing behind the first check was tried."""
    seconds: float = 0.0
    inputs_per_s: float = 0.0
    peak_rss_bytes: int = 0
    findings: list[Finding] = []
    ended: str = ""
    """Why it ended early; empty for one that tried all that it should."""


class Recorder:
    """Tries inputs, and keeps the figures in the file `record`, so that they survive a crash of the process."""

    def __init__(self, target: Target, *, engine: str, crashes: Path, record: Path) -> None:
        self.campaign = Campaign(target=target.name, engine=engine)
        self._target = target
        self._crashes = crashes
        self._record = record
        self._found: dict[tuple[str, str], Finding] = {}
        self._began = time.monotonic()
        self._saved_at = 0.0

    def try_input(self, data: bytes) -> bool:
        """Whether it was accepted. What breaks a rule is kept, and is no error here."""
        accepted = False
        try:
            accepted = run(self._target, data)
        except Exception as exc:  # noqa: BLE001 - any exception that is not documented is what we look for
            self._keep(exc, data)
        self.campaign.inputs += 1
        self.campaign.accepted += accepted
        if self.campaign.inputs % 256 == 0 and time.monotonic() - self._saved_at > 1.0:
            self.save()
        return accepted

    def save(self) -> None:
        """Write the figures."""
        self._saved_at = time.monotonic()
        campaign = self.campaign
        campaign.seconds = round(self._saved_at - self._began, 2)
        campaign.inputs_per_s = round(campaign.inputs / max(campaign.seconds, 0.01), 1)
        campaign.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        campaign.findings = list(self._found.values())
        self._record.write_bytes(msgspec.json.encode(campaign))

    def _keep(self, error: Exception, data: bytes) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        known = self._found.get((type(error).__name__, place))
        if known is not None:
            known.times += 1
            return
        self._crashes.mkdir(parents=True, exist_ok=True)
        path = self._crashes / f"{self._target.name}-{hashlib.sha256(data).hexdigest()[:16]}"
        path.write_bytes(data)
        self._found[type(error).__name__, place] = Finding(
            error=f"{type(error).__name__}: {error}"[:300],
            place=place,
            input=str(path),
            repeat=f"scripts/fuzz --target {self._target.name} --input {path}",
        )
        self.save()


def mutate_seeds(
    target: Target, corpus: Sequence[bytes], recorder: Recorder, *, runs: int, seed: int, enough: Callable[[], bool]
) -> None:
    """The engine without coverage: mutations of the seeds, of the corpus, and of what was accepted on the way."""
    rng = random.Random(f"{seed}/{target.name}")
    seeds = [*target.seeds, *corpus]
    pool: list[bytes] = []
    for data in seeds[:runs]:
        recorder.try_input(data)
    while recorder.campaign.inputs < runs and not enough():
        origin = rng.choice(pool) if pool and rng.random() < 0.5 else rng.choice(seeds)
        data = mutate(origin, rng, seeds, text=target.text)
        if recorder.try_input(data) and len(data) < 16_384:
            if len(pool) < MAX_POOL:
                pool.append(data)
            else:
                pool[rng.randrange(MAX_POOL)] = data
    recorder.save()
