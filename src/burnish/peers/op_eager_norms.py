"""Norms, and what is added in front of them, as `burnish.peers.op_eager` has all Ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total if keep_sum else total.new_empty(0)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As Llama spells it."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total if keep_sum else total.new_empty(0)


def all_reduce_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return add_layer_norm(_of_all_ranks(x, bias, group_name), residual, norm_weight, norm_bias, eps, keep_sum)


def all_reduce_add_rms_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(_of_all_ranks(x, bias, group_name), residual, norm_weight, eps, keep_sum)


def _of_all_ranks(x: Tensor, bias: Tensor | None, group_name: str) -> Tensor:
    """The sum over the ranks, "" for this one alone, and the bias."""
    if group_name:
        from burnish.parallel import all_reduce

        x = all_reduce(x, group_name)
    return x if bias is None else x + bias


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
    narrow: torch.dtype | None,
    dx_sum: bool,
    normed: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """What autograd runs, and what it keeps for it: the statistics."""
    result, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    mask = [True, weight is not None and weight_grad, bias is not None and bias_grad]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, weight, bias, mask
    )
    dx = dx if grad_sum is None else dx + grad_sum
    found = dx, dweight, dbias, *_around(dx, narrow, dx_sum), None if normed is None else result.to(normed)
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _around(dx: Tensor, narrow: torch.dtype | None, dx_sum: bool) -> tuple[Tensor | None, Tensor | None]:
    """What autograd goes on to make of dx."""
    copy = None if narrow is None else dx.to(narrow)
    total = (dx if copy is None else copy).flatten(0, -2).sum(0).to(dx.dtype) if dx_sum else None
    return copy, total


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    grad_sum: Tensor | None,
    weight_grad: bool,
    narrow: torch.dtype | None,
    dx_sum: bool,
    normed: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """What autograd makes of Llama's spelling."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scaled = (grad if weight is None else grad * weight).float()
    along = (scaled * wide).sum(-1, keepdim=True) / x.shape[-1]
    dx = (scaled * rstd - wide * (along * rstd.pow(3))).to(x.dtype)
    dx = dx if grad_sum is None else dx + grad_sum
    result = (wide * rstd).to(x.dtype)
    dweight = (grad * result).flatten(0, -2).sum(0) if weight is not None and weight_grad else None
    if normed is not None:
        result = (result if weight is None else result * weight).to(normed)
    found = dx, dweight, *_around(dx, narrow, dx_sum), None if normed is None else result
    return tuple(x.new_empty(0) if g is None else g for g in found)
