"""The section of RESULTS.md, from the benchmark's JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from reft_edge.simulation.deployments.bad_models import PASSES_CHECKS
from reft_edge.simulation.deployments.records import (
    NEAR_S,
    DeployRun,
    DeploySettings,
    Rollout,
    Stopped,
    Survived,
    Swaps,
    Window,
)
from reft_edge.simulation.results.markdown import Goal, goals, table
from reft_edge.simulation.results.results_file import ResultsFile

BAD_WORDS = {
    "random": "random weights",
    "slow": "right, but too slow",
    "unreadable": "onnxruntime refuses it",
    "hungry": "its check runs out of memory",
    "deadly": "it kills the process that runs it",
    "brittle": "right, but fails with inputs that come later",
}

_PARTS: tuple[tuple[str, Callable[[Rollout], float]], ...] = (
    ("`deploy` to the last device serving", lambda run: run.until_served_s),
    ("until the canaries are asked", lambda run: run.start_s),
    ("canaries: fetch, check, switch", lambda run: run.canaries_s),
    ("soak, as set", lambda run: run.soak_s),
    ("the rest: fetch, check, switch", lambda run: run.rest_s),
    ("one device's fetching, median of the devices", lambda run: run.fetch_s),
    ("one device's check, median of the devices", lambda run: run.check_s),
    ("the whole command", lambda run: run.command_s),
    ("`rollback` to the last device serving the old one", lambda run: run.until_undone_s),
    ("the whole command", lambda run: run.undo_command_s),
)


def section(path: Path) -> str:
    """Markdown, from the heading on. Raises `ConfigError` when `path` holds something else."""
    results = ResultsFile.read(path, DeploySettings, DeployRun)
    settings, runs = results.settings, results.runs
    rollouts = [run.rollout for run in runs if run.rollout is not None]
    swaps = [run.swaps for run in runs if run.swaps is not None]
    bad = [run.bad for run in runs if run.bad is not None]
    broken = [run.faults for run in runs if run.faults is not None]
    introduction = (
        "Real agents, each a process with a worker, on one Mosquitto with mutual TLS; all messages are signed. The "
        "model is `digits_cnn` (0.85 MB in float32), for every second device its half, each in float32 and int8. "
        "Agents, broker and commands share this machine's cores: what boards do at the same time is done by turns "
        "here.\n"
    )
    wanted = [*_swap_goals(swaps), *_bad_goals(settings, bad), *_fault_goals(broken)]
    parts = ["## Deployments\n", introduction]
    if wanted:
        parts.append(goals(wanted))
    if rollouts:
        parts += ["### A version to every device\n", _rollouts(rollouts)]
    if swaps:
        parts += ["### Switching under load\n", _swaps(settings, swaps)]
    if bad:
        parts += ["### Bad versions\n", _bad(settings, bad)]
    if broken:
        parts += ["### Killed on the way\n", _broken(settings, broken)]
    return "\n".join(parts)


# Goals.


def _swap_goals(runs: Sequence[Swaps]) -> list[Goal]:
    if not runs:
        return []
    requests, switches = sum(run.requests for run in runs), sum(run.switches for run in runs)
    lost, late = sum(run.lost for run in runs), sum(run.late for run in runs)
    what = f"requests lost in {switches} switches under load"
    measured = f"{lost} of {requests:,}" + (f", {late} by the version before" if late else "")
    return [Goal(what=what, wanted="none", measured=measured, met=lost == 0 and late == 0)]


def _bad_goals(settings: DeploySettings, runs: Sequence[Stopped]) -> list[Goal]:
    if not runs:
        return []
    checked = [run for run in runs if run.badness not in PASSES_CHECKS]
    switched, beyond = sum(run.switched for run in checked), sum(run.switched_beyond for run in runs)
    whole = all(not run.complaints for run in runs)
    return [
        Goal(
            what=f"devices beyond the canaries that ever served one of {len(runs)} bad versions",
            wanted="none",
            measured=f"{beyond} of {settings.devices}",
            met=beyond == 0,
        ),
        Goal(
            what="canaries that ever served one that fails its check",
            wanted="none",
            measured=str(switched),
            met=switched == 0,
        ),
        Goal(
            what="the old version is served everywhere afterwards",
            wanted="always",
            measured="always" if whole else "; ".join(one for run in runs for one in run.complaints)[:200],
            met=whole,
        ),
    ]


def _fault_goals(runs: Sequence[Survived]) -> list[Goal]:
    if not runs:
        return []
    well = sum(not run.complaints for run in runs)
    what = "deployments with processes killed or stopped on the way that end where they should, every model whole"
    return [Goal(what=what, wanted="all", measured=f"{well} of {len(runs)}", met=well == len(runs))]


# Tables.


def _rollouts(runs: Sequence[Rollout]) -> str:
    first = runs[0]
    rows = [
        (name, *(f"{figure:.2f}" for figure in (median(map(part, runs)), min(map(part, runs)), max(map(part, runs)))))
        for name, part in _PARTS
    ]
    said, heard = (median(getattr(run, name) for run in runs) / 1e6 for name in ("said_bytes", "heard_bytes"))
    int8 = median(run.int8 for run in runs)
    after = (
        f"\n{len(runs)} times to {first.devices} devices, {first.canaries} of them canaries, and back. The broker "
        f"received {said:.2f} MB and sent {heard:.2f} MB for each (MQTT without TLS, medians); the version's files are "
        f"{first.file_bytes / 1e6:.2f} MB. {int8:g} devices took int8, the others float32: each takes what it measured "
        "better. A check is a worker that starts, both files on the samples held out, latency one sample at a time, "
        "and what is served now for comparison.\n"
    )
    return table(("seconds", "median", "least", "most"), rows) + after


def _swaps(settings: DeploySettings, runs: Sequence[Swaps]) -> str:
    def row(name: str, window: Callable[[Swaps], Window]) -> tuple[str, ...]:
        windows = [window(run) for run in runs]
        figures = (
            median(one.p50_s for one in windows),
            median(one.p99_s for one in windows),
            max(one.worst_s for one in windows),
        )
        return (name, f"{sum(one.requests for one in windows):,}", *(f"{1e3 * figure:.1f}" for figure in figures))

    rows = [
        row("nothing is deployed", lambda run: run.quiet),
        row("a version is fetched and checked beside it", lambda run: run.deploying),
        row(f"within {NEAR_S:g} s of a switch", lambda run: run.switching),
    ]
    before = (
        f"`reft-edge serve` of one device gets {settings.requests_per_s:g} requests a second, every tenth on a new "
        f"connection, while `reft-edge deploy` and `reft-edge rollback` take turns: {len(runs)} runs of "
        f"{settings.swaps} switches. Latency counts from when a request was due. Medians of the runs, and the worst of "
        "all.\n\n"
    )
    return before + table(("milliseconds", "requests", "p50", "p99", "worst"), rows)


def _bad(settings: DeploySettings, runs: Sequence[Stopped]) -> str:
    rows = [
        (
            BAD_WORDS[run.badness],
            run.kind or ("errors" if run.canaries else "command"),
            str(run.canaries),
            str(run.switched),
            str(run.switched_beyond),
            f"{run.command_s:.1f}",
            "" if run.undo_s is None else f"{run.undo_s:.1f}",
        )
        for run in sorted(runs, key=lambda run: settings.bad.index(run.badness))
    ]
    header = (
        "version",
        "stopped for",
        "canaries asked",
        "served it",
        "beyond canaries",
        "command, s",
        "undone, s",
    )
    after = (
        f"\n{settings.devices} devices serve a good version and are offered a bad one. *Stopped for*: what the canary "
        f"said (devices accept {1e3 * settings.max_latency_s:g} ms for one sample). *Served it*: devices that ever "
        "did; the last one passes every check, and its canary's server then counts errors, which it reports. *Undone*: "
        "from a canary's refusal to the end of the command.\n"
    )
    return table(header, rows) + after


def _broken(settings: DeploySettings, runs: Sequence[Survived]) -> str:
    injected = Counter(kind for run in runs for kind in run.injected)
    ends = Counter(run.state for run in runs)
    rows = [
        (kind, str(count), str(sum(kind in run.injected and not run.complaints for run in runs)))
        for kind, count in sorted(injected.items())
    ]
    n_missed = sum(len(run.missed) for run in runs)
    complaints = [f"\n- {complaint}" for run in runs for complaint in run.complaints]
    after = (
        f"\n{len(runs)} deployments to {settings.fault_devices} devices, each with one or two faults at drawn moments "
        f"(seeds from {settings.seed}); {n_missed} more found nothing to break. "
        f"{ends['done']} were completed, {ends['rolled_back']} undone because a canary's check could not be done. "
        "Afterwards every device serves a model that is whole by its SHA-256, and the right one for how the deployment "
        "ended.\n"
    )
    return table(("fault", "done", "all well"), rows) + after + "".join(complaints)
