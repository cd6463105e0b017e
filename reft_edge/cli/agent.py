"""Run the agent: train here, on this device's own data, what the coordinator asks for.

Keeps running and connected, as a system service would; stop it with Ctrl-C or SIGTERM. While there is nothing to train
it is one small process without numpy or onnxruntime.

A settings file:

  device = "pi-kitchen"             # unique in the federation
  federation = "birds"

  [broker]
  host = "broker.local"             # also: port, username, password_file, ca_file, certificate_file, key_file

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

examples:
  reft-edge agent agent.toml --check     are settings, data and broker all right?
  reft-edge agent agent.toml
"""

from __future__ import annotations

import argparse
import json
import queue
from pathlib import Path
from typing import Any

from reft_edge.agent.settings import AgentSettings, limited_profile


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="AGENT_TOML", help="the settings file")
    parser.add_argument("--check", action="store_true", help="validate settings, data and broker, then exit")
    parser.add_argument("--json", action="store_true", help="with --check: print one JSON document")


def run(args: argparse.Namespace) -> int:
    settings = AgentSettings.read(args.settings)
    base_dir = args.settings.resolve().parent
    if args.check:
        return _check(settings, base_dir, as_json=args.json)
    from reft_edge.agent.daemon import Daemon

    Daemon(settings, base_dir=base_dir).run()
    return 0


def _check(settings: AgentSettings, base_dir: Path, *, as_json: bool) -> int:
    """Try everything that the agent needs; the first problem is raised."""
    from reft_edge.agent.training import split_seed
    from reft_edge.data.describe import describe_dataset
    from reft_edge.profiling.profile import DeviceProfile

    found: dict[str, Any] = {"device": settings.device, "federation": settings.federation}
    if settings.profile.path:
        profile = limited_profile(DeviceProfile.read(base_dir / settings.profile.path), settings.limits)
        found["training_flops_per_s"] = profile.planning_flops_per_s
        found["memory_bytes"] = profile.planning_memory_bytes
    data = describe_dataset(settings.data, base_dir=base_dir, split_seed=split_seed(settings.device))
    found["training_samples"] = data.training_samples
    found["holdout_samples"] = data.holdout_samples
    found["input_shape"] = list(data.input_shape) or "the model's"
    found["classes"] = list(data.classes) or data.n_classes
    found["broker"] = _check_broker(settings)
    if as_json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:22}{value}")
        print("everything is all right")
    return 0


def _check_broker(settings: AgentSettings) -> str:
    """Connect under another client id, so that a running agent keeps its session. Raises `BrokerError`."""
    from reft_edge.wire.mqtt import MqttLink

    client_id = f"{settings.device[:58]}-check"
    link = MqttLink(settings.broker, client_id=client_id, events=queue.SimpleQueue(), persistent=False)
    link.start(wait_s=settings.broker.connect_timeout_s)
    link.stop()
    return settings.broker.address
