"""Where the files for people are: broker configuration, service units, reference boards.

They are not part of the package, because people read and copy them: in a checkout they lie beside it, and an
installation puts them into `share/reft-edge` of its environment, as the FHS has it.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Literal, TypeAlias

import reft_edge
from reft_edge.errors import ConfigError

SharedFolder: TypeAlias = Literal["broker_config", "device_profiles"]


def shared_folder(name: SharedFolder) -> Path:
    """The folder `name`, in a checkout or in the installation. Raises `ConfigError` where it is missing."""
    candidates = [root / name for root in _roots()]
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = ", ".join(dict.fromkeys(map(str, candidates)))
    raise ConfigError(f"the folder {name} of reft-edge is missing, looked for at {tried}; install reft-edge again")


def _roots() -> list[Path]:
    """Folders that may hold the shared ones, the surest first."""
    above_package = Path(reft_edge.__file__).resolve().parent.parent
    user_scheme = sysconfig.get_preferred_scheme("user")
    prefixes = [
        Path(sysconfig.get_path("data")),  # pip install into an environment
        above_package,  # pip install --target
        Path(sysconfig.get_path("data", user_scheme)),  # pip install --user
    ]
    return [above_package, *(prefix / "share" / "reft-edge" for prefix in prefixes)]
