"""Op + Op -> wider Op. One spelling each, because raising made them uniform."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.graph.matcher import Match
from burnish.rewrites.rewrite import (
    GraphPass,
    Outcome,
    Rewrite,
    arguments,
    forget_origin,
    insert,
    same,
    value,
    values,
)

aten = torch.ops.aten

# --- linear + activation --------------------------------------------------------------------------


_ACTIVATIONS: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu", aten.tanh.default: "tanh"}


def _activation_name(node: fx.Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)


def fuse_linear_activation(graph_module: fx.GraphModule) -> Outcome:
    """activation(linear(x)) -> linear(x, activation=...)."""
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        activation = _activation_name(node) if node.op == "call_function" else None
        source = node.args[0] if activation else None
        if not isinstance(source, fx.Node) or source.target is not ops.linear.overload:
            continue
        x, weight, bias, inner, residual = ops.linear.bind(*source.args, **source.kwargs)
        if len(source.users) > 1:
            others = ", ".join(user.name for user in source.users if user is not node)
            refused.append(f"{node.name}: the product {source.name} is also used by {others}")
        elif inner == "none" and residual is None:
            insert(graph_module, [node], ops.linear, x, weight, bias, activation)
            count += 1
    return Outcome(count, tuple(refused))


# --- gated MLP ------------------------------------------------------------------------------------


def gated(x: Any, gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, activation: str) -> Any:
    hidden = aten.mul.Tensor(ops.linear(x, gate, gate_bias, activation, None), ops.linear(x, up, up_bias, "none", None))
    return ops.linear(hidden, down, down_bias, "none", None)


def to_gated_mlp(
    x: Any, gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, activation: str
) -> Any:
    bias = None if gate_bias is None else aten.cat.default([gate_bias, up_bias])
    return ops.gated_mlp(x, aten.cat.default([gate, up]), down, bias, down_bias, activation)


def _refuse_gated(match: Match) -> str | None:
    gate, up = values(match, "gate", "up")
    if match.bindings["activation"] not in ("silu", "gelu", "gelu_tanh"):
        return f"the gate's activation is {match.bindings['activation']}"
    if (match.bindings["gate_bias"] is None) != (match.bindings["up_bias"] is None):
        return "only one of gate and up has a bias"
    if not same(gate.shape, up.shape):
        return f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape"
    return None


# --- residual + norm ------------------------------------------------------------------------------


def add_then_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    total = aten.add.Tensor(x, residual)
    return ops.layer_norm(total, weight, bias, eps), total


def to_add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    result = ops.add_layer_norm(x, residual, weight, bias, eps)
    return result[0], result[1]


def add_then_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    total = aten.add.Tensor(x, residual)
    return ops.rms_norm(total, weight, eps), total


def to_add_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    result = ops.add_rms_norm(x, residual, weight, eps)
    return result[0], result[1]


def _refuse_sum(match: Match) -> str | None:
    x, residual = values(match, "x", "residual")
    if not isinstance(x, torch.Tensor) or not isinstance(residual, torch.Tensor):
        return "one summand is a number"
    if x.dtype != residual.dtype:
        return f"the summands are {x.dtype} and {residual.dtype}"
    if not same(x.shape, residual.shape):
        return f"the summands have shapes {tuple(x.shape)} and {tuple(residual.shape)}"
    return None


# --- linear + residual + norm, on CUDA ------------------------------------------------------------


def fuse_linear_add_norm(graph_module: fx.GraphModule) -> Outcome:
    """add_layer_norm(linear(x), residual) -> linear_add_layer_norm, and so for rms_norm; on CUDA, where it saves passes
    over memory. (oneDNN has no use for it.)"""
    wider = {
        ops.add_layer_norm.overload: (ops.add_layer_norm, ops.linear_add_layer_norm),
        ops.add_rms_norm.overload: (ops.add_rms_norm, ops.linear_add_rms_norm),
    }
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target not in wider or not on_cuda(node.args[0]):
            continue
        narrow, wide = wider[node.target]
        one, other, *rest = narrow.bind(*node.args, **node.kwargs)
        found = next((pair for pair in ((one, other), (other, one)) if _is_plain_linear(pair[0])), None)
        if found is None:
            continue
        x, weight, bias, _, _ = ops.linear.bind(*found[0].args, **found[0].kwargs)
        if insert(graph_module, [node], wide, x, weight, bias, found[1], *rest) is None:
            graph_module.graph.erase_node(found[0])
            count += 1
    return Outcome(count)


def on_cuda(node: Any) -> bool:
    return bool(value(node).device.type == "cuda")


def _is_plain_linear(node: Any) -> bool:
    """A product that nobody else reads, without activation or residual."""
    if not isinstance(node, fx.Node) or node.target is not ops.linear.overload or len(node.users) != 1:
        return False
    _, _, _, activation, residual = ops.linear.bind(*node.args, **node.kwargs)
    return bool(activation == "none" and residual is None)


# --- embeddings + norm ----------------------------------------------------------------------------


def embeddings_then_norm(
    ids: Any,
    word: Any,
    position_ids: Any,
    position: Any,
    type_ids: Any,
    type: Any,
    weight: Any,
    bias: Any,
    eps: float,
    word_pad: int,
    position_pad: int,
    type_pad: int,
) -> Any:
    """BERT: word + type, then + position."""
    total = aten.add.Tensor(
        aten.add.Tensor(aten.embedding.default(word, ids, word_pad), aten.embedding.default(type, type_ids, type_pad)),
        aten.embedding.default(position, position_ids, position_pad),
    )
    return ops.layer_norm(total, weight, bias, eps)


def to_embedding_layer_norm(
    ids: Any,
    word: Any,
    position_ids: Any,
    position: Any,
    type_ids: Any,
    type: Any,
    weight: Any,
    bias: Any,
    eps: float,
) -> Any:
    return ops.embedding_layer_norm(ids, word, position_ids, position, type_ids, type, weight, bias, eps)


def _refuse_embeddings(match: Match) -> str | None:
    ids, position_ids, type_ids = values(match, "ids", "position_ids", "type_ids")
    if ids.dim() != 2 or position_ids.dim() != 2 or type_ids.dim() != 2:
        return "ids are not (batch, length)"
    return None


# --- rope of queries and keys ---------------------------------------------------------------------


def pair_ropes(graph_module: fx.GraphModule) -> Outcome:
    """attention(rope(q), rope(k)) -> both rotated in one, where they are rotated by the same tables."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.attention.overload:
            continue
        q, k = node.args[:2]
        if q is k or any(side.target is not ops.rope.overload for side in (q, k)):
            continue
        (x, *tables), (y, *other_tables) = (ops.rope.bind(*side.args, **side.kwargs) for side in (q, k))
        one, two = value(x), value(y)
        sizes = ((one.shape[0], *one.shape[2:]), (two.shape[0], *two.shape[2:]))
        order = {n: i for i, n in enumerate(graph_module.graph.nodes)}
        first, last = sorted((q, k), key=order.__getitem__)
        unused_between = all(order[user] > order[last] for user in first.users)
        if tables != other_tables or one.dtype != two.dtype or not same(*sizes) or not unused_between:
            continue
        pair = [(q, 0), (k, 1)] if last is q else [(k, 1), (q, 0)]  # put before the later one, where both inputs are
        places = [place for _, place in pair]

        def build(x: Any, y: Any, *tables: Any, places: list[int] = places) -> tuple[Any, ...]:
            both = ops.rope_qk(x, y, *tables)
            return tuple(both[place] for place in places)

        if insert(graph_module, [side for side, _ in pair], build, x, y, *tables) is None:
            count += 1
    return Outcome(count)


# --- parallel products of one input ---------------------------------------------------------------


def merge_parallel_linears(graph_module: fx.GraphModule) -> Outcome:
    """q(x), k(x), v(x) -> slices of one product. Only of products that belong to one module (the parent of q, k, v), so
    that a decoder's cross attentions, which all project the encoder's output, do not become one giant."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.target is not ops.linear.overload:
            continue
        x, weight, _, activation, residual = ops.linear.bind(*node.args, **node.kwargs)
        if activation == "none" and residual is None and weight.op == "get_attr":
            parent = weight.target.rpartition(".")[0].rpartition(".")[0]
            groups.setdefault((x, parent, value(weight).dtype), []).append(node)
    count = 0
    for (x, _, _), group in groups.items():
        if len(group) > 1 and len({node.args[1].target for node in group}) == len(group):  # type: ignore[union-attr]
            _merge(graph_module, x, group)
            count += 1
    return Outcome(count)


def _merge(graph_module: fx.GraphModule, x: fx.Node, group: list[fx.Node]) -> None:
    weights, biases = [node.args[1] for node in group], [node.args[2] if len(node.args) > 2 else None for node in group]
    sizes = [value(weight).shape[0] for weight in weights]
    some_bias = next((i for i, bias in enumerate(biases) if bias is not None), None)

    def build(x: Any, weights: Any, biases: Any) -> tuple[Any, ...]:
        bias = None
        if some_bias is not None:  # a product without bias among others that have one (Whisper's keys) gets zeros
            like = biases[some_bias]
            filled = zip(biases, sizes, strict=True)
            bias = aten.cat.default([aten.new_zeros.default(like, [n]) if b is None else b for b, n in filled])
        parts = aten.split_with_sizes.default(ops.linear(x, aten.cat.default(list(weights)), bias), sizes, -1)
        return tuple(parts[i] for i in range(len(sizes)))

    insert(graph_module, group, build, x, weights, biases)


# --- a product and the rotation of its heads, on CUDA ---------------------------------------------


def fuse_linear_rope(graph_module: fx.GraphModule) -> Outcome:
    """rope_qk of heads that are parts of one product -> linear_rope, of which the parts leave rotated; on CUDA, where
    it saves a pass over q and k. (oneDNN has no use for it.)"""
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.rope_qk.overload or not on_cuda(node.args[0]):
            continue
        if reason := _rotate_in_product(graph_module, node):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _rotate_in_product(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    """Puts linear_rope in place of the product whose parts `node` rotates, or says why not."""
    q, k, cos, sin, interleaved = ops.rope_qk.bind(*node.args, **node.kwargs)
    head_dim = value(q).shape[-1]
    if interleaved or not same(value(cos).shape[-1], head_dim):
        return "it rotates pairs of neighbours, or a part of each head"
    paths = [path for side in (q, k) if (path := _path_from_split(side)) is not None]
    if len(paths) < 2 or paths[0][0] is not paths[1][0]:
        return "q and k are not heads of two parts of one product that nothing else reads"
    split, parts = paths[0][0], [path[1] for path in paths]
    linear: Any = split.args[0]
    if not _is_plain_linear(linear) or value(linear).dim() != 3 or arguments(split)["dim"] not in (-1, 2):
        return f"{split.name} does not split the columns of a plain product (B, S, N) that nothing else reads"
    places = [user.args[1] for user in split.users]
    if {part.args[1] for part in parts} != {0, 1} or len(set(places)) < len(places):
        return "q and k are not the first two parts of their product"
    if not _move_before(linear, cos, sin):
        return f"the tables depend on {linear.name}"
    x, weight, bias, _, _ = ops.linear.bind(*linear.args, **linear.kwargs)
    rotated = sum(value(part).shape[-1] for part in parts)
    reason = insert(graph_module, [linear], ops.linear_rope, x, weight, bias, cos, sin, head_dim, rotated)
    if reason is not None:
        return reason
    fused: Any = split.args[0]
    for changed in (fused, *paths[0], *paths[1]):
        forget_origin(changed)
    for result in list(node.users):
        side = q if result.args[1] == 0 else k
        side.meta |= {key: entry for key, entry in result.meta.items() if key != "val"}  # whose value it has now
        result.replace_all_uses_with(side)
        graph_module.graph.erase_node(result)
    graph_module.graph.erase_node(node)
    return None


def _path_from_split(heads: Any) -> list[fx.Node] | None:
    """The nodes from a split of (B, S, N) to one part's heads (B, H, S, D), where each has one reader but the split."""
    path = path_to_heads(heads)
    split: Any = path[0].args[0] if path and path[0].target is operator.getitem else None
    return [split, *path] if path and split and split.target is aten.split_with_sizes.default else None


def path_to_heads(heads: Any) -> list[fx.Node] | None:
    """The nodes from (B, S, N) to its heads (B, H, S, D), where each has one reader."""
    swapped = arguments(heads) if heads.target in (aten.transpose.int, aten.permute.default) else {}
    if {swapped.get("dim0"), swapped.get("dim1")} != {1, 2} and swapped.get("dims") != [0, 2, 1, 3]:
        return None
    view = heads.args[0]
    part = view.args[0] if view.target in (aten.view.default, aten.reshape.default) else None
    if not isinstance(part, fx.Node):
        return None
    one, two = value(part).shape, value(view).shape
    path = [part, view, heads]
    if len(one) != 3 or len(two) != 4 or not same(one[:2], two[:2]) or not all(len(step.users) == 1 for step in path):
        return None
    return path


def _move_before(node: fx.Node, *wanted: fx.Node) -> bool:
    """Moves what computes `wanted` before `node`; False, and nothing moved, where some of it depends on `node`."""
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    later: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        current = pending.pop()
        if order[current] >= order[node] and current not in later:
            later.add(current)
            pending += current.all_input_nodes
    if node in later:
        return False
    for other in sorted(later, key=order.__getitem__):
        node.prepend(other)
    return True


# --- sums that nobody reads -----------------------------------------------------------------------


def drop_unread_sums(graph_module: fx.GraphModule) -> Outcome:
    """(normed, sum) -> (normed, nothing) where only the first is read, as in post-norm models: of four tensors that
    pass through memory one less."""
    with_sum = (ops.add_layer_norm, ops.add_rms_norm, ops.linear_add_layer_norm, ops.linear_add_rms_norm)
    by_target = {op.overload: op for op in with_sum}
    graph_module.graph.eliminate_dead_code()  # so that what still has a user is read
    count = 0
    for node in list(graph_module.graph.nodes):
        op = by_target.get(node.target)
        if op is None or any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            continue
        *args, keep_sum = op.bind(*node.args, **node.kwargs)
        if keep_sum:
            forget_origin(node)  # of an Op that capture put there, whose second result is the sum
            if insert(graph_module, [node], op, *args, False) is None:
                count += 1
    return Outcome(count)


FUSE: list[Rewrite | GraphPass] = [
    GraphPass("linear + activation", fuse_linear_activation),
    Rewrite("gated_mlp", gated, to_gated_mlp, None, ops.linear.overload, _refuse_gated),
    Rewrite(
        "embedding_layer_norm",
        embeddings_then_norm,
        to_embedding_layer_norm,
        None,
        aten.embedding.default,
        _refuse_embeddings,
    ),
    Rewrite("add_layer_norm", add_then_layer_norm, to_add_layer_norm, None, ops.layer_norm.overload, _refuse_sum),
    Rewrite("add_rms_norm", add_then_rms_norm, to_add_rms_norm, None, ops.rms_norm.overload, _refuse_sum),
    GraphPass("linear_add_norm", fuse_linear_add_norm),
    GraphPass("parallel linears", merge_parallel_linears),
    GraphPass("rope_qk", pair_ropes),
    GraphPass("linear_rope", fuse_linear_rope),
    GraphPass("unread sums", drop_unread_sums),
]
