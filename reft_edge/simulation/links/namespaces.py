"""Whether this machine lets us make network namespaces, which emulated links are put between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def why_not() -> str | None:
    """Why there can be no network namespaces here; None when there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    for program in ("ip", "nsenter", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed (packages iproute2, util-linux)"
    refused = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if refused.returncode == 0 else "this system refuses new network namespaces"
