"""`varlen_attention` as training wants it: with what the backward pass starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.op import Cost, Sample, op
from burnish.ops import _varlen, _varlen_inputs
from burnish.ops._common import nbytes, wide
from burnish.ops._masks import additive_mask, allowed_pairs
from burnish.ops.attention import attention
from burnish.ops.varlen_attention_backward import varlen_attention_backward


def _cost(
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
) -> Cost:
    pairs = q.shape[1] * _varlen.pairs_of(q, k, cu_seqlens_q, cu_seqlens_k, is_causal, window)
    out = q.shape[0] * q.shape[1] * (v.shape[2] * q.element_size() + wide(q.dtype).itemsize)
    return Cost(2 * pairs * (q.shape[2] + v.shape[2]), nbytes(q, k, v, cu_seqlens_q, cu_seqlens_k) + out)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return _varlen_inputs.samples(device, dtype)


def _shape(
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
    return (
        q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
        q.new_empty((q.shape[1], q.shape[0]), dtype=wide(q.dtype)),
    )


@op(cost=_cost, samples=_samples, check=_varlen_inputs.check, shape=_shape, follows="varlen_attention")
def varlen_attention_with_logsumexp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`varlen_attention`, and the logarithm of the sum of each row's exponentiated scores: `(out, logsumexp)`.

    Shapes: arguments and the first result as of `varlen_attention`; logsumexp (Hq, T), of scaled scores, +inf for a
    query that may attend to no key, so that exp(score - logsumexp) is 0.
    Dtypes: as there; logsumexp is float32, float64 for float64.
    Errors: as there.
    Source: Dao, "FlashAttention-2", arXiv:2307.08691.
    """
    parts, sums = [], []
    for one_q, one_k, one_v in _varlen.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k):
        parts.append(attention.reference(one_q, one_k, one_v, None, None, is_causal, window, scale))
        sums.append(_logsumexp(one_q, one_k, is_causal, window, scale))
    logsumexp = torch.cat(sums, dim=1) if sums else q.new_empty((q.shape[1], 0), dtype=wide(q.dtype))
    return _varlen.packed(parts, q, v.shape[2]), logsumexp


def _logsumexp(q: Tensor, k: Tensor, is_causal: bool, window: int | None, scale: float | None) -> Tensor:
    """(Hq, L) of one sequence."""
    dtype = wide(q.dtype)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(dtype) @ keys.to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = additive_mask(None, allowed_pairs(q, k, None, is_causal, window), dtype)
    if mask is not None:
        scores = scores + mask
    nothing = (scores == -torch.inf).all(dim=-1)
    # torch.logsumexp asks whether there are keys, which nobody knows who traces this.
    lowest = scores.new_full((*scores.shape[:-1], 1), torch.finfo(dtype).min)
    largest = torch.cat([scores.detach(), lowest], dim=-1).amax(dim=-1)
    total = torch.exp(scores - largest[..., None]).sum(dim=-1).masked_fill(nothing, 1.0)
    return (total.log() + largest).masked_fill(nothing, torch.inf)[0]


@varlen_attention_with_logsumexp.impl("torch_flash", why_not=_varlen.flash_why_not)
def _torch_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention: on CUDA FlashAttention-2 for packed sequences, on the CPU one sequence at a time."""
    if q.is_cuda:
        return _varlen.flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window, scale)
    return _varlen.flash_by_sequence_with_logsumexp(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, window, scale)


def _triton_why_not(
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
    return _varlen.kernel_why_not(q, k, v)


def _triton_configs(
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
) -> Sequence[Any]:
    from burnish.kernels.varlen_attention import varlen_configs

    return varlen_configs(q, v, cu_seqlens_q, max_seqlen_q)


@varlen_attention_with_logsumexp.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """`varlen_attention`'s kernel, which writes its running maximum and sum too."""
    from burnish.kernels.varlen_attention import varlen_attention_forward

    out, logsumexp = varlen_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal, window, scale, True, config=config
    )
    assert logsumexp is not None
    return out, logsumexp


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    out, logsumexp = varlen_attention_with_logsumexp(q, k, v, *rest)
    return (out, logsumexp), (q, k, v, *rest[:2], out, logsumexp)


def gradients(saved: Saved, grad: Tensor | None, grad_logsumexp: Tensor | None) -> Gradients:
    """Of both Ops' arguments, which kept q, k, v, both offsets and both results."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, logsumexp = saved.kept
    if grad is None and grad_logsumexp is None:
        return (None,) * len(saved.args)
    found = varlen_attention_backward(
        torch.zeros_like(out) if grad is None else grad,
        *(q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k),
        *saved.args[5:],
        grad_logsumexp,
    )
    needed = (one if need else None for one, need in zip(found, saved.needed, strict=False))
    return (*needed, *(None,) * (len(saved.args) - 3))


varlen_attention_with_logsumexp.differentiate(_forward, gradients)
