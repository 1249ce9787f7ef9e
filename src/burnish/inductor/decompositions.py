"""What ATen operators are made of in front of Inductor, where that differs from Inductor's own choice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from burnish.ops import embedding_backward
from burnish.ops._common import HALF_TYPES

Decomposition = Callable[..., Any]

_ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERFC_SCALE = 0.3275911


def decompositions() -> dict[Any, Decomposition]:
    """Inductor's table, with ours for the gradients of tables, and without GELU: that stays whole, so that it can be
    found in graphs, until `expand_gelu` takes what is left of it apart."""
    from torch._inductor.decomposition import select_decomp_table

    found: dict[Any, Decomposition] = dict(select_decomp_table())
    for operator in gelu_decompositions():
        del found[operator]
    operator = torch.ops.aten.embedding_dense_backward.default
    return found | {operator: functools.partial(_table_gradient, found[operator])}


def gelu_decompositions() -> dict[Any, Decomposition]:
    """What GELU and its backward pass are made of: in half precision ours, else Inductor's."""
    from torch._inductor.decomposition import select_decomp_table

    theirs = select_decomp_table()
    gelu, backward = torch.ops.aten.gelu.default, torch.ops.aten.gelu_backward.default
    return {
        gelu: functools.partial(_gelu, theirs[gelu]),
        backward: functools.partial(_gelu_backward, theirs[backward]),
    }


def expand_gelu(graph_module: fx.GraphModule) -> None:
    """Takes GELU and its backward pass apart in the graph and in those that it calls, in place: Inductor fuses them."""
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table() | gelu_decompositions()
    for module in (m for m in graph_module.modules() if isinstance(m, fx.GraphModule)):
        for operator in gelu_decompositions():
            for node in module.graph.find_nodes(op="call_function", target=operator):
                _expand(node, table)
        module.recompile()


def _expand(node: fx.Node, table: dict[Any, Decomposition]) -> None:
    """The operators that the table has for a node in its place."""
    graph, tensors = node.graph, node.all_input_nodes
    values = [tensor.meta["val"] for tensor in tensors]

    def run(*values: Any) -> Any:
        given = dict(zip(tensors, values, strict=True))
        return node.target(*map_arg(node.args, given.__getitem__), **node.kwargs)  # type: ignore[operator]

    with values[0].fake_mode:
        parts = make_fx(run, decomposition_table=table)(*values).graph
    parts.eliminate_dead_code()  # what a decomposition tried
    with graph.inserting_before(node):
        node.replace_all_uses_with(
            graph.graph_copy(parts, dict(zip(parts.find_nodes(op="placeholder"), tensors, strict=True)))  # type: ignore[arg-type]
        )
    graph.erase_node(node)


def _table_gradient(
    theirs: Decomposition, grad: Tensor, ids: Tensor, entries: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """In a fixed order: Inductor's adds up by atomics, with other bits in every run."""
    if scale_grad_by_freq:
        result: Tensor = theirs(grad, ids, entries, padding_idx, scale_grad_by_freq)
        return result
    if padding_idx >= 0:  # its gradients are of no row: rows are not written again
        ids = torch.where(ids == padding_idx, -1, ids)
    table: Tensor = embedding_backward(grad, ids, entries)
    return table


def _gelu(theirs: Decomposition, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none" or x.dtype not in HALF_TYPES:
        result: Tensor = theirs(x, approximate)
        return result
    wide = x.float()
    return (wide * _normal_cdf(wide, _bell(wide))).to(x.dtype)


def _gelu_backward(theirs: Decomposition, grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none" or x.dtype not in HALF_TYPES:
        result: Tensor = theirs(grad, x, approximate)
        return result
    wide = x.float()
    bell = _bell(wide)
    slope = _normal_cdf(wide, bell) + wide * bell * (1 / math.sqrt(2 * math.pi))
    return (grad.float() * slope).to(grad.dtype)


def _bell(x: Tensor) -> Tensor:
    return torch.exp(x * x * -0.5)


def _normal_cdf(x: Tensor, bell: Tensor) -> Tensor:
    """The normal distribution function, of `bell` = exp(-x^2 / 2), which a derivative needs as well.

    With CUDA's erf GELU is bound by arithmetic, not by memory: it computes two polynomials and an exponential for each
    entry. This is one polynomial, off by at most 1.5e-7, and by 0.4 % of the result at x = -6, where 1 + erf(x) in
    float32 has nothing left but its rounding.
    Source: Abramowitz, Stegun, "Handbook of Mathematical Functions", 7.1.26.
    """
    t = 1 / (1 + _ERFC_SCALE / math.sqrt(2) * x.abs())
    series: Any = 0.0
    for coefficient in reversed(_ERFC):
        series = (series + coefficient) * t
    tail = 0.5 * series * bell
    return torch.where(x < 0, tail, 1 - tail)
