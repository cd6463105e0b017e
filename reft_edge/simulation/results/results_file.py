"""A benchmark's finished runs in one JSON file, kept as they end.

A benchmark that was interrupted opens its file again and goes on with what is missing. The file is replaced as a whole,
so it is complete whenever the process is killed. Runs of different settings never share a file, because their means
would mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.simulation.results.provenance import Provenance, provenance

SettingsT = TypeVar("SettingsT", bound=msgspec.Struct)
RunT = TypeVar("RunT", bound=msgspec.Struct)


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    """The file; settings and runs as plain values until their types are known."""

    benchmark: str
    provenance: tuple[Provenance, ...]
    settings: dict[str, Any]
    runs: list[dict[str, Any]]


def results_path(folder: Path, benchmark: str, *, quick: bool) -> Path:
    """Where a benchmark keeps its runs unless --json names another file."""
    return folder / f"{benchmark}-quick.json" if quick else folder / f"{benchmark}.json"


class ResultsFile(Generic[SettingsT, RunT]):
    """The runs of one benchmark with one set of settings; see `open` and `read`."""

    def __init__(
        self,
        path: Path,
        *,
        benchmark: str,
        settings: SettingsT,
        runs: list[RunT],
        provenance: tuple[Provenance, ...] = (),
    ) -> None:
        self.path = path
        self.benchmark = benchmark
        self.settings = settings
        self.runs = runs
        self.provenance = provenance
        """Where the runs were made, oldest first: one entry as long as neither machine nor code changes."""
        self._here: Provenance | None = None

    @classmethod
    def open(
        cls, path: Path, *, benchmark: str, settings: SettingsT, run_type: type[RunT]
    ) -> ResultsFile[SettingsT, RunT]:
        """The file at `path` with the runs it has; one that does not exist yet is written with the first run.

        Raises `ConfigError` when it holds something else: another benchmark's runs, or those of other settings.
        """
        if not path.exists():
            return cls(path, benchmark=benchmark, settings=settings, runs=[])
        document = _load(path)
        if document.benchmark != benchmark:
            raise ConfigError(f"{path} holds runs of the benchmark {document.benchmark!r}; give another file")
        wanted = msgspec.json.decode(msgspec.json.encode(settings))  # where a tuple is a list
        if (name := _first_difference(document.settings, wanted)) is not None:
            there, here = document.settings.get(name), wanted.get(name)
            raise ConfigError(
                f"{path} holds runs with {name} = {there!r}, not {here!r}; give another file, or remove it"
            )
        runs = _convert(document.runs, list[run_type], path)  # type: ignore[valid-type]
        return cls(path, benchmark=benchmark, settings=settings, runs=runs, provenance=document.provenance)

    @classmethod
    def read(cls, path: Path, settings_type: type[SettingsT], run_type: type[RunT]) -> ResultsFile[SettingsT, RunT]:
        """The file at `path`, for a report. Raises `ConfigError` when it is missing or holds something else."""
        document = _load(path)
        settings = _convert(document.settings, settings_type, path)
        runs = _convert(document.runs, list[run_type], path)  # type: ignore[valid-type]
        return cls(path, benchmark=document.benchmark, settings=settings, runs=runs, provenance=document.provenance)

    def add(self, run: RunT) -> None:
        """Keep a finished run, on disk when this returns.

        Raises `ValueError` for a run that JSON cannot hold (NaN), before anything is written; `ResourceError` when the
        disk refuses.
        """
        if not _survives(run):
            raise ValueError(f"JSON cannot hold this run; is a number of it no number? {run!r}")
        self._here = self._here or provenance()
        if not any(one.same_place(self._here) for one in self.provenance):
            self.provenance += (self._here,)
        self.runs.append(run)
        self._save()

    def _save(self) -> None:
        document = _Document(
            benchmark=self.benchmark,
            provenance=self.provenance,
            settings=msgspec.to_builtins(self.settings),
            runs=[msgspec.to_builtins(run) for run in self.runs],
        )
        partial = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
            partial.replace(self.path)
        except OSError as exc:
            raise ResourceError(f"{self.path}: cannot be written: {exc.strerror or exc}") from exc


def read_provenance(path: Path) -> tuple[Provenance, ...]:
    """Where the runs of a file were made, whatever their benchmark. Raises `ConfigError`."""
    return _load(path).provenance


def _survives(run: msgspec.Struct) -> bool:
    try:
        return msgspec.json.decode(msgspec.json.encode(run), type=type(run)) == run
    except msgspec.ValidationError:
        return False


def _load(path: Path) -> _Document:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Document)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path} is no file of benchmark results: {exc}; give another file, or remove it") from exc


def _convert(value: object, kind: Any, path: Path) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path} was written by another version: {exc}; give another file, or remove it") from exc


def _first_difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    return next((name for name in [*here, *there] if there.get(name) != here.get(name)), None)
