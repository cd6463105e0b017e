"""Less processor time for a child: a control group of our own, version 1 or 2, where this user may make one.

A process inherits its parent's group, so we join ours for as long as it takes to start a child in it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from reft_edge.errors import ResourceError

PERIOD_US = 100_000
"""The kernel's default, which services (`CPUQuota=`) have too."""

_MOUNT = Path("/sys/fs/cgroup")


class Quota:
    """Processor time of `cores` (0.5: half a core) for what is started within `joined`.

    Raises `ResourceError` where that cannot be had. `close` when everything that was started has ended.
    """

    def __init__(self, cores: float) -> None:
        self._root, second = (_MOUNT, True) if (_MOUNT / "cgroup.controllers").exists() else (_MOUNT / "cpu", False)
        self._group = self._root / f"reft-edge-truth-{os.getpid()}"
        limit = round(cores * PERIOD_US)
        try:
            self._group.mkdir()
            if second:
                (self._group / "cpu.max").write_text(f"{limit} {PERIOD_US}")
            else:
                (self._group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self._group / "cpu.cfs_quota_us").write_text(str(limit))
        except OSError as exc:
            self.close()
            raise ResourceError(f"no control group with a quota can be made in {self._root}: {exc.strerror}") from exc

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Children that are started in the block are bound by the quota, and stay so."""
        before = self._root / self._own_path() / "cgroup.procs"
        (self._group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            before.write_text(str(os.getpid()))

    def close(self) -> None:
        """Remove the group, which must be empty by now."""
        with contextlib.suppress(OSError):
            self._group.rmdir()

    def _own_path(self) -> str:
        """Our present group below the mount."""
        name = "cpu" if self._root != _MOUNT else ""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if name in controllers.split(","):
                return path.strip("/")
        return ""
