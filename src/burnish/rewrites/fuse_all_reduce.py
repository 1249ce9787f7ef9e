"""The sum over the ranks behind a divided layer, and the residual addition and norm that follow, as one Op."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.op import Op
from burnish.parallel.graphs import is_all_reduce
from burnish.rewrites.rewrite import Outcome, arguments, insert, same, value

aten = torch.ops.aten
_WIDER: dict[Any, tuple[Op, Op]] = {
    narrow.overload: (narrow, wide)
    for narrow, wide in (
        (ops.add_layer_norm, ops.all_reduce_add_layer_norm),
        (ops.add_rms_norm, ops.all_reduce_add_rms_norm),
    )
}


def fuse_all_reduce_add_norm(graph_module: fx.GraphModule) -> Outcome:
    """add_rms_norm(all_reduce(x) + bias, residual) -> all_reduce_add_rms_norm, and so for layer norm; with the layer's
    bias or without. Only where nothing else reads the sum over the ranks.

    The collective moves to where the norm is. So it does on every rank: they have the same graph.
    """
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target not in _WIDER:
            continue
        narrow, wide = _WIDER[node.target]
        one, other, *rest = narrow.bind(*node.args, **node.kwargs)
        pairs = ((one, other), (other, one)) if one is not other else ()
        found = [(branch, residual) for first, residual in pairs if (branch := _branch_of(first)) is not None]
        alone = [pair for pair in found if all(len(step.users) == 1 for step in pair[0][0])]
        if not alone:
            refused += [f"{node.name}: something else reads {steps[0].name} too" for (steps, _), _ in found]
            continue
        (steps, bias), residual = alone[0]
        x, group_name = arguments(steps[-1]).values()
        *norm_args, keep_sum = rest
        reason = insert(graph_module, [node], wide, x, bias, residual, *norm_args, group_name, keep_sum)
        if reason is None:
            for step in steps:
                graph_module.graph.erase_node(step)
            count += 1
        else:
            refused.append(f"{node.name}: {reason}")
    return Outcome(count, tuple(refused))


def _branch_of(node: Any) -> tuple[list[fx.Node], Any] | None:
    """The nodes from `node` back to the sum over the ranks that it is, and the bias that is added to that, if any."""
    if not isinstance(node, fx.Node):
        return None
    if is_all_reduce(node):
        return [node], None
    if node.target is not aten.add.Tensor:
        return None
    one, other, alpha = arguments(node).values()
    for total, bias in ((one, other), (other, one)):
        if alpha == 1 and isinstance(total, fx.Node) and is_all_reduce(total) and _is_vector(bias, total):
            return [node, total], bias
    return None


def _is_vector(bias: Any, total: fx.Node) -> bool:
    """Whether it is one number of the same dtype for each feature."""
    vector = value(bias)
    return (
        isinstance(bias, fx.Node)
        and isinstance(vector, torch.Tensor)
        and vector.dtype == value(total).dtype
        and same(tuple(vector.shape), tuple(value(total).shape[-1:]))
    )
