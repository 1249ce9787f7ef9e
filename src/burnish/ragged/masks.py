"""What says which tokens of a padded batch are real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.rewrites.rewrite import same

aten = torch.ops.aten
_CONVERSIONS = (aten.to.device, aten.to.dtype, aten._to_copy.default, aten.ne.Scalar, aten.contiguous.default)


class Refused(Exception):
    """Padding cannot be removed from a graph: the node and the reason in one line."""


def bound(node: fx.Node) -> dict[str, Any]:
    return dict(zip(ops.attention.signature.parameters, ops.attention.bind(*node.args, **node.kwargs), strict=True))


def mask_of(node: fx.Node) -> fx.Node:
    """What says which keys are real: the padding mask, or a boolean bias (B, 1, 1, S) that was made of it."""
    given = bound(node)
    mask, bias = given["key_padding_mask"], given["bias"]
    if bias is not None:
        if mask is not None or bias.meta["val"].dtype != torch.bool or bias.meta["val"].dim() != 4:
            raise Refused(f"{node.name}: the attention has a bias")
        mask, kept = bias, {*_CONVERSIONS, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor}
    else:
        kept = {*_CONVERSIONS}
    if mask is None:
        raise Refused(f"{node.name}: the attention has no padding mask")
    while mask.op == "call_function" and mask.target in kept:
        mask = mask.args[0]
    if bias is not None:
        shape, of_mask = bias.meta["val"].shape, mask.meta["val"].shape
        expected = (of_mask[0], 1, 1, of_mask[1]) if len(of_mask) == 2 else None
        if expected is None or not same(tuple(shape), expected):
            raise Refused(f"{node.name}: the attention has a mask of pairs of tokens")
    return mask


def is_mask(node: Any, mask: fx.Node) -> bool:
    """Whether the value is the mask, converted or spread over more dimensions."""
    kept = (*_CONVERSIONS, aten.unsqueeze.default, aten.expand.default, aten.clone.default)
    while isinstance(node, fx.Node) and node is not mask and node.target in kept:
        node = node.args[0]
    return node is mask


def mask_function(
    graph_module: fx.GraphModule, mask: fx.Node, light: set[fx.Node]
) -> Callable[[Sequence[Any]], Tensor]:
    """Of the graph's flat inputs the mask. Refused where it is computed of more than what is `light`."""
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    if mask in inputs:
        place = inputs.index(mask)
        return lambda leaves: leaves[place]
    if mask not in light:
        raise Refused(f"{mask.name}: the mask is computed of more than inputs")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(str(n.target)) for n in inputs}
    for node in graph_module.graph.nodes:
        if node in light and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[mask])
    graph.eliminate_dead_code()
    module = fx.GraphModule(graph_module, graph)
    return lambda leaves: module(*leaves)
