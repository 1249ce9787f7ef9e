"""The product with the vocabulary and its cross entropy, in chunks of rows: there are never more logits than one's."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.ops._common import HALF_TYPES, wide
from burnish.ops._cross_entropy import Options, Rows, mean_share, reduce

_ROWS = 128  # of a tile of a product: a chunk is whole ones
_COLUMNS = 64  # to a multiple of which rows of logits are padded in memory, so that each begins at 16 bytes


@dataclass(frozen=True)
class Chunks:
    """A way to run: so many rows at once."""

    rows: int

    def __str__(self) -> str:
        return f"rows={self.rows}"


def chunk_configs(x: Tensor, weight: Tensor) -> list[Chunks]:
    """Chunks of up to 256 MiB of logits each, then of 512 and 128.

    Each chunk adds to the weight's gradient in float32, which is read and written once for it: 0.3 GB for 50304 x 768,
    2.1 GB for 128256 x 2048 (0.5 ms of an H200's bandwidth, where the chunk's three products take 2.1 ms). So chunks
    should be few, and what they may take is what the step can spare: 12288 rows of 50304 logits are 1.2 GB, and go in
    5 chunks of 2560; 4096 of 128256 in 4 of 1024.
    """
    rows, bytes_of_row = x.shape[0], weight.shape[0] * x.element_size()
    return list(dict.fromkeys(Chunks(_even(rows, bytes_of_row, mebibytes << 20)) for mebibytes in (256, 512, 128)))


def _even(rows: int, bytes_of_row: int, budget: int) -> int:
    """The rows of each of the fewest chunks within the budget, all about as long, in whole tiles."""
    most = max(_ROWS, budget // max(1, bytes_of_row) // _ROWS * _ROWS)
    chunks = max(1, -(-rows // most))
    return min(-(-rows // chunks // _ROWS) * _ROWS, most)


@dataclass(frozen=True)
class Wanted:
    """Which gradients are."""

    x: bool
    weight: bool
    bias: bool

    @property
    def some(self) -> bool:
        return self.x or self.weight or self.bias


@torch.no_grad()
def in_chunks(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad_loss: Tensor | None,
    options: Options,
    wanted: Wanted,
    rows: Rows,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients of x, weight and bias, empty where they are not wanted.

    `rows` writes each row's loss and, in place of its logits, their gradient.
    """
    count, size = x.shape[0], weight.shape[0]
    losses = x.new_empty(count, dtype=wide(x.dtype))
    share = mean_share(target, options.ignore_index, losses.dtype) if options.reduction == "mean" else None
    d_x = x.new_empty(x.shape if wanted.x else 0)
    d_weight = Sum(weight.shape, x, count <= chunk) if wanted.weight else None
    d_bias = Sum((size,), x, count <= chunk) if wanted.bias else None
    memory = x.new_empty((min(chunk, count), -(-size // _COLUMNS) * _COLUMNS))
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        part, logits = x[start:stop], memory[: stop - start, :size]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        grads = grad_loss[start:stop] if grad_loss is not None and grad_loss.dim() else grad_loss
        gradient = logits if wanted.some else None
        numbers = options.ignore_index, options.label_smoothing, options.z_loss, options.softcap
        rows(logits, target[start:stop], share, grads, losses[start:stop], gradient, *numbers)
        if wanted.x:
            torch.mm(logits, weight, out=d_x[start:stop])
        if d_weight is not None:
            d_weight.add_product(logits.t(), part)
        if d_bias is not None:
            d_bias.add_rows(logits)
    return (
        reduce(losses, share, options.reduction),
        d_x,
        x.new_empty(0) if d_weight is None else d_weight.result(),
        x.new_empty(0) if d_bias is None else d_bias.result(),
    )


class Sum:
    """A sum over chunks, added up in float32 (float64 for float64) and rounded once, at the end.

    In half precision each chunk would round what is there: after 5 of them an error of 2.2 times that of one product,
    more than anyone should lose to a way of saving memory.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, single: bool) -> None:
        self._shape, self._like, self._single = shape, like, single
        self._total: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Adds a @ b."""
        if self._single:
            self._total = torch.mm(a, b)
        elif a.dtype not in HALF_TYPES:
            self._total = torch.mm(a, b) if self._total is None else self._total.addmm_(a, b)
        elif not a.is_cuda:  # there is no product of bfloat16 with a float32 result: each is rounded
            product = torch.mm(a, b)
            self._total = product.float() if self._total is None else self._total.add_(product)
        elif self._total is None:
            self._total = torch.mm(a, b, out_dtype=torch.float32)
        elif accumulates_in_float32(a.device, a.dtype):
            torch.ops.aten.addmm.dtype_out(self._total, a, b, torch.float32, out=self._total)
        else:
            self._total.add_(torch.mm(a, b, out_dtype=torch.float32))

    def add_rows(self, rows: Tensor) -> None:
        found = rows.sum(dim=0, dtype=wide(rows.dtype))
        self._total = found if self._total is None else self._total.add_(found)

    def result(self) -> Tensor:
        total = self._like.new_zeros(self._shape) if self._total is None else self._total
        return total.to(self._like.dtype)


@functools.cache
def accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of half precision to a float32 matrix in place. Some versions that have
    `addmm` with an out_dtype want the summand to be of the factors' dtype."""
    total, a = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def rows_by_triton(*args: Any) -> None:
    """As `Rows`, of the memory that `in_chunks` pads."""
    from burnish.kernels.cross_entropy import rows

    rows(*args, padded=True)  # type: ignore[misc]  # it cannot see how many these are
