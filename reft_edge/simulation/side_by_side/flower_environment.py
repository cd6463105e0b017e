"""Flower in an environment of its own, so that nothing of it gets into ours: made once, then used again.

Flower comes from the package index in one pinned version; torch is the one that runs here, which the environment sees
beside its own packages. So both sides compute with the same build, and no gigabytes are fetched twice.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from reft_edge.errors import ReftError

FLOWER_VERSION = "1.41.0"
"""1.42.0 asks for a version of certifi that not every index has yet."""

_INSTALL_TIMEOUT_S = 900.0
_MAX_QUOTED_CHARACTERS = 300


class NoFlowerError(ReftError):
    """Flower cannot be installed, or does not start, here."""


def default_folder() -> Path:
    """Of this interpreter's minor version, because packages are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "reft-edge" / f"flower-{FLOWER_VERSION}-python{version}"


def ready_environment(folder: Path) -> Path:
    """The `bin` folder of an environment with Flower in `folder`, which is made if need be.

    Raises `NoFlowerError` with the reason where that is not possible.
    """
    programs = folder.absolute() / "bin"
    if not _stamp(folder).is_file():
        try:
            _make(folder)
        except (OSError, subprocess.SubprocessError) as exc:
            raise NoFlowerError(f"Flower {FLOWER_VERSION} cannot be installed into {folder}: {_reason(exc)}") from exc
    return programs


def is_ready(folder: Path) -> bool:
    """Whether nothing has to be installed."""
    return _stamp(folder).is_file()


def packages(folder: Path) -> dict[str, str]:
    """Versions of what a device with Flower runs."""
    code = "import importlib.metadata as m; print(*(f'{n}={m.version(n)}' for n in ('flwr', 'torch', 'numpy')))"
    done = subprocess.run([folder / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return dict(word.split("=", 1) for word in done.stdout.split())


def _make(folder: Path) -> None:
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise FileNotFoundError("torch is not installed beside reft-edge")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, capture_output=True, text=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install.append(f"flwr=={FLOWER_VERSION}")
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S)
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # After its own packages: what both have, Flower takes from its own.
    (Path(where) / "reft_edge_torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n", encoding="utf-8")
    subprocess.run([python, "-c", "import flwr.clientapp, torch"], check=True, capture_output=True, text=True)
    _stamp(folder).write_text("complete\n", encoding="utf-8")


def _stamp(folder: Path) -> Path:
    return folder / ".reft-edge-complete"


def _reason(exc: OSError | subprocess.SubprocessError) -> str:
    """The last line that says something, shortened."""
    if isinstance(exc, subprocess.CalledProcessError):
        lines = [line.strip() for line in str(exc.stderr or "").splitlines() if line.strip()]
        return (lines[-1] if lines else f"status {exc.returncode}")[:_MAX_QUOTED_CHARACTERS]
    return str(exc)[:_MAX_QUOTED_CHARACTERS]
