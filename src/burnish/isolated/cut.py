"""`isolate`: one forward pass of the whole model, stopped where the submodule is called."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish._unchanged import nothing_changed
from burnish.isolated.recipe import recipe_of
from burnish.runtime.module import OptimizedModule

_NAMED = 8  # submodules that an error lists


@dataclass(frozen=True, eq=False)
class Isolated:
    """A submodule with the inputs of its first call in a forward pass of its model: unpacks as `module, args, kwargs`.

    Attributes:
        module: the model's own submodule, not a copy, or the one that `load` built.
        args, kwargs: copies of what it was called with, detached.
        path: where it is in the model; `model` is that one's class.
        recipe: how another process builds the module, as JSON data; None where it has to be given one.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    model: str
    recipe: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.module, self.args, self.kwargs))

    def save(self, folder: str | Path) -> bool:
        """Writes weights and inputs (safetensors) and what they belong to (JSON) to a folder of their own.

        Returns whether `load` can build the module by itself: one of `transformers` or `torch.nn` of which it gives the
        same outputs. Any other has to be given to `load`.

        Raises ValueError for a folder that holds something else, and for an input that is no data.
        """
        from burnish.isolated.folder import save

        return save(self, Path(folder))

    @classmethod
    def load(
        cls, folder: str | Path, *, module: nn.Module | None = None, device: torch.device | str = "cpu"
    ) -> Isolated:
        """What `save` wrote, on `device`. Nothing that the folder says is run: it can only name classes of
        `transformers` and `torch.nn`.

        module: the one to put the weights into, where its class is from elsewhere; its tensors are replaced.

        Raises ValueError for a folder that is damaged, a module whose weights are others, and one that is missing.
        """
        from burnish.isolated.folder import load

        return load(Path(folder), module, torch.device(device))


class _Caught(BaseException):
    """Ends the forward pass. No Exception: a model may handle those."""


def isolate(model: nn.Module, args: tuple[Any, ...], path: str, kwargs: Mapping[str, Any] | None = None) -> Isolated:
    """Cuts the submodule at `path` out, with the inputs that it gets in `model(*args, **kwargs)`.

    The pass ends at the submodule's first call, and leaves model, inputs and random state as they are. A cache that the
    model made for this pass becomes None: it was empty.

    Returns:
        An `Isolated`: `module, args, kwargs = isolate(...)`.

    Raises:
        TypeError: a bad argument.
        ValueError: there is no such submodule, or these inputs do not reach it; a cache among the inputs, which the
            submodule's every call would lengthen. The model's own error for inputs that it cannot take.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, not {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise TypeError("model: this one is optimized, and calls no submodule; give the module it was made from")
    if not isinstance(args, tuple):
        raise TypeError(f"args: a tuple of inputs is needed, not {type(args).__name__}; write (x,) for one input")
    module = submodule(model, path)
    if type(module).forward is nn.Module.forward:
        raise ValueError(f"path={path!r}: a {type(module).__name__} is never called itself; it has {_children(module)}")
    inputs = args, dict(kwargs or {})
    for leaf in pytree.tree_leaves(inputs, is_leaf=_is_cache):
        if _is_cache(leaf):
            kind = type(leaf).__name__
            raise ValueError(f"the inputs hold a {kind}, which each call would lengthen; isolate from a pass without")
    caught: list[Any] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(copied((args, kwargs)))
        raise _Caught

    given_args, given_kwargs = copied(inputs)
    # Ahead of the user's own hooks: they stay with the module, and run again when it is called alone.
    handle = module.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
    try:
        with torch.no_grad(), nothing_changed(model), contextlib.suppress(_Caught):
            model(*given_args, **given_kwargs)
    finally:
        handle.remove()
    if not caught:
        raise ValueError(f"path={path!r}: these inputs do not reach this {type(module).__name__}")
    own_args, own_kwargs = caught[0]
    return Isolated(module, own_args, own_kwargs, path, type(model).__name__, recipe_of(model, path))


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule; ValueError that lists what there is where the path leaves the model."""
    module, passed = model, ""
    names = path.split(".") if path else [""]
    for name in names:
        child = module._modules.get(name)
        if child is None:
            here = f"{passed} is a {type(module).__name__}" if passed else f"this is a {type(module).__name__}"
            raise ValueError(f"path={path!r}: {here}, which has {_children(module)}")
        module, passed = child, f"{passed}.{name}" if passed else name
    return module


def copied(inputs: Any) -> Any:
    """The inputs with every tensor copied, the same one twice where it was given twice, and caches left out."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return copies.setdefault(id(leaf), leaf.detach().clone())
        return None if _is_cache(leaf) else leaf

    return pytree.tree_map(copy, inputs, is_leaf=_is_cache)


def _is_cache(value: Any) -> bool:
    """Whether it is one of Hugging Face's caches of keys and values."""
    library: Any = sys.modules.get("transformers.cache_utils")
    return library is not None and isinstance(value, library.Cache)


def _children(module: nn.Module) -> str:
    names = [name for name, child in module._modules.items() if child is not None]
    if not names:
        return "no submodules"
    return ", ".join(names[:_NAMED]) + (f", ... {names[-1]}" if len(names) > _NAMED else "")
