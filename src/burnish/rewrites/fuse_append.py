"""Rotation of new queries and keys, and the keys' way into a cache -> one Op; with the attention of one token, too."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.ops._common import HALF_TYPES
from burnish.ops.cached_attention import MAX_HEAD_DIM, MAX_QUERIES
from burnish.rewrites import fuse
from burnish.rewrites.rewrite import Outcome, arguments, insert, value

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
    caches = {user.args[1]: user for user in append.users if user.target is operator.getitem}
    readers = [user for user in caches[0].users if user.target is _ATTENTION] if 0 in caches else []
    if len(caches) < 2 or len(readers) != 1:
        return "not one attention reads what was appended"
    query: Any = readers[0].args[0]
    if query.target is not _ROPE or len(query.users) > 1:
        return f"{query.name} is no rotation of which {readers[0].name} is the only reader"
    q, *others = ops.rope.bind(*query.args, **query.kwargs)
    if tables != others:
        return f"{query.name} and {rotated.name} rotate by different tables"
    cos, sin, interleaved = tables
    places = [caches[0], caches[1], query]

    def build(*args: Any) -> tuple[Any, ...]:
        both = ops.rope_append(*args, interleaved)
        return both[1], both[2], both[0]

    reason = insert(graph_module, places, build, q, k, v, cos, sin, k_cache, v_cache, lengths)
    if reason is None:
        for node in (append, rotated):
            graph_module.graph.erase_node(node)
    return reason


def fuse_append_attention(graph_module: fx.GraphModule) -> Outcome:
    """cached_attention(*rope_append(..., lengths), lengths + 1) -> rope_append_attention, of one new token on CUDA."""
    graph_module.graph.eliminate_dead_code()  # so that what still has a user is read
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.rope_append.overload or not fuse.on_cuda(node.args[0]):
            continue
        if reason := _fuse_attention(graph_module, node):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _fuse_attention(graph_module: fx.GraphModule, append: fx.Node) -> str | None:
    *given, lengths, interleaved = ops.rope_append.bind(*append.args, **append.kwargs)
    if reason := _refuse_sizes(*map(value, given[:3])):
        return reason
    by_place: dict[Any, fx.Node] = {result.args[1]: result for result in append.users}
    results = [by_place[i] for i in range(3) if i in by_place]
    readers = [user for result in results for user in result.users if user.op != "output"]
    if len(results) < 3 or len(readers) != 3 or len(set(readers)) != 1:
        return f"its results are read by {', '.join(user.name for user in readers)}, not by one attention alone"
    attention, (query, *caches) = readers[0], results
    if attention.target is not _ATTENTION or len(query.users) != 1:
        return f"{attention.name} is not the attention to the cache, or not all that reads the rotated query"
    *operands, total, padding, window, scale, bias = ops.cached_attention.bind(*attention.args, **attention.kwargs)
    if bias is not None:
        return f"{attention.name} has a bias"
    if operands != results or not _is_one_more(total, lengths):
        return f"{attention.name} attends to something else than what is filled now"

    def build(*args: Any) -> tuple[Any, ...]:
        fused = ops.rope_append_attention(*args, interleaved)
        return fused[0], fused[1], fused[2]

    places = [attention, *caches]
    reason = insert(graph_module, places, build, *given, lengths, padding, window, scale)
    if reason is None:
        for node in (query, append):
            graph_module.graph.erase_node(node)
    return reason


def _refuse_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why no kernel does all of it, where the parts may have kernels."""
    tokens, groups, width = q.shape[2], q.shape[1] // k.shape[1], max(q.shape[3], v.shape[3])
    if not isinstance(tokens, int) or tokens != 1:
        return f"there are {tokens} new tokens; one kernel does all of it for one"
    if not isinstance(groups, int) or groups > MAX_QUERIES or width > MAX_HEAD_DIM:
        return f"{groups} heads of {width} share a key head; the kernel takes {MAX_QUERIES} of {MAX_HEAD_DIM}"
    if q.dtype not in (*HALF_TYPES, torch.float32):
        return f"it is of {q.dtype}; the kernel takes float16, bfloat16 and float32"
    return None


def _is_one_more(total: Any, lengths: fx.Node) -> bool:
    if not isinstance(total, fx.Node) or total.target is not torch.ops.aten.add.Tensor:
        return False
    given = arguments(total)
    return given["self"] is lengths and given["other"] == 1 and given["alpha"] == 1
