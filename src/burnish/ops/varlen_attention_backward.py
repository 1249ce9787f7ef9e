"""The backward pass of `varlen_attention`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops import _varlen, _varlen_inputs
from burnish.ops._common import check_same_dtype, nbytes, wide
from burnish.ops._masks import additive_mask, allowed_pairs


def _check(
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
    grad_logsumexp: Tensor | None,
) -> None:
    _varlen_inputs.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window, scale)
    shape = (q.shape[0], q.shape[1], v.shape[2])
    for name, tensor in (("grad", grad), ("out", out)):
        check_same_dtype(name, tensor, "q", q)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be the result's, {shape}")
    for name, sums in (("logsumexp", logsumexp), ("grad_logsumexp", grad_logsumexp)):
        if sums is not None and sums.shape != (q.shape[1], q.shape[0]):
            raise ValueError(
                f"{name} has shape {tuple(sums.shape)}; it must be (heads, tokens), {(q.shape[1], q.shape[0])}"
            )


def _cost(
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
    grad_logsumexp: Tensor | None,
) -> Cost:
    pairs = q.shape[1] * _varlen.pairs_of(q, k, cu_seqlens_q, cu_seqlens_k, is_causal, window)
    # Scores again, and the gradients of weights, q, k and v: three products as wide as q, two as wide as v.
    flops = 2 * pairs * (3 * q.shape[2] + 2 * v.shape[2])
    given = nbytes(grad, q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, grad_logsumexp)
    return Cost(flops, given + nbytes(q, k, v))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    from burnish.ops.varlen_attention_with_logsumexp import varlen_attention_with_logsumexp

    for sample in _varlen_inputs.samples(device, dtype):
        args = varlen_attention_with_logsumexp.bind(*sample.args, **sample.kwargs)
        out, logsumexp = varlen_attention_with_logsumexp.reference(*args)
        grad = randn(*out.shape, dtype=dtype, device=device, seed=9)
        yield Sample(sample.label, (grad, *args[:3], out, logsumexp, *args[3:]))
        if sample.label in ("causal", "grouped, other keys"):
            of_sums = randn(*logsumexp.shape, dtype=logsumexp.dtype, device=device, seed=10)
            label = f"{sample.label}, gradient of logsumexp"
            yield Sample(label, (grad, *args[:3], out, logsumexp, *args[3:], of_sums))


def _shape(
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
    grad_logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, follows="varlen_attention")
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    grad_logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by that of `varlen_attention`'s result: `(dq, dk, dv)`.

    Shapes: grad and out (T, Hq, Dv), logsumexp (Hq, T), as `varlen_attention_with_logsumexp` gives them; the rest as of
    `varlen_attention`. The results have q's, k's and v's shapes, contiguous, and are the same bits in every run.
    grad_logsumexp (Hq, T): the gradient of logsumexp, where there is one, in its dtype.
    Dtypes: grad and out q's; logsumexp float32, float64 for float64.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
    """
    dtype, groups = wide(q.dtype), q.shape[1] // k.shape[1]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    found: list[list[Tensor]] = [[], [], []]
    lengths = _varlen.lengths_of(cu_seqlens_q)
    parts = _varlen.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
    means = (grad.to(dtype) * out.to(dtype)).sum(-1).t()
    if grad_logsumexp is not None:
        means = means - grad_logsumexp
    others = zip(
        grad.transpose(0, 1).unsqueeze(0).split(lengths, dim=2),
        *(t.to(dtype).unsqueeze(0).split(lengths, dim=2) for t in (logsumexp, means)),
        strict=True,
    )
    for (one_q, one_k, one_v), (one_grad, sums, mean) in zip(parts, others, strict=True):
        wide_q, g = (t.to(dtype) for t in (one_q, one_grad))
        wide_k, wide_v = (t.to(dtype).repeat_interleave(groups, dim=1) for t in (one_k, one_v))
        scores = wide_q @ wide_k.transpose(-2, -1) * factor
        mask = additive_mask(None, allowed_pairs(one_q, one_k, None, is_causal, window), dtype)
        weights = torch.exp((scores if mask is None else scores + mask) - sums[..., None])
        of_scores = weights * (g @ wide_v.transpose(-2, -1) - mean[..., None]) * factor
        dv, dk = (m.transpose(-2, -1) @ t for m, t in ((weights, g), (of_scores, wide_q)))
        dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (dk, dv))
        for gradients, new in zip(found, (of_scores @ wide_k, dk, dv), strict=True):
            gradients.append(new)
    dq, dk, dv = (
        _varlen.packed(new, like, like.shape[2]).to(like.dtype) for new, like in zip(found, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _flash_why_not(
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
    grad_logsumexp: Tensor | None,
) -> list[str]:
    reasons = _varlen.flash_why_not(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window, scale
    )
    if grad_logsumexp is not None:
        reasons.append("the kernel takes no grad_logsumexp")
    return reasons


@varlen_attention_backward.impl("torch_flash", why_not=_flash_why_not)
def _torch_flash(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    grad_logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's flash attention backward, without atomics: on the CPU one sequence at a time."""
    if q.is_cuda:
        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return _varlen.flash_backward(grad, q, k, v, out, logsumexp, *bounds, is_causal, window, scale)
    return _varlen.flash_backward_by_sequence(
        grad, q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, is_causal, window, scale
    )


def _triton_why_not(
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
    grad_logsumexp: Tensor | None,
) -> list[str]:
    return _varlen.kernel_why_not(q, k, v)


def _triton_configs(
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
    grad_logsumexp: Tensor | None,
) -> Sequence[Any]:
    from burnish.kernels.varlen_attention_backward import varlen_backward_configs

    return varlen_backward_configs(q, v)


@varlen_attention_backward.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    grad_logsumexp: Tensor | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels that compute the weights again: by blocks of keys for dk and dv, by blocks of queries for dq."""
    from burnish.kernels.varlen_attention_backward import varlen_attention_backward as run

    return run(
        grad, q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window, scale,
        grad_logsumexp, config=config,
    )  # fmt: skip
