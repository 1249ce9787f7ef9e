"""Which Ops of a packed graph are told how many of its rows are real tokens.

On CUDA the graph then has one size for all masks of a shape, room for every place, and its kernels read on the device
how far the real tokens go: nobody waits to learn that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from burnish import ops
from burnish.lower import op_of
from burnish.ops._common import HALF_TYPES
from burnish.ragged.tokens import put_back
from burnish.rewrites.fuse import on_cuda

aten = torch.ops.aten

OFFSETS = "burnish_cu_seqlens"
"""The input of a packed graph whose last entry is how many tokens are real."""

WORTH_IT = HALF_TYPES
"""Dtypes of products that kernels of ours are as fast at as cuBLAS, which computes all rows."""

_ATTENTION = (ops.varlen_attention.overload,)  # told by the offsets where each sequence ends
_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default)


def told(graph: fx.Graph, explicit: Mapping[str, str]) -> list[fx.Node]:
    """The Op nodes with a row for each token that have Impls to take `live_rows`.

    None at all where the graph is better run on as many tokens as there are: it is not on CUDA; an Op that reads
    matrices has no such Impl, or none that is worth it, or another was asked for (`explicit`, Impl names by Op name);
    something may be looked up by what is computed of them, which is undefined beyond the real tokens.
    """
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    if not on_cuda(inputs[OFFSETS]):
        return []
    tokens = inputs["burnish_columns"].meta["val"].shape[0]
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target in _ATTENTION or not _meets(node, tokens):
            continue
        if node.target in _PRODUCTS:
            return []
        op = op_of(node.target)
        if op is None:
            continue
        if _counts(node, tokens) and any(impl.live_rows for impl in op.impls.values()):
            found.append(node)
            if _reads_matrix(node) and not _is_spared(node, explicit):
                return []
        elif _reads_matrix(node):
            return []
    return [] if _counts_by(found, graph) else found


def _counts_by(nodes: list[fx.Node], graph: fx.Graph) -> bool:
    """Whether whole numbers are computed of these nodes' results, before they are put back."""
    undefined = set(nodes)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not put_back and undefined.intersection(node.all_input_nodes):
            undefined.add(node)
            values = (v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor))
            if any(not v.is_floating_point() and v.dtype != torch.bool for v in values):
                return True
    return False


def _meets(node: fx.Node, tokens: Any) -> bool:
    """Whether it computes with values of tokens: BERT's pooler does not, which has a row for each text."""
    symbols = tokens.node.expr.free_symbols
    values = [value for each in (node, *node.all_input_nodes) for value in pytree.tree_leaves(each.meta.get("val"))]
    sizes = (size for value in values if isinstance(value, Tensor) for size in value.shape)
    return any(isinstance(size, torch.SymInt) and symbols & size.node.expr.free_symbols for size in sizes)


def _counts(node: fx.Node, tokens: Any) -> bool:
    """Whether the node's result has a row for each token, and no others."""
    value = _first(node)
    if not isinstance(value, Tensor):
        return False
    sizes = [size for size in value.shape[:-1] if not (isinstance(size, int) and size == 1)]
    return len(sizes) == 1 and isinstance(sizes[0], torch.SymInt) and bool(sizes[0].node.expr == tokens.node.expr)


def _is_spared(node: fx.Node, explicit: Mapping[str, str]) -> bool:
    """Whether a product may be expected to run by an Impl that takes `live_rows`."""
    op = op_of(node.target)
    assert op is not None
    asked = op.asked_for(explicit)
    return _first(node).dtype in WORTH_IT and (asked is None or op.impls[asked].live_rows)


def _first(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value[0] if isinstance(value, (tuple, list)) else value


def _reads_matrix(node: fx.Node) -> bool:
    op = op_of(node.target)
    assert op is not None
    args = op.bind(*node.args, **node.kwargs)
    given = (args[i] for i in op.weights)
    return any(isinstance(arg, fx.Node) and arg.meta["val"].dim() > 1 for arg in given)
