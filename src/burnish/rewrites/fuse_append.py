"""Rotation of new queries and keys, and the keys' way into a cache -> one Op."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from burnish import ops
from burnish.rewrites.rewrite import Outcome, insert

_ROPE, _APPEND, _ATTENTION = ops.rope.overload, ops.append_kv.overload, ops.cached_attention.overload


def fuse_rope_append(graph_module: fx.GraphModule) -> Outcome:
    """cached_attention(rope(q), *append_kv(..., rope(k), v, ...)) -> rope_append of all of them, where q and k are
    rotated by the same tables and nothing else reads the rotated k."""
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target is not _APPEND or node.args[2].target is not _ROPE:
            continue
        if reason := _fuse(graph_module, node):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _fuse(graph_module: fx.GraphModule, append: fx.Node) -> str | None:
    k_cache, v_cache, rotated, v, lengths = ops.append_kv.bind(*append.args, **append.kwargs)
    if len(rotated.users) > 1:
        return f"{rotated.name} is read by more than the cache"
    k, *tables = ops.rope.bind(*rotated.args, **rotated.kwargs)
    found = caches_and_reader(append)
    if found is None:
        return "not one attention reads what was appended"
    caches, attention = found
    query: Any = attention.args[0]
    if query.target is not _ROPE or len(query.users) > 1:
        return f"{query.name} is no rotation of which {attention.name} is the only reader"
    q, *others = ops.rope.bind(*query.args, **query.kwargs)
    if tables != others:
        return f"{query.name} and {rotated.name} rotate by different tables"
    cos, sin, interleaved = tables

    def build(*args: Any) -> tuple[Any, ...]:
        both = ops.rope_append(*args, interleaved)
        return both[1], both[2], both[0]

    reason = insert(graph_module, [*caches, query], build, q, k, v, cos, sin, k_cache, v_cache, lengths)
    if reason is None:
        for node in (append, rotated):
            graph_module.graph.erase_node(node)
    return reason


def caches_and_reader(append: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """Of an append_kv the nodes of both caches and the attention that reads them, if it is one."""
    caches = {user.args[1]: user for user in append.users if user.target is operator.getitem}
    readers = [user for user in caches[0].users if user.target is _ATTENTION] if 0 in caches else []
    return ([caches[0], caches[1]], readers[0]) if len(caches) == 2 and len(readers) == 1 else None
