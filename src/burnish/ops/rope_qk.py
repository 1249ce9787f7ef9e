"""Rotary position embedding of queries and keys by the same tables, in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.autograd import Gradients, Saved, gradients_of
from burnish.op import Cost, Sample, op
from burnish.ops.rope import rope, turned_back


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    rope.check(q, cos, sin, interleaved)
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], q.shape[2], q.shape[3]):
        raise ValueError(f"k has shape {tuple(k.shape)}; for q of {tuple(q.shape)} only its number of heads may differ")
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype} where q has {q.dtype}; convert one of them")


def _cost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Cost:
    both = rope.cost(q, cos, sin, interleaved) + rope.cost(k, cos, sin, interleaved)
    tables = cos.numel() * cos.element_size() + sin.numel() * sin.element_size()
    return Cost(both.flops, both.bytes - tables)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in rope.samples(device, dtype):
        q = sample.args[0]
        k = torch.roll(q[:, : max(1, q.shape[1] // 2)], 1, dims=2)
        yield Sample(sample.label, (q, k, *sample.args[1:]))


def _shape(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """`rope(q, cos, sin), rope(k, cos, sin)`: the tables are read once.

    Shapes: q (B, H, S, D), k (B, G, S, D); cos and sin as `rope` takes them. Each result is laid out in memory as
    torch.empty_like of its input.
    Dtypes: q and k the same floating one; otherwise as in `rope`.
    Errors: ValueError for sizes that do not fit, TypeError for integers and for dtypes of q and k that differ.
    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    return rope.reference(q, cos, sin, interleaved), rope.reference(k, cos, sin, interleaved)


def _torch_why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    return rope.impls["torch"].why_not(q, cos, sin, interleaved)


@rope_qk.impl("torch", why_not=_torch_why_not)
def _torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """`rope` of each by PyTorch's own functions."""
    return rope.impls["torch"].fn(q, cos, sin, interleaved), rope.impls["torch"].fn(k, cos, sin, interleaved)


def _triton_why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    reasons = rope.impls["triton"].why_not(q, cos, sin, interleaved)
    return [*reasons, "k is empty"] if k.numel() == 0 else reasons


def _triton_configs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[Any]:
    from burnish.kernels.rope import rope_configs

    return rope_configs(q, k, cos.shape[-1])


@rope_qk.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, config: Any = None
) -> tuple[Tensor, Tensor]:
    """One launch for both, one pass over memory."""
    from burnish.kernels.rope import rope_pair

    return rope_pair(q, k, cos, sin, interleaved, config)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Keeps q and k only for the gradients of the tables, which models do not train."""
    kept = (q, k) if cos.requires_grad or sin.requires_grad else (None, None)
    return rope_qk(q, k, cos, sin, interleaved), (*kept, cos, sin)


def _backward(saved: Saved, grad_q: Tensor | None, grad_k: Tensor | None) -> Gradients:
    q, k, cos, sin = saved.kept
    interleaved: bool = saved.args[4]
    need_q, need_k, *need_tables, _ = saved.needed
    dcos = dsin = None
    if any(need_tables) and (grad_q is not None or grad_k is not None):
        needed = (False, False, *need_tables, False)
        *_, dcos, dsin, _ = gradients_of(rope_qk.reference, (q, k, cos, sin, interleaved), needed, (grad_q, grad_k))
    of_q, of_k = grad_q if need_q else None, grad_k if need_k else None
    back = turned_back(sin, interleaved)
    if of_q is not None and of_k is not None:
        return *rope_qk(of_q, of_k, cos, back, interleaved), dcos, dsin, None
    dq, dk = (None if grad is None else rope(grad, cos, back, interleaved) for grad in (of_q, of_k))
    return dq, dk, dcos, dsin, None


rope_qk.differentiate(_forward, _backward)
