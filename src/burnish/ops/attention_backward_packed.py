"""Gradients of attention side by side, as the product that gave q, k and v together wants them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.op import Cost, Impl, Sample, op
from burnish.ops.attention_backward import attention_backward


def _check(*args: Any) -> None:
    attention_backward.check(*args, False)
    q, k, v = args[1:4]
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has {k.shape[2]} keys; side by side with q's gradient there must be q's {q.shape[2]}")
    if v.shape[3] != q.shape[3]:
        raise ValueError(f"v has head_dim {v.shape[3]}; side by side with q's gradient it must be q's {q.shape[3]}")


def _cost(*args: Any) -> Cost:
    return attention_backward.cost(*args, False)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in attention_backward.samples(device, dtype):
        q, k, v = sample.args[1:4]
        if q.shape[2] == k.shape[2] and q.shape[3] == v.shape[3]:
            yield Sample(sample.label, sample.args[:-1])


def _shape(*args: Any) -> Tensor:
    q, k = args[1:3]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1] + 2 * k.shape[1], q.shape[3]))


def _side_by_side(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.transpose(1, 2) for gradient in gradients], dim=2)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, follows="attention_backward")
def attention_backward_packed(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The gradients of q, k and v by `attention_backward`, side by side along the heads; none of bias.

    Shapes: as of `attention_backward`, with as many keys as queries and head_dim of v as of q. The result is
    (B, L, Hq + 2 * Hkv, D), contiguous: of each position the heads of q, then those of k and of v, as a product that
    gives all three has its columns.
    Dtypes: grad and out of q's dtype, logsumexp float32 (float64 for float64).
    Errors: as of `attention_backward`; ValueError for other numbers of keys than queries and for another head_dim of v.
    Source: as of `attention_backward`.
    """
    return _side_by_side(
        attention_backward.reference(
            grad, q, k, v, out, logsumexp, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed
        )[:3]
    )


def _triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """The kernels of attention_backward, which write to where each gradient has its place."""
    from burnish.kernels.attention_backward import attention_backward as run

    packed = _shape(grad, q, k)
    run(
        grad,
        q,
        k,
        v,
        out,
        logsumexp,
        bias,
        key_padding_mask,
        is_causal,
        window,
        scale,
        dropout_p,
        seed,
        config=config,
        packed=packed,
    )
    return packed


def _put_together(impl: Impl) -> Callable[..., Tensor]:
    def run(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        window: int | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        args = grad, q, k, v, out, logsumexp, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed
        return _side_by_side(impl.fn(*args)[:3])

    run.__doc__ = f"{impl.description.rstrip('.')}; the results are put together by another kernel."
    return run


def _without_bias_grad(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: fn(*args, False)


for _impl in attention_backward.impls.values():  # in their order
    if _impl.name != "reference":
        attention_backward_packed.impl(
            _impl.name,
            why_not=_without_bias_grad(_impl.reasons),
            configs=None if _impl.configs is None else _without_bias_grad(_impl.configs),
            named_only=_impl.named_only,
        )(_triton if _impl.name == "triton" else _put_together(_impl))
