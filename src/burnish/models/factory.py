"""`package.module:factory`: the user's own function that returns a model."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from burnish.models.inputs import made_up
from burnish.models.wanted import Loaded, ModelError, Wanted, converted, first_line


def from_factory(name: str, wanted: Wanted) -> Loaded:
    """What the user's function returns: a module or (module, inputs). Its parameters `batch` and `seq` get sizes."""
    if wanted.text:
        raise ModelError("--text: there is no tokenizer for a factory's model; tokenize in the factory")
    module_name, _, attribute = name.partition(":")
    with current_folder_importable():
        factory = _find_factory(name, module_name, attribute)
        asked = {key: value for key in ("batch", "seq") if (value := getattr(wanted, key)) is not None}
        takes = inspect.signature(factory).parameters
        taken = {key: value for key, value in asked.items() if key in takes}
        try:
            result = factory(**taken)
        except Exception as error:
            raise ModelError(f"{name} raised {type(error).__name__}: {first_line(error)}") from error
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {_kind(result)}; it must return an nn.Module or (nn.Module, inputs)")
    makes_inputs = inputs is not None or not hasattr(model, "config")
    if makes_inputs and (unused := [f"--{key}" for key in asked if key not in taken]):
        raise ModelError(f"{', '.join(unused)}: {name} has no parameter of that name to take it")
    model = model.eval().to(device=wanted.device, dtype=wanted.dtype)
    if inputs is None:
        if not hasattr(model, "config"):
            raise ModelError(f"{name} returned {_kind(model)} alone; return (module, inputs) with example inputs")
        return Loaded(name, model, (), made_up(name, model, wanted), type(model).__name__)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (dict, tuple, list)):
        raise ModelError(f"{name} returned {_kind(inputs)} as inputs; a dict by name or a tuple would do")
    named = inputs if isinstance(inputs, dict) else {}
    args = tuple(converted(value, wanted.device, wanted.dtype) for value in (() if named is inputs else inputs))
    kwargs = {key: converted(value, wanted.device, wanted.dtype) for key, value in named.items()}
    return Loaded(name, model, args, kwargs, type(model).__name__)


def _find_factory(name: str, module_name: str, attribute: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{name}: importing {module_name!r} raised {fault}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(f"{name}: {module_name} has no function {attribute!r}{hint}")
    return factory


@contextlib.contextmanager
def current_folder_importable() -> Iterator[None]:
    """An installed command has its own folder first on the path, not the user's."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _kind(value: Any) -> str:
    article = "an" if type(value).__name__[0] in "AEIOUaeiou" else "a"
    return f"{article} {type(value).__name__}"
