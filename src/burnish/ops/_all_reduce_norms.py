"""What the Ops share that end a branch of a divided model: the sum over the ranks, residual addition, normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from burnish.op import Cost, Op
from burnish.ops._common import check_same_dtype, check_vector
from burnish.ops._norms import check_norm, check_residual
from burnish.ops._triton_norms import triton_norm_why_not

Results = tuple[Tensor, Tensor]


def check_sum(x: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor | None, *norm_bias: Any) -> None:
    check_norm(x, None)
    for name, vector in (("bias", bias), ("norm_weight", norm_weight), *(("norm_bias", v) for v in norm_bias)):
        check_vector(name, vector, x.shape[-1], "x's last dimension")
    check_same_dtype("bias", bias, "x", x)
    check_residual(x, residual)


def cost_of(norm: Op, x: Tensor, bias: Tensor | None, *norm_args: Any) -> Cost:
    """The norm's; and an addition for each entry. What goes over the link passes through no memory of this rank's."""
    least: Cost = norm.cost(x, *norm_args)
    vector = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(least.flops + (1 if bias is None else 2) * x.numel(), least.bytes + vector)


def summed(x: Tensor, bias: Tensor | None, group_name: str) -> Tensor:
    """x summed over the group's ranks, and the bias: without a group x alone, in fresh memory only with a bias."""
    if not group_name:
        return x if bias is None else x + bias
    from burnish.parallel.collectives import all_reduce

    total = all_reduce(x, group_name)
    return total if bias is None else total + bias


def summed_in_place(x: Tensor, bias: Tensor | None, group_name: str, *, fresh: bool) -> Tensor:
    """The same for inference, in as little memory: in that of x, or, with `fresh`, in none that x has."""
    if group_name:
        from burnish.parallel.collectives import all_reduce, all_reduce_in_place

        x = all_reduce(x, group_name) if fresh else all_reduce_in_place(x, group_name)
    elif fresh:
        return summed(x, bias, group_name)
    return x if bias is None else x.add_(bias)


def symmetric_why_not(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, group_name: str, pushed: bool = False
) -> list[str]:
    """Reasons against the kernel that exchanges rows by symmetric memory, with `pushed` against that for many rows."""
    reasons = triton_norm_why_not(x, norm_weight, norm_bias)
    if x.is_cuda and x.numel():
        from burnish.parallel import symmetric

        rows, row_bytes = x.numel() // x.shape[-1], x.shape[-1] * x.element_size()
        why_not = symmetric.why_not_pushed if pushed else symmetric.why_not
        reasons += why_not(group_name, x.device, rows, row_bytes)
    return reasons


def symmetric_configs(x: Tensor, pushed: bool = False) -> list[Any]:
    if pushed:
        from burnish.kernels.all_reduce_norm_rows import all_reduce_norm_rows_configs

        return all_reduce_norm_rows_configs(x.numel() // x.shape[-1], x.shape[-1], x.element_size())
    from burnish.kernels.all_reduce_norm import all_reduce_norm_configs

    return all_reduce_norm_configs(x.shape[-1], x.element_size())


def symmetric(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    group_name: str,
    keep_sum: bool,
    config: Any,
    pushed: bool = False,
) -> Results:
    from burnish.kernels.all_reduce_norm import all_reduce_add_norm
    from burnish.kernels.all_reduce_norm_rows import all_reduce_add_norm_rows
    from burnish.parallel.symmetric import find

    room = find(group_name, x.device)
    assert room is not None  # or why_not had said so
    run = all_reduce_add_norm_rows if pushed else all_reduce_add_norm
    return run(x, bias, residual, norm_weight, norm_bias, eps, rms, keep_sum, room, config)


def by_best(norm: Op, *args: Any) -> Results:
    """The norm by the first of its Impls that can."""
    function: Callable[..., Results] = norm.select(*args).fn
    return function(*args)


def empty_results(x: Tensor, keep_sum: bool) -> Results:
    fresh = torch.empty_like(x, memory_format=torch.contiguous_format)
    return fresh, torch.empty_like(fresh) if keep_sum else x.new_empty(0)
