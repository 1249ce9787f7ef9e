"""The end of a pre-norm branch of a divided model: the sum over the ranks, the residual addition and the next RMS
normalization in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops import _all_reduce_norms as shared
from burnish.ops._norms import rms_norm_reference
from burnish.ops._triton_norms import triton_norm_configs, triton_norm_why_not
from burnish.ops.add_rms_norm import add_rms_norm


def _check(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> None:
    shared.check_sum(x, bias, residual, norm_weight)


def _cost(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> Cost:
    return shared.cost_of(add_rms_norm, x, bias, residual, norm_weight, eps, keep_sum)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Of a process by itself: with others it is a test of its own."""

    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias = tensor(1024, seed=2), tensor(1024, seed=3)
    one = tensor(1, 1, 2048, seed=0), tensor(1, 1, 2048, seed=1)
    yield Sample("1x2048", (one[0], None, one[1], tensor(2048, seed=16), 1e-5))
    yield Sample("bias", (tensor(5, 1024, seed=4), bias, tensor(5, 1024, seed=5), weight))
    yield Sample("odd", (tensor(7, 33, seed=6), tensor(33, seed=7), tensor(7, 33, seed=8), tensor(33, seed=9)))
    yield Sample("plain", (tensor(2, 16, 1024, seed=10), None, tensor(2, 16, 1024, seed=11)))
    yield Sample("no sum", (tensor(9, 1024, seed=12), bias, tensor(9, 1024, seed=13), weight, 1e-6, "", False))
    transposed = tensor(5, 1024, 3, seed=14).transpose(1, 2)
    yield Sample("transposed", (transposed, None, tensor(5, 3, 1024, seed=15), weight))


def _shape(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return shared.empty_results(x, keep_sum)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, donates={"x": 1})
def all_reduce_add_rms_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(all_reduce(x) + bias + residual)` and the sum itself: `(normed, sum)`.

    Every rank of the group has to call it, with x of the same shape; bias, residual and weight are alike on all ranks,
    and so are the results. `group_name` is the process group's, as of the collectives; "" stands for this process
    alone, whose x is the sum.
    Shapes: x and residual (..., N); bias and norm_weight (N,) or None; both results are x's, contiguous.
    Without `keep_sum`, for where nobody reads the sum, the second result is empty: of shape (0,).
    Dtypes: x, bias and residual the same floating one; norm_weight may differ. Each sum is rounded to that dtype, and
    the last one normalized from there, in float32 (float64 for float64), rounded once.
    Errors: ValueError for other sizes, TypeError for dtypes that differ and for integers.
    Source: the sum behind rows of Shoeybi et al., "Megatron-LM", arXiv:1909.08053, and the pre-norm residual connection
    of Touvron et al., "LLaMA", arXiv:2302.13971.
    """
    total = (shared.summed(x, bias, group_name) + residual).contiguous()
    return rms_norm_reference(total, norm_weight, eps), total if keep_sum else total.new_empty(0)


has_side_effect(all_reduce_add_rms_norm.overload)  # the other ranks wait for it: nobody may leave it out


def _torch_in_place(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    y = shared.summed_in_place(x, bias, group_name, fresh=False)
    return shared.by_best(add_rms_norm, y, residual, norm_weight, eps, keep_sum)


@all_reduce_add_rms_norm.impl("torch", in_place=_torch_in_place)
def _torch(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """torch.distributed's all-reduce, and the first Impl of add_rms_norm that can."""
    y = shared.summed_in_place(x, bias, group_name, fresh=True)
    return shared.by_best(add_rms_norm, y, residual, norm_weight, eps, keep_sum)


def _torch_triton_why_not(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> list[str]:
    return triton_norm_why_not(x, norm_weight)


def _torch_triton_configs(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> list[Any]:
    return triton_norm_configs(x, added=True)


def _torch_triton_in_place(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    from burnish.kernels import norms

    y = shared.summed_in_place(x, bias, group_name, fresh=False)
    return norms.add_rms_norm(y, residual, norm_weight, eps, keep_sum, config)


@all_reduce_add_rms_norm.impl(
    "torch_triton", why_not=_torch_triton_why_not, configs=_torch_triton_configs, in_place=_torch_triton_in_place
)
def _torch_triton(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """torch.distributed's all-reduce, then addition and normalization in one pass over memory."""
    from burnish.kernels import norms

    y = shared.summed_in_place(x, bias, group_name, fresh=True)
    return norms.add_rms_norm(y, residual, norm_weight, eps, keep_sum, config)


def _symmetric_why_not(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> list[str]:
    return shared.symmetric_why_not(x, norm_weight, None, group_name)


def _symmetric_configs(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> list[Any]:
    return shared.symmetric_configs(x)


@all_reduce_add_rms_norm.impl("symmetric", why_not=_symmetric_why_not, configs=_symmetric_configs)
def _symmetric(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """All in one kernel: each GPU writes its rows into the others' memory over NVLink, and adds up what arrives."""
    return shared.symmetric(x, bias, residual, norm_weight, None, eps, True, group_name, keep_sum, config)


def _symmetric_rows_why_not(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> list[str]:
    return shared.symmetric_why_not(x, norm_weight, None, group_name, pushed=True)


def _symmetric_rows_configs(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> list[Any]:
    return shared.symmetric_configs(x, pushed=True)


@all_reduce_add_rms_norm.impl("symmetric_rows", why_not=_symmetric_rows_why_not, configs=_symmetric_rows_configs)
def _symmetric_rows(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_name: str = "",
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """One kernel for many rows: some of its programs push rows over NVLink, the others add up what arrives."""
    return shared.symmetric(x, bias, residual, norm_weight, None, eps, True, group_name, keep_sum, config, pushed=True)


def _parts(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    group_name: str,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = add_rms_norm(
        shared.summed(x, bias, group_name), residual, norm_weight, eps, keep_sum
    )
    return result


all_reduce_add_rms_norm.compose(_parts)
