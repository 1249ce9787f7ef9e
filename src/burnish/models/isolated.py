"""A folder that `burnish isolate` wrote: a submodule with the inputs that it got inside its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.utils import _pytree as pytree

from burnish.isolated import Isolated
from burnish.isolated.cut import submodule
from burnish.isolated.folder import read_config
from burnish.models.factory import from_factory
from burnish.models.wanted import Loaded, ModelError, Wanted, converted


def from_isolated(name: str, wanted: Wanted) -> Loaded:
    """The module with its inputs. Where its code is the user's own, `wanted.factory` builds the model around it."""
    sizes = [f"--{option}" for option in ("batch", "seq") if getattr(wanted, option) is not None]
    if sizes or wanted.text:
        raise ModelError(f"{', '.join(sizes) or '--text'}: {name} comes with the inputs that it got inside its model")
    try:
        data = read_config(Path(name))
        if data.get("recipe") is None and wanted.factory is None:
            raise ModelError(
                f"{name} holds the weights of {data.get('class')}, whose code is not in it: give --factory, the "
                f"package.module:function that builds {data.get('model')} around it"
            )
        loaded = Isolated.load(name, module=_built(wanted, str(data.get("path"))), device=wanted.device)
    except ValueError as error:
        raise error if isinstance(error, ModelError) else ModelError(str(error)) from error
    args, kwargs = pytree.tree_map(
        lambda leaf: converted(leaf, wanted.device, wanted.dtype), (loaded.args, loaded.kwargs)
    )
    module = loaded.module.eval().to(device=wanted.device, dtype=wanted.dtype)
    origin = f"{type(module).__name__}, submodule {loaded.path} of {loaded.model}"
    return Loaded(name, module, args, kwargs, origin)


def _built(wanted: Wanted, path: str) -> nn.Module | None:
    if wanted.factory is None:
        return None
    model = from_factory(wanted.factory, replace(wanted, dtype=None)).model
    try:
        return submodule(model, path)
    except ValueError as error:
        there = str(error).removeprefix(f"path={path!r}: ")
        raise ModelError(f"--factory {wanted.factory}: {there}, and no {path}") from None
