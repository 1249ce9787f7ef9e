"""PyTorch's attention kernel for the CPU as Impls of `attention`, whose docstring says what the arguments are."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.ops._common import HALF_TYPES, not_on_cpu, wide
from burnish.ops._masks import additive_mask, allowed_pairs


def flash_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> list[str]:
    reasons = not_on_cpu(q)
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
) -> list[str]:
    reasons = flash_why_not(q, k, v, bias, key_padding_mask, is_causal, window, scale)
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
) -> Tensor:
    """PyTorch's flash attention for the CPU, called directly; grouped heads without G copies of k and v."""
    # The kernel takes the last stride for 1 without looking.
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, length, width), key_heads, keys = q.shape, k.shape[1], k.shape[2]
    skip_future = is_causal and window is None and length == keys  # the kernel's own causality is top-left aligned
    in_mask = is_causal and not skip_future and length > 1  # a single query is the last: nothing is to come
    mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, in_mask, window), wide(q.dtype))
    if heads == key_heads:
        return _flash(q, k, v, mask, skip_future, scale)
    groups = heads // key_heads
    if not skip_future and (mask is None or mask.shape[1:3] == (1, 1)):
        # All queries of a group see the same keys: they become more rows of one head, and k is read once for all.
        rows = _flash(q.reshape(batch, key_heads, groups * length, width), k, v, mask, False, scale)
        out = rows.reshape(batch, heads, length, width)
    else:
        # Each key head becomes a batch entry of its own, expanded over its group without a copy.
        q = q.reshape(batch * key_heads, groups, length, width)
        k, v = (t.reshape(batch * key_heads, 1, keys, width).expand(-1, groups, -1, -1) for t in (k, v))
        if mask is not None and mask.shape[:2] != (1, 1):
            mask = mask.expand(batch, heads, -1, -1).reshape(batch * key_heads, groups, *mask.shape[2:])
        out = _flash(q, k, v, mask, skip_future, scale).reshape(batch, heads, length, width)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out: Tensor = kernel(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel lays its result out like q
