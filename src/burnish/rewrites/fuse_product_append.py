"""A product's heads that go into a cache, rotated or not -> one Op, for one new token on CUDA.

With few rows the product's kernel rotates in its epilogue and writes into the cache, and neither has a kernel of its
own. With more, products run on tensor cores, and none of those kernels does so. So this applies only where there is one
new token of each text, as when a model decodes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.rewrites import fuse
from burnish.rewrites.fuse_append import caches_and_reader
from burnish.rewrites.rewrite import Outcome, arguments, insert, value

aten = torch.ops.aten


_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)


@dataclass(frozen=True)
class _Part:
    """Columns `start:stop` of a product (B, S, N), of which nothing but their heads (B, H, S, D) is read."""

    node: fx.Node
    product: fx.Node
    start: int
    stop: int


def fuse_linear_rope_append(graph_module: fx.GraphModule) -> Outcome:
    """rope_append of q, k and v that are all of one product -> linear_rope_append; so append_kv of k and v, without
    tables, where q that the attention reads is of the same product."""
    graph_module.graph.eliminate_dead_code()  # so that what still has a user is read
    fusions = {ops.rope_append.overload: _fuse_rotated, ops.append_kv.overload: _fuse_unrotated}
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target not in fusions or not fuse.on_cuda(node.args[0]):
            continue
        if reason := fusions[node.target](graph_module, node):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _fuse_rotated(graph_module: fx.GraphModule, append: fx.Node) -> str | None:
    q, k, v, *rest = ops.rope_append.bind(*append.args, **append.kwargs)
    if reason := _too_many(k):
        return reason
    product = _product_of(q, k, v)
    if isinstance(product, str):
        return product
    return insert(graph_module, [append], ops.linear_rope_append, *product, *rest)


def _fuse_unrotated(graph_module: fx.GraphModule, append: fx.Node) -> str | None:
    k_cache, v_cache, k, v, lengths = ops.append_kv.bind(*append.args, **append.kwargs)
    if reason := _too_many(k):
        return reason
    found = caches_and_reader(append)
    if found is None:
        return "not one attention reads what was appended"
    caches, attention = found
    query: Any = attention.args[0]
    product = _product_of(query, k, v)
    if isinstance(product, str):
        return product

    def build(*args: Any) -> tuple[Any, ...]:
        results = ops.linear_rope_append(*args)
        return results[1], results[2], results[0]

    reason = insert(graph_module, [*caches, query], build, *product, None, None, k_cache, v_cache, lengths)
    if reason is None:
        graph_module.graph.erase_node(append)
    return reason


def _too_many(k: Any) -> str | None:
    tokens = value(k).shape[2]
    if isinstance(tokens, int) and tokens == 1:
        return None
    return f"there are {tokens} new tokens; a product's kernel appends one"


def _product_of(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any] | str:
    """x, weight and bias of the product of which q, k and v are all heads; or why there is none."""
    parts = [part for heads in (q, k, v) if (part := _part(heads)) is not None]
    products = {part.product for part in parts}
    if len(parts) < 3 or len(products) > 1:
        return "q, k and v are not heads of three parts of one product"
    (product,) = products
    if product.target is not ops.linear.overload or set(_readers(product)) != {part.node for part in parts}:
        return f"{product.name} is not a product of which nothing but q, k and v is read"
    ends = [0, *(part.stop for part in parts)]
    if [part.start for part in parts] != ends[:-1] or ends[-1] != value(product).shape[-1]:
        return f"q, k and v are not all columns of {product.name}, in this order"
    x, weight, bias, activation, residual = ops.linear.bind(*product.args, **product.kwargs)
    if activation != "none" or residual is not None:
        return f"{product.name} has an activation or adds a residual"
    return x, weight, bias


def _part(heads: Any) -> _Part | None:
    """The columns of a product that these heads are, if they are some."""
    path = fuse.path_to_heads(heads)
    if path is None:
        return None
    node, width = path[0], value(path[0]).shape[-1]
    source: Any = node.args[0]
    if node.target is operator.getitem and source.target in _SPLITS and arguments(source)["dim"] in (-1, 2):
        start = sum(part.shape[-1] for part in value(source)[: node.args[1]])
        return _Part(node, source.args[0], start, start + width)
    if node.target is aten.slice.Tensor:
        _, dim, start, _, step = arguments(node).values()
        if dim in (-1, 2) and step == 1:
            start = (start or 0) % value(source).shape[-1]
            return _Part(node, source, start, start + width)
    return None


def _readers(product: fx.Node) -> Iterator[fx.Node]:
    """Who reads the product, or one part of it."""
    for user in product.users:
        if user.target in _SPLITS:
            yield from user.users
        else:
            yield user
