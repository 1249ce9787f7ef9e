"""Weights of 8 and 4 bits, as `burnish.quantize` stores them, written out in a product's dtype: one pass over memory.

A row is here what has one scale: of int4 each group, which follow each other in memory. Rows are read in words of 32
bits. A thread reads four of them at once and stores 16 bytes at once, as its neighbours do the next ones: in between
the compiler hands words on through shared memory, where they are smallest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.quantize import MIDDLE, columns_of

_MIDDLE = tl.constexpr(MIDDLE)


@triton.jit
def _stored(words, KIND: tl.constexpr):
    """(rows, words) as (rows, columns), in columns' order: the numbers in float32, of int4 2 ** 23 too large."""
    BITS: tl.constexpr = 4 if KIND == "int4" else 8
    column = tl.arange(0, 32 // BITS)[None, None, :]
    place = column % 2 * 16 + column // 2 * BITS  # of the word's halves in turn
    if KIND == "int4":  # no conversion, and a subtraction that is needed anyway
        numbers = (words[:, :, None] >> place & 15 | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        top = words[:, :, None] << (24 - place)
        if KIND == "int8":
            numbers = (top >> 24).to(tl.float32)
        else:  # the bits 0x87F00000 are where float32 has such, 2 ** 120 too small; sm_80 does not convert fp8
            numbers = (top >> 4 & -0x78100000).to(tl.float32, bitcast=True) * 2.0**120
    return numbers.reshape(words.shape[0], words.shape[1] * 32 // BITS)


@triton.jit
def dequantize_kernel(
    data_ptr,  # (rows, COLUMNS), in words
    scales_ptr,  # (rows,)
    zeros_ptr,  # (rows,) or None
    out_ptr,  # (rows, COLUMNS)
    rows,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tile `program_id(0)`, ROWS x BLOCK entries, counted along the columns."""
    launch_dependents(PDL)
    PER_WORD: tl.constexpr = 8 if KIND == "int4" else 4
    TILES: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(0) % TILES * BLOCK
    word = start // PER_WORD + tl.arange(0, BLOCK // PER_WORD)
    column = start + tl.arange(0, BLOCK)
    inside = row < rows
    words_at = row.to(tl.int64)[:, None] * (COLUMNS // PER_WORD) + word[None, :]
    words = tl.load(data_ptr + words_at, inside[:, None] & (word < COLUMNS // PER_WORD)[None, :], other=0)
    scale = tl.load(scales_ptr + row, inside, other=0.0).to(tl.float32)
    entries = _stored(words, KIND)
    if KIND == "int4":
        zero = _MIDDLE
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + row, inside, other=0).to(tl.float32)[:, None]
        entries -= 2.0**23 + zero
    entries *= scale[:, None]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    wait_for_inputs(PDL)
    tl.store(out_ptr + at, entries.to(out_ptr.dtype.element_ty), inside[:, None] & (column < COLUMNS)[None, :])


def dequantize_configs(data: Tensor, scales: Tensor, kind: str) -> list[Config]:
    """Configs of `dequantize_weight`, the most promising first."""
    longest = triton.next_power_of_2(_columns(data, scales, kind))
    configs = []
    for entries, columns, warps in ((4096, 1024, 4), (2048, 2048, 4), (8192, 1024, 8)):
        block = min(columns, longest)
        configs.append(Config.of(num_warps=warps, ROWS=entries // block, BLOCK=block))
    return configs


def dequantize_weight(
    data: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    """The weight (N, K) in `dtype`, of the same numbers as `burnish.quantize.dequantize`.

    data, scales and zeros are contiguous, and data begins at a multiple of 16 bytes. Dtypes of the scales and the
    result: float16, bfloat16 or float32.
    """
    config = config or dequantize_configs(data, scales, kind)[0]
    rows, columns = scales.numel(), _columns(data, scales, kind)
    out = data.new_empty((data.shape[0], columns_of(data, kind)), dtype=dtype)
    programs = triton.cdiv(rows, config["ROWS"]) * triton.cdiv(columns, config["BLOCK"])
    stored = (data.view(torch.int32), scales, zeros)
    launch(dequantize_kernel, (programs,), *stored, out, rows, config=config, like=data, KIND=kind, COLUMNS=columns)
    return out


def _columns(data: Tensor, scales: Tensor, kind: str) -> int:
    """How many have one scale."""
    return columns_of(data, kind) // (scales.shape[1] if kind == "int4" else 1)
