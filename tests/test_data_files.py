"""The files for people are found in a checkout, and in what `pip install` makes of a wheel."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reft_edge.data_files
from reft_edge.data_files import shared_folder
from reft_edge.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("reft_edge", "broker_config", "device_profiles", "docs", "pyproject.toml", "README.md", "LICENSE")
WANTED = (
    "broker_config/mosquitto.conf",
    "broker_config/systemd/reft-edge-agent.service",
    "device_profiles/raspberry-pi-5.toml",
)
OLDEST_SETUPTOOLS = 77  # as in pyproject.toml

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
FIND = (
    "import reft_edge.data_files as found; "
    "print(*(found.shared_folder(name) for name in ('broker_config', 'device_profiles')), sep='\\n')"
)


@pytest.mark.parametrize("wanted", WANTED)
def test_a_checkout_has_the_files_beside_the_package(wanted: str) -> None:
    folder, _, rest = wanted.partition("/")
    assert folder in ("broker_config", "device_profiles")
    assert (shared_folder(folder) / rest) == ROOT / wanted
    assert (ROOT / wanted).is_file()


def test_a_missing_folder_is_one_line_that_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reft_edge.data_files, "_roots", lambda: [tmp_path])
    with pytest.raises(ConfigError, match=f"{tmp_path}/broker_config; install reft-edge again"):
        shared_folder("broker_config")


@pytest.mark.slow
def test_a_wheel_brings_the_files_wherever_it_is_installed(tmp_path: Path) -> None:
    wheel = _build_wheel(tmp_path)
    environment, target = tmp_path / "environment", tmp_path / "target"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--prefix", environment, "--ignore-installed", wheel], check=True, capture_output=True)
    subprocess.run([*pip, "--target", target, wheel], check=True, capture_output=True)

    in_environment = _folders([str(environment / "bin" / "python"), "-I"], {})
    in_target = _folders([sys.executable, "-S", "-P"], {"PYTHONPATH": str(target)})
    for found, prefix in ((in_environment, environment), (in_target, target)):
        assert found == [prefix / "share/reft-edge/broker_config", prefix / "share/reft-edge/device_profiles"]
        assert (prefix / "share/reft-edge/monitoring/grafana-dashboard.json").is_file()
    for folder in (*in_environment, *in_target):
        shipped = [path.relative_to(ROOT / folder.name) for path in (ROOT / folder.name).rglob("*") if path.is_file()]
        assert shipped
        assert [name for name in shipped if not (folder / name).is_file()] == []


def _build_wheel(directory: Path) -> Path:
    """Built from a copy: a build leaves its own folder in the sources."""
    try:
        installed = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        installed = 0
    if installed < OLDEST_SETUPTOOLS:
        pytest.skip(f"building a wheel here needs setuptools {OLDEST_SETUPTOOLS} in this environment")
    sources = directory / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(directory)], cwd=sources, check=True, capture_output=True, text=True
    )
    return directory / built.stdout.splitlines()[-1]


def _folders(python: list[str], environment: dict[str, str]) -> list[Path]:
    found = subprocess.run([*python, "-c", FIND], env=environment, check=True, capture_output=True, text=True)
    return [Path(line) for line in found.stdout.splitlines()]
