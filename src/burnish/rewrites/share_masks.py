"""Masks: read as they are given, and on the CPU one additive mask for all layers that mask alike.

Torch's CPU attention takes an additive mask and nothing else, so each layer would make its own from the padding mask:
43 us a layer of MiniLM, 3% of a call with 16 tokens. GPU kernels take padding and causality as such and keep them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.ops._masks import additive_mask, allowed_pairs
from burnish.rewrites.rewrite import Outcome, insert, set_value, value

aten = torch.ops.aten

_BIAS, _PADDING = map(list(ops.attention.signature.parameters).index, ("bias", "key_padding_mask"))
_CONVERSIONS = (aten.to.device, aten.to.dtype, aten._to_copy.default)


def padding_bias(q: Tensor, k: Tensor, key_padding_mask: Tensor, is_causal: bool, window: int | None) -> Tensor:
    """The additive mask, (B, 1, 1 or Lq, Lk), -inf where a query may not attend."""
    mask = additive_mask(None, allowed_pairs(q, k, key_padding_mask, is_causal, window), q.dtype)
    assert mask is not None
    return mask


def read_integer_masks(graph_module: fx.GraphModule) -> Outcome:
    """attention(key_padding_mask=mask.to(bool)) -> attention(key_padding_mask=mask), where the mask is of integers."""
    count = 0
    for node in graph_module.graph.nodes:
        if node.target is not ops.attention.overload:
            continue
        args = ops.attention.bind(*node.args, **node.kwargs)
        mask = args[_PADDING]
        source = mask.args[0] if isinstance(mask, fx.Node) and mask.target in _CONVERSIONS else None
        if not isinstance(source, fx.Node) or value(mask).dtype != torch.bool:
            continue
        if value(source).dtype in (torch.int32, torch.int64) and value(source).device == value(mask).device:
            node.args, node.kwargs = (*args[:_PADDING], source, *args[_PADDING + 1 :]), {}
            count += 1
    return Outcome(count)


def read_boolean_masks(graph_module: fx.GraphModule) -> Outcome:
    """attention(bias=not (mask == 0)), or not (not mask), as many spell it -> attention(bias=mask), or mask != 0 where
    it is not boolean: one or two passes over the mask less."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.attention.overload:
            continue
        args = ops.attention.bind(*node.args, **node.kwargs)
        hidden: Any = args[_BIAS].args[0] if _calls(args[_BIAS], aten.bitwise_not.default) else None
        is_zero = _calls(hidden, aten.eq.Scalar) and hidden.args[1] == 0
        if not (is_zero or _calls(hidden, aten.bitwise_not.default) or _calls(hidden, aten.logical_not.default)):
            continue
        mask = hidden.args[0]
        if value(mask).dtype != torch.bool:
            with graph_module.graph.inserting_before(args[_BIAS]):
                mask = graph_module.graph.call_function(aten.ne.Scalar, (mask, 0))
            set_value(mask)
        node.args, node.kwargs = (*args[:_BIAS], mask, *args[_BIAS + 1 :]), {}
        count += 1
    return Outcome(count)


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def share_padding_masks(graph_module: fx.GraphModule) -> Outcome:
    """attention(key_padding_mask=..., is_causal, window) -> attention(bias=...), one bias for all that agree in these
    and in sizes."""
    shared: dict[Any, fx.Node] = {}
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.attention.overload:
            continue
        q, k, v, bias, padding, is_causal, window, *rest = ops.attention.bind(*node.args, **node.kwargs)
        if bias is not None or padding is None or value(q).device.type != "cpu":
            continue
        key = (padding, is_causal, window, value(q).dtype, str(value(q).shape[2]), str(value(k).shape[2]))
        if key not in shared:
            with graph_module.graph.inserting_before(node):
                shared[key] = graph_module.graph.call_function(padding_bias, (q, k, padding, is_causal, window))
            set_value(shared[key])
        insert(graph_module, [node], ops.attention, q, k, v, shared[key], None, False, None, *rest)
        count += 1
    return Outcome(count)
