"""PyTorch's attention kernels, forward with the logsumexp and backward, as Impls of the Ops that training calls.

The arguments are those of `attention_with_logsumexp` and `attention_backward`. None of these kernels drops weights
here: their random numbers are their own, and no other Impl could replay them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.ops import _attention_cpu, _attention_cuda
from burnish.ops._attention import for_queries, heads_last, weights_and_gradients
from burnish.ops._common import HALF_TYPES

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

_ALIGNED_LOGSUMEXP = 32  # queries: the memory-efficient kernel's rows of it are so long, or a multiple
_MAX_HEAD_DIM = 256  # of the Triton backward kernel; in float32 half of it


def backward_reasons(why_not: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """What speaks against one of these kernels backward: what does forward."""
    return lambda *args: why_not(*args[1:4], *args[6:13])


def flash_reasons(*args: Any) -> list[str]:
    """Of `attention`'s arguments, on either kind of device."""
    why_not = _attention_cuda.flash_why_not if args[0].is_cuda else _attention_cpu.flash_why_not
    return why_not(*args)


def triton_backward_reasons(*args: Any) -> list[str]:
    """What speaks against the Triton kernels."""
    q, v = args[1], args[3]
    reasons = _attention_cuda.triton_why_not(*args[1:4], *args[6:13])
    limit = _MAX_HEAD_DIM // 2 if q.dtype == torch.float32 else _MAX_HEAD_DIM
    widest = max(q.shape[3], v.shape[3])
    return (
        [*reasons, f"head_dim {widest} is above {limit}, that of the kernels for {q.dtype}"]
        if widest > limit
        else reasons
    )


class deterministic:
    """Within the `with`, PyTorch's kernels add up in a fixed order: flash attention's dq otherwise differs by run.

    A class and torch._C: a generator and torch.use_deterministic_algorithms, which writes Inductor's settings too,
    took 5.5 us of each call where this takes 0.9.
    """

    def __enter__(self) -> None:
        self._enabled = torch._C._get_deterministic_algorithms()
        self._warn_only = torch._C._get_deterministic_algorithms_warn_only()
        self._fill = torch._C._get_deterministic_fill_uninitialized_memory()
        if not self._enabled:
            torch._C._set_deterministic_fill_uninitialized_memory(False)
        torch._C._set_deterministic_algorithms(True, warn_only=False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_deterministic_algorithms(self._enabled, warn_only=self._warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(self._fill)


def flash_forward(
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
    """PyTorch's flash attention, called directly; on a CPU half precision in float32."""
    if q.device.type == "cpu":
        if q.dtype in HALF_TYPES:  # the logsumexp of the kernels for these is off by 5e-5
            return flash_float32_forward(q, k, v, bias, key_padding_mask, is_causal, window, scale)
        return _attention_cpu.flash_forward(q, k, v, bias, key_padding_mask, is_causal, window, scale)
    out, logsumexp, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, is_causal, scale=scale)
    return heads_last(out), logsumexp.contiguous()


def flash_backward(
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
) -> Gradients:
    """PyTorch's flash attention, its backward pass; on a CPU half precision in float32."""
    if q.device.type == "cpu":
        args = grad, q, k, v, out, logsumexp, bias, key_padding_mask, is_causal, window, scale
        if q.dtype in HALF_TYPES:
            return flash_float32_backward(*args, bias_grad=bias_grad)
        found = _attention_cpu.flash_backward(*args)
        return (*found, _bias_gradient(*args) if bias_grad else q.new_empty((0,)))
    nothing = q.new_empty((), dtype=torch.int64)  # where random numbers would have started
    sizes = q.shape[2], k.shape[2]
    with deterministic():
        found = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, out, logsumexp, None, None, *sizes, 0.0, is_causal, nothing, nothing, scale=scale
        )
    dq, dk, dv = map(heads_last, found)
    return dq, dk, dv, q.new_empty((0,))


def flash_float32_forward(
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
    """PyTorch's flash attention for the CPU in float32, then rounded, for half-precision inputs."""
    out, logsumexp = flash_forward(q.float(), k.float(), v.float(), bias, key_padding_mask, is_causal, window, scale)
    return out.to(q.dtype), logsumexp


def flash_float32_backward(
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
) -> Gradients:
    """PyTorch's flash attention for the CPU, its backward pass, in float32, then rounded."""
    wide = [t.float() for t in (grad, q, k, v, out)]
    args: Any = (*wide, logsumexp, bias, key_padding_mask, is_causal, window, scale)
    dq, dk, dv = (t.to(q.dtype) for t in _attention_cpu.flash_backward(*args))
    return dq, dk, dv, _bias_gradient(*args) if bias_grad else q.new_empty((0,))


def _bias_gradient(*args: Any) -> Tensor:
    """What the CPU's kernel does not give, with all scores in memory."""
    bias: Tensor = args[6]
    given: Any = (*args, 0.0, None)
    _, dscores = weights_and_gradients(*given)
    return dscores.sum_to_size(bias.shape).to(bias.dtype).contiguous()


def cudnn_forward(
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
    """cuDNN's flash attention, through PyTorch."""
    causal = is_causal and q.shape[2] > 1  # a single query is the last: nothing is to come
    out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return heads_last(out), logsumexp.reshape(q.shape[:3]).contiguous()


def cudnn_backward(
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
) -> Gradients:
    """cuDNN's flash attention, its backward pass, through PyTorch: dq in any order, whatever PyTorch is told."""
    causal = is_causal and q.shape[2] > 1
    nothing = q.new_empty((), dtype=torch.int64)  # where random numbers would have started
    sizes, kept = (q.shape[2], k.shape[2]), logsumexp.unsqueeze(-1)
    found = aten._scaled_dot_product_cudnn_attention_backward.default(
        grad, q, k, v, out, kept, nothing, nothing, None, None, None, *sizes, 0.0, causal, scale=scale
    )
    dq, dk, dv = map(heads_last, found)
    return dq, dk, dv, q.new_empty((0,))


def efficient_forward(
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
    """PyTorch's memory-efficient attention (CUTLASS), with one mask in memory for all but causality."""
    mask, nothing, mask_type = _attention_cuda.efficient_mask(q, k, bias, key_padding_mask, is_causal, window)
    rows = (t.transpose(1, 2) for t in (q, for_queries(k, q), for_queries(v, q)))
    out, logsumexp, *_ = aten._efficient_attention_forward.default(
        *rows, mask, None, None, None, None, 0.0, mask_type, True, scale=scale
    )
    out, logsumexp = out.transpose(1, 2), logsumexp[..., : q.shape[2]]
    if nothing is not None:
        out, logsumexp = out.masked_fill(nothing, 0.0), logsumexp.masked_fill(nothing.squeeze(-1), torch.inf)
    return heads_last(out), logsumexp.contiguous()


def efficient_backward(
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
) -> Gradients:
    """PyTorch's memory-efficient attention (CUTLASS), its backward pass."""
    mask, _, mask_type = _attention_cuda.efficient_mask(q, k, bias, key_padding_mask, is_causal, window)
    kept = F.pad(logsumexp, (0, -q.shape[2] % _ALIGNED_LOGSUMEXP), value=torch.inf)
    given, *rows, result = (t.transpose(1, 2) for t in (grad, q, for_queries(k, q), for_queries(v, q), out))
    nothing = q.new_empty((), dtype=torch.int64)  # where random numbers would have started
    sizes = q.shape[2], k.shape[2]
    dq, dk, dv, dbias = aten._efficient_attention_backward.default(
        given, *rows, mask, result, None, None, *sizes, kept, 0.0, nothing, nothing, mask_type, bias_grad,
        scale=scale, num_splits_key=1,  # more of them would add up in any order
    )  # fmt: skip
    dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
    if q.shape[1] != k.shape[1]:
        dk, dv = (t.unflatten(1, (k.shape[1], -1)).float().sum(dim=2).to(q.dtype) for t in (dk, dv))
    if not bias_grad or bias is None:
        return heads_last(dq), heads_last(dk), heads_last(dv), q.new_empty((0,))
    dbias = dbias.float().sum_to_size(bias.shape).to(bias.dtype).contiguous()
    return heads_last(dq), heads_last(dk), heads_last(dv), dbias
