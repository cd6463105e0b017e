"""Small files of /proc and /sys, read under a root so that tests can give a board's files as a directory.

What is missing, unreadable or not a number is None: boards differ in what they tell, and none of it is worth failing
for.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """The file's text without surrounding blanks and NUL bytes (device-tree strings end in one)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The file's text as a decimal integer."""
    text = read_text(path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list notation, such as `0-3,6`."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus
