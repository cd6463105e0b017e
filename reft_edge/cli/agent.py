"""Run the agent: train here, on this device's own data, what the coordinator asks for.

Keeps running and connected, as a system service would; stop it with Ctrl-C or SIGTERM. While there is nothing to train
it is one small process without numpy or onnxruntime.

`--enrol FILE` installs what `reft-edge provision add-device` made for this device: its key and certificate, whom it
trusts, and a settings file that is complete but for the data. FILE is then removed, because it holds the private key.

A settings file:

  device = "pi-kitchen"             # unique in the federation
  federation = "birds"

  [broker]
  host = "broker.local"             # also: port, username, password_file, ca_file, certificate_file, key_file

  [trust]                           # sign what is said, and obey one coordinator only; --enrol writes it
  key_file = "identity.key"         # also: certificate_file, coordinator_key_file

  [data]
  path = "data"                     # pictures by class: data/<class>/<n>.png; or samples.npz, or samples.csv
  # target_column = "label"         # for a .csv
  # function = "mydata:load"        # anything else: a function in mydata.py beside this file

  [limits]                          # all optional
  memory_bytes = 300_000_000        # of the training process
  training_flops_per_s = 2e9        # leave the rest of the device to its main job
  threads = 2

  [profile]                         # optional: otherwise measured once, at the first start
  path = "board.toml"               # from reft-edge profile-device --output

  [serving]                         # optional: what reft-edge deploy brings to this device
  report = true                     # tell which classes are predicted, in counts only; errors are told anyway

  [metrics]                         # optional: figures for Prometheus
  address = "9465"                  # PORT of this machine only, or HOST:PORT

examples:
  reft-edge agent --enrol pi-kitchen.enrol          install this device's identity, and agent.toml, here
  reft-edge agent agent.toml --check                are settings, identity, data and broker all right?
  reft-edge agent agent.toml
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reft_edge import logs
from reft_edge.agent.identity_files import KEY_FILE, SETTINGS_FILE, finish_install
from reft_edge.agent.settings import AgentSettings, limited_profile
from reft_edge.errors import BrokerError, ConfigError, ResourceError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", type=Path, nargs="?", metavar="AGENT_TOML", help=f"the settings file (default: {SETTINGS_FILE})"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate settings, identity, data and broker, then exit; a running agent may lose its connection for "
        "a moment",
    )
    parser.add_argument("--json", action="store_true", help="with --check: print one JSON document")
    parser.add_argument("--enrol", type=Path, metavar="FILE", help="install this enrolment file, then exit")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="with --enrol: where to (default: here)")
    parser.add_argument("--keep", action="store_true", help="with --enrol: do not remove FILE afterwards")


def run(args: argparse.Namespace) -> int:
    if args.enrol is not None:
        if args.settings is not None or args.check:
            raise ConfigError("--enrol stands alone; its --directory says where the settings file is to be")
        return _enrol(args.enrol, args.directory or Path(), keep=args.keep)
    if args.directory is not None or args.keep:
        raise ConfigError("--directory and --keep belong to --enrol")
    settings_file = args.settings or Path(SETTINGS_FILE)
    finish_install(settings_file.parent)
    settings = AgentSettings.read(settings_file)
    logs.process_is_about(logs.Subject(device=settings.device))
    base_dir = settings_file.resolve().parent
    if args.check:
        return _check(settings, base_dir, as_json=args.json)
    from reft_edge.agent.daemon import Daemon

    Daemon(settings, base_dir=base_dir).run()
    return 0


def _enrol(file: Path, directory: Path, *, keep: bool) -> int:
    """Install an enrolment file and say what comes next."""
    from reft_edge.agent.enrolment import check_enrolment, install, others_may_read, read_enrolment

    enrolment = read_enrolment(file)
    ends = check_enrolment(enrolment, origin=str(file), now=datetime.now(UTC))
    if others_may_read(file):
        _warn(f"other users of this machine may have read {file}; if one could have, revoke it and enrol anew")
    directory = directory.resolve()
    installed = install(enrolment, directory)
    print(f"enrolled {enrolment.device} in federation {enrolment.federation}")
    print(f"  broker       {enrolment.broker_host}:{enrolment.broker_port}")
    print(f"  certificate  valid until {ends:%Y-%m-%d}")
    print(f"  installed    in {directory}; {KEY_FILE} is this device's secret")
    _remove(file, keep=keep)
    settings_file = installed.settings_file
    if installed.settings_kept:
        print(f"{settings_file} was kept" + ("; change in it:" if installed.advice else ""))
        for line in installed.advice:
            print(f"  {line}")
    else:
        print(f"next: put samples into {directory / 'data'}, or name where they are in [data] of {settings_file}")
    print(f"then: reft-edge agent {settings_file} --check")
    return 0


def _remove(file: Path, *, keep: bool) -> None:
    """The enrolment file has done its work."""
    if keep:
        _warn(f"{file} holds this device's private key; keep it from everybody, or remove it")
        return
    try:
        file.unlink()
    except OSError as exc:
        _warn(f"{file} holds this device's private key and cannot be removed: {exc.strerror or exc}; remove it")
    else:
        print(f"removed {file}, which held the private key")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _check(settings: AgentSettings, base_dir: Path, *, as_json: bool) -> int:
    """Try everything that the agent needs; the first problem is raised."""
    from reft_edge.agent.training import split_seed
    from reft_edge.data.describe import describe_dataset
    from reft_edge.profiling.profile import DeviceProfile
    from reft_edge.wire.deployment import HealthRules

    found: dict[str, Any] = {"device": settings.device, "federation": settings.federation}
    found |= _check_identity(settings)
    _check_spool(base_dir / settings.spool)
    if settings.profile.path:
        profile = limited_profile(DeviceProfile.read(base_dir / settings.profile.path), settings.limits)
        found["training_flops_per_s"] = profile.planning_flops_per_s
        found["memory_bytes"] = profile.planning_memory_bytes
    data = describe_dataset(settings.data, base_dir=base_dir, split_seed=split_seed(settings.device))
    found["training_samples"] = data.training_samples
    found["holdout_samples"] = data.holdout_samples
    found["input_shape"] = list(data.input_shape) or "the model's"
    found["classes"] = list(data.classes) or data.n_classes
    found["serving"] = _served(base_dir / settings.spool)
    found["broker"] = _check_broker(settings)
    if as_json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:22}{'-' if value is None else value}")
        least = HealthRules().min_holdout_samples
        if data.holdout_samples < least:
            _warn(
                f"with {data.holdout_samples} samples held out this device cannot judge a version; {least} are needed"
            )
        print("everything is all right")
    return 0


def _check_identity(settings: AgentSettings) -> dict[str, str]:
    """The files of [broker] and [trust]. Raises `ConfigError`."""
    from reft_edge.agent.credentials import expiry_warning, report_request
    from reft_edge.agent.trust import read_identity

    read_identity(settings)
    request = report_request(settings)
    if request is None:
        return {}
    from reft_edge.agent.certificate_report import examine

    trust = settings.trust
    if trust is not None and (trust.certificate_file, trust.key_file) != (request.certificate_file, request.key_file):
        raise ConfigError("key_file and certificate_file in [trust] and [broker] differ; a device has one identity")
    now = datetime.now(UTC)
    report = examine(request, now)
    if report.faults or report.ends is None:
        raise ConfigError(f"certificate {request.certificate_file}: {'; '.join(report.faults)}")
    if warning := expiry_warning(request.certificate_file, report.ends, now):
        _warn(warning)
    return {"certificate_ends": f"{report.ends:%Y-%m-%d %H:%M} UTC"}


def _check_spool(spool: Path) -> None:
    """Whether the spool can be written, or made: by whoever runs this. Leaves nothing. Raises `ResourceError`."""
    folder = spool
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as exc:
        raise ResourceError(
            f"spool {spool} cannot be written: {exc.strerror or exc}; choose another in the settings (spool = ...), or "
            "give this user the right"
        ) from exc


def _served(spool: Path) -> str:
    """What this device serves, in words."""
    from reft_edge.agent.serving.slots import SERVING, Slots

    served = Slots(spool / SERVING).current()
    if served is None:
        return "nothing"
    words = f"{served.slot.version} ({served.slot.model}, {served.slot.precision})"
    return words if served.verified() else f"{words}; it is damaged, and the agent will go back when it starts"


def _check_broker(settings: AgentSettings) -> str:
    """Connect under another client id, so that a running agent keeps its session. Raises `BrokerError`.

    A broker that takes the certificate's name for the client id ends the running agent's connection; it comes back.
    """
    from reft_edge.agent.credentials import Credentials
    from reft_edge.wire.mqtt import MqttLink

    client_id = f"{settings.device[:58]}-check"
    link = MqttLink(settings.broker, client_id=client_id, events=queue.SimpleQueue(), persistent=False)
    try:
        link.start(wait_s=settings.broker.connect_timeout_s)
    except BrokerError as exc:
        explanation = Credentials(settings).explain_refusal() if link.turned_away else ""
        raise BrokerError("; ".join(filter(None, (str(exc), explanation)))) from exc
    link.stop()
    return settings.broker.address
