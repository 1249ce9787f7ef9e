"""The real tokens of a padded batch: found by one launch or two, their inputs taken by one, put back by one.

The host may learn how many there are from memory of its own that the kernel writes to. PyTorch's operators for the same
(nonzero, sum, cumsum, padding) are 15 launches, and two waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, cdiv, launch, launch_dependents, next_power_of_2, wait_for_inputs

_CONFIG, _COUNTS_CONFIG = Config.of(4, BLOCK=512, MORE=2048), Config.of(4, BLOCK=1024)
_ALONE = 8192  # places: as far, each program counts the tokens of all rows before its own itself, in one launch
_WIDEST = 2048  # entries of a token that one program moves,
_AT_ONCE = 4  # of so many tokens: 4096 places of 768 entries take 2.8 us, and 5.7 where each is a program's (H200)


@triton.jit
def _real(mask, row, column, stride_row, stride_column, inside):
    """1 for a real token, 0 for padding and outside."""
    pointers = mask + tl.cast(row, tl.int64) * stride_row + tl.cast(column, tl.int64) * stride_column
    return (tl.load(pointers, inside, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "length", "stride_row"])
def _counts_kernel(mask, counts, rows, length, stride_row, stride_column, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row's number of real tokens, and after those of all rows whether there are gaps between them."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    starts = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, length, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < length
        real = _real(mask, row, column, stride_row, stride_column, inside)
        follows = _real(mask, row, column - 1, stride_row, stride_column, inside & (column > 0))
        found += real
        starts += real * (1 - follows)
    tl.store(counts + row, tl.sum(found, 0))
    tl.store(counts + rows + row, (tl.sum(starts, 0) > 1).to(tl.int32))


@triton.jit(do_not_specialize=["rows", "length", "step", "stride_row"])
def _tokens_kernel(
    mask, counts, places, nearest, columns, cu_seqlens, sources, found, rows, length, step, stride_row, stride_column,
    ALL: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, MORE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row's tokens; the last program, past all rows, adds the dummies and tells the host what was found.

    ALL: there are as many tokens as places; each place of padding gives one dummy, from the end on.
    FLAT: the mask's rows follow each other as its columns do, so that no place has to be divided by their length.
    """
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    before = tl.zeros((MORE,), tl.int32)
    gaps = tl.zeros((MORE,), tl.int32)
    if counts is None:
        for first in range(0, row * length, MORE):
            place = first + tl.arange(0, MORE)
            inside = place < row * length
            if FLAT:
                before += _real(mask, 0, place, stride_row, stride_column, inside)
            else:
                before += _real(mask, place // length, place % length, stride_row, stride_column, inside)
    else:
        for first in range(0, row, MORE):
            other = first + tl.arange(0, MORE)
            before += tl.load(counts + other, other < row, other=0)
            gaps += tl.load(counts + rows + other, other < row, other=0)
    start = tl.sum(before, 0)
    tl.store(cu_seqlens + row, start)
    if row < rows:
        token = start
        for first in range(0, length, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < length
            real = _real(mask, row, column, stride_row, stride_column, inside)
            index = token + tl.cumsum(real, 0) - real
            place = row * length + column
            tl.store(places + index, place.to(tl.int64), real != 0)
            tl.store(nearest + index, place.to(tl.int64), real != 0)
            tl.store(columns + index, column.to(tl.int64), real != 0)
            tl.store(sources + place, tl.where(real != 0, index, -1), inside)
            if ALL:
                dummy = rows * length - 1 - (place - index)  # as much padding comes before
                padding = inside & (real == 0)
                tl.store(places + dummy, tl.zeros((BLOCK,), tl.int64) + rows * length, padding)
                tl.store(nearest + dummy, tl.zeros((BLOCK,), tl.int64) + (rows * length - 1), padding)
                tl.store(columns + dummy, tl.zeros((BLOCK,), tl.int64) + (length - 1), padding)
            token += tl.sum(real, 0)
    else:
        if not ALL:
            total = tl.cdiv(tl.maximum(start, 1), step) * step
            for first in range(start, total, BLOCK):
                index = first + tl.arange(0, BLOCK)
                dummy = index < total
                tl.store(places + index, tl.zeros((BLOCK,), tl.int64) + rows * length, dummy)
                tl.store(nearest + index, tl.zeros((BLOCK,), tl.int64) + (rows * length - 1), dummy)
                tl.store(columns + index, tl.zeros((BLOCK,), tl.int64) + (length - 1), dummy)
            sequences = tl.cdiv(step, length)
            for first in range(0, sequences, BLOCK):
                sequence = first + tl.arange(0, BLOCK)
                end = tl.minimum(start + (sequence + 1) * length, total)
                tl.store(cu_seqlens + rows + 1 + sequence, end, sequence < sequences)
        if found is not None:
            tl.store(found, start)
            tl.store(found + 1, tl.sum(gaps, 0))


def find_tokens(
    mask: Tensor, places: Tensor, nearest: Tensor, columns: Tensor, cu_seqlens: Tensor, sources: Tensor,
    found: Tensor | None, step: int | None, ask_gaps: bool,
) -> None:  # fmt: skip
    """Writes where the real tokens of `mask` (B, S) are, of any dtype and strides; nothing of it is empty.

    The number of tokens is rounded up to a multiple of `step`, at least one, by dummies: what follows has room for
    B * S + step tokens. Without a step there are as many tokens as places, B * S, the dummies in no sequence.

    Args:
        places: (T,) int64, row * S + column of each token; a dummy's is B * S.
        nearest: (T,) int64, the same, a dummy's B * S - 1: to read at.
        columns: (T,) int64, that of `nearest`.
        cu_seqlens: (B + 1 + ceil(step / S),) int32, where the tokens of each row start, and their end; dummies are
            sequences of at most S. Without a step (B + 1,).
        sources: (B * S,) int32, which token is at each place; -1 at padding.
        found: (2,) int32, of pinned memory on CUDA: the number of real tokens, and, where `ask_gaps`, of rows with
            gaps between them. To be read once the stream has come so far. None where nobody asks.
    """
    rows, length = mask.shape
    counts = None
    if ask_gaps or rows * length > _ALONE:
        counts = torch.empty(2 * rows, dtype=torch.int32, device=mask.device)
        launch(_counts_kernel, (rows,), mask, counts, rows, length, *mask.stride(), config=_COUNTS_CONFIG, like=mask)
    launch(
        _tokens_kernel, (rows + 1,), mask, counts, places, nearest, columns, cu_seqlens, sources, found, rows, length,
        step or 0, *mask.stride(), config=_CONFIG, like=mask, ALL=step is None,
        FLAT=mask.stride(0) == length * mask.stride(1),
    )  # fmt: skip


@triton.jit
def _take(source, out, number, tokens, nearest, column, index, inside, BY_COLUMN: tl.constexpr):
    if source is not None:
        place = column if (BY_COLUMN >> number) & 1 else nearest
        tl.store(out + tl.cast(number, tl.int64) * tokens + index, tl.load(source + place, inside), inside)


@triton.jit
def _take_kernel(
    nearest, columns, first, second, third, fourth, out, tokens, BY_COLUMN: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of each source: number i by their columns where bit i of BY_COLUMN is set."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tokens
    place = tl.load(nearest + index, inside, other=0)
    column = tl.load(columns + index, inside, other=0)
    _take(first, out, 0, tokens, place, column, index, inside, BY_COLUMN)
    _take(second, out, 1, tokens, place, column, index, inside, BY_COLUMN)
    _take(third, out, 2, tokens, place, column, index, inside, BY_COLUMN)
    _take(fourth, out, 3, tokens, place, column, index, inside, BY_COLUMN)


MOST_TAKEN = 4  # sources of one launch


def take(nearest: Tensor, columns: Tensor, sources: Sequence[Tensor], by_column: Sequence[bool]) -> Tensor:
    """Of each of up to four int64 sources what is at every token's place, or column: (sources, T). They are vectors,
    of any strides."""
    tokens = nearest.shape[0]
    out = nearest.new_empty((len(sources), tokens))
    given = [source.contiguous() for source in sources] + [None] * (MOST_TAKEN - len(sources))
    bits = sum(1 << i for i, by in enumerate(by_column) if by)
    launch(
        _take_kernel, (cdiv(tokens, 256),), nearest, columns, *given, out, tokens, BY_COLUMN=bits,
        config=Config.of(4, BLOCK=256), like=nearest,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["places"])
def _put_back_kernel(
    packed, sources, out, places, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """BLOCK entries of the tokens at ROWS places, or zeros."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    source = tl.load(sources + place, place < places, other=-1).to(tl.int64)
    values = tl.load(packed + source * width + column, (source >= 0) & (column < width), other=0)
    tl.store(out + place.to(tl.int64) * width + column, values, (place < places) & (column < width))


def put_back(packed: Tensor, sources: Tensor) -> Tensor:
    """Of packed tokens (T, ...) those at each place (B * S, ...), zeros where `sources` (B * S,) is negative."""
    packed = packed.contiguous()
    out = packed.new_empty((sources.shape[0], *packed.shape[1:]))
    places = sources.shape[0]
    width = out.numel() // places
    block = min(next_power_of_2(width), _WIDEST)
    launch(
        _put_back_kernel, (cdiv(places, _AT_ONCE), cdiv(width, block)), packed, sources, out, places, width,
        config=Config.of(max(1, min(4, block // 256)), ROWS=_AT_ONCE, BLOCK=block), like=packed,
    )  # fmt: skip
    return out
