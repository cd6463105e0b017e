"""Models by name: the zoo's, or `module:function` in a user's own file.

Importing this module does not load torch; building a model does.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reft_edge.config import did_you_mean
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


class ZooEntry(NamedTuple):
    """Where a model's function is, and the sizes it is usually built with."""

    module: str
    function: str
    input_shape: tuple[int, ...]
    n_outputs: int


ZOO = {
    "mlp": ZooEntry("reft_edge.models.mlp", "mlp", (64,), 10),
    "digits_cnn": ZooEntry("reft_edge.models.vgg", "digits_cnn", (1, 8, 8), 10),
    "vgg_small": ZooEntry("reft_edge.models.vgg", "vgg_small", (3, 32, 32), 10),
    "vgg_tiny": ZooEntry("reft_edge.models.vgg", "vgg_tiny", (3, 32, 32), 10),
    "vgg16": ZooEntry("reft_edge.models.vgg", "vgg16", (3, 32, 32), 10),
    "resnet_small": ZooEntry("reft_edge.models.resnet", "resnet_small", (3, 32, 32), 10),
    "resnet18": ZooEntry("reft_edge.models.resnet", "resnet18", (3, 32, 32), 10),
    "mobilenet_v2": ZooEntry("reft_edge.models.mobilenet", "mobilenet_v2", (3, 32, 32), 10),
    "vit_small": ZooEntry("reft_edge.models.vit", "vit_small", (3, 32, 32), 10),
    "sensor_cnn": ZooEntry("reft_edge.models.sensor", "sensor_cnn", (6, 128), 6),
}


def model_names() -> tuple[str, ...]:
    return tuple(ZOO)


def build_model(
    reference: str, *, input_shape: Sequence[int], n_outputs: int, base_dir: Path | None = None
) -> nn.Module:
    """A new model: `reference` is a name of the zoo, or `module:function` in `module.py` under `base_dir`.

    The user's function is called with those of `input_shape` and `n_outputs` that it has as parameters. Raises
    `ModelError` for an unknown name, a missing file or function, an error in it, or a result that is no module.
    """
    from torch import nn

    if ":" in reference:
        function = _user_function(reference, base_dir or Path.cwd())
    elif reference in ZOO:
        entry = ZOO[reference]
        function = getattr(importlib.import_module(entry.module), entry.function)
    else:
        hint = did_you_mean(reference, model_names())
        raise ModelError(f"unknown model {reference!r}, neither of the zoo nor of the form 'module:function'{hint}")
    arguments = {"input_shape": tuple(input_shape), "n_outputs": n_outputs}
    accepted = inspect.signature(function).parameters
    try:
        model = function(**{name: value for name, value in arguments.items() if name in accepted})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise ModelError(
            f"model {reference!r} cannot be built for input shape {tuple(input_shape)}: {exc}; the function gets those "
            f"of {' and '.join(arguments)} that it names"
        ) from exc
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {reference!r}: the function returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _user_function(reference: str, base_dir: Path) -> Callable[..., Any]:
    """The function `reference` names. The user's file runs with the user's rights, as `python file.py` would."""
    module_name, _, function_name = reference.partition(":")
    path = base_dir / f"{module_name}.py"
    if not module_name.isidentifier() or not path.is_file():
        raise ModelError(f"model {reference!r}: no file {path}; expected 'module:function' with module.py there")
    spec = importlib.util.spec_from_file_location(f"reft_edge_user_{module_name}", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"model {reference!r}: {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(base_dir))  # its neighbours can be imported by it, as by the functions in [data]
    try:
        spec.loader.exec_module(module)
    except (ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError) as exc:
        raise ModelError(f"model {reference!r}: {path} fails: {type(exc).__name__}: {exc}") from exc
    except (RuntimeError, SyntaxError, TypeError, ValueError) as exc:
        raise ModelError(f"model {reference!r}: {path} fails: {type(exc).__name__}: {exc}") from exc
    finally:
        sys.path.remove(str(base_dir))
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ModelError(
            f"model {reference!r}: {path} has no function {function_name!r}{did_you_mean(function_name, names)}"
        )
    found: Callable[..., Any] = function
    return found
