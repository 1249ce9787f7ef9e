"""Gradients of attention written where the product that gave q, k and v wants them, in graphs for Inductor.

A model that gets q, k and v from one product has their gradients put together in its backward pass: a kernel between
attention's and the product's that copies all three. `attention_backward_packed` writes them that way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from burnish.inductor.nodes import call, value_of
from burnish.lower import op_of
from burnish.ops import attention_backward, attention_backward_packed

_HEADS_LAST = [0, 2, 1, 3]

_aten = torch.ops.aten
_KEEP_ORDER = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


def pack_gradients(graph_module: fx.GraphModule) -> None:
    """Replaces each `attention_backward` whose gradients of q, k and v are only put together, position by position."""
    graph = graph_module.graph
    graph.eliminate_dead_code()  # who reads what is asked below
    for node in [n for n in graph.nodes if n.op == "call_function" and op_of(n.target) is attention_backward]:
        _pack(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _pack(node: fx.Node) -> None:
    *args, _ = attention_backward.bind(*node.args, **node.kwargs)
    q, k, v = (value_of(arg).shape for arg in args[1:4])
    cat = _put_together(node)
    dim = _dim(cat, q[0], [heads * width for _, heads, _, width in (q, k, v)]) if cat is not None else None
    if cat is None or dim is None or q[3] != v[3]:
        return
    graph = node.graph
    with graph.inserting_before(node):
        packed = call(attention_backward_packed.overload, *args)
        packed.meta["eager_input_vals"] = (tuple(map(value_of, args)), {})  # by which Inductor lays inputs out
    with graph.inserting_before(cat):
        batch = q[0] if isinstance(q[0], int) else call(_aten.sym_size.int, packed, 0)
        rows = [batch, -1] if dim == 2 else [-1]
        view = call(_aten.view.default, packed, [*rows, *value_of(cat).shape[dim:]])
    cat.replace_all_uses_with(view)


def _put_together(node: fx.Node) -> fx.Node | None:
    """The `cat` of the gradients of q, k and v in this order, heads last, if nothing reads these or that of bias."""
    by_place: list[Any] = sorted((user.args[1], user) for user in node.users)  # each a getitem
    if [place for place, _ in by_place] != [0, 1, 2]:
        return None
    rows = [_rows(gradient) for _, gradient in by_place]
    cat = _only_user(rows[0]) if rows[0] is not None else None
    if cat is None or cat.target is not _aten.cat.default or cat.args[0] != rows:
        return None
    return cat if all(map(_only_user, cat.args[0])) else None  # type: ignore[arg-type]


def _rows(gradient: fx.Node) -> fx.Node | None:
    """The last of the views of it whose elements lie in the order (B, L, H, D), each all that reads the one before."""
    node, turned = gradient, False
    while (user := _only_user(node)) is not None:
        if user.target is _aten.permute.default and not turned:
            dims: Any = user.args[1]
            if [dim % 4 for dim in dims] != _HEADS_LAST:
                return None
            turned = True
        elif user.target is not _aten.clone.default and not (turned and user.target in _KEEP_ORDER):
            break
        node = user
    return node if turned else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _dim(cat: fx.Node, batch: Any, widths: list[Any]) -> int | None:
    """Along which dimension the rows, of these widths, are put together: 1 of (B * L, ...) or 2 of (B, L, ...)."""
    shapes = [value_of(row).shape for row in cat.args[0]]  # type: ignore[union-attr]
    dim: Any = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    dim %= len(shapes[0])
    if dim not in (1, 2) or (dim == 2 and not statically_known_true(shapes[0][0] == batch)):
        return None
    of_rows = [shape[dim:] for shape in shapes]
    if not all(isinstance(size, int) for sizes in (widths, *of_rows) for size in sizes):
        return None
    return dim if [math.prod(sizes) for sizes in of_rows] == widths else None
