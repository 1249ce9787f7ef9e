"""How a model spells the attention Ops with PyTorch's own functions, packed sequences and caches included."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
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
    mask = bias if key_padding_mask is None else key_padding_mask.bool()[:, None, None, :]
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def attention_with_logsumexp(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """PyTorch's function, and the sums as one would write them."""
    bias, _, is_causal, _, scale = rest[:5]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ keys.transpose(-2, -1)).float() * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -torch.inf)
    return attention(q, k, v, *rest), scores.logsumexp(dim=-1)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PyTorch's function differentiated by autograd, its forward pass included."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        dq, dk, dv = torch.autograd.grad(attention(q, k, v, *rest[:-1]), (q, k, v), grad)
    return dq, dk, dv, q.new_empty((0,))


def attention_backward_packed(*args: Any) -> Tensor:
    """`attention_backward`, its results put together."""
    return torch.cat([t.transpose(1, 2) for t in attention_backward(*args, False)[:3]], dim=2)


def varlen_attention(
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
) -> Tensor:
    """One sequence at a time, of as many keys as queries."""
    lengths = cu_seqlens_q.diff().tolist()
    grouped = q.shape[1] != k.shape[1]
    queries, keys, values = (t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v))
    found = [
        F.scaled_dot_product_attention(*one, is_causal=is_causal, scale=scale, enable_gqa=grouped)
        for one in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(found, dim=2)[0].transpose(0, 1)


def varlen_attention_with_logsumexp(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """PyTorch has no function for it: the second result from scores of its own."""
    lengths, scale = rest[0].diff().tolist(), rest[-1]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    sums = []
    for one_q, one_k in zip(q.split(lengths), keys.split(lengths), strict=True):
        scores = one_q.transpose(0, 1) @ one_k.permute(1, 2, 0) * (q.shape[2] ** -0.5 if scale is None else scale)
        if rest[4]:
            scores = scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
        sums.append(scores.logsumexp(-1))
    return varlen_attention(q, k, v, *rest), torch.cat(sums, dim=1)


def varlen_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Autograd's, with the forward pass that it needs."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        return torch.autograd.grad(varlen_attention(q, k, v, *rest[:7]), (q, k, v), grad)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """As Hugging Face's static cache has it: a mask over the whole cache."""
    mask = torch.arange(k.shape[2], device=k.device) < lengths.reshape(-1, 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
