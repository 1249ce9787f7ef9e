"""The gradient of a table that a product shares, added where the table's gradient is written, in graphs for Inductor.

A language model's last product often has the table of its words for a weight. That has then two gradients: the one of
the product, which the forward pass left where it made the loss and which the loss's own gradient scales, and the one of
the lookup. Inductor casts, scales and adds them in a pass over both; `embedding_backward` does so as it writes a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from burnish.inductor.nodes import call, value_of
from burnish.lower import op_of
from burnish.ops import embedding_backward

_DEVICES = ("cuda",)  # elsewhere the Op adds by a pass of PyTorch's, which Inductor's is not slower than

_aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


def add_tables(graph_module: fx.GraphModule) -> None:
    """Replaces each sum of a table's gradient and another tensor by an `embedding_backward` of both."""
    graph = graph_module.graph
    graph.eliminate_dead_code()  # who reads what is asked below
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target is _aten.add.Tensor]:
        _add(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _add(node: fx.Node) -> None:
    if len(node.args) != 2 or node.kwargs:  # kwargs: a factor
        return
    operands: Any = node.args
    one, other = operands
    for lookups, rest in ((one, other), (other, one)):
        if _is_alone(lookups, node) and _is_like(rest, lookups):
            grad, ids, entries, *_ = embedding_backward.bind(*lookups.args)
            args = grad, ids, entries, *_scaled(rest)
            with node.graph.inserting_before(node):
                added = call(embedding_backward.overload, *args)
                added.meta["eager_input_vals"] = (tuple(map(value_of, args)), {})  # by which Inductor lays inputs out
            node.replace_all_uses_with(added)
            return


def _is_alone(node: Any, add: fx.Node) -> bool:
    """Whether it is a table's gradient to which nothing is added yet, which only `add` reads, and does not widen."""
    if not isinstance(node, fx.Node) or op_of(node.target) is not embedding_backward or node.kwargs:
        return False
    value: Tensor = node.meta["val"]
    return (
        embedding_backward.bind(*node.args)[3] is None
        and list(node.users) == [add]
        and add.meta["val"].dtype == value.dtype
        and value.device.type in _DEVICES
    )


def _is_like(node: Any, table: fx.Node) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    like: Tensor = table.meta["val"]
    return (
        node is not table
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.device == like.device
        and _same_sizes(value, like)
    )


def _scaled(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What it is a number's multiple of, and the number; in front of casts: nothing is rounded before the sum."""
    node = _before_widening(node)
    product: Any = node.args[0] if node.target is _CAST else node
    if product.target is _aten.mul.Tensor and not product.kwargs:
        for gradient, factor in (product.args, product.args[::-1]):
            if _is_number(factor) and isinstance(gradient, fx.Node) and _same_sizes(value_of(gradient), value_of(node)):
                return _before_widening(gradient), _before_casts(factor)
    return node, None


def _is_number(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _same_sizes(one: Tensor, other: Tensor) -> bool:
    return all(isinstance(n, int) for n in (*one.shape, *other.shape)) and one.shape == other.shape


def _before_widening(node: fx.Node) -> fx.Node:
    source: Any = node.args[0] if node.target is _CAST else None
    if source is None or not value_of(source).is_floating_point():
        return node
    narrow, wide = value_of(source).dtype, value_of(node).dtype
    return _before_widening(source) if torch.promote_types(narrow, wide) == wide else node


def _before_casts(number: Any) -> Any:
    while number.target is _CAST and value_of(number.args[0]).is_floating_point():
        number = number.args[0]
    return number
