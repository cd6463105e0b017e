"""`module:function`: the user's own code that returns samples.

The code is the user's, on the user's machine, named in the user's settings; nothing from the network comes here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from reft_edge.data.dataset import Dataset
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from reft_edge.data.settings import DataSettings

# What a user's function or module may be expected to raise; it becomes one line instead of a traceback.
_USER_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def load_function(settings: DataSettings, base_dir: Path) -> Dataset:
    """Call the function that `settings.function` names and check the kind of what it returns. Raises `DataError`."""
    function = find_function(settings.function, base_dir)
    try:
        result = function()
    except _USER_ERRORS as exc:
        raise DataError(f"{settings.function} raised {type(exc).__name__}: {exc}") from exc
    inputs: Any = result
    targets: Any = None
    classes: Any = ()
    recordings: Any = None
    if isinstance(result, Mapping):
        if "inputs" not in result:
            raise DataError(f"{settings.function} returned a dictionary without 'inputs'")
        inputs, targets, classes = result["inputs"], result.get("targets"), result.get("classes", ())
        recordings = result.get("recordings")
    elif isinstance(result, tuple):
        if len(result) != 2:
            raise DataError(f"{settings.function} returned {len(result)} values; expected (inputs, targets)")
        inputs, targets = result
    try:
        return Dataset(
            inputs=np.asarray(inputs),
            targets=np.asarray(targets) if targets is not None and settings.labelled else None,
            classes=tuple(str(name) for name in classes) or settings.classes,
            recordings=None if recordings is None else np.asarray(recordings, dtype=np.int64),
        )
    except (TypeError, ValueError) as exc:
        raise DataError(f"{settings.function} returned what does not make an array: {exc}") from exc


def find_function(name: str, base_dir: Path) -> Callable[[], Any]:
    """The function `module:function`; the module is `base_dir`/module.py or, without such a file, an installed one."""
    module_name, _, function_name = name.partition(":")
    path = base_dir / (module_name.replace(".", "/") + ".py")
    try:
        module = _import_file(module_name, path, base_dir) if path.is_file() else importlib.import_module(module_name)
    except _USER_ERRORS as exc:
        raise DataError(f"{name}: {path} cannot be imported: {type(exc).__name__}: {exc}") from exc
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"{name}: {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _import_file(name: str, path: Path, base_dir: Path) -> ModuleType:
    """Import one file under its own name; its neighbours can be imported by it."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(base_dir))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(base_dir))
    return module
