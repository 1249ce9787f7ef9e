"""A model's inputs at another size: the sequence made longer or shorter, by what its Program knows of the sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish.capture import Program


@dataclass(frozen=True)
class Axis:
    """The free size to vary: the second dim's, where it is free (a sequence's), else the first's (a batch's).

    symbols: those that have this size now and are no batch's: queries and keys may have one each.
    """

    symbols: frozenset[str]
    name: str
    size: int


def axis_of(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Axis | None:
    """What can be varied of these inputs; None where the model fixes all sizes."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    free = [
        (dim, symbol, leaf.shape[dim])
        for spec, leaf in zip(program.inputs, leaves, strict=True)
        for dim, symbol in enumerate(spec.sizes)
        if isinstance(symbol, str) and symbol.isidentifier()
    ]
    for first, name in ((1, "tokens"), (0, "rows")):
        size = next((size for dim, _, size in free if dim == first), None)
        if size is not None:
            return Axis(frozenset(symbol for dim, symbol, other in free if dim >= first and other == size), name, size)
    return None


def resized(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], axis: Axis, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with `size` in place of the axis' present size, cut or repeated. ValueError where the graph does not
    serve that size."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    new = [
        _resized(leaf, [dim for dim, symbol in enumerate(given.sizes) if symbol in axis.symbols], size)
        for given, leaf in zip(program.inputs, leaves, strict=True)
    ]
    if reason := program.rejects(new):
        raise ValueError(f"the model does not take {size} {axis.name}: {reason}")
    new_args, new_kwargs = pytree.tree_unflatten(new, spec)
    return new_args, new_kwargs


def _resized(leaf: Any, dims: list[int], size: int) -> Any:
    for dim in dims if isinstance(leaf, Tensor) else ():
        leaf = leaf.index_select(dim, torch.arange(size, device=leaf.device) % leaf.shape[dim])
    return leaf
