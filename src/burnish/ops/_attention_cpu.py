"""PyTorch's attention kernel for the CPU as Impls of `attention`, whose docstring says what the arguments are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.ops._attention import dropout_reasons, heads_last
from burnish.ops._common import HALF_TYPES, not_on_cpu, wide
from burnish.ops._masks import additive_mask, allowed_pairs

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    reasons = not_on_cpu(q) + dropout_reasons(dropout_p)
    if q.shape[3] != v.shape[3]:
        reasons.append(f"v's head_dim is {v.shape[3]} where q's is {q.shape[3]}")
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("q or k is empty")
    return reasons


def flash_float32_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    reasons = flash_why_not(q, k, v, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed)
    return reasons if q.dtype in HALF_TYPES else [*reasons, f"q is {q.dtype}, not a half-precision type"]


def torch_flash_float32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """PyTorch's flash attention for the CPU in float32, then rounded, for half-precision inputs."""
    # Conversions included, on a CPU without AMX it is 3x as fast as the float16 kernel and level with the bfloat16 one.
    out = torch_flash(q.float(), k.float(), v.float(), bias, key_padding_mask, is_causal, window, scale)
    return out.to(q.dtype)


def torch_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """PyTorch's flash attention for the CPU, called directly; grouped heads without G copies of k and v."""
    rows = Rows.of(q, k, v, bias, key_padding_mask, is_causal, window)
    out = _FORWARD(rows.q, rows.k, rows.v, 0.0, rows.skip_future, attn_mask=rows.mask, scale=scale)[0]
    return heads_last(out.reshape(*q.shape[:3], v.shape[3]))  # the kernel lays its result out like q


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The result and the logsumexp."""
    rows = Rows.of(q, k, v, bias, key_padding_mask, is_causal, window)
    out, logsumexp = _FORWARD(rows.q, rows.k, rows.v, 0.0, rows.skip_future, attn_mask=rows.mask, scale=scale)
    if rows.mask is not None:  # the kernel says 0 of a query that may attend to nothing
        logsumexp = logsumexp.masked_fill(_is_hidden(rows.mask, rows.skip_future), torch.inf)
    return heads_last(out.reshape(*q.shape[:3], v.shape[3])), logsumexp.reshape(q.shape[:3]).contiguous()


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    rows = Rows.of(q, k, v, bias, key_padding_mask, is_causal, window)
    grad, out = (t.reshape(*rows.q.shape) for t in (grad if grad.stride(3) == 1 else grad.contiguous(), out))
    logsumexp = logsumexp.reshape(rows.q.shape[:3])
    found = _BACKWARD(
        grad, rows.q, rows.k, rows.v, out, logsumexp, 0.0, rows.skip_future, attn_mask=rows.mask, scale=scale
    )
    dq, dk, dv = found
    if rows.expanded:
        dk, dv = (t.unflatten(0, (k.shape[0], k.shape[1])).sum(dim=2) for t in (dk, dv))
    return heads_last(dq.reshape(q.shape)), heads_last(dk.reshape(k.shape)), heads_last(dv.reshape(v.shape))


def _is_hidden(mask: Tensor, is_causal: bool) -> Tensor:
    """True for a query that a mask (..., Lq or 1, Lk) hides all keys from, with causality all up to its own."""
    hidden = mask == -torch.inf
    if not is_causal:
        return hidden.all(dim=-1)
    up_to = hidden.to(torch.uint8).cumprod(dim=-1).bool()
    return up_to.squeeze(-2) if mask.shape[-2] == 1 else up_to.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True)
class Rows:
    """What the kernel is called with. It has as many key heads as query heads, and causality from the first query on.

    expanded: whether each key head is a batch entry of its own, expanded over the query heads that it serves.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    skip_future: bool
    expanded: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        window: int | None,
    ) -> Rows:
        # The kernel takes the last stride for 1 without looking.
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        (batch, heads, length, width), key_heads, keys = q.shape, k.shape[1], k.shape[2]
        skip_future = is_causal and window is None and length == keys
        in_mask = is_causal and not skip_future and length > 1  # a single query is the last: nothing is to come
        mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, in_mask, window), wide(q.dtype))
        if heads == key_heads:
            return cls(q, k, v, mask, skip_future)
        groups = heads // key_heads
        if not skip_future and (mask is None or mask.shape[1:3] == (1, 1)):
            # All queries of a group see the same keys: they become more rows of one head, and k is read once for all.
            return cls(q.reshape(batch, key_heads, groups * length, width), k, v, mask, False)
        # Each key head becomes a batch entry of its own, expanded over its group without a copy.
        q = q.reshape(batch * key_heads, groups, length, width)
        k, v = (t.reshape(batch * key_heads, 1, keys, width).expand(-1, groups, -1, -1) for t in (k, v))
        if mask is not None and mask.shape[:2] != (1, 1):
            mask = mask.expand(batch, heads, -1, -1).reshape(batch * key_heads, groups, *mask.shape[2:])
        return cls(q, k, v, mask, skip_future, expanded=True)
