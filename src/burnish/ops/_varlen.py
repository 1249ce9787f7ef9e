"""What the Ops on packed sequences share: sizes, and PyTorch's kernels that they run by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from burnish.ops._attention_cpu import torch_flash as flash_on_cpu
from burnish.ops._attention_training import deterministic
from burnish.ops._common import HALF_TYPES, wide
from burnish.ops._masks import additive_mask, allowed_pairs, attended_pairs
from burnish.ops._triton import triton_why_not

MAX_HEAD_DIM = 256  # of the Triton kernels
_ALIGNMENT = 16  # bytes of one load of flash attention's

# Sequences this short on average are attended to as one padded batch: a call for each costs 40 us. 128 of 4 to 16
# tokens, 12 heads of 32: 3.8 ms against 5.5; 32 of 16 to 128: 12.0 against 6.2 (two threads of an AMD Zen 5).
_SHORT = 16


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """How long each sequence is. On CUDA the host waits for the device."""
    return [b - a for a, b in pairwise(cu_seqlens.tolist())]


def pairs_of(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, is_causal: bool, window: int | None
) -> int:
    """(query, key) pairs of one head. Where the offsets cannot be read, as if all sequences were of one length."""
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.device.type == "meta":
        count = max(1, cu_seqlens_q.shape[0] - 1)
        return count * attended_pairs(q.shape[0] // count, k.shape[0] // count, is_causal, window)
    queries = lengths_of(cu_seqlens_q)
    keys = queries if cu_seqlens_k is None else lengths_of(cu_seqlens_k)
    return sum(attended_pairs(lq, lk, is_causal, window) for lq, lk in zip(queries, keys, strict=True))


def sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each sequence's q, k and v as views (1, heads, length, head_dim); tokens of no sequence as one more, but not in a
    trace, where nobody knows whether there are such."""
    queries = lengths_of(cu_q)
    spare = q.shape[0] - sum(queries)
    if cu_k is None and isinstance(spare, int) and spare > 0:
        queries.append(spare)
    keys = queries if cu_k is None else lengths_of(cu_k)
    pairs = ((q, queries), (k, keys), (v, keys))
    return zip(*(t.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for t, lengths in pairs), strict=True)


def packed(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    """(1, heads, length, width) of each sequence -> (tokens, heads, width), contiguous."""
    if not parts:
        return like.new_empty((0, like.shape[1], width))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).squeeze(0)


# --- PyTorch's kernels ------------------------------------------------------------------------------------------------


def flash_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> list[str]:
    reasons = []
    if q.shape[2] != v.shape[2]:
        reasons.append(f"v's head_dim is {v.shape[2]} where q's is {q.shape[2]}")
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("q or k is empty")
    if q.device.type == "cpu":
        return reasons
    if not q.is_cuda:
        return [*reasons, f"the inputs are on {q.device.type}, not on cpu or a CUDA device"]
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append(f"compute capability {torch.cuda.get_device_capability(q.device)} is below 8.0")
    if q.dtype not in HALF_TYPES:
        reasons.append(f"q is {q.dtype}, not a half-precision type")
    entries = _ALIGNMENT // q.element_size()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[2] % entries or tensor.shape[2] > 256:
            reasons.append(f"{name}'s head_dim is {tensor.shape[2]}; the kernel takes multiples of {entries} up to 256")
        if tensor.stride(2) != 1 or tensor.storage_offset() % entries or any(s % entries for s in tensor.stride()[:2]):
            reasons.append(f"{name}'s rows are not aligned to {_ALIGNMENT} bytes")
    return reasons


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The result and its logsumexp (Hq, T) by PyTorch's FlashAttention-2, on CUDA."""
    starts_q, starts_k, most_q, most_k = bounds(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward.default(
        q, k, v, starts_q, starts_k, most_q, most_k, 0.0, is_causal, False, scale=scale, **_sides(is_causal, window)
    )
    return out, logsumexp


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2's backward pass, on CUDA, in its form that adds dq up in a fixed order."""
    starts_q, starts_k, most_q, most_k = bounds(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    nothing = q.new_empty((), dtype=torch.int64)  # where random numbers would have started
    with deterministic():  # else atomics add up dq, in any order
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            grad.contiguous(), q, k, v, out, logsumexp, starts_q, starts_k, most_q, most_k, 0.0, is_causal, nothing,
            nothing, scale=scale, **_sides(is_causal, window),
        )  # fmt: skip
    return dq, dk, dv


def bounds(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor | None, most_q: int | None, most_k: int | None
) -> tuple[Tensor, Tensor, int, int]:
    """Offsets as int32 of both, and bounds of both lengths: all tokens where none is given, to ask no device."""
    starts_q = cu_q.int()
    if cu_k is None:
        most_k = most_q if most_k is None else most_k
        most_q = most_k if most_q is None else most_q
    most_q = q.shape[0] if most_q is None else min(most_q, q.shape[0])
    most_k = k.shape[0] if most_k is None else min(most_k, k.shape[0])
    return starts_q, starts_q if cu_k is None else cu_k.int(), most_q, most_k


def _sides(is_causal: bool, window: int | None) -> dict[str, Any]:
    if window is None:
        return {}
    return {"window_size_left": window - 1, "window_size_right": 0 if is_causal else window - 1}


def flash_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """PyTorch's flash attention for the CPU, a call for each sequence; short ones in one padded call.

    Half-precision inputs in float32, then rounded: without AMX 3 times as fast as the float16 kernel, and level with
    the bfloat16 one.
    """
    if q.dtype in HALF_TYPES:
        widened = q.float(), k.float(), v.float()
        return flash_by_sequence(*widened, cu_seqlens_q, cu_seqlens_k, is_causal, window, scale).to(q.dtype)
    lengths = lengths_of(cu_seqlens_q)
    if cu_seqlens_k is None and len(lengths) > 1 and q.shape[0] <= _SHORT * len(lengths):
        return _flash_padded(q, k, v, lengths, is_causal, window, scale)
    parts = []
    for one_q, one_k, one_v in sequences(q, k, v, cu_seqlens_q, cu_seqlens_k):
        if one_q.shape[2] and one_k.shape[2]:
            parts.append(flash_on_cpu(one_q, one_k, one_v, None, None, is_causal, window, scale))
        else:
            parts.append(one_q.new_zeros((*one_q.shape[:3], v.shape[2])))
    return packed(parts, q, v.shape[2])


def _flash_padded(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], is_causal: bool, window: int | None, scale: float | None
) -> Tensor:
    longest, sizes = max(lengths), torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    columns = torch.arange(longest)
    real = columns < sizes[:, None]
    rows = (starts[:, None] + columns).clamp_max(q.shape[0] - 1).flatten()

    def padded(t: Tensor) -> Tensor:
        return t.index_select(0, rows).view(len(lengths), longest, *t.shape[1:]).transpose(1, 2)

    # Padded queries come last: without keys to come, or with all masked, what they see changes no other row.
    out = flash_on_cpu(padded(q), padded(k), padded(v), None, real, is_causal, window, scale)
    return out.transpose(1, 2)[real]


def _flash_with_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window: int | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Of one sequence: (1, Hq, L, D), and (1, Hq, L)."""
    k, v = (_over_groups(t, q.shape[1]) for t in (k, v))
    mask = _mask(q, k, is_causal, window)
    nothing = None if mask is None else (mask == -torch.inf).all(dim=-1)[:, 0]
    if q.shape[2] == 0 or k.shape[2] == 0:
        sums = q.new_full(q.shape[:3], torch.inf, dtype=wide(q.dtype))
        return q.new_zeros((*q.shape[:3], v.shape[3])), sums
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        *_last_is_one(q, k, v), 0.0, is_causal and mask is None, attn_mask=mask, scale=scale
    )
    return out, logsumexp if nothing is None else logsumexp.masked_fill(nothing, torch.inf)


def _flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sequence, all (1, heads, L, D)."""
    if q.shape[2] == 0 or k.shape[2] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    key_heads = k.shape[1]
    k, v = (_over_groups(t, q.shape[1]) for t in (k, v))
    mask = _mask(q, k, is_causal, window)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *_last_is_one(grad, q, k, v), out, logsumexp, 0.0, is_causal and mask is None, attn_mask=mask, scale=scale
    )
    if key_heads != q.shape[1]:
        dk, dv = (t.unflatten(1, (key_heads, -1)).sum(2) for t in (dk, dv))
    return dq, dk, dv


def _over_groups(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def _last_is_one(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        t if t.stride(3) == 1 else t.contiguous() for t in tensors
    )  # the kernel takes it for 1 without looking


def _mask(q: Tensor, k: Tensor, is_causal: bool, window: int | None) -> Tensor | None:
    """None also for what the kernel does by itself: causality of as many queries as keys."""
    if window is None and (not is_causal or q.shape[2] == k.shape[2]):
        return None
    return additive_mask(None, allowed_pairs(q, k, None, is_causal, window), wide(q.dtype))


def kernel_why_not(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """What speaks against the Triton kernels."""
    reasons = triton_why_not(q)
    if k.numel() == 0 or v.numel() == 0:
        reasons.append("k or v is empty")
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[2] > MAX_HEAD_DIM:
            reasons.append(f"{name}'s head_dim {tensor.shape[2]} is above {MAX_HEAD_DIM}")
    return reasons


def flash_by_sequence_with_logsumexp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The result and its logsumexp (Hq, T), on the CPU."""
    if q.dtype in HALF_TYPES:  # whose kernels sum up rounded weights
        widened = q.float(), k.float(), v.float(), cu_seqlens_q, cu_seqlens_k
        out, logsumexp = flash_by_sequence_with_logsumexp(*widened, is_causal, window, scale)
        return out.to(q.dtype), logsumexp
    parts, sums = [], []
    for one in sequences(q, k, v, cu_seqlens_q, cu_seqlens_k):
        out, logsumexp = _flash_with_logsumexp(*one, is_causal, window, scale)
        parts.append(out)
        sums.append(logsumexp)
    logsumexp = torch.cat(sums, dim=2).squeeze(0) if sums else q.new_empty((q.shape[1], 0), dtype=wide(q.dtype))
    return packed(parts, q, v.shape[2]), logsumexp


def flash_backward_by_sequence(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, on the CPU; of half-precision inputs in float32, then rounded."""
    if q.dtype in HALF_TYPES:
        widened = grad.float(), q.float(), k.float(), v.float(), out.float(), logsumexp
        found = flash_backward_by_sequence(*widened, cu_seqlens_q, cu_seqlens_k, is_causal, window, scale)
        dq, dk, dv = (t.to(q.dtype) for t in found)
        return dq, dk, dv
    lengths = lengths_of(cu_seqlens_q)
    parts_of: list[list[Tensor]] = [[], [], []]
    grads, outs = (t.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for t in (grad, out))
    others = zip(grads, outs, logsumexp.unsqueeze(0).split(lengths, dim=2), strict=True)
    for one, (g, o, sums) in zip(sequences(q, k, v, cu_seqlens_q, cu_seqlens_k), others, strict=True):
        for parts, new in zip(parts_of, _flash_backward(*one, g, o, sums, is_causal, window, scale), strict=True):
            parts.append(new)
    dq, dk, dv = (packed(parts, like, like.shape[2]) for parts, like in zip(parts_of, (q, k, v), strict=True))
    return dq, dk, dv
