"""Attention as training runs it: with what its backward pass needs to compute the weights again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.op import Cost, Sample, op
from burnish.ops import _attention, _attention_cpu, _attention_cuda, _attention_training
from burnish.ops._common import wide


def _cost(*args: Any) -> Cost:
    q = args[0]
    return _attention.cost(*args) + Cost(0, q.shape[0] * q.shape[1] * q.shape[2] * 4)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return (s for s in _attention.samples(device, dtype) if s.label in _attention.IN_TRAINING)


def _shape(*args: Any) -> tuple[Tensor, Tensor]:
    q = args[0]
    return _attention.shape(*args), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@op(cost=_cost, samples=_samples, check=_attention.check, shape=_shape, follows="attention")
def attention_with_logsumexp(
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
) -> tuple[Tensor, Tensor]:
    """`attention`, whose arguments these are, and the logarithm of the sum over the keys of exp(score), of each query.

    Shapes: as of `attention`; the second result is (B, Hq, Lq), contiguous, +inf for a query that may attend to no key:
    its weights exp(score - inf) are zeros. Dropout does not change it. Dtypes: the second result float32 (float64 for
    float64).
    Errors: as of `attention`.
    Source: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.
    """
    scores = _attention.scores(q, k, bias, key_padding_mask, is_causal, window, scale)
    weights, nothing = _attention.softmax(scores)
    weights = _attention.dropped(weights, dropout_p, seed)
    logsumexp = torch.logsumexp(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing.squeeze(-1), torch.inf)
    return _attention.heads_last(weights.to(v.dtype) @ _attention.for_queries(v, q)), logsumexp


def _triton_configs(*args: Any) -> Sequence[Any]:
    from burnish.kernels.attention_configs import configs_for

    q, k, v, bias, key_padding_mask, *_ = args
    return configs_for(q, k, v, bias, key_padding_mask, training=True, dropout=args[8] > 0)


# In the order in which they are tried on a GPU: there cuDNN's is the fastest, up to 1.8 times as fast as flash (H200).
_impl = attention_with_logsumexp.impl
_impl("torch_flash_float32", why_not=_attention_cpu.flash_float32_why_not)(_attention_training.flash_float32_forward)
_impl("torch_cudnn", why_not=_attention_cuda.cudnn_why_not)(_attention_training.cudnn_forward)
_impl("torch_flash", why_not=_attention_training.flash_reasons)(_attention_training.flash_forward)


@attention_with_logsumexp.impl("triton", why_not=_attention_cuda.triton_why_not, configs=_triton_configs)
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
) -> tuple[Tensor, Tensor]:
    """The kernel of `attention`, which then stores one more number for each query."""
    from burnish.kernels.attention import attention_forward

    out, logsumexp = attention_forward(
        q, k, v, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed, training=True, config=config
    )
    assert logsumexp is not None
    return out, logsumexp


_impl("torch_efficient", why_not=_attention_cuda.efficient_why_not)(_attention_training.efficient_forward)
