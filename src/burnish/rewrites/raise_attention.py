"""Spellings of attention -> the Op: torch's own function, and softmax written out (eager Hugging Face, nanoGPT, the
notebook)."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from burnish import ops
from burnish.graph.matcher import Match
from burnish.rewrites.raise_causal import raise_causal_masks
from burnish.rewrites.rewrite import (
    GraphPass,
    Outcome,
    Rewrite,
    forget_origin,
    rewrite_nodes,
    same,
    set_value,
    value,
    values,
)

aten = torch.ops.aten

# --- torch's own: scaled_dot_product_attention ----------------------------------------------------


def _sdpa(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    return _attend(q, k, v, attn_mask, is_causal, scale, dropout_p)


def _refuse_sdpa(node: fx.Node, args: dict[str, Any]) -> str | None:
    q, k = value(args["query"]), value(args["key"])
    if reason := _refuse_dropout(q, args["dropout_p"]):
        return reason
    if q.dim() not in (3, 4):
        return f"queries have {q.dim()} dims"
    if args["is_causal"] and not same(q.shape[-2], k.shape[-2]):
        return "is_causal is aligned top-left here and the two lengths may differ"
    return None


def raise_sdpa(graph_module: fx.GraphModule) -> Outcome:
    return rewrite_nodes(graph_module, aten.scaled_dot_product_attention.default, _sdpa, _refuse_sdpa)


def _attend(q: Any, k: Any, v: Any, bias: Any, is_causal: bool, scale: float | None, dropout_p: float = 0.0) -> Any:
    """Single-head (batch, length, features) attention is attention with one head."""
    dropout = (dropout_p, _draw_seed(q)) if dropout_p else ()
    if value(q.node).dim() == 4:
        return ops.attention(q, k, v, bias, None, is_causal, None, scale, *dropout)
    q, k, v = (aten.unsqueeze.default(x, 1) for x in (q, k, v))
    if bias is not None and value(bias.node).dim() == 3:
        bias = aten.unsqueeze.default(bias, 1)
    return aten.squeeze.dim(ops.attention(q, k, v, bias, None, is_causal, None, scale, *dropout), 1)


def _draw_seed(q: Any) -> Any:
    """`burnish.ops.draw_seed` on q's device, in a graph: drawn anew at every call."""
    return aten.randint_like.low_dtype(aten.new_empty.default(q, [1], dtype=torch.int64), 0, 1 << 62)


_DROPPING = ("cuda",)
"""Kinds of devices on which dropout goes into the Op. On a CPU no kernel has it: 2x12x128x64, forward and backward,
takes ten times as long as what PyTorch runs."""


def _refuse_dropout(q: Tensor, dropout_p: float) -> str | None:
    if not dropout_p or (dropout_p < 1 and q.device.type in _DROPPING):
        return None
    return f"dropout of {dropout_p} on the attention weights is active, which no kernel has on {q.device.type}"


# --- softmax(scale(q @ k.T) [+ bias | masked]) @ v ------------------------------------------------

_HEAD_DIM = 4


def _examples(mask: str, scaled: bool, drops: bool) -> Callable[[torch.dtype], tuple[Any, ...]]:
    def examples(dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = (torch.randn(2, 3, length, _HEAD_DIM, dtype=dtype) for length in (5, 7, 7))
        extra: list[Any] = []
        if mask == "added":
            extra.append(torch.randn(2, 1, 5, 7, dtype=dtype))
        elif mask == "filled":
            extra += [torch.zeros(5, 7, dtype=torch.bool), -12345.678]
        return (q, k, v, *extra, *([0.123456789] if scaled else []), *([0.234567891] if drops else []))

    return examples


_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "times": lambda scores, scale: scores * scale,
    "over": lambda scores, scale: scores / scale,
    "unscaled": lambda scores, scale: scores,
}

_SOFTMAX: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "softmax": lambda scores, dtype: scores.softmax(-1),
    "float softmax": lambda scores, dtype: torch.softmax(scores, -1, dtype=torch.float32).to(dtype),
}


def _spelling(scale_with: str, mask: str, softmax: str, drops: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pattern of one spelling and its replacement, with the parameters that this spelling has."""
    extra = {"added": ["bias"], "filled": ["mask", "fill"], "unmasked": []}[mask]
    names = ["q", "k", "v", *extra, *(["scale"] if scale_with != "unscaled" else []), *(["dropout_p"] if drops else [])]

    def pattern(*args: Any) -> Tensor:
        given = dict(zip(names, args, strict=True))
        q, k, v = args[:3]
        scores = _SCALES[scale_with](q @ k.transpose(-2, -1), given.get("scale", 1.0))
        if mask == "added":
            scores = scores + given["bias"]
        elif mask == "filled":
            scores = scores.masked_fill(given["mask"], given["fill"])
        weights = _SOFTMAX[softmax](scores, q.dtype)
        return (F.dropout(weights, given["dropout_p"], True) if drops else weights) @ v

    def replacement(**given: Any) -> Any:
        scale = given.get("scale", 1.0)
        bias = aten.bitwise_not.default(given["mask"]) if mask == "filled" else given.get("bias")
        scale = 1 / scale if scale_with == "over" else scale
        return _attend(given["q"], given["k"], given["v"], bias, False, scale, given.get("dropout_p", 0.0))

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    for function in (pattern, replacement):
        function.__name__ = f"{softmax.replace(' ', '_')}_{scale_with}_{mask}{'_dropout' if drops else ''}"
        setattr(function, "__signature__", inspect.Signature(parameters))  # noqa: B010
    return pattern, replacement


def _refuse_manual(match: Match) -> str | None:
    q, k, v = values(match, "q", "k", "v")
    if not q.dim() == k.dim() == v.dim() or q.dim() not in (3, 4):
        return f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dims"
    if not (same(q.shape[:-2], k.shape[:-2]) and same(k.shape[:-2], v.shape[:-2])):
        return f"batch and heads of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not the same"
    if reason := _refuse_dropout(q, match.bindings.get("dropout_p", 0.0)):
        return reason
    fill = match.bindings.get("fill")
    if fill is not None and fill > -1e3:
        return f"masked scores are filled with {fill}, which does not mask"
    return None


def _manual() -> Iterator[Rewrite]:
    anchors = {"added": aten.softmax.int, "filled": aten.masked_fill.Scalar, "unmasked": aten.softmax.int}
    spellings = itertools.product(anchors.items(), _SCALES, _SOFTMAX, (False, True))
    for (mask, anchor), scale_with, softmax, drops in spellings:
        pattern, replacement = _spelling(scale_with, mask, softmax, drops)
        yield Rewrite(
            f"attention: {softmax}, {scale_with}, {mask}{', dropout' if drops else ''}",
            pattern,
            replacement,
            _examples(mask, scale_with != "unscaled", drops),
            (anchor, aten.dropout.default) if drops else anchor,
            _refuse_manual,
        )


# --- what stands around attention and is not needed by the Op -------------------------------------


def strip_around_attention(graph_module: fx.GraphModule) -> Outcome:
    """Keys and values repeated for grouped heads, and copies made contiguous: the Op takes them as they were."""
    count = 0
    attention, cached = ops.attention.overload, ops.cached_attention.overload
    for node in graph_module.graph.nodes:
        if node.target is cached and (bare := _without_copy(node.args[0])) is not node.args[0]:
            node.args = (bare, *node.args[1:])
            count += 1
        if node.target is not attention:
            continue
        q, k, v = node.args[:3]
        bare_q, bare_k, bare_v = (_without_copy(x) for x in (q, k, v))
        short_k, short_v = _ungrouped(bare_k), _ungrouped(bare_v)
        if short_k is not None and short_v is not None and same(value(short_k).shape[:3], value(short_v).shape[:3]):
            bare_k, bare_v = _without_copy(short_k), _without_copy(short_v)
        if (bare_q, bare_k, bare_v) != (q, k, v):
            node.args = (bare_q, bare_k, bare_v, *node.args[3:])
            count += 1
        _refresh_layout(node)
    graph_module.graph.eliminate_dead_code()
    return Outcome(count)


_MOVES = {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default}


def _refresh_layout(node: fx.Node) -> None:
    """The Op stores its result as the next product reads it; the captured nodes behind it still carry the old
    strides."""
    for user in node.users:
        if user.target in _MOVES:
            set_value(user)
            _refresh_layout(user)


def _without_copy(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target is aten.contiguous.default:
        node = node.args[0]
    return node


def _ungrouped(node: fx.Node) -> fx.Node | None:
    """`x` where `node` is `x` (batch, kv_heads, length, head_dim) with each head repeated in place, else None."""
    if node.target is aten.repeat_interleave.self_int and node.args[2:3] == (1,):
        return node.args[0]  # type: ignore[return-value]
    chain = [aten.reshape.default, aten.expand.default, aten.unsqueeze.default]
    if node.target is aten.view.default:
        chain[0] = aten.view.default
    source = node
    for target in chain:
        if source.target is not target or not isinstance(source.args[0], fx.Node):
            return None
        last, source = source, source.args[0]
    if last.args[1] not in (2, -3):
        return None
    before, after = value(source).shape, value(node).shape
    fits = len(before) == len(after) == 4 and all(same(before[dim], after[dim]) for dim in (0, 2, 3))
    return source if fits else None


def fold_query_scale(graph_module: fx.GraphModule) -> Outcome:
    """attention(view(x * c), ..., scale) -> attention(view(x), ..., scale * c): Whisper scales its queries right after
    the product."""
    count, by_target = 0, {op.overload: op for op in (ops.attention, ops.cached_attention)}
    for node in graph_module.graph.nodes:
        if node.target not in by_target:
            continue
        moved, scaled = [], node.args[0]
        while scaled.target in _MOVES and len(scaled.users) == 1:
            moved.append(scaled)
            scaled = scaled.args[0]
        if (
            scaled.target is not aten.mul.Tensor
            or len(scaled.users) != 1
            or not isinstance(scaled.args[1], (int, float))
        ):
            continue
        op = by_target[node.target]
        args = dict(zip(op.signature.parameters, op.bind(*node.args, **node.kwargs), strict=True))
        scale = 1 / math.sqrt(value(node.args[0]).shape[-1]) if args["scale"] is None else args["scale"]
        node.args, node.kwargs = tuple((args | {"scale": scaled.args[1] * scale}).values()), {}
        scaled.replace_all_uses_with(scaled.args[0])
        for moved_node in moved:
            forget_origin(moved_node)
        count += 1
    return Outcome(count)


def drop_zero_bias(graph_module: fx.GraphModule) -> Outcome:
    """A bias of zeros is none: T5's cross attention has one."""
    count = 0
    for node in graph_module.graph.nodes:
        if node.target is ops.attention.overload:
            args = list(ops.attention.bind(*node.args, **node.kwargs))
            if isinstance(args[3], fx.Node) and args[3].target is aten.zeros.default:
                args[3] = None
                node.args, node.kwargs = tuple(args), {}
                count += 1
    return Outcome(count)


ATTENTION: list[Rewrite | GraphPass] = [
    GraphPass("attention: scaled_dot_product_attention", raise_sdpa),
    *_manual(),
    GraphPass("attention: inputs as they were before copies", strip_around_attention),
    GraphPass("attention: query scale", fold_query_scale),
    GraphPass("attention: bias of zeros", drop_zero_bias),
    GraphPass("attention: causal mask", raise_causal_masks),
]
