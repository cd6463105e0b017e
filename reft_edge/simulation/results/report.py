"""RESULTS.md: every table whose JSON is there, with where it was measured and how to measure it again.

Every figure is from a JSON file; what was found and why is from a notes file, written by a person. Where a table has
been measured in full, its quick form is not shown. The same files give the same text.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reft_edge.simulation.results.markdown import table
from reft_edge.simulation.results.provenance import Provenance
from reft_edge.simulation.results.results_file import read_provenance, results_path

HEAD = """\
# Results

Written by `scripts/benchmarks/report` from the JSON files in `scripts/benchmarks/results/` and the notes in
`scripts/benchmarks/notes/`; changes made here by hand are lost. Every benchmark runs the product's own code. Where
training is involved, a figure is the mean over the seeds and ± its sample standard deviation.
"""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One benchmark's part: `module` has `section(path)`, whose text begins with a heading `## `."""

    name: str
    module: str
    options: str = ""
    """That its command needs."""


CHAPTERS = (
    Chapter(name="size", module="reft_edge.simulation.sizes.section"),
    Chapter(name="accuracy", module="reft_edge.simulation.accuracy.section", options="--data FOLDER"),
    Chapter(name="planner", module="reft_edge.simulation.truth.section"),
    Chapter(name="flower", module="reft_edge.simulation.side_by_side.section"),
    Chapter(name="step", module="reft_edge.simulation.step.section"),
    Chapter(name="codecs", module="reft_edge.simulation.codecs.section"),
    Chapter(name="deploy", module="reft_edge.simulation.deployments.section"),
    Chapter(name="dashboard", module="reft_edge.simulation.dashboard.section"),
)


def report(benchmarks: Path, *, root: Path, chapters: Sequence[Chapter] = CHAPTERS) -> str:
    """The text of RESULTS.md from `results/` and `notes/` below `benchmarks`; links are relative to `root`.

    Raises `ConfigError` for a file that is none of results.
    """
    found = [(one, path) for one in chapters if (path := _measured(benchmarks, one.name)) is not None]
    machines: dict[str, str] = {}
    rows, sections = [], []
    for chapter, path in found:
        text = _section(chapter, path, benchmarks, root)
        title = text.splitlines()[0].removeprefix("## ")
        origins = read_provenance(path)
        labels = [machines.setdefault(_machine(one), f"M{len(machines) + 1}") for one in origins]
        quick = path.stem.endswith("-quick")
        command = " ".join(filter(None, ["scripts/benchmarks/" + chapter.name, chapter.options, "--quick" * quick]))
        rows.append(
            (
                title,
                "quick" if quick else "full",
                _distinct(labels),
                _distinct(one.commit or "not from a checkout" for one in origins),
                _distinct(one.date[:10] for one in origins),
                f"`{command}`",
            )
        )
        sections.append(text)
    parts = [HEAD]
    if rows:
        parts.append(table(("table", "form", "machine", "code", "date", "repeat it with"), rows))
        parts.append("".join(f"- {label}: {machine}\n" for machine, label in machines.items()))
    return "\n".join([*parts, *sections])


def _measured(benchmarks: Path, name: str) -> Path | None:
    """The JSON of the full form, else of the quick one."""
    paths = [results_path(benchmarks / "results", name, quick=quick) for quick in (False, True)]
    return next((path for path in paths if path.exists()), None)


def _section(chapter: Chapter, path: Path, benchmarks: Path, root: Path) -> str:
    text = str(importlib.import_module(chapter.module).section(path)).strip()
    if not text.startswith("## "):
        raise ValueError(f"{chapter.module}.section gives a text that does not begin with '## ': {text[:40]!r}")
    parts = [text]
    plot = path.with_suffix(".svg")
    if plot.exists():
        parts.append(f"![{chapter.name}]({plot.relative_to(root).as_posix()})")
    notes = benchmarks / "notes" / f"{chapter.name}.md"
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def _machine(one: Provenance) -> str:
    """Everything but code and date, in a line."""
    accelerator = f", {one.accelerator}" if one.accelerator else ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(one.packages.items()))
    return (
        f"{one.processor}, {one.cores:g} cores, {one.memory_bytes / 2**30:.0f} GiB{accelerator}; {one.system}, "
        f"Python {one.python}; {versions}"
    )


def _distinct(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))
