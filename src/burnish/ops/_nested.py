"""`attention` on torch's jagged nested tensors, by `varlen_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.ops.attention import attention
from burnish.ops.varlen_attention import varlen_attention


def offsets_of(name: str, nested: Tensor, ragged: int) -> Tensor:
    """Where each sequence starts, and the end. TypeError, ValueError for what is no jagged nested tensor whose
    dimension `ragged` is the one of unequal lengths."""
    if not nested.is_nested or nested.layout != torch.jagged:
        kind = "a nested tensor of another layout" if nested.is_nested else "not nested"
        raise TypeError(f"{name} is {kind}; it must be a nested tensor of layout torch.jagged as the others are")
    if nested._ragged_idx != ragged or nested._lengths is not None:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} has shape {tuple(nested.shape)}; its dimension {ragged}, without gaps, must be ragged"
        )
    offsets: Tensor = nested.offsets()  # type: ignore[attr-defined]
    return offsets


def longest(nested: Tensor) -> int:
    """The length of the longest sequence; known, or asked of the device once and remembered by the tensor."""
    return int(nested._get_max_seqlen())  # type: ignore[attr-defined]


def attention_nested(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """q, k and v of shape (B, heads, ragged, head_dim), as transposing (B, ragged, heads, head_dim) makes them; so is
    the result. TypeError, ValueError for others, and for what only padded batches have."""
    if bias is not None or key_padding_mask is not None or dropout_p:
        raise TypeError("attention: nested tensors take no bias, no key_padding_mask and no dropout_p")
    starts = [offsets_of(name, tensor, 2) for name, tensor in (("q", q), ("k", k), ("v", v))]
    if starts[1] is not starts[2] and not torch.equal(starts[1], starts[2]):
        raise ValueError("v has other lengths than k")
    rows = (tensor.transpose(1, 2).values() for tensor in (q, k, v))
    same = starts[0] is starts[1]
    bounds = longest(q), longest(q if same else k)
    out = varlen_attention(*rows, starts[0], None if same else starts[1], *bounds, is_causal, window, scale)
    nested = torch.nested.nested_tensor_from_jagged(out, starts[0], max_seqlen=bounds[0])
    return nested.transpose(1, 2)


attention.for_nested(attention_nested)
