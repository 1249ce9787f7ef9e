"""The gradient of a table for those of the rows that were looked up in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import HALF_TYPES, check_floating, nbytes, wide

_FEW_ROWS = 3072  # up to so many PyTorch's CUDA kernel adds to a table of the gradient's dtype, row by row


def _check(grad: Tensor, ids: Tensor, entries: int) -> None:
    check_floating("grad", grad)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids has dtype {ids.dtype}; it must be int32 or int64")
    if grad.dim() == 0 or grad.shape[:-1] != ids.shape:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}; for ids of {tuple(ids.shape)} it must be (*ids.shape, N)"
        )
    if entries <= 0:
        raise ValueError(f"entries is {entries}; a table has at least one")


def _cost(grad: Tensor, ids: Tensor, entries: int) -> Cost:
    return Cost(grad.numel(), nbytes(grad, ids) + entries * grad.shape[-1] * grad.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def index(*shape: int, below: int, seed: int) -> Tensor:
        return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def grad(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    yield Sample("words", (grad(2, 33, 384, seed=0), index(2, 33, below=1000, seed=1), 1000))
    yield Sample("two types", (grad(2, 64, 96, seed=2), index(2, 64, below=2, seed=3), 2))
    yield Sample("odd", (grad(7, 33, seed=4), index(7, below=5, seed=5), 50))
    yield Sample("positions, int32", (grad(1, 9, 128, seed=6), torch.arange(9, device=device)[None].int(), 512))
    transposed = grad(48, 5, 3, seed=7).transpose(0, 2)
    yield Sample("transposed", (transposed, index(5, 3, below=11, seed=8).t(), 11))
    yield Sample("4096 rows", (grad(4, 1024, 64, seed=9), index(4, 1024, below=300, seed=10), 300))


def _shape(grad: Tensor, ids: Tensor, entries: int) -> Tensor:
    return grad.new_empty((entries, grad.shape[-1]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def embedding_backward(grad: Tensor, ids: Tensor, entries: int) -> Tensor:
    """For each of a table's `entries` rows the sum of the `grad` of all places where `ids` has looked it up.

    Shapes: ids of any shape, grad (*ids.shape, N); the result (entries, N), contiguous.
    Dtypes: ids int32 or int64; grad floating, the result's. Added up in float32 (float64 for float64), rounded once.
    An id that is not in the table adds to none. The same inputs give the same bits on the same device: Inductor would
    make of PyTorch's operator atomic additions, whose order differs from run to run; hence an Op of its own.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: the derivative of torch.nn.functional.embedding.
    """
    rows = grad.reshape(-1, grad.shape[-1]).to(wide(grad.dtype))
    places = torch.where((ids >= 0) & (ids < entries), ids, entries).reshape(-1)
    table = rows.new_zeros(entries + 1, grad.shape[-1]).index_add(0, places, rows)
    return table[:entries].to(grad.dtype).contiguous()


@embedding_backward.impl("torch")
def _torch(grad: Tensor, ids: Tensor, entries: int) -> Tensor:
    """PyTorch's embedding_dense_backward, in float32 where it would add up in half precision."""
    # On CUDA (ATen's Embedding.cu and EmbeddingBackwardKernel.cu) it never adds atomically. Up to 3072 ids a warp goes
    # through them in order, and lanes with the same id add one after the other; beyond, ids are sorted by a stable
    # radix sort and each run of equal ones is summed in order, in float32, by tens and then over these. On the CPU each
    # thread has a range of the table's rows, and adds to them in the order of the ids.
    dtype = grad.dtype
    if dtype in HALF_TYPES and (grad.device.type == "cpu" or ids.numel() <= _FEW_ROWS):
        grad = grad.float()
    table: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, entries, -1, False)
    return table.to(dtype)
