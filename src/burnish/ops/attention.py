"""Scaled dot-product attention with grouped heads, causality, windows, padding and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Saved
from burnish.op import op
from burnish.ops import _attention, _attention_cpu, _attention_cuda
from burnish.ops._common import not_on_cpu
from burnish.ops._masks import additive_mask, allowed_pairs
from burnish.ops.attention_backward import attention_backward
from burnish.ops.attention_with_logsumexp import attention_with_logsumexp


@op(cost=_attention.cost, samples=_attention.samples, check=_attention.check, shape=_attention.shape)
def attention(
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
    """`softmax(q @ k.T * scale + bias, over the keys allowed) @ v`; a query that may attend to no key gives zeros.

    Shapes: q (B, Hq, Lq, D); k (B, Hkv, Lk, D); v (B, Hkv, Lk, Dv); Hq a multiple of Hkv, each key head serving
    Hq / Hkv neighbouring query heads. bias broadcasts to (B, Hq, Lq, Lk): added, or, if bool, True where allowed.
    key_padding_mask (B, Lk), bool or integer: nonzero for a real token. The result is (B, Hq, Lq, Dv), stored as
    (B, Lq, Hq, Dv): its transpose(1, 2) is contiguous.
    Positions: the last query sits at the last key's position. is_causal allows the keys up to the query's position;
    window w those less than w positions away, so with is_causal the query's own and the w - 1 before it.
    scale defaults to D ** -0.5. Dtypes: q, k and v the same floating one, the result's; scores and softmax in float32
    (float64 for float64), the weights rounded to v's dtype.
    dropout_p drops that share of the weights and divides the others by 1 - dropout_p; which ones is a function of seed,
    an int64 of shape (1,) on q's device (`burnish.ops.draw_seed`), and of batch entry, head, query and key.
    Errors: ValueError for sizes that do not fit, a dropout_p outside [0, 1) or without a seed, TypeError for dtypes.
    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762; grouped heads as in Ainslie et al.,
    arXiv:2305.13245; the window as in Hugging Face's sliding_window.
    """
    weights, _ = _attention.softmax(_attention.scores(q, k, bias, key_padding_mask, is_causal, window, scale))
    weights = _attention.dropped(weights, dropout_p, seed)
    return _attention.heads_last(weights.to(v.dtype) @ _attention.for_queries(v, q))


def _flash_why_not(
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
    why_not = _attention_cuda.flash_why_not if q.is_cuda else _attention_cpu.flash_why_not
    return why_not(q, k, v, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed)


def _sdpa_why_not(
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
    if q.is_cuda:
        return _attention_cuda.mask_reasons(q, k, bias) + _attention.dropout_reasons(dropout_p)
    reasons = not_on_cpu(q) + (["q or k is empty"] if q.numel() == 0 or k.numel() == 0 else [])
    return reasons + _attention.dropout_reasons(dropout_p)


def _triton_configs(
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
) -> Sequence[Any]:
    from burnish.kernels.attention_configs import configs_for

    return configs_for(q, k, v, bias, key_padding_mask, dropout=dropout_p > 0)


attention.impl("torch_flash_float32", why_not=_attention_cpu.flash_float32_why_not)(_attention_cpu.torch_flash_float32)


@attention.impl("torch_flash", why_not=_flash_why_not)
def _torch_flash(
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
    """PyTorch's flash attention, called directly; grouped heads without G copies of k and v."""
    kernel = _attention_cuda.torch_flash if q.is_cuda else _attention_cpu.torch_flash
    return kernel(q, k, v, bias, key_padding_mask, is_causal, window, scale)


@attention.impl("torch_sdpa", why_not=_sdpa_why_not, differentiable=True)
def _torch_sdpa(
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
    """F.scaled_dot_product_attention, which chooses a kernel and has its own backward."""
    masked = bias is not None or key_padding_mask is not None or window is not None or q.shape[2] != k.shape[2]
    mask = nothing = None
    if masked and q.is_cuda:
        mask, nothing = _attention_cuda.safe_mask(q, k, bias, key_padding_mask, is_causal, window)
    elif masked:
        mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, is_causal, window), q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal and not masked, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if nothing is not None:
        out = out.masked_fill(nothing, 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


attention.impl("torch_cudnn", why_not=_attention_cuda.cudnn_why_not)(_attention_cuda.torch_cudnn)
attention.impl("torch_efficient", why_not=_attention_cuda.efficient_why_not)(_attention_cuda.torch_efficient)


@attention.impl("triton", why_not=_attention_cuda.triton_why_not, configs=_triton_configs)
def _triton(
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
    config: Any = None,
) -> Tensor:
    """A flash attention in Triton that takes every mask, without one in memory."""
    from burnish.kernels.attention import attention_forward

    return attention_forward(q, k, v, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed, config=config)[
        0
    ]


attention.impl("triton_decode", why_not=_attention_cuda.decode_why_not, configs=_attention_cuda.decode_configs)(
    _attention_cuda.triton_decode
)


def _gluon_configs(
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
) -> Sequence[Any]:
    from burnish.kernels.attention_wgmma import attention_wgmma_configs, useful_split

    return attention_wgmma_configs(q.shape[3], useful_split(q, k))


@attention.impl("gluon", why_not=_attention_cuda.gluon_why_not, configs=_gluon_configs)
def _gluon(
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
    config: Any = None,
) -> Tensor:
    """A flash attention in Gluon for Hopper, a warp that loads and warps that attend."""
    from burnish.kernels.attention_wgmma import attention_wgmma

    return attention_wgmma(q, k, v, key_padding_mask, is_causal, scale, config=config)


def _forward(*args: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    out, logsumexp = attention_with_logsumexp(*args)
    return out, (*args[:5], args[9], out, logsumexp)


def _backward(saved: Saved, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, key_padding_mask, seed, out, logsumexp = saved.kept
    is_causal, window, scale, dropout_p = saved.args[5:9]
    if grad is None:
        return (None,) * len(saved.args)
    bias_grad = saved.needed[3]
    dq, dk, dv, dbias = attention_backward(
        grad, q, k, v, out, logsumexp, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed, bias_grad
    )
    rest = (None,) * (len(saved.args) - 4)
    return dq, dk, dv, dbias if bias_grad else None, *rest


# The same kernels on a CPU by PyTorch's own autograd, in C++: two passes in Python take 0.5 ms of 7 at 2x12x128x64.
attention.differentiate(_forward, _backward, on_cpu="torch_sdpa", in_graphs=False)
