"""An RMS norm and the product that alone reads it -> one Op, for few rows on CUDA.

With few rows a product's kernel normalizes x itself, and the norm has no kernel of its own. With more, products run on
tensor cores, and none of those kernels does so. So this applies only where the number of rows is known and small, as
when a model decodes one token at a time.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.kernels.layout import MAX_GEMV_ROWS
from burnish.op import Op
from burnish.ops._common import HALF_TYPES
from burnish.rewrites import fuse
from burnish.rewrites.rewrite import Outcome, insert, set_value, value

_NORM, _AFTER_SUM, _AFTER_PRODUCT = (op.overload for op in (ops.rms_norm, ops.add_rms_norm, ops.linear_add_rms_norm))
_FUSED: dict[Any, tuple[Op, Op]] = {
    ops.linear.overload: (ops.linear, ops.rms_norm_linear),
    ops.gated_mlp.overload: (ops.gated_mlp, ops.rms_norm_gated_mlp),
}
_OF_HEADS = (ops.linear_rope.overload, ops.linear_rope_append.overload)


def fuse_norm_prologue(graph_module: fx.GraphModule) -> Outcome:
    """linear(rms_norm(x)) -> rms_norm_linear(x), and so for gated_mlp.

    A norm that ends a branch goes along: linear_add_rms_norm becomes linear, with the residual in its epilogue, and the
    norm moves into what reads it. Of `add_rms_norm` only the norm would move: the addition would stay a kernel.
    """
    graph_module.graph.eliminate_dead_code()  # so that what still has a user is read
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target not in (_NORM, _AFTER_SUM, _AFTER_PRODUCT) or not fuse.on_cuda(node.args[0]):
            continue
        results = [node] if node.target == _NORM else _items(node, 0)
        readers = [(reader, normed) for normed in results for reader in normed.users]
        if not any(
            reader.target in (*_FUSED, *_OF_HEADS) and reader.args[:1] == (normed,) for reader, normed in readers
        ):
            continue
        reason = _refuse(node, readers) or _move(graph_module, node, readers[0][0])
        if reason:
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _items(node: fx.Node, index: int) -> list[fx.Node]:
    """The nodes that take this one of a node's results."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def _refuse(node: fx.Node, readers: list[tuple[fx.Node, fx.Node]]) -> str | None:
    """Why the norm of `node` stays where it is, None where it moves; `readers` with what they read it from."""
    reader, normed = readers[0]
    shape, dtype = value(normed).shape, value(normed).dtype
    if not all(isinstance(size, int) for size in shape[:-1]):
        return f"the number of rows of {tuple(shape)} is not fixed; up to {MAX_GEMV_ROWS} a product normalizes them"
    rows = math.prod(shape[:-1])
    if rows > MAX_GEMV_ROWS:
        return f"there are {rows} rows; up to {MAX_GEMV_ROWS} a product normalizes them"
    if len(readers) > 1:
        return f"its result is read by {', '.join(reader.name for reader, _ in readers)}"
    if normed in reader.args[1:] or normed in reader.kwargs.values():
        return f"{reader.name} reads it as more than its x"
    if node.target == _AFTER_SUM:
        return "the addition before it would be a kernel of its own, so that none is saved"
    if reader.target in _OF_HEADS:
        return f"{reader.name} rotates or appends heads in its epilogue, and has no norm in its prologue"
    product, _ = _FUSED[reader.target]
    bound = product.bind(*reader.args, **reader.kwargs)
    if product is ops.linear and bound[4] is not None:
        return f"{reader.name} adds a residual"
    if dtype not in (*HALF_TYPES, torch.float32):
        return f"it is of {dtype}; the kernel takes float16, bfloat16 and float32"
    if any(value(bound[i]).stride(1) != 1 for i in product.weights):
        return f"a weight of {reader.name} is stored (K, N); the kernel reads rows of (N, K)"
    return None


def _move(graph_module: fx.GraphModule, node: fx.Node, reader: fx.Node) -> str | None:
    """Puts the fused Op in the place of `reader`, or says why it cannot be."""
    product, fused = _FUSED[reader.target]
    total = None
    if node.target == _AFTER_PRODUCT:
        x, weight, bias, residual, norm_weight, eps, _ = ops.linear_add_rms_norm.bind(*node.args, **node.kwargs)
        total = _sum_before(node, x, weight, bias, residual)
        norm_args: tuple[Any, ...] = (total, norm_weight, eps)
    else:
        norm_args = ops.rms_norm.bind(*node.args, **node.kwargs)
    _, *product_args = product.bind(*reader.args, **reader.kwargs)
    if product is ops.linear:
        product_args.pop()  # the residual, which is None
    reason = insert(graph_module, [reader], fused, *norm_args, *product_args)
    if total is not None:
        for old in _items(node, 1) if reason is None else ():
            total.meta |= {key: entry for key, entry in old.meta.items() if key != "val"}
            old.replace_all_uses_with(total)
        graph_module.graph.eliminate_dead_code()
    return reason


def _sum_before(node: fx.Node, x: Any, weight: Any, bias: Any, residual: Any) -> fx.Node:
    """The product and its residual, without the norm, before `node`."""
    with node.graph.inserting_before(node):
        total = node.graph.call_function(ops.linear.overload, (x, weight, bias, "none", residual))
    set_value(total)
    total.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    return total
