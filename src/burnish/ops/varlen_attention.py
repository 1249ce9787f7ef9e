"""Attention within packed sequences of unequal lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.op import Cost, Sample, op
from burnish.ops import _varlen, _varlen_inputs
from burnish.ops._common import nbytes
from burnish.ops.attention import attention
from burnish.ops.varlen_attention_with_logsumexp import gradients, varlen_attention_with_logsumexp


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
    out = q.shape[0] * q.shape[1] * v.shape[2] * q.element_size()
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
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@op(cost=_cost, samples=_samples, check=_varlen_inputs.check, shape=_shape)
def varlen_attention(
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
) -> Tensor:
    """`attention` within each of several sequences that lie one after another, without padding.

    Shapes: q (T, Hq, D); k (Tk, Hkv, D); v (Tk, Hkv, Dv); Hq a multiple of Hkv. Sequence i has the queries from
    cu_seqlens_q[i] to cu_seqlens_q[i + 1], and the keys likewise by cu_seqlens_k (None: those of the queries). Both are
    (sequences + 1,), rise from 0 to the number of tokens, and may stand still: an empty sequence. The result is
    (T, Hq, Dv), contiguous; a query that may attend to no key gives zeros. On CUDA, without cu_seqlens_k, tokens may be
    left over after the last sequence: no other looks at them, and what the result holds for them is undefined.
    max_seqlen_q, max_seqlen_k: bounds of the lengths, in tokens, which no device is asked for; None: as many as there
    are tokens. The nearer, the fewer programs a kernel on CUDA starts in vain.
    Positions: the last query of a sequence sits at its last key's position. is_causal and window as in `attention`, by
    each sequence's own positions. scale defaults to D ** -0.5.
    Dtypes: q, k and v the same floating one, the result's; scores and softmax in float32 (float64 for float64); offsets
    int32 or int64.
    Errors: ValueError for sizes that do not fit, and on the CPU for offsets that do not; TypeError for dtypes. On CUDA
    offsets are not looked at.
    Source: the interface is FlashAttention's `flash_attn_varlen_func` (Dao, arXiv:2307.08691); padding left out of a
    whole model: ByteTransformer, Zhai et al., arXiv:2210.03052.
    """
    parts = [
        attention.reference(*one, None, None, is_causal, window, scale)
        for one in _varlen.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
    ]
    return _varlen.packed(parts, q, v.shape[2])


@varlen_attention.impl("torch_flash", why_not=_varlen.flash_why_not)
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
) -> Tensor:
    """PyTorch's flash attention: on CUDA FlashAttention-2 for packed sequences, on the CPU one sequence at a time."""
    if q.is_cuda:
        return _varlen.flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window, scale)[
            0
        ]
    return _varlen.flash_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, window, scale)


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


@varlen_attention.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
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
) -> Tensor:
    """A flash attention in Triton over blocks of queries of every sequence; asks no device for the lengths."""
    from burnish.kernels.varlen_attention import varlen_attention_forward

    return varlen_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal, window, scale, config=config
    )[0]


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    out, logsumexp = varlen_attention_with_logsumexp(q, k, v, *rest)
    return out, (q, k, v, *rest[:2], out, logsumexp)


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    return gradients(saved, grad, None)


varlen_attention.differentiate(_forward, _backward)
