"""The backward pass of layer and root-mean-square normalization: one pass over memory, the same bits in every run.

Each of a fixed number of programs takes every so many rows, holds them whole in registers, works their statistics out
again and adds what they contribute to the gradients of weight and bias up in registers of its own. A second, small
kernel adds the programs' sums in a fixed order. Nothing is added by atomics, whose order, and with it the last bits,
would differ from run to run.
Sources: those of `burnish.kernels.norms`; the derivatives follow from the definitions.
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
    prefetch,
    target_of,
    wait_for_inputs,
)
from burnish.kernels.norms import collapse, load_vector, row_offsets

_STAGED_BYTES = 144 << 10  # shared memory of one multiprocessor for rows on their way; sm_80 has 164 KiB
_ENTRIES = 16  # of a row that a thread holds: up to 128 registers with x, the gradient and two sums in float32
_WIDEST = 8192  # the widest row for which 16 warps of such threads do
_COLUMNS = 16  # of one program that adds parts up: 64 bytes of each part
_PARTS = 256  # that it reads at a time


@triton.jit
def _two_means(first, second, N: tl.constexpr):
    """The means of each row of both, (rows, 1): summed together, so that warps wait for each other once."""
    first, second = tl.split(tl.sum(tl.join(first, second), axis=1) / N)
    return first[:, None], second[:, None]


@triton.jit
def _prefetch_row(start, N: tl.constexpr):
    """Asks for a row to be brought into the L2 cache, by lines of 64 entries: of 128 bytes, or twice as many."""
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(N, 64))
    prefetch(start + tl.minimum(tl.arange(0, LINES) * 64, N - 1))


@triton.jit
def _two_rows(x_at, g_at, weight_at, scale, mask, weight_mask, POLICY: tl.constexpr):
    """Rows of x and of the gradient, and the gradient times the weight, which is `scale` or read, all in float32."""
    values = tl.load(x_at, mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    g = tl.load(g_at, mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    scaled = g
    if scale is not None:
        scaled = g * scale.to(tl.float32)
    elif weight_at is not None:
        scaled = g * tl.load(weight_at, weight_mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return values, g, scaled


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    grad, x, weight, bias, grad_sum, dx, narrow, result, weight_parts, bias_parts, dx_parts, rows, size1, size2,
    g_stride0, g_stride1, g_stride2, x_stride0, x_stride1, x_stride2, s_stride0, s_stride1, s_stride2, weight_step,
    bias_step, eps, N: tl.constexpr, BLOCK_N: tl.constexpr, RMS: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, PER_SM: tl.constexpr, AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With AGAIN, where the sums take the registers, rows are read anew for each use: from caches, after the first."""
    launch_dependents(PDL)
    column = tl.arange(0, BLOCK_N)[None, :]
    within = column < N
    scale, shift, weight_at = None, None, None
    if weight is not None:
        weight_at = weight + column * weight_step
        if not AGAIN:
            scale = load_vector(weight, weight_step, N, BLOCK_N)
    if bias is not None and not AGAIN:
        shift = load_vector(bias, bias_step, N, BLOCK_N)
    wait_for_inputs(PDL)
    weight_sum = tl.zeros((ROWS, BLOCK_N), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK_N), tl.float32)
    dx_sum = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        mask = within
        if ROWS > 1:
            mask = within & (row < rows)
        x_at = x + row_offsets(row, size1, size2, x_stride0, x_stride1, x_stride2) + column
        g_at = grad + row_offsets(row, size1, size2, g_stride0, g_stride1, g_stride2) + column
        if AGAIN and PDL:  # nothing else is on its way while this row is worked on
            after = tl.minimum(tile + tl.num_programs(0), rows - 1)
            _prefetch_row(x + row_offsets(after, size1, size2, x_stride0, x_stride1, x_stride2), N)
            _prefetch_row(grad + row_offsets(after, size1, size2, g_stride0, g_stride1, g_stride2), N)
        values, g, scaled = _two_rows(x_at, g_at, weight_at, scale, mask, within, "")
        if not RMS:
            mean, along_ones = _two_means(values, scaled, N)
            if AGAIN:
                values, g, scaled = _two_rows(x_at, g_at, weight_at, scale, mask, within, "evict_last")
            values = tl.where(mask, values - mean, 0.0)
        variance, along = _two_means(values * values, scaled * values, N)
        rstd = tl.rsqrt(variance + eps)
        if AGAIN:
            values, g, scaled = _two_rows(x_at, g_at, weight_at, scale, mask, within, "evict_first")
            if not RMS:
                values = values - mean
        normed = values * rstd
        if not RMS:
            scaled = scaled - along_ones
        if result is not None:
            values = normed
            if scale is not None:
                values = values * scale.to(tl.float32)
            elif weight is not None:
                values = values * tl.load(weight_at, within, other=0.0).to(tl.float32)
            if shift is not None:
                values += shift.to(tl.float32)
            elif bias is not None:
                values += load_vector(bias, bias_step, N, BLOCK_N).to(tl.float32)
            tl.store(result + row.to(tl.int64) * N + column, values.to(result.dtype.element_ty), mask)
        found = (scaled - normed * (along * rstd)) * rstd
        if weight_parts is not None:
            weight_sum += g * normed
        if bias_parts is not None:
            bias_sum += g
        if grad_sum is not None:
            s_offset = row_offsets(row, size1, size2, s_stride0, s_stride1, s_stride2)
            found += tl.load(grad_sum + s_offset + column, mask, other=0.0).to(tl.float32)
        if dx_parts is not None:
            dx_sum += found  # 0 in rows that there are not
        if narrow is not None:
            tl.store(narrow + row.to(tl.int64) * N + column, found.to(narrow.dtype.element_ty), mask)
        tl.store(dx + row.to(tl.int64) * N + column, found.to(dx.dtype.element_ty), mask)
    part = tl.program_id(0).to(tl.int64) * N + column
    if weight_parts is not None:
        tl.store(weight_parts + part, tl.sum(weight_sum, axis=0, keep_dims=True), within)
    if bias_parts is not None:
        tl.store(bias_parts + part, tl.sum(bias_sum, axis=0, keep_dims=True), within)
    if dx_parts is not None:
        tl.store(dx_parts + part, tl.sum(dx_sum, axis=0, keep_dims=True), within)


@triton.jit
def _add_parts(parts, out, count, start, N: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """out[column] = the sum over all parts (count, N) of float32, for COLUMNS columns from `start` on."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.load(parts + part * N + column, (part < count) & (column < N), other=0.0)
    added = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + column, added.to(out.dtype.element_ty), column < N)


@triton.jit(do_not_specialize=["count"])
def _add_parts_kernel(
    first, second, third, to_first, to_second, to_third, count, N: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of up to three sums, of which the last may be None."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    start, which = tl.program_id(0) * COLUMNS, tl.program_id(1)
    if second is None:  # noqa: SIM114  (which the compiler has to know)
        _add_parts(first, to_first, count, start, N, COLUMNS, PARTS)
    elif which == 0:
        _add_parts(first, to_first, count, start, N, COLUMNS, PARTS)
    elif third is None:  # noqa: SIM114
        _add_parts(second, to_second, count, start, N, COLUMNS, PARTS)
    elif which == 1:
        _add_parts(second, to_second, count, start, N, COLUMNS, PARTS)
    else:
        _add_parts(third, to_third, count, start, N, COLUMNS, PARTS)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    bias_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of layer normalization of x (..., N) for those of its result, `grad`: `(dx, dweight, dbias)`; then
    dx in the dtype `narrow`, its sum over all rows (N,) in x's, and the normalized x in the dtype `normed`.

    `grad_sum`, the gradient of x from elsewhere, is added to dx. grad and grad_sum are like x, with strides of their
    own; weight and bias (N,) or None, bias is read for `normed` only; what is not asked for, or the gradient of what is
    None, is empty. Dtypes: float16, bfloat16, float32, weight and bias each their own. Any strides; only where the last
    one is not 1, or the leading dimensions need more than three strides, there is a copy first. N at most MAX_COLUMNS.
    """
    wanted = weight if weight_grad else None, bias if bias_grad else None
    return _norm_backward(grad, x, weight, bias, grad_sum, *wanted, eps, False, narrow, dx_sum, normed, config)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of root-mean-square normalization, `(dx, dweight)`; otherwise as `layer_norm_backward`."""
    wanted = weight if weight_grad else None
    dx, dweight, _, copy, total, result = _norm_backward(
        grad, x, weight, None, grad_sum, wanted, None, eps, True, narrow, dx_sum, normed, config
    )
    return dx, dweight, copy, total, result


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_sum: Tensor | None,
    weight_like: Tensor | None, bias_like: Tensor | None, eps: float, rms: bool, narrow: torch.dtype | None,
    dx_sum: bool, normed: torch.dtype | None, config: Config | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`weight_like` and `bias_like` are those whose gradients are wanted."""
    N = x.shape[-1]
    rows = x.numel() // N
    target = target_of(x)
    crowded = dx_sum + (normed is not None) > rms
    config = config or first_config(norm_backward_configs, rows, N, x.dtype, grad_sum is not None, target, crowded)
    given, sizes, strides = _in_rows(x, grad, *(() if grad_sum is None else (grad_sum,)))
    size1, size2 = (*sizes[1:], 1, 1)[:2]
    x_steps, g_steps, s_steps = ((*stride[:-1], 0, 0, 0)[:3] for stride in (*strides, (0,))[:3])
    tiles = cdiv(rows, config["ROWS"])
    # No more programs than share the tiles evenly.
    programs = cdiv(tiles, cdiv(tiles, config["PER_SM"] * target.num_sms))
    dx, copy, result = (
        None if dtype is None else torch.empty(x.shape, dtype=dtype, device=x.device)
        for dtype in (x.dtype, narrow, normed)
    )
    sums = (
        None if dtype is None else torch.empty(N, dtype=dtype, device=x.device)
        for dtype in (
            None if weight_like is None else weight_like.dtype,
            None if bias_like is None else bias_like.dtype,
            x.dtype if dx_sum else None,
        )
    )
    dweight, dbias, total = sums
    wanted = [out for out in (dweight, dbias, total) if out is not None]
    parts = [
        None if out is None else torch.empty(programs, N, dtype=torch.float32, device=x.device)
        for out in (dweight, dbias, total)
    ]
    launch(
        _norm_backward_kernel, (programs,), given[1], given[0], weight, None if normed is None else bias,
        None if grad_sum is None else given[2], dx, copy, result, *parts, rows, size1, size2, *g_steps, *x_steps,
        *s_steps, 1 if weight is None else weight.stride(0), 1 if bias is None else bias.stride(0), eps, config=config,
        like=x, N=N, BLOCK_N=next_power_of_2(N), RMS=rms, STAGES=config.num_stages,
    )  # fmt: skip
    if wanted:
        absent = (None,) * (3 - len(wanted))
        launch(
            _add_parts_kernel, (cdiv(N, _COLUMNS), len(wanted)), *(p for p in parts if p is not None), *absent,
            *wanted, *absent, programs, config=_PARTS_CONFIG, like=x, N=N,
        )  # fmt: skip
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dweight, dbias, copy, total, result))  # type: ignore[return-value]


def _in_rows(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...], list[tuple[int, ...]]]:
    """The tensors, copied where they must be, with the sizes and strides that `collapse` gives."""
    if tensors[0].shape[-1] > 1:  # gradients of a sum are expanded numbers
        tensors = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    sizes, strides = collapse(*tensors)
    if len(sizes) > 3:
        tensors = tuple(t.contiguous() for t in tensors)
        sizes, strides = collapse(*tensors)
    return tensors, sizes, strides


_PARTS_CONFIG = Config.of(num_warps=4, COLUMNS=_COLUMNS, PARTS=_PARTS)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """out (N,), of any floating dtype, becomes the sum of parts (count, N), float32, contiguous, in a fixed order."""
    count, N = parts.shape
    args = (parts, None, None, out, None, None, count)
    launch(_add_parts_kernel, (cdiv(N, _COLUMNS), 1), *args, config=_PARTS_CONFIG, like=parts, N=N)


def norm_backward_configs(
    rows: int, N: int, dtype: torch.dtype, added: bool, target: Target, crowded: bool = False
) -> list[Config]:
    """How to go back through `rows` rows of N entries on `target`, the most promising first.

    PER_SM programs for each multiprocessor loop over tiles of ROWS rows; all but the last of their stages are tiles on
    their way to shared memory. With AGAIN = 1 rows are read anew for each use. `crowded` is layer norm that also adds
    dx up or gives its result, or RMS norm that does both: with three sums, weight and bias, 8 entries a thread take 96
    registers and 16 up to 176.
    """
    block = next_power_of_2(N)
    if block > _WIDEST:
        # 512 threads of 128 registers: in half precision none is spilled for RMS norm and 8 bytes for layer norm with a
        # bias, in float32 40 and 104; 1024 threads spill up to 104.
        return [Config.of(num_warps=w, num_stages=1, ROWS=1, PER_SM=1, AGAIN=1) for w in (16, 32)]
    # Rows that share a program's threads need addresses of their own: with 8 entries a thread has up to 80 registers
    # where a row takes four warps, and 104 in narrower ones.
    narrow = block < 4 * 32 * _ENTRIES
    entries = _ENTRIES // 2 if narrow else _ENTRIES
    base = max(4, block // (32 * entries))

    def config(num_warps: int, stages: int) -> list[Config]:
        """One, or none where the tiles on their way do not fit."""
        ROWS = max(1, num_warps * 32 * entries // block) if narrow else 1
        staged = ROWS * block * dtype.itemsize * (3 if added else 2) * (stages - 1)
        threads = 768 if narrow and ROWS * block == 4 * 32 * entries and block >= 512 else 512
        if crowded and threads * entries > 512 * _ENTRIES // 2:
            threads -= 128
        per_sm = min(max(1, threads // (32 * num_warps)), _STAGED_BYTES // max(1, staged))
        return [Config.of(num_warps=num_warps, num_stages=stages, ROWS=ROWS, PER_SM=per_sm, AGAIN=0)] * (per_sm > 0)

    if block < 512:
        pipelined, plain = config(4, 3) + config(8, 3), config(4, 1) + config(8, 1)
    elif narrow:
        pipelined, plain = config(4, 3) + config(4, 4) + config(8, 3), config(4, 2) + config(8, 1)
    else:
        pipelined, plain = config(base, 3) + config(base, 2) + config(base, 4), config(base, 1)
        if block < _WIDEST:  # 32 warps would have 64 registers a thread
            pipelined, plain = pipelined + config(2 * base, 3), plain + config(2 * base, 1)
    # Where each program has a tile or two there is nothing to have on its way.
    few = rows <= 2 * pipelined[0]["ROWS"] * pipelined[0]["PER_SM"] * target.num_sms
    return plain + pipelined if few else pipelined + plain
