"""The benchmark's four parts, run by run. The first three play on one site each, the last on a new one each time."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import numpy as np

from reft_edge.simulation.deployments.bad_models import BRITTLE_SUM, MADE_FROM_A_GOOD_ONE, PASSES_CHECKS, Badness
from reft_edge.simulation.deployments.breaking import KINDS, break_deployment, draw
from reft_edge.simulation.deployments.crew import Crew
from reft_edge.simulation.deployments.observer import Observer
from reft_edge.simulation.deployments.records import PARTS, DeployRun, DeploySettings, Part
from reft_edge.simulation.deployments.rollout import roll_out
from reft_edge.simulation.deployments.served import preinstall
from reft_edge.simulation.deployments.site import EVERY_CLASS, SiteOptions, open_site
from reft_edge.simulation.deployments.stopping import stop_bad
from reft_edge.simulation.deployments.swapping import load_on, serving, swap
from reft_edge.simulation.deployments.versions import MODEL, VersionOptions, make_versions
from reft_edge.simulation.digits import load_digits_split
from reft_edge.simulation.faults.disk import mounted, why_not

if TYPE_CHECKING:
    from reft_edge.coordinator.records import ExportRecord

Tell: TypeAlias = Callable[[str], None]

OLD, NEW, RANDOM = "old", "new", "random"
"""Versions: two good ones, and one that was never trained."""

VERSIONS = {OLD: VersionOptions(seed=1), NEW: VersionOptions(seed=2), RANDOM: VersionOptions(seed=3, epochs=0)}

_SERVED_SOAK_S = 20.0
"""Long enough for the first errors to be counted and told, also where a machine is busy."""

READY_WITHIN_S = 120.0
"""For the last agent to have announced itself; twenty take ten seconds on two quiet cores."""


def missing(
    settings: DeploySettings, runs: Sequence[DeployRun], parts: Sequence[Part] = PARTS
) -> dict[Part, list[int]]:
    """Numbers of the runs that are still to be done, by part."""
    have = {(run.part, run.number) for run in runs}
    wanted = {
        "rollout": settings.rollouts,
        "swaps": settings.swap_runs,
        "bad": len(settings.bad),
        "faults": settings.fault_runs,
    }
    return {part: [number for number in range(wanted[part]) if (part, number) not in have] for part in parts}


class Workplace:
    """Where runs are done: folders below `directory`, which is there, and the versions, made when first needed.

    Folders of runs in which all was well are removed.
    """

    def __init__(self, directory: Path, settings: DeploySettings, tell: Tell) -> None:
        self._directory = directory
        self._settings = settings
        self._tell = tell
        self._versions: dict[str, list[ExportRecord]] = {}

    def run(self, todo: Mapping[Part, Sequence[int]]) -> Iterator[DeployRun]:
        """Runs as they end. Raises `ReftError`."""
        parts = {"rollout": self.rollouts, "swaps": self.swaps, "bad": self.bad, "faults": self.faults}
        for part, numbers in todo.items():
            if numbers:
                yield from parts[part](numbers)

    def rollouts(self, numbers: Sequence[int]) -> Iterator[DeployRun]:
        """There and back."""
        file_bytes = sum(Path(record.path).stat().st_size for record in self._made()[NEW])
        with self._fleet("rollout", self._options(self._settings.devices), served=OLD) as (crew, observer):
            for number in numbers:
                rollout = roll_out(crew, observer, old=OLD, new=NEW, file_bytes=file_bytes)
                yield DeployRun(part="rollout", number=number, rollout=rollout)
        self._remove("rollout")

    def swaps(self, numbers: Sequence[int]) -> Iterator[DeployRun]:
        """One device and its server, under load."""
        digits = load_digits_split(1, alpha=EVERY_CLASS, seed=self._settings.seed)
        body = msgspec.json.encode({"inputs": digits.test.inputs[:1].tolist()})
        for number in numbers:
            name = f"swaps-{number}"
            with self._fleet(name, self._options(1), served=OLD) as (crew, _):
                swaps = swap(crew, self._settings, body, old=OLD, new=NEW)
            self._remove(name)
            yield DeployRun(part="swaps", number=number, swaps=swaps)

    def bad(self, numbers: Sequence[int]) -> Iterator[DeployRun]:
        """All devices serve the old version, before and after each."""
        checked = [number for number in numbers if self._settings.bad[number] not in PASSES_CHECKS]
        if checked:
            yield from self._stopped_at_checks(checked)
        for number in numbers:
            if number not in checked:
                yield self._stopped_while_served(number)

    def _stopped_at_checks(self, numbers: Sequence[int]) -> Iterator[DeployRun]:
        with self._fleet("bad", self._options(self._settings.devices), served=OLD) as (crew, observer):
            for number in numbers:
                if self._settings.bad[number] == "deadly" and platform.machine() not in ("x86_64", "AMD64"):
                    self._tell("deadly: not on this processor, which divides whole numbers without a signal")
                    continue
                yield self._stopped(crew, observer, number)
        self._remove("bad")

    def _stopped_while_served(self, number: int) -> DeployRun:
        """Of a version that passes every check: the canary's server gets inputs that it fails with."""
        body = msgspec.json.encode({"inputs": np.full((1, *MODEL.input_shape), BRITTLE_SUM).tolist()})
        options = self._options(self._settings.devices)
        canary = options.names[0]
        options = msgspec.structs.replace(options, canary_devices=(canary,), soak_s=_SERVED_SOAK_S)
        with (
            self._fleet("served", options, served=OLD) as (crew, observer),
            serving(crew, canary) as port,
            load_on(port, body, self._settings),
        ):
            run = self._stopped(crew, observer, number)
        self._remove("served")
        return run

    def _stopped(self, crew: Crew, observer: Observer, number: int) -> DeployRun:
        badness = self._settings.bad[number]
        arguments = self._bad_arguments(badness)
        return DeployRun(
            part="bad",
            number=number,
            bad=stop_bad(crew, observer, badness, arguments, version=badness, served=OLD),
        )

    def faults(self, numbers: Sequence[int]) -> Iterator[DeployRun]:
        """Each run with a fleet of its own, which nothing has happened to."""
        if (reason := why_not()) is not None:
            self._tell(f"disk-full: not on this machine: {reason}")
        kinds = [kind for kind in KINDS if kind != "disk-full" or reason is None]
        options = self._options(self._settings.fault_devices)
        for number in numbers:
            name = f"faults-{number}"
            script = draw(self._settings.seed + number, devices=options.names, kinds=kinds)
            full = {fault.device for fault in script.faults if fault.kind == "disk-full"}
            with self._fleet(name, options, served=OLD, blocks=True, disks_for=full) as (crew, observer):
                survived = break_deployment(crew, observer, script, old=OLD, new=NEW)
            if not survived.complaints:
                self._remove(name)
            yield DeployRun(part="faults", number=number, faults=survived)

    def _options(self, devices: int) -> SiteOptions:
        settings = self._settings
        return SiteOptions(devices=devices, soak_s=settings.soak_s, max_latency_s=settings.max_latency_s)

    @contextmanager
    def _fleet(
        self, name: str, options: SiteOptions, *, served: str, blocks: bool = False, disks_for: Collection[str] = ()
    ) -> Iterator[tuple[Crew, Observer]]:
        """A site with all its agents there, which serve a version already.

        `blocks`: as `Observer` takes it. `disks_for`: devices whose spool gets a disk of its own.
        """
        digits = load_digits_split(options.devices, alpha=EVERY_CLASS, seed=self._settings.seed)
        versions, folder = self._made(), self._directory / name
        with (
            open_site(folder, options, digits, versions) as site,
            ExitStack() as stack,
            Crew(site, disks={each: stack.enter_context(mounted(site.spool(each))) for each in disks_for}) as crew,
            Observer(site, blocks=blocks) as observer,
        ):
            for device, ratio in site.ratios.items():
                trained = next(record for record in versions[served] if record.values["ratio"] == ratio)
                preinstall(site, device, served, trained)
            crew.start_agents()
            observer.wait_for_devices(set(site.devices), timeout_s=READY_WITHIN_S)
            yield crew, observer

    def _remove(self, name: str) -> None:
        shutil.rmtree(self._directory / name)

    def _made(self) -> dict[str, list[ExportRecord]]:
        if not self._versions:
            self._tell("training and exporting the versions, some 15 s")
            digits = load_digits_split(1, alpha=EVERY_CLASS, seed=self._settings.seed)
            self._versions = make_versions(self._directory / "versions", VERSIONS, digits)
        return self._versions

    def _bad_arguments(self, badness: Badness) -> list[str]:
        """Of `deploy`: a run of the store, or a file that was made from a good one."""
        if badness == "random":
            return [RANDOM]
        good = Path(self._made()[NEW][0].path).read_bytes()
        path = self._directory / f"{badness}.onnx"
        path.write_bytes(MADE_FROM_A_GOOD_ONE[badness](good))
        return ["--file", str(path), "--as", badness]
