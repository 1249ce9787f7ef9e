"""How a tensor's rows lie in memory, as the kernels of matrix products want to know it. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_GEMV_ROWS = 8  # with more, the products of ordinary cores would be slower than the memory
MAX_GEMV_MMA_ROWS = 16
MAX_GEMV_MMA_DEPTH = 32768
MAX_SKINNY_ROWS = 64
MAX_SKINNY_APPEND_ROWS = 32  # of 64, where rows go takes so many registers that they spill
MIN_TMA_ROWS = 128
MIN_WGMMA_ROWS = 33


@dataclass(frozen=True)
class Rows:
    """A tensor's rows, all dimensions but the last: `count` of them, `inner` by one stride and those by another."""

    count: int
    inner: int
    stride_outer: int
    stride_inner: int


def rows_of(x: Tensor) -> Rows | None:
    """The rows of x (..., K) as they lie, or None where two strides do not reach them all."""
    levels: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner, stride_inner = levels[0] if levels else (1, x.shape[-1])
    outer, stride_outer = levels[1] if len(levels) == 2 else (1, 0)
    return Rows(inner * outer, inner, stride_outer, stride_inner)


def layout_reasons(x: Tensor, weights: tuple[Tensor, ...], residual: Tensor | None = None) -> list[str]:
    """Reasons of strides and sizes against any of the kernels."""
    reasons = ["a weight is empty"] if any(weight.numel() == 0 for weight in weights) else []
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and rows_of(tensor) is None:
            reasons.append(f"{name} has strides {tensor.stride()}; two have to be enough for its rows")
    return reasons


def gemv_reasons(x: Tensor, weights: tuple[Tensor, ...]) -> list[str]:
    """Further reasons against the kernels that multiply without tensor cores."""
    rows = x.numel() // max(1, x.shape[-1])
    reasons = [f"x has {rows} rows; the kernel takes up to {MAX_GEMV_ROWS}"] if rows > MAX_GEMV_ROWS else []
    if any(weight.stride(1) != 1 and weight.shape[1] > 1 for weight in weights):
        reasons.append("a weight is not contiguous along K")
    return reasons


def gemv_mma_reasons(x: Tensor, weights: tuple[Tensor, ...]) -> list[str]:
    """Further reasons against the kernel that reads the weight right into tensor cores' operands."""
    rows, reasons = x.numel() // max(1, x.shape[-1]), []
    if x.element_size() != 2:
        reasons.append(f"the inputs are {x.dtype}; the kernel takes float16 and bfloat16")
    if rows > MAX_GEMV_MMA_ROWS:
        reasons.append(f"x has {rows} rows; the kernel takes up to {MAX_GEMV_MMA_ROWS}")
    if x.stride(-1) != 1 or any(weight.stride(1) != 1 for weight in weights):
        reasons.append("x or a weight is not contiguous along K")
    if max(x.shape[-1], *(weight.shape[1] for weight in weights)) > MAX_GEMV_MMA_DEPTH:
        reasons.append(f"K is above {MAX_GEMV_MMA_DEPTH}; the kernel has the code of each step over it")
    return reasons


def skinny_reasons(x: Tensor, weights: tuple[Tensor, ...]) -> list[str]:
    """Further reasons against the kernels that have the weight as the left operand."""
    rows, reasons = x.numel() // max(1, x.shape[-1]), []
    if x.element_size() != 2:
        reasons.append(f"the inputs are {x.dtype}; the kernel takes float16 and bfloat16")
    if not 2 <= rows <= MAX_SKINNY_ROWS:
        reasons.append(f"x has {rows} rows; the kernel takes 2 to {MAX_SKINNY_ROWS}")
    if any(weight.stride(1) != 1 and weight.shape[1] > 1 for weight in weights):
        reasons.append("a weight is not contiguous along K")
    return reasons


def tma_reasons(x: Tensor, weights: tuple[Tensor, ...]) -> list[str]:
    """Further reasons against the kernels that copy tiles by tensor memory access."""
    reasons = _copied_reasons(x, MIN_TMA_ROWS)
    for weight in weights:
        if weight.shape[0] * weight.element_size() % 16:
            reasons.append(f"a weight has {weight.shape[0]} rows; a row of the result must be a multiple of 16 bytes")
        if not any(copyable(weight, *strides) for strides in (weight.stride(), weight.stride()[::-1])):
            reasons.append(
                f"a weight has strides {weight.stride()}; one must be 1 and the other a multiple of 16 bytes"
            )
    return reasons


def wgmma_reasons(x: Tensor, weights: tuple[Tensor, ...]) -> list[str]:
    """Further reasons against the kernels whose warps have roles."""
    reasons = _copied_reasons(x, MIN_WGMMA_ROWS)
    for weight in weights:
        if not copyable(weight, *weight.stride()):
            reasons.append(f"a weight has strides {weight.stride()}; they must be a multiple of 16 bytes and 1")
    return reasons


def _copied_reasons(x: Tensor, fewest: int) -> list[str]:
    """Reasons against copying rows of x by tensor memory access, where there are to be `fewest` at least."""
    rows, reasons = x.numel() // max(1, x.shape[-1]), []
    if x.element_size() != 2:
        reasons.append(f"the inputs are {x.dtype}; the kernel takes float16 and bfloat16")
    if rows < fewest:
        reasons.append(f"x has {rows} rows; the kernel takes {fewest} and more")
    lying = rows_of(x)
    if lying is not None and lying.inner != lying.count:
        reasons.append(f"x has strides {x.stride()}; one has to be enough for its rows")
    elif lying is not None and not copyable(x, lying.stride_inner, x.stride(-1)):
        reasons.append(f"x has strides {x.stride()}; its rows must be contiguous and start at multiples of 16 bytes")
    return reasons


def copyable(x: Tensor, stride_row: int, stride_column: int) -> bool:
    """Whether tensor memory access can copy boxes of a matrix with these strides that begins where x does."""
    aligned = all(count * x.element_size() % 16 == 0 for count in (stride_row, x.storage_offset()))
    return stride_column == 1 and stride_row > 0 and aligned
