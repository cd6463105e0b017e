"""The demo's folder is what a person would have written, and no other folder is ever emptied."""

from __future__ import annotations

import numpy as np
import pytest

from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.trust import Identity
from reft_edge.coordinator.preparation import prepare as prepare_coordinator
from reft_edge.coordinator.settings import load_federation
from reft_edge.data.load import load_dataset
from reft_edge.errors import ConfigError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.simulation.digits import load_digits_split
from reft_edge.simulation.run_directory import (
    FEDERATION,
    FEDERATION_FILE,
    DemoOptions,
    find_board,
    make_empty,
    prepare,
)
from reft_edge.simulation.trust import trust_at
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.signing import SigningKey


def test_settings_and_data_load_and_every_agent_is_a_different_board(tmp_path):
    options = DemoOptions()
    digits = load_digits_split(len(options.boards), alpha=options.alpha, seed=0)
    broker = BrokerSettings(host="127.0.0.1", port=2883, mqtt_version="3.1.1")
    directory = make_empty(tmp_path / "run")
    agents = prepare(directory, options, digits, trust_at(broker, directory=directory, federation=FEDERATION))
    federation = load_federation(directory / FEDERATION_FILE)
    assert (federation.broker, federation.min_devices) == (broker, 4)
    coordinator = SigningKey.read(federation.trust.key_file)
    made = prepare_coordinator(federation, directory)
    assert made.options.public.targets is None
    assert np.array_equal(made.options.test.targets, digits.test.targets)
    speeds, keys = set(), set()
    for path, part in zip(agents, digits.devices, strict=True):
        settings = AgentSettings.read(path)
        board = DeviceProfile.read(find_board(settings.device))
        assert settings.limits.training_flops_per_s == board.planning_flops_per_s
        assert settings.limits.memory_bytes == board.planning_memory_bytes
        assert settings.profile.path == ""  # measured, as on a real device
        assert settings.broker == broker
        identity = Identity.read(settings.trust)
        assert identity.coordinator == coordinator.public
        keys.add(identity.key.public.raw)
        assert np.array_equal(load_dataset(settings.data, base_dir=path.parent).targets, part.targets)
        speeds.add(board.planning_flops_per_s)
    assert len(speeds) == len(keys) == 4


def test_only_a_folder_that_a_demo_made_is_emptied(tmp_path):
    ours = make_empty(tmp_path / "ours")
    (ours / "old").mkdir()
    (ours / "old" / "file").touch()
    assert make_empty(tmp_path / "ours") == ours
    assert not (ours / "old").exists()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter").touch()
    for path in (foreign, foreign / "chapter"):
        with pytest.raises(ConfigError, match="--output"):
            make_empty(path)
    assert (foreign / "chapter").exists()


def test_an_unknown_board_is_named():
    with pytest.raises(ConfigError, match="'commodore-64'"):
        find_board("commodore-64")
