"""Layer and root-mean-square normalization over rows, with or without a residual addition: one pass over memory.

A program holds whole rows in registers, so each is read once and written once whatever the statistics need; the
variance is taken from the centred values (two steps), which keeps rows whose mean is large against their spread exact.
Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; Zhang, Sennrich, "Root Mean Square Layer
Normalization", arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import (
    Config,
    Target,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    target_of,
    wait_for_inputs,
)

MAX_COLUMNS = 16384
"""The longest row that one program of 32 warps holds in registers (16 entries a thread)."""

_PERSISTENT_BYTES = 32 << 20  # from here on each program of a full grid has several rows to loop over
_STAGED_BYTES = 144 << 10  # shared memory of one multiprocessor for rows on their way; sm_80 has 164 KiB


@triton.jit
def normalize(values, mask, eps, N: tl.constexpr, RMS: tl.constexpr):
    """Each row of `values` (rows, block) normalized, in float32; `values` are 0 where `mask` is not set."""
    if not RMS:
        values = tl.where(mask, values - tl.sum(values, axis=1, keep_dims=True) / N, 0.0)
    variance = tl.sum(values * values, axis=1, keep_dims=True) / N
    return values * tl.rsqrt(variance + eps)


@triton.jit
def row_offsets(row, size1, size2, stride0, stride1, stride2):
    """Where rows begin, in entries; with one row stride both sizes are 1, which the compiler folds."""
    inner, outer = row % size2, row // size2
    return (
        (outer // size1).to(tl.int64) * stride0 + (outer % size1).to(tl.int64) * stride1 + inner.to(tl.int64) * stride2
    )


@triton.jit
def _normalize_tile(
    tile, x, residual, weight, bias, out, total, rows, size1, size2, x_stride0, x_stride1, x_stride2,
    r_stride0, r_stride1, r_stride2, eps, N: tl.constexpr, BLOCK_N: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, from x to the results; `weight` and `bias` are values (1, BLOCK_N) or None, `total` may be None."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = column < N
    if ROWS > 1:
        mask = mask & (row < rows)
    offset = row_offsets(row, size1, size2, x_stride0, x_stride1, x_stride2)
    to = row.to(tl.int64) * N + column
    if residual is None:
        values = tl.load(x + offset + column, mask, other=0.0).to(tl.float32)
    else:  # both are dead after the addition, the sum takes their place
        r_offset = row_offsets(row, size1, size2, r_stride0, r_stride1, r_stride2)
        values = tl.load(x + offset + column, mask, other=0.0)
        added = tl.load(residual + r_offset + column, mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(out.dtype.element_ty)
        if total is not None:
            tl.store(total + to, values, mask)
        values = values.to(tl.float32)
    normed = normalize(values, mask, eps, N, RMS)
    if weight is not None:
        normed = normed * weight.to(tl.float32)
    if bias is not None:
        normed = normed + bias.to(tl.float32)
    tl.store(out + to, normed.to(out.dtype.element_ty), mask)


@triton.jit
def load_vector(vector, step, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """A weight or a bias as (1, BLOCK_N)."""
    column = tl.arange(0, BLOCK_N)[None, :]
    return tl.load(vector + column * step, column < N, other=0.0)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["live"])
def _norm_kernel(
    x, residual, weight, bias, out, total, rows, size1, size2, x_stride0, x_stride1, x_stride2,
    r_stride0, r_stride1, r_stride2, weight_step, bias_step, eps, live, N: tl.constexpr, BLOCK_N: tl.constexpr,
    RMS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, PER_SM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    scale, shift = None, None
    if weight is not None:
        scale = load_vector(weight, weight_step, N, BLOCK_N)
    if bias is not None:
        shift = load_vector(bias, bias_step, N, BLOCK_N)
    wait_for_inputs(PDL)
    if live is not None:
        rows = tl.minimum(rows, tl.load(live))
        if tl.program_id(0) * ROWS >= rows:
            return
    if PER_SM == 0:
        _normalize_tile(
            tl.program_id(0), x, residual, scale, shift, out, total, rows, size1, size2, x_stride0, x_stride1,
            x_stride2, r_stride0, r_stride1, r_stride2, eps, N, BLOCK_N, RMS, ROWS,
        )  # fmt: skip
    else:  # STAGES - 1 tiles are on their way to shared memory while one is normalized
        for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
            _normalize_tile(
                tile, x, residual, scale, shift, out, total, rows, size1, size2, x_stride0, x_stride1,
                x_stride2, r_stride0, r_stride1, r_stride2, eps, N, BLOCK_N, RMS, ROWS,
            )  # fmt: skip


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """Layer normalization of x (..., N); weight and bias (N,) or None. The result is x's, contiguous.

    Rows of the result from `live_rows` on, an int32 on the device, are left as they are.

    Dtypes: float16, bfloat16, float32, weight and bias each their own. Any strides; only where the last one is not 1,
    or the leading dimensions need more than three strides, x is copied first. N at most MAX_COLUMNS.
    """
    return _norm(x, None, weight, bias, eps, False, False, config, live_rows)[0]


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, config: Config | None = None, live_rows: Tensor | None = None
) -> Tensor:
    """Root-mean-square normalization of x (..., N) with weight (N,) or None; otherwise as `layer_norm`."""
    return _norm(x, None, weight, None, eps, True, False, config, live_rows)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep_sum: bool = True,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x + residual)` and the sum, rounded to x's dtype; residual is like x, with strides of its own.

    Without `keep_sum` the sum is not written, and the second result is empty.
    """
    out, total = _norm(x, residual, weight, bias, eps, False, keep_sum, config, live_rows)
    return out, out.new_empty(0) if total is None else total


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    keep_sum: bool = True,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and the sum, as `add_layer_norm`."""
    out, total = _norm(x, residual, weight, None, eps, True, keep_sum, config, live_rows)
    return out, out.new_empty(0) if total is None else total


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    keep_sum: bool, config: Config | None, live_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    N = x.shape[-1]
    rows = x.numel() // N
    target = target_of(x)
    config = config or first_config(norm_configs, rows, N, x.dtype, residual is not None, target)
    sizes, strides = collapse(x) if residual is None else collapse(x, residual)
    if len(sizes) > 3 or any(stride[-1] != 1 for stride in strides):
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        sizes, strides = (rows,), [(N, 1)] * 2
    size1, size2 = (*sizes[1:], 1, 1)[:2]
    steps = [step for stride in (*strides, (0,)) for step in (*stride[:-1], 0, 0, 0)[:3]][:6]
    # Weights are read before the kernels before this one are known to be done, so a copy of them would come too late.
    vector_steps = (1 if v is None else v.stride(0) for v in (weight, bias))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if keep_sum else None
    tiles = cdiv(rows, config["ROWS"])
    grid = tiles
    if config["PER_SM"]:  # no more programs than share the tiles evenly
        grid = cdiv(tiles, cdiv(tiles, config["PER_SM"] * target.num_sms))
    launch(
        _norm_kernel, (grid,), x, residual, weight, bias, out, total, rows, size1, size2, *steps,
        *vector_steps, eps, live_rows, config=config, like=x, N=N, BLOCK_N=next_power_of_2(N), RMS=rms,
        STAGES=config.num_stages,
    )  # fmt: skip
    return out, total


def collapse(*tensors: Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The leading dimensions, merged where all tensors (of one shape) allow it, outermost first; at least one.

    Returns their sizes, and each tensor's strides of them followed by the last dimension's.
    """
    shape = tensors[0].shape
    if all(t.is_contiguous() for t in tensors):
        return (tensors[0].numel() // shape[-1],), [(shape[-1], 1)] * len(tensors)
    kept: list[int] = []  # innermost first
    sizes: list[int] = []
    for dim in reversed(range(len(shape) - 1)):
        if shape[dim] == 1:
            continue
        if kept and all(t.stride(dim) == t.stride(kept[-1]) * sizes[-1] for t in tensors):
            sizes[-1] *= shape[dim]
        else:
            kept.append(dim)
            sizes.append(shape[dim])
    last = [t.stride(-1) if shape[-1] > 1 else 1 for t in tensors]
    if not kept:
        return (1,), [(shape[-1], step) for step in last]
    return tuple(sizes[::-1]), [
        (*(t.stride(dim) for dim in kept[::-1]), step) for t, step in zip(tensors, last, strict=True)
    ]


def norm_configs(rows: int, N: int, dtype: torch.dtype, added: bool, target: Target) -> list[Config]:
    """How to normalize `rows` rows of N entries on `target`, the most promising first.

    ROWS rows a program; PER_SM programs for each multiprocessor loop over them, or, where it is 0, each has one tile.
    """
    block = next_power_of_2(N)
    row_bytes = block * dtype.itemsize
    most = max(1, min(32, row_bytes // 512))  # one 16-byte load a thread
    base = max(1, most // 2)
    fewest = max(1, block // 1024)  # 32 entries a thread
    warps = dict.fromkeys(w for w in (base, most, base // 2) if w >= fewest)
    configs = [Config.of(num_warps=w, ROWS=1, PER_SM=0) for w in warps]
    # Short rows: as many as give each thread two or four loads, where that many programs still fill the device.
    several = [r for r in (4096 // row_bytes, 8192 // row_bytes) if r > 1 and rows >= 4 * r * target.num_sms]
    tiles = [Config.of(num_warps=4, ROWS=r, PER_SM=0) for r in several]
    configs = tiles + configs if row_bytes < 512 else configs + tiles
    if rows * N * dtype.itemsize >= _PERSISTENT_BYTES:
        ROWS = several[0] if several else 1
        tile_bytes = ROWS * row_bytes * (2 if added else 1)
        for num_warps, stages in ((4, 2), (4, 3)) if several else ((base, 2), (base, 3), (max(fewest, base // 2), 2)):
            per_sm = min(32 // num_warps, _STAGED_BYTES // (tile_bytes * (stages - 1)))
            if per_sm:
                configs.append(Config.of(num_warps=num_warps, num_stages=stages, ROWS=ROWS, PER_SM=per_sm))
    return list(dict.fromkeys(configs))
