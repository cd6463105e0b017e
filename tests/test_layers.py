"""The import direction between packages is a rule, and this file is the rule.

Reads every module's imports from its syntax tree. Imports inside functions and those for type checking count as well: a
type from above is a dependency too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "reft_edge"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "logs": set(),
    "metrics_page": {"errors"},
    "data_files": {"errors"},
    "profiling": {"errors", "types", "config"},
    "starter": {"errors", "types"},
    "data": {"errors", "types", "config"},
    "bundle": {"errors", "types", "config", "profiling"},
    "wire": {"errors", "types", "config", "profiling", "bundle"},
    "agent": {"errors", "types", "config", "logs", "metrics_page", "profiling", "bundle", "wire", "data"},
    "models": {"errors", "types", "config"},
    "compile": {"errors", "types", "config", "bundle", "models"},
    "coordinator": {
        "errors",
        "types",
        "config",
        "logs",
        "metrics_page",
        "profiling",
        "bundle",
        "wire",
        "data",
        "models",
        "compile",
    },
}
MAY_IMPORT["provisioning"] = {"errors", "types", "config", "wire", "data_files"}
MAY_IMPORT["dashboard"] = {*MAY_IMPORT["coordinator"], "coordinator"} - {"models", "compile"}
MAY_IMPORT["simulation"] = set(MAY_IMPORT) - {"simulation"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"cli"}

USES_TORCH = {"compile", "models", "coordinator", "simulation", "cli"}
"""`simulation` and `cli` only inside functions; the test of import costs below holds that."""

MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name not in {"__init__.py", "__main__.py"})


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    layer = layer_of(path)
    imports = imported_modules(path)
    layers = {name.split(".")[1] for name in imports if name.startswith("reft_edge.")}
    assert layers - {layer} <= MAY_IMPORT[layer]
    if layer not in USES_TORCH:
        assert not {name for name in imports if name.split(".")[0] in {"torch", "torch_pruning", "onnx", "onnxscript"}}


@pytest.mark.parametrize(
    ("module", "must_stay_out"),
    [
        ("reft_edge.agent.daemon", {"numpy", "onnxruntime", "torch", "PIL", "psutil", "zstandard", "cryptography"}),
        ("reft_edge.agent", {"numpy", "onnxruntime", "msgspec"}),
        ("reft_edge.agent.serving.counts", {"numpy", "onnxruntime"}),
        ("reft_edge.agent.serving.http_server", {"torch", "onnx", "paho", "PIL", "psutil", "cryptography"}),
        ("reft_edge.agent.trainer", {"torch", "onnx", "paho"}),
        ("reft_edge.cli.main", {"numpy", "torch", "paho", "msgspec", "rich"}),
        ("reft_edge.cli.demo", {"torch"}),
        ("reft_edge.wire.mqtt", {"numpy", "torch"}),
    ],
)
def test_importing_a_module_does_not_load_what_it_must_not(module: str, must_stay_out: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & must_stay_out
