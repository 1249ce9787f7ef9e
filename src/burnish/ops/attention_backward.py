"""Gradients of attention, from what its forward pass left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops import _attention, _attention_cpu, _attention_cuda, _attention_training
from burnish.ops._attention_training import backward_reasons
from burnish.ops._common import check_floating, check_same_dtype, nbytes, wide
from burnish.ops.attention_with_logsumexp import attention_with_logsumexp


def _of_forward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `attention` among those of its backward pass."""
    return (*args[1:4], *args[6:13])


def _check(*args: Any) -> None:
    grad, q, _, v, out, logsumexp, bias = args[:7]
    _attention.check(*_of_forward(args))
    for name, tensor in (("grad", grad), ("out", out)):
        check_floating(name, tensor)
        check_same_dtype(name, tensor, "q", q)
        if tensor.shape != (*q.shape[:3], v.shape[3]):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {(*q.shape[:3], v.shape[3])}")
    if logsumexp.shape != q.shape[:3] or logsumexp.dtype != wide(q.dtype):
        raise ValueError(
            f"logsumexp is {logsumexp.dtype} of shape {tuple(logsumexp.shape)}; it must be {wide(q.dtype)} of "
            f"{tuple(q.shape[:3])}, attention_with_logsumexp's second result"
        )
    if args[13] and (bias is None or bias.dtype == torch.bool):
        raise ValueError("bias_grad is True where bias is None or bool, which has no gradient")


def _cost(*args: Any) -> Cost:
    q, k, v = args[1:4]
    flops = _attention.cost(*_of_forward(args)).flops
    # Scores, weights' gradients, and the gradients of q, k and v: five products where forward has two.
    return Cost(flops * 5 // 2, nbytes(*args[:8]) + nbytes(q, k, v))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _attention.samples(device, dtype):
        if sample.label not in _attention.IN_TRAINING:
            continue
        args = attention_with_logsumexp.bind(*sample.args, **sample.kwargs)
        out, logsumexp = attention_with_logsumexp.reference(*args)
        grad = randn(*out.shape, dtype=dtype, device=device, seed=11)
        bias_grad = args[3] is not None and args[3].dtype != torch.bool
        yield Sample(sample.label, (grad, *args[:3], out, logsumexp, *args[3:], bias_grad))


def _shape(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, bias, bias_grad = *args[1:4], args[6], args[13]
    dq, dk, dv = (t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv, bias.new_empty(bias.shape) if bias_grad else q.new_empty((0,))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, follows="attention")
def attention_backward(
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
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias, where `grad` is that of `attention`'s result; weights are computed again.

    Shapes: grad and out (B, Hq, Lq, Dv), logsumexp (B, Hq, Lq): `attention_with_logsumexp`'s results; the others as of
    `attention`. The results have the shapes of q, k and v, stored heads last as `attention`'s, and the bias' (summed
    where it broadcasts); without bias_grad the last one is empty. The same bits at every call, on one device.
    Dtypes: grad and out of q's dtype, logsumexp float32 (float64 for float64). The weights, and the gradients of
    weights and scores, are rounded to q's dtype where they are multiplied.
    A query all of whose scores are so large (1e6 and more) that float32 does not tell them from their logsumexp gets
    gradients that are too large: weights that should be 1/n are 1. Forward is exact there.
    Errors: ValueError and TypeError as of `attention`; ValueError for bias_grad where there is no floating bias.
    Source: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.2.
    """
    weights, dscores = _attention.weights_and_gradients(
        grad, q, k, v, out, logsumexp, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed
    )
    dv = _attention.dropped(weights, dropout_p, seed).to(v.dtype).transpose(-2, -1) @ grad
    scaled = (dscores * (q.shape[-1] ** -0.5 if scale is None else scale)).to(q.dtype)
    dq, dk = scaled @ _attention.for_queries(k, q), scaled.transpose(-2, -1) @ q
    # Each key head's gradient is the sum over the query heads that it serves.
    dk, dv = (t.unflatten(1, (k.shape[1], -1)).to(weights.dtype).sum(dim=2).to(q.dtype) for t in (dk, dv))
    dq, dk, dv = (_attention.heads_last(t) for t in (dq, dk, dv))
    if not bias_grad or bias is None:
        return dq, dk, dv, q.new_empty((0,))
    return dq, dk, dv, dscores.sum_to_size(bias.shape).to(bias.dtype).contiguous()


def _triton_configs(*args: Any) -> Sequence[Any]:
    from burnish.kernels.attention_backward_configs import backward_configs_for

    grad, q, k, v, _, _, bias = args[:7]
    return backward_configs_for(grad, q, k, v, bias, dropout=args[11] > 0)


_impl = attention_backward.impl
_impl("torch_flash_float32", why_not=backward_reasons(_attention_cpu.flash_float32_why_not))(
    _attention_training.flash_float32_backward
)
_impl(
    "torch_cudnn",
    why_not=backward_reasons(_attention_cuda.cudnn_why_not),
    named_only="it adds up dq by atomics, in another order at every run; name it where that does not matter",
)(_attention_training.cudnn_backward)


@attention_backward.impl("triton", why_not=_attention_training.triton_backward_reasons, configs=_triton_configs)
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
    bias_grad: bool = False,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlashAttention-2's scheme in Triton, with every mask and dropout, the bias' gradient too."""
    from burnish.kernels.attention_backward import attention_backward as run

    dq, dk, dv, dbias = run(
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
        bias_grad,
        config,
    )
    return dq, dk, dv, q.new_empty((0,)) if dbias is None else dbias


_impl("torch_flash", why_not=backward_reasons(_attention_training.flash_reasons))(_attention_training.flash_backward)
_impl("torch_efficient", why_not=backward_reasons(_attention_cuda.efficient_why_not))(
    _attention_training.efficient_backward
)
