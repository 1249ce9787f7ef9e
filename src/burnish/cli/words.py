"""What several commands say alike: what is being loaded, what a model and its inputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from burnish.models import Loaded


def loading(model: str) -> str:
    """The progress line while the model is loaded."""
    from burnish.models import is_remote

    return f"loading {model} from the Hugging Face hub" if is_remote(model) else f"loading {model}"


def check_writable(path: Path | None, option: str) -> None:
    """Before any work is done rather than after all of it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.absolute().parent}")


def heading(loaded: Loaded) -> RenderableType:
    """The model's name, what it is, and its inputs."""
    from rich.text import Text

    return Text.assemble((loaded.name, "bold"), f": {loaded.origin}; {', '.join(sizes(loaded.args, loaded.kwargs))}")


def sizes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Every input with its shape, or its value where it has none: "input 0 1x128", "use_cache=False". None is left
    out."""
    from torch.utils._pytree import keystr, tree_flatten_with_path

    found = []
    for name, value in [*((f"input {i}", v) for i, v in enumerate(args)), *kwargs.items()]:
        for path, leaf in tree_flatten_with_path(value)[0]:
            shape = getattr(leaf, "shape", None)
            if shape is not None:
                found.append(f"{name}{keystr(path)} {'x'.join(map(str, shape)) or 'scalar'}")
            elif leaf is not None:
                found.append(f"{name}{keystr(path)}={leaf}")
    return found
