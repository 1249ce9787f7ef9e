"""GELU between linear layers, in graphs for Inductor: what a product's epilogue can do.

GELU behind a linear layer is a pass over memory of its own, and so is its backward pass, after which the gradient of
the bias is another. In half precision Ops have these as the epilogue of the product that comes before.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from burnish.inductor.nodes import call, move_behind, needing, value_of
from burnish.inductor.sums import keeps_order, readers, replace_sums, sums_of_rows
from burnish.op import Op
from burnish.op import why_not as _why_not
from burnish.ops import linear_gelu_backward, linear_with_preactivation
from burnish.ops._common import HALF_TYPES

_aten = torch.ops.aten
_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


def use_gelu_products(graph_module: fx.GraphModule) -> None:
    """Puts the Ops in the places of products and GELU, where there are kernels for them, in place."""
    graph = graph_module.graph
    graph.eliminate_dead_code()  # who reads what is asked below
    for node in graph.find_nodes(op="call_function", target=_aten.gelu.default):
        _use_forward(node)
    for node in graph.find_nodes(op="call_function", target=_aten.gelu_backward.default):
        _use_backward(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def undo_gelu_products(graph_module: fx.GraphModule) -> None:
    """Takes `linear_with_preactivation` apart where it was not chosen to run by its kernel: Inductor then fuses GELU
    with what is around it."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=linear_with_preactivation.overload):
        if str(node.kwargs.get("impl", "")).startswith("gluon"):
            continue
        x, weight, bias, activation = node.args
        with graph.inserting_before(node):
            turned = call(_aten.permute.default, weight, [1, 0])
            pre = call(_aten.mm.default, x, turned) if bias is None else call(_aten.addmm.default, bias, x, turned)
            approximate = next(name for name, known in _ACTIVATIONS.items() if known == activation)
            hidden = graph.call_function(_aten.gelu.default, (pre,), {"approximate": approximate})
            hidden.meta["val"] = pre.meta["val"]
        for user in list(node.users):
            user.replace_all_uses_with((hidden, pre)[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    graph_module.recompile()


def _use_forward(node: fx.Node) -> None:
    """A product with its bias, which is kept, and GELU of it -> `linear_with_preactivation`."""
    product = _source(node.args[0])
    if product is None or product.target not in (_aten.addmm.default, _aten.mm.default) or product.kwargs:
        return
    if node.graph.output_node() not in _users(product):
        return
    *bias, x, turned = product.args
    columns = product.meta["val"].shape[-1]
    if not isinstance(columns, int) or node.meta["val"].shape[-1] != columns:
        return
    if bias and bias[0].meta["val"].shape != (columns,):  # type: ignore[union-attr]
        return
    graph = node.graph
    with graph.inserting_before(product):
        weight = call(_aten.permute.default, turned, [1, 0])
        args = x, weight, bias[0] if bias else None, _activation(node)
        if not _suits(linear_with_preactivation, "gluon", *args):
            return
        hidden, pre = _call(linear_with_preactivation, *args)
    product.replace_all_uses_with(pre)
    with graph.inserting_before(node):
        node.replace_all_uses_with(_viewed(hidden, node))


def _users(node: fx.Node) -> set[fx.Node]:
    """Who reads it or a view of it in the same order."""
    return set(readers(node, keeps_order))


def _use_backward(node: fx.Node) -> None:
    """A product that is the gradient of GELU's result, what GELU's backward pass makes of it, GELU computed again, and
    sums of rows -> `linear_gelu_backward`.

    What reads GELU's result, the product for a weight's gradient, may come before: it is moved behind.
    """
    product, x = _source(node.args[0], alone=True), _source(node.args[1])
    if product is None or x is None or product.target is not _aten.mm.default:
        return
    columns = product.meta["val"].shape[-1]
    if not isinstance(columns, int) or any(n.meta["val"].shape[-1] != columns for n in (node, x)):
        return
    if not _suits(linear_gelu_backward, "torch_triton", *product.args, x):
        return
    graph, activation = node.graph, _activation(node)
    gelus = graph.find_nodes(op="call_function", target=_aten.gelu.default)
    again = next((n for n in gelus if _source(n.args[0]) is x and _activation(n) == activation), None)
    moved: list[fx.Node] | None = None
    if again is not None:
        moved = needing(again, node) if again < node else []
    with graph.inserting_before(node):
        rows = x if x.meta["val"].dim() == 2 else call(_aten.view.default, x, [-1, columns])
        dx, hidden, total = _call(linear_gelu_backward, *product.args, rows, activation, moved is not None)
        dx = _viewed(dx, node)
    replace_sums(sums_of_rows(node, columns, (*HALF_TYPES, torch.float32)), total)
    node.replace_all_uses_with(dx)
    if again is not None and moved is not None:
        with graph.inserting_before(node):
            hidden = _viewed(hidden, again)
        again.replace_all_uses_with(hidden)
        move_behind(node, moved)


def _suits(op: Op, impl: str, *nodes: Any) -> bool:
    """Whether this Impl takes such inputs, and they are of half precision: in float32 products are exact, and slow."""
    values = [_of_known_sizes(value_of(node)) for node in nodes]
    if any(value is None for value, node in zip(values, nodes, strict=True) if isinstance(node, fx.Node)):
        return False
    return values[0].dtype in HALF_TYPES and not _why_not(op, impl, *values)


def _of_known_sizes(value: Any) -> Any:
    """A fake tensor of the sizes at hand instead of any: asking for those would be taken for a condition on them. None
    where they are not known."""
    if not isinstance(value, Tensor):
        return value
    sizes, strides = (
        [n.node.hint if isinstance(n, torch.SymInt) else n for n in numbers]
        for numbers in (value.shape, value.stride())
    )
    if None in (*sizes, *strides):
        return None
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _source(node: Any, alone: bool = False) -> fx.Node | None:
    """What it is a view of, element by element in the same order; with `alone`, if nothing else reads that."""
    while isinstance(node, fx.Node) and not (alone and len(node.users) > 1):
        if not keeps_order(node):
            return node
        node = node.args[0]
    return None


def _activation(node: fx.Node) -> str:
    return _ACTIVATIONS[str(node.kwargs.get("approximate", "none"))]


def _call(op: Op, *args: Any) -> list[fx.Node]:
    """A node of the Op, and one for each of its results, which are returned."""
    node = call(op.overload, *args)
    node.meta["eager_input_vals"] = (tuple(map(value_of, args)), {})  # by which Inductor lays inputs out
    return [call(operator.getitem, node, place) for place in range(len(node.meta["val"]))]


def _viewed(node: fx.Node, like: fx.Node) -> fx.Node:
    """A view of it in the shape of another, or of what that is given."""
    sizes = like.meta["val"].shape
    if len(sizes) == node.meta["val"].dim():
        return node
    known = like.args[-1]
    return call(
        _aten.view.default,
        node,
        [size if isinstance(size, int) else call(_aten.sym_size.int, known, i) for i, size in enumerate(sizes)],
    )
