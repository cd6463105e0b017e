"""Show what each device would train, how long a round would take there, and what it would need.

The times are of a first round, with graphs and whole weights on the way down; "later" is what travels from then on.
Prunes and compiles the variants that come into question, and predicts time and memory from the device profiles. Nothing
is sent anywhere and no device is needed: profiles come from `reft-edge profile-device --output`, or from the folder
device_profiles/ of the repository. A device that cannot train any variant is told so, with the reason.

Exit code 5 when no device can take part.

examples:
  reft-edge plan --model vgg16 --profile device_profiles/*.toml --deadline 600
  reft-edge plan --model resnet_small --profile board.toml --samples 5000 --epochs 1 --policy reft
  reft-edge plan --model my_nets:detector --input-shape 1,64,64 --outputs 2 --profile board.toml --json
  reft-edge plan --model vgg16 --profile board.toml --limit weight_bytes=1800000 --limit macs=70000000
  reft-edge plan --federation federation.toml --profile board.toml
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.config import convert_settings
from reft_edge.errors import ConfigError, PlanError
from reft_edge.profiling.profile import DeviceProfile

if TYPE_CHECKING:
    from reft_edge.coordinator.planning import Assignment
    from reft_edge.coordinator.prediction import Device, Option, Workload
    from reft_edge.coordinator.settings import FederationSettings

DEFAULT_SAMPLES = 1000
"""Training samples of a device that is not there to be asked."""

TABLE_WIDTH = 118
"""Characters, where the output is no terminal."""


def configure(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME", help="a model of the zoo, or module:function in module.py here")
    model.add_argument("--federation", type=Path, metavar="FILE.toml", help="take model and settings from this file")
    parser.add_argument(
        "--profile", type=Path, nargs="+", action="extend", required=True, metavar="FILE.toml", help="device profiles"
    )
    parser.add_argument("--input-shape", type=_shape, metavar="N,N,...", help="one sample, for example 3,32,32")
    parser.add_argument("--outputs", type=int, metavar="N", help="classes, or regression targets")
    parser.add_argument("--input-dtype", choices=("float32", "int64"), help="int64 for token ids")
    parser.add_argument("--loss", choices=("cross_entropy", "mean_squared_error"))
    parser.add_argument(
        "--samples",
        type=_count,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help="training samples on each device (%(default)s)",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="local epochs in a round")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="what a round may take")
    parser.add_argument("--policy", help="deadline: the largest that is done in time; reft: in proportion to FLOP/s")
    parser.add_argument("--max-variants", type=int, metavar="N", help="variants that devices share at most")
    parser.add_argument("--ratios", type=_ratios, metavar="R,R,...", help="pruning ratios to choose from")
    parser.add_argument(
        "--limit",
        type=_limit,
        action="append",
        metavar="QUANTITY=N",
        help="what no variant may exceed: parameters, macs or weight_bytes; may be repeated",
    )
    parser.add_argument("--importance", help="which channels stay: magnitude, random or first")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON document")


def run(args: argparse.Namespace) -> int:
    settings, base_dir = _settings(args)
    profiles = [DeviceProfile.read(path) for path in args.profile]

    from reft_edge.compile.importance import find_importance
    from reft_edge.coordinator.assigning import workload_of
    from reft_edge.coordinator.catalogue import Workshop, initial_model
    from reft_edge.coordinator.planning import plan
    from reft_edge.coordinator.policies import Ladder, find_policy
    from reft_edge.coordinator.prediction import Option

    find_policy(settings.planning.policy)
    find_importance(settings.planning.importance)
    workload = workload_of(settings)
    model = initial_model(settings.model, base_dir=base_dir, seed=settings.seed)
    workshop = Workshop(
        model,
        settings.model,
        importance=settings.planning.importance,
        seed=settings.seed,
        limits=settings.planning.limits,
    )
    tell = _silent if args.quiet else _tell

    def price(ratio: float) -> Option:
        began = time.perf_counter()
        bundle, _ = workshop.make(ratio)
        tell(f"ratio {ratio:.3g}: pruned and compiled in {time.perf_counter() - began:.1f} s")
        return Option.of(bundle.manifest, ratio=ratio, workload=workload)

    devices = _devices(profiles, args.samples)
    ladder = Ladder(workshop.ladder(settings.planning.ratios), price)
    assignments = plan(
        devices,
        workload=workload,
        ladder=ladder,
        policy=settings.planning.policy,
        max_variants=settings.planning.max_variants,
    )
    if args.json:
        print(json.dumps(_document(settings, workload, devices, assignments), indent=1))
    else:
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        _print_plan(settings, workload, n_parameters, devices, assignments)
    return 0 if any(assignment.option for assignment in assignments) else PlanError.exit_code


def _settings(args: argparse.Namespace) -> tuple[FederationSettings, Path]:
    """The federation's settings, with what the command line says instead, and the folder of the user's files."""
    from reft_edge.config import read_toml
    from reft_edge.coordinator.settings import FederationSettings, check_federation

    table: dict[str, Any] = {"federation": "plan", "distillation": {"epochs": 0}, "model": {}}
    base_dir = Path.cwd()
    origin = "arguments"
    if args.federation is not None:
        table, base_dir, origin = read_toml(args.federation), args.federation.absolute().parent, str(args.federation)
    else:
        table["model"] = _zoo_defaults(args)
    given = {
        "model": {"input_shape": args.input_shape, "n_outputs": args.outputs, "input_dtype": args.input_dtype,
                  "loss": args.loss},
        "training": {"local_epochs": args.epochs, "batch_size": args.batch_size},
        "planning": {"policy": args.policy, "max_variants": args.max_variants, "ratios": args.ratios,
                     "importance": args.importance, "limits": dict(args.limit) if args.limit else None},
    }  # fmt: skip
    for section, values in given.items():
        chosen = {key: value for key, value in values.items() if value is not None}
        if chosen:
            table[section] = {**table.get(section, {}), **chosen}
    table |= {key: value for key, value in (("deadline_s", args.deadline), ("seed", args.seed)) if value is not None}
    settings = convert_settings(table, FederationSettings, origin=origin)
    check_federation(settings)
    return settings, base_dir


def _zoo_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Name and usual sizes of a model of the zoo. Raises `ConfigError` where a user's own model lacks a size."""
    from reft_edge.models.registry import ZOO

    entry = ZOO.get(args.model)
    if entry is not None:
        return {"name": args.model, "input_shape": list(entry.input_shape), "n_outputs": entry.n_outputs}
    if ":" in args.model and (args.input_shape is None or args.outputs is None):
        raise ConfigError(f"--model {args.model}: give --input-shape, for example 3,32,32, and --outputs with it")
    return {"name": args.model, "input_shape": args.input_shape or [1], "n_outputs": args.outputs or 1}


def _devices(profiles: Sequence[DeviceProfile], n_samples: int) -> list[Device]:
    """One device for each profile, named by it; a second of the same name gets a number."""
    from reft_edge.coordinator.prediction import Device

    seen: Counter[str] = Counter()
    devices = []
    for profile in profiles:
        seen[profile.name] += 1
        name = profile.name if seen[profile.name] == 1 else f"{profile.name} ({seen[profile.name]})"
        devices.append(Device(device=name, profile=profile, training_samples=n_samples))
    return devices


def _document(
    settings: FederationSettings, workload: Workload, devices: Sequence[Device], assignments: Sequence[Assignment]
) -> dict[str, Any]:
    """The plan as plain values, in SI base units."""
    import msgspec

    rows = []
    for device, assignment in zip(devices, assignments, strict=True):
        row: dict[str, Any] = {"device": assignment.device, "fits": assignment.option is not None}
        row["reason"] = assignment.reason
        row["flops_per_s"] = device.profile.planning_flops_per_s
        row["memory_bytes"] = device.profile.planning_memory_bytes
        if assignment.option is not None and assignment.prediction is not None:
            option = assignment.option
            row |= {
                "ratio": option.ratio,
                "parameters": option.cost.parameters,
                "weight_bytes": option.weight_bytes,
                "forward_macs": option.cost.forward_macs,
                "later_down_bytes": option.delta_bytes,
                "round_s": assignment.prediction.round_s,
                **msgspec.to_builtins(assignment.prediction),
            }
        rows.append(row)
    return {
        "model": settings.model.name,
        "input_shape": list(settings.model.input_shape),
        "policy": settings.planning.policy,
        "workload": msgspec.to_builtins(workload),
        "devices": rows,
    }


def _print_plan(
    settings: FederationSettings,
    workload: Workload,
    n_parameters: int,
    devices: Sequence[Device],
    assignments: Sequence[Assignment],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    epochs, samples = workload.local_epochs, devices[0].training_samples
    console.print(
        f"{settings.model.name}: {n_parameters:,} parameters, {4e-6 * n_parameters:,.1f} MB. "
        f"A round: {epochs} epochs of {samples:,} samples, batches of {workload.batch_size}, "
        f"deadline {workload.deadline_s:g} s. Policy: {settings.planning.policy}.",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("device", no_wrap=True)
    for heading in ("GFLOP/s", "pruned", "parameters", "MB", "MMACs", "step", "round", "memory", "down", "later", "up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for device, assignment in zip(devices, assignments, strict=True):
        option, expected = assignment.option, assignment.prediction
        if option is not None and expected is not None:
            table.add_row(
                assignment.device,
                f"{device.profile.planning_flops_per_s / 1e9:.1f}",
                f"{option.ratio:.1%}",
                f"{option.cost.parameters:,}",
                f"{option.weight_bytes / 1e6:.2f}",
                f"{option.cost.forward_macs / 1e6:.1f}",
                _duration(expected.step_s),
                _duration(expected.round_s),
                f"{expected.peak_memory_bytes / 2**20:,.0f} MiB",
                f"{expected.down_bytes / 1e6:.2f} MB",
                f"{option.delta_bytes / 1e6:.2f} MB",
                f"{expected.up_bytes / 1e6:.2f} MB",
            )
    if table.row_count:
        console.print(table)
    for assignment in assignments:
        if assignment.option is None:
            console.print(f"{assignment.device} takes no part: {assignment.reason}", style="yellow", soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _tell(line: str) -> None:
    print(f"reft-edge plan: {line}", file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """For --quiet: `line` is progress only."""


def _shape(text: str) -> list[int]:
    return _numbers(text, int, "3,32,32")


def _ratios(text: str) -> list[float]:
    return _numbers(text, float, "0,0.25,0.5")


def _limit(text: str) -> tuple[str, int]:
    quantity, _, number = text.partition("=")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a limit like macs=70000000")
    return quantity, int(number)


def _numbers(text: str, kind: Callable[[str], Any], example: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like {example}") from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
