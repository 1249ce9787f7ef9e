"""The product with the vocabulary + `cross_entropy` -> `linear_cross_entropy`, where the logits are for the loss
alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.rewrites.raise_cross_entropy import path_of_rows
from burnish.rewrites.rewrite import Outcome, insert, value

aten = torch.ops.aten


def fuse_linear_cross_entropy(graph_module: fx.GraphModule) -> Outcome:
    """cross_entropy(rows of linear(x, weight, bias), target) -> linear_cross_entropy(these rows of x, ...)."""
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.cross_entropy.overload:
            continue
        if reason := _fuse(graph_module, node):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _fuse(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    logits, target, *options = ops.cross_entropy.bind(*node.args, **node.kwargs)
    path = path_of_rows(logits)
    linear = path.source
    if linear.target is not ops.linear.overload or path.widened:
        return "its logits are not a linear layer's result"
    x, weight, bias, activation, residual = ops.linear.bind(*linear.args, **linear.kwargs)
    if activation != "none" or residual is not None:
        return f"the product {linear.name} has an activation or a residual"
    ways = {*path.steps, node}
    if others := [user.name for step in (linear, *path.steps) for user in step.users if user not in ways]:
        return f"the logits {linear.name} are also used by {', '.join(others)}"

    def build(x: Any, weight: Any, target: Any, bias: Any) -> Any:
        width = value(weight.node).shape[1]
        if not isinstance(width, int):
            width = aten.sym_size.int(weight, 1)
        return ops.linear_cross_entropy(path.follow(x, width), weight, target, bias, *options)

    return insert(graph_module, [node], build, x, weight, target, bias)
