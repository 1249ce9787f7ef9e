"""Sums over all rows in graphs for Inductor, as biases' gradients are: where they are, and how they are replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from burnish.inductor.nodes import call

_aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten.permute.default, _aten.unsqueeze.default)


def readers(node: fx.Node, through: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
    """Who reads it, itself or by views of it: any, or those that `through` takes."""
    for user in node.users:
        if user.target in _VIEWS and (through is None or through(user)):
            yield from readers(user, through)
        else:
            yield user


def keeps_order(view: fx.Node) -> bool:
    """Whether a view's elements come in the order of those it is of."""
    return view.target in (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


def sums_of_rows(node: fx.Node, columns: Any, dtypes: Collection[torch.dtype]) -> list[fx.Node]:
    """What adds up all dimensions of it but the last, which has so many columns, with a result of one of the dtypes."""
    return [user for user in readers(node, keeps_order) if _adds_rows(user, columns, dtypes)]


def _adds_rows(node: fx.Node, columns: Any, dtypes: Collection[torch.dtype]) -> bool:
    if node.target is not _aten.sum.dim_IntList or node.meta["val"].dtype not in dtypes:
        return False
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if not isinstance(columns, int) or value.dim() < 2 or value.shape[-1] != columns:
        return False
    dims = sorted(dim % value.dim() for dim in node.args[1] or range(value.dim()))  # type: ignore[union-attr]
    return dims == list(range(value.dim() - 1))


def replace_sums(sums: Sequence[fx.Node], total: fx.Node) -> None:
    """Puts the total (N,) in their places."""
    dtype = total.meta["val"].dtype
    for each in sums:
        casts = [u for u in readers(each, keeps_order) if u.target is _CAST and u.meta["val"].dtype == dtype]
        for wanted in (*casts, each):  # which need no rounding to half precision and back
            if wanted.users:
                wanted.replace_all_uses_with(_shaped_like(wanted, total))


def _shaped_like(node: fx.Node, total: fx.Node) -> fx.Node:
    """The total (N,) in the shape and dtype of `node`."""
    value, graph = node.meta["val"], node.graph
    with graph.inserting_before(node):
        if value.shape != total.meta["val"].shape:
            total = call(_aten.view.default, total, list(value.shape))
        return total if value.dtype == total.meta["val"].dtype else call(_CAST, total, value.dtype)
