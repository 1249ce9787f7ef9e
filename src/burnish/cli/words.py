"""What several commands say alike: what is being loaded, what a model and its inputs are."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from burnish.models import Loaded


def loading(model: str) -> str:
    """The progress line while the model is loaded."""
    from burnish.models import is_remote

    return f"loading {model} from the Hugging Face hub" if is_remote(model) else f"loading {model}"


def check_writable(path: Path | None, option: str) -> None:
    """Before any work is done rather than after all of it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.absolute().parent}")


@contextlib.contextmanager
def as_typed(**typed: str) -> Iterator[None]:
    """An error that names an argument of a function ("path='x': there is none") names what was typed for it instead:
    with `path="PATH"` "PATH x: there is none"."""
    try:
        yield
    except ValueError as error:
        told = re.fullmatch(r"(\w+)=('.*?'|\w+)(:?) (.*)", str(error), re.DOTALL)
        if told is None or told[1] not in typed:
            raise
        name, value, colon, rest = told.groups()
        shown = typed[name] if value == "True" else f"{typed[name]} {value.strip(chr(39))}"
        raise ValueError(f"{shown}{colon} {rest}") from error


def heading(loaded: Loaded) -> RenderableType:
    """The model's name, what it is, and its inputs."""
    from rich.text import Text

    inputs = sizes(named_inputs(loaded.model, loaded.args, loaded.kwargs))
    return Text.assemble((loaded.name, "bold"), f": {loaded.origin}; {', '.join(inputs)}")


def named_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs by the names of forward's parameters."""
    return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}


def sizes(inputs: Mapping[str, Any]) -> list[str]:
    """Every input with its shape, or its value where it has none: "input_ids 1x128", "use_cache=False". None is left
    out."""
    from torch.utils._pytree import keystr, tree_flatten_with_path

    found = []
    for name, value in inputs.items():
        for path, leaf in tree_flatten_with_path(value)[0]:
            shape = getattr(leaf, "shape", None)
            if shape is not None:
                found.append(f"{name}{keystr(path)} {'x'.join(map(str, shape)) or 'scalar'}")
            elif leaf is not None:
                found.append(f"{name}{keystr(path)}={leaf}")
    return found
