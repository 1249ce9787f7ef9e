"""A new token's way into the model -> one Op, on CUDA.

A step of decoding is made of kernels that begin before the one ahead of them has ended; PyTorch's do not, so those at
its start cost as much as a layer's products. In a prompt they do not count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.rewrites import fuse
from burnish.rewrites.rewrite import Outcome, arguments, insert, same, value

aten = torch.ops.aten


def fuse_token_embedding(graph_module: fx.GraphModule) -> Outcome:
    """embedding(word, ids), with embedding(position, position_ids) or without, of one token of each text -> one Op."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if (sides := _summands(node)) is not None:
            count += insert(graph_module, [node], ops.embedding, *_lookups(*sides)) is None
    for node in list(graph_module.graph.nodes):
        if node.users and _is_of_one_token(node):
            count += insert(graph_module, [node], ops.embedding, *_lookups(node)) is None
    return Outcome(count)


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two embeddings that this node adds, first the one of each text; None if it is no such sum."""
    if node.target is not aten.add.Tensor:
        return None
    one, other, alpha = arguments(node).values()
    if alpha != 1 or not all(_is_of_one_token(side) and len(side.users) == 1 for side in (one, other)):
        return None
    if not same(value(one).shape, value(node).shape):
        one, other = other, one
    fits = value(one).dtype == value(other).dtype and same(value(one).shape, value(node).shape)
    batch = value(other).shape[0]
    return (one, other) if fits and (same(batch, value(one).shape[0]) or same(batch, 1)) else None


def _is_of_one_token(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.embedding.default or not fuse.on_cuda(node):
        return False
    ids = value(arguments(node)["indices"])
    return ids.dim() == 2 and isinstance(ids.shape[1], int) and ids.shape[1] == 1


def _lookups(*nodes: fx.Node) -> list[Any]:
    """The indices and the table of each."""
    return [given[name] for node in nodes for given in [arguments(node)] for name in ("indices", "weight")]
