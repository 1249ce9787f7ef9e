"""The gradient of a table for those of the rows that were looked up in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import HALF_TYPES, check_floating, nbytes, wide
from burnish.ops._triton import triton_why_not

_FEW_ROWS = 3072  # up to so many PyTorch's CUDA kernel adds to a table of the gradient's dtype, row by row
_MOST_ENTRIES = 2**21 - 2  # as in burnish.kernels.embedding_backward, which needs triton


def _check(grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None, scale: Tensor | None) -> None:
    check_floating("grad", grad)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids has dtype {ids.dtype}; it must be int32 or int64")
    if grad.dim() == 0 or grad.shape[:-1] != ids.shape:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}; for ids of {tuple(ids.shape)} it must be (*ids.shape, N)"
        )
    if entries <= 0:
        raise ValueError(f"entries is {entries}; a table has at least one")
    if table_grad is not None:
        check_floating("table_grad", table_grad)
        if table_grad.shape != (entries, grad.shape[-1]):
            raise ValueError(
                f"table_grad has shape {tuple(table_grad.shape)}; it must be ({entries}, {grad.shape[-1]}): the table's"
            )
    if scale is not None:
        check_floating("scale", scale)
        if table_grad is None:
            raise ValueError("scale is given where table_grad is None; it multiplies that alone")
        if scale.dim() != 0:
            raise ValueError(f"scale has shape {tuple(scale.shape)}; it must be one number")


def _cost(grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None, scale: Tensor | None) -> Cost:
    table = entries * grad.shape[-1]
    flops = grad.numel() + (0 if table_grad is None else table) + (0 if scale is None else table)
    return Cost(flops, nbytes(grad, ids, table_grad, scale) + table * grad.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def index(*shape: int, below: int, seed: int, from_: int = 0) -> Tensor:
        return torch.randint(from_, below, shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def grad(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    yield Sample("words", (grad(2, 33, 384, seed=0), index(2, 33, below=1000, seed=1), 1000))
    yield Sample("two types", (grad(2, 64, 96, seed=2), index(2, 64, below=2, seed=3), 2))
    yield Sample("odd", (grad(7, 33, seed=4), index(7, below=5, seed=5), 50))
    yield Sample("positions, int32", (grad(1, 9, 128, seed=6), torch.arange(9, device=device)[None].int(), 512))
    transposed = grad(48, 5, 3, seed=7).transpose(0, 2)
    yield Sample("transposed", (transposed, index(5, 3, below=11, seed=8).t(), 11))
    yield Sample("4096 rows", (grad(4, 1024, 64, seed=9), index(4, 1024, below=300, seed=10), 300))
    tied = randn(90, 48, dtype=torch.bfloat16 if dtype == torch.float32 else dtype, device=device, seed=11)
    scale = torch.tensor(0.375, device=device)
    yield Sample("tied", (grad(2, 20, 48, seed=12), index(2, 20, below=90, seed=13), 90, tied, scale))
    yield Sample("tied, transposed", (grad(7, 33, seed=14), index(7, below=50, seed=15), 50, grad(33, 50, seed=16).t()))
    often = torch.where(index(2, 150, below=3, seed=17) > 0, 7, index(2, 150, below=40, seed=18))
    yield Sample("one word often", (grad(2, 150, 40, seed=19), often, 40))
    yield Sample("all the same", (grad(300, 24, seed=20), torch.full((300,), 4, device=device), 6))
    yield Sample("ids of no row", (grad(70, 32, seed=21), index(70, below=20, seed=22, from_=-5).int(), 12))


def _shape(grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None, scale: Tensor | None) -> Tensor:
    return grad.new_empty((entries, grad.shape[-1]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def embedding_backward(
    grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """For each of a table's `entries` rows the sum of the `grad` of all places where `ids` has looked it up.

    `table_grad`, the table's gradient from elsewhere (of a product that shares it), is added, times `scale`.
    Shapes: ids of any shape, grad (*ids.shape, N); table_grad and the result (entries, N), which is contiguous; scale
    one number.
    Dtypes: ids int32 or int64; grad floating, the result's; table_grad and scale floating, each its own. Added up in
    float32 (float64 for float64), rounded once.
    An id that is not in the table adds to none. The same inputs give the same bits on the same device: Inductor would
    make of PyTorch's operator atomic additions, whose order differs from run to run; hence an Op of its own.
    Errors: ValueError for sizes that do not fit and for a scale without table_grad, TypeError for dtypes.
    Source: the derivative of torch.nn.functional.embedding.
    """
    dtype = wide(grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
    places = torch.where((ids >= 0) & (ids < entries), ids, entries).reshape(-1)
    table = rows.new_zeros(entries + 1, grad.shape[-1]).index_add(0, places, rows)[:entries]
    if table_grad is not None:
        other = table_grad.to(dtype)
        table = table + (other if scale is None else other * scale.to(dtype))
    return table.to(grad.dtype).contiguous()


def _triton_why_not(
    grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None, scale: Tensor | None
) -> list[str]:
    reasons = triton_why_not(grad)
    for name, given in (("table_grad", table_grad), ("scale", scale)):
        if given is not None and given.dtype not in (*HALF_TYPES, torch.float32):
            reasons.append(f"{name} is {given.dtype}; the kernel takes float16, bfloat16 and float32")
    if entries > _MOST_ENTRIES:
        reasons.append(f"{entries} rows are too many for the kernel's keys of 32 bits; {_MOST_ENTRIES} are not")
    return reasons


def _triton_configs(grad: Tensor, *rest: Any) -> list[Any]:
    from burnish.kernels.embedding_backward import embedding_backward_configs

    return embedding_backward_configs(grad.shape[-1])


@embedding_backward.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    grad: Tensor,
    ids: Tensor,
    entries: int,
    table_grad: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    config: Any = None,
) -> Tensor:
    """Lookups sorted by a kernel of their own, and every row of the table written once, by the program that sums it."""
    from burnish.kernels.embedding_backward import embedding_backward as kernel

    return kernel(grad, ids, entries, table_grad, scale, config)


@embedding_backward.impl("torch")
def _torch(
    grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """PyTorch's embedding_dense_backward, in float32 where it would add up in half precision, and an addition."""
    # On CUDA (ATen's Embedding.cu and EmbeddingBackwardKernel.cu) it never adds atomically. Up to 3072 ids a warp goes
    # through them in order, and lanes with the same id add one after the other; beyond, ids are sorted by a stable
    # radix sort and each run of equal ones is summed in order, in float32, by tens and then over these. On the CPU each
    # thread has a range of the table's rows, and adds to them in the order of the ids. It passes over -1, the index of
    # padding; on CUDA it would write where other wrong ids point.
    dtype = grad.dtype
    if dtype in HALF_TYPES and (grad.device.type == "cpu" or ids.numel() <= _FEW_ROWS or table_grad is not None):
        grad = grad.float()
    if grad.device.type != "cpu":
        ids = torch.where((ids >= 0) & (ids < entries), ids, -1)
    table: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, entries, -1, False)
    if table_grad is not None:
        table = table.add_(table_grad) if scale is None else torch.addcmul(table, table_grad, scale)
    return table.to(dtype)
