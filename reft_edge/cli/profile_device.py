"""Measure what this device can do: training speed, memory, disk, temperature, and the link to a broker.

Prints a table, with the estimate that the REFT paper uses (cores x clock x operations per cycle, arXiv 2308.13662)
beside what was measured. Close what else computes on the device first; warnings say when something disturbed it.

examples:
  reft-edge profile-device                              about 30 s
  reft-edge profile-device --quick --json | jq .training_flops_per_s.value
  reft-edge profile-device --output board.toml          a profile for `reft-edge plan --profile board.toml`
  reft-edge profile-device --broker broker.local:1883   measures the link too
  reft-edge profile-device --agent agent.toml           the link to the agent's broker, with its certificate
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from reft_edge.agent.profiler import measure_profile
from reft_edge.agent.settings import AgentSettings
from reft_edge.errors import ConfigError, ResourceError
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.endpoint import BrokerSettings, parse_broker


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="under 25 s; figures vary a little more")
    parser.add_argument("--json", action="store_true", help="print the profile as one JSON document")
    parser.add_argument("--output", type=Path, metavar="FILE.toml", help="write the profile to this file")
    parser.add_argument("--broker", metavar="HOST[:PORT]", help="measure round trip and throughput to this MQTT broker")
    parser.add_argument(
        "--agent", type=Path, metavar="AGENT_TOML", help="measure to the broker of this agent, as it; stop it first"
    )
    parser.add_argument(
        "--username", metavar="NAME", help="log in to the broker with this name; stop the agent first, which has it too"
    )
    parser.add_argument("--password-file", metavar="FILE", help="file whose first line is the password")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads to compute with (default: one a core)")
    parser.add_argument("--name", help="name of the profile (default: the board's own)")
    parser.add_argument(
        "--disk", type=Path, default=Path(), metavar="DIR", help="where the agent would keep its files (default: here)"
    )


def run(args: argparse.Namespace) -> int:
    broker = _broker(args)
    if args.output is not None:
        _check_writable(args.output)
    warnings: list[str] = []
    profile = measure_profile(
        quick=args.quick,
        threads=args.threads,
        disk_path=args.disk,
        name=args.name,
        broker=broker,
        progress=None if args.quiet else _tell,
        warn=warnings.append,
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.output is not None:
        _write(args.output, profile)
        if not args.quiet:
            _tell(f"wrote {args.output}")
    if args.json:
        print(json.dumps(_document(profile, warnings), indent=1))
    else:
        print("\n".join(table(profile)))
    return 0


def _broker(args: argparse.Namespace) -> BrokerSettings | None:
    """The broker to measure. Raises `ConfigError` for options that do not go together."""
    if args.agent is not None:
        if args.broker is not None or args.username is not None:
            raise ConfigError("--agent says which broker and how to log in; leave out --broker and --username")
        return agent_login(AgentSettings.read(args.agent))
    if args.username is None and args.password_file is not None:
        raise ConfigError("--password-file needs --username")
    if args.broker is None:
        if args.username is not None:
            raise ConfigError("--username needs --broker")
        return None
    return msgspec.structs.replace(parse_broker(args.broker), username=args.username, password_file=args.password_file)


def agent_login(settings: AgentSettings) -> BrokerSettings:
    """The agent's broker, with the user name that it has there: with a certificate it is the device's name."""
    broker = settings.broker
    if broker.certificate_file is None or broker.username is not None:
        return broker
    return msgspec.structs.replace(broker, username=settings.device)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _tell(line: str) -> None:
    print(f"reft-edge profile-device: {line}", file=sys.stderr, flush=True)


def _check_writable(path: Path) -> None:
    """Before half a minute of measuring, not after it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: not a file in an existing folder")


def _write(path: Path, profile: DeviceProfile) -> None:
    import tomli_w

    try:
        path.write_text(tomli_w.dumps(_whole_numbers(profile.to_table())), encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"--output {path}: cannot be written: {exc.strerror or exc}") from exc


def _whole_numbers(value: Any) -> Any:
    """Floats without a fraction as integers, which TOML writes without a dangling `.0`."""
    if isinstance(value, dict):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _document(profile: DeviceProfile, warnings: list[str]) -> dict[str, object]:
    """The profile's table, and what is computed from it."""
    return {
        **profile.to_table(),
        "theoretical_flops_per_s": profile.theoretical_flops_per_s,
        "warnings": warnings,
    }


def table(profile: DeviceProfile) -> Iterator[str]:
    """The profile for a person, line by line."""
    theory = profile.theoretical_flops_per_s
    yield f"{profile.name}: {profile.description}"
    yield ""
    yield _row("cores", f"{profile.cores.value:g}", profile.architecture)
    yield _row("clock", f"{profile.clock_hz.value / 1e9:.2f} GHz")
    yield _row("theoretical", _giga(theory, "FLOP/s"), "cores x clock x operations per cycle (arXiv 2308.13662)")
    yield _measured_row("matrix product", profile.gemm_flops_per_s, theory)
    yield _measured_row("training", profile.training_flops_per_s, theory, "; plans are made with this")
    yield _row("memory bandwidth", _giga(profile.memory_bandwidth_bytes_per_s, "B/s"), "copy, read and write")
    yield ""
    available = profile.memory_available_bytes
    yield _row("memory", _mebi(profile.memory_total_bytes))
    yield _row("  available", _mebi(available), available.source.rpartition(": ")[2] if available else "")
    start = profile.worker_start_s
    yield _row("  empty worker", _mebi(profile.runtime_base_bytes), f"started in {start.value:.2f} s" if start else "")
    yield _row("disk free", _mebi(profile.disk_free_bytes))
    if profile.link_round_trip_s is not None:
        yield _row("round trip", f"{profile.link_round_trip_s.value * 1e3:.2f} ms", "to the broker and back")
    if profile.link_down_bytes_per_s is not None:
        yield _row("link down", _mega(profile.link_down_bytes_per_s))
        yield _row("link up", _mega(profile.link_up_bytes_per_s))
    yield ""
    temperature = profile.temperature_celsius
    yield _row("temperature", "not told" if temperature is None else f"{temperature.value:.0f} °C", "after training")
    yield _row("throttled", {None: "not told", True: "YES", False: "no"}[profile.throttled])


def _row(label: str, value: str, remark: str = "") -> str:
    return f"  {label:<18}{value:>16}  {remark}".rstrip()


def _measured_row(label: str, quantity: Quantity | None, theory: float, remark: str = "") -> str:
    if quantity is None:
        return _row(label, "unknown")
    return _row(label, _giga(quantity, "FLOP/s"), f"{quantity.value / theory:.0%} of theoretical{remark}")


def _giga(quantity: Quantity | float | None, unit: str) -> str:
    value = quantity.value if isinstance(quantity, Quantity) else quantity
    return "unknown" if value is None else f"{value / 1e9:.1f} G{unit}"


def _mega(quantity: Quantity | None) -> str:
    return "unknown" if quantity is None else f"{quantity.value / 1e6:.1f} MB/s"


def _mebi(quantity: Quantity | None) -> str:
    return "unknown" if quantity is None else f"{quantity.value / 2**20:,.0f} MiB"
