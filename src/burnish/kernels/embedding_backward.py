"""The gradient of a table: what came back for each lookup, added to the table's rows, each of which is written once.

Lookups are grouped by rows by a sort of our own: chunks of them by comparing each with each, and the chunks are merged
by rank, for which every lookup counts in all chunks, by binary searches, those of lesser rows and those of its own.
Where a row's lookups begin, and how many there are, is left beside. Then a program for a few rows adds theirs up in the
order of their places, and writes zeros for rows that nobody looked up. Nothing is filled beforehand, and nothing is
added by atomics.

Of a row that is looked up very often (padding) one program would read for long. So the sorted lookups are cut into
blocks; what a block has of rows that reach beyond it is added up by a program of its own, and the row adds such parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import (
    Config,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    wait_for_inputs,
)

_CHUNK = 1024  # lookups that are sorted by comparing each with each: 12 million comparisons for 12288
_BLOCK = 16  # sorted lookups; of a row within one block the row's own program adds them up
MAX_ENTRIES = 2**31 // _CHUNK - 2  # as row and place within a chunk share 32 bits, and one row more is for wrong ids

_SORT = Config.of(8, CHUNK=_CHUNK, PLACES=32, OTHERS=256)  # four rounds of loads, each of 32 comparisons a thread
_RANK = Config.of(8, CHUNK=_CHUNK, PLACES=64, CHUNKS=16)
_NONE = tl.constexpr(2**31 - 1)  # the key of no lookup, after all others
_LEVELS = tl.constexpr(_CHUNK.bit_length() - 1)


@triton.jit
def _key(ids, lookup, place, lookups, entries, CHUNK: tl.constexpr):
    """Row * CHUNK + place in the chunk, by which lookups are sorted; a wrong id is of the row past all others."""
    row = tl.load(ids + lookup, lookup < lookups, other=0)
    row = tl.where((row >= 0) & (row < entries), row, entries).to(tl.int32)
    return tl.where(lookup < lookups, row * CHUNK + place, _NONE)


@triton.jit(do_not_specialize=["lookups", "entries"])
def _sort_kernel(
    ids, keys, spans, lookups, entries, CHUNK: tl.constexpr, PLACES: tl.constexpr, OTHERS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Moves PLACES keys to where they belong in their chunk; programs past all chunks say that rows have no lookups."""
    launch_dependents(PDL)
    programs = tl.cdiv(lookups, PLACES)
    wait_for_inputs(PDL)
    if tl.program_id(0) < programs:
        lookup = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
        start = tl.program_id(0) * PLACES // CHUNK * CHUNK
        key = _key(ids, lookup, lookup - start, lookups, entries, CHUNK)
        less = tl.zeros((PLACES, OTHERS), tl.int32)
        for first in range(0, tl.minimum(CHUNK, lookups - start), OTHERS):
            place = first + tl.arange(0, OTHERS)
            other = _key(ids, start + place, place, lookups, entries, CHUNK)
            less += (other[None, :] < key[:, None]).to(tl.int32)
        tl.store(keys + start + tl.sum(less, 1), key, lookup < lookups)
    else:
        row = (tl.program_id(0) - programs) * CHUNK + tl.arange(0, CHUNK)
        tl.store(spans + row, tl.zeros((CHUNK,), tl.int64), row < entries)


@triton.jit
def _nearer(keys, start, less, bound, lookups, WIDTH: tl.constexpr):
    """`less`, and WIDTH more where that many more keys are less than `bound`."""
    place = start + less + (WIDTH - 1)
    return less + tl.where(tl.load(keys + place, place < lookups, other=_NONE) < bound, WIDTH, 0)


@triton.jit
def _two_searches(keys, start, first, second, lookups, CHUNK: tl.constexpr):
    """How many keys of the sorted chunk that begins at `start` are less than `first`, and how many than `second`."""
    less, less_too = tl.zeros_like(first + start), tl.zeros_like(second + start)
    for level in tl.static_range(_LEVELS):
        less = _nearer(keys, start, less, first, lookups, CHUNK >> (level + 1))
        less_too = _nearer(keys, start, less_too, second, lookups, CHUNK >> (level + 1))
    return _nearer(keys, start, less, first, lookups, 1), _nearer(keys, start, less_too, second, lookups, 1)


@triton.jit(do_not_specialize=["lookups", "entries"])
def _rank_kernel(
    keys, places, rows, spans, lookups, entries, CHUNK: tl.constexpr, PLACES: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Moves PLACES lookups to where they belong among all: their places and rows; the first of a row notes its span."""
    launch_dependents(PDL)
    chunks = tl.cdiv(lookups, CHUNK)
    index = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    own = index // CHUNK
    real = index < lookups
    wait_for_inputs(PDL)
    key = tl.load(keys + index, real, other=0)
    row = key // CHUNK
    lesser = tl.zeros((PLACES,), tl.int32)  # lookups of lesser rows
    before = tl.zeros((PLACES,), tl.int32)  # of this row that come earlier
    count = tl.zeros((PLACES,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS))[None, :]
        low, high = _two_searches(
            keys, chunk * CHUNK, (row * CHUNK)[:, None], (row * CHUNK + CHUNK)[:, None], lookups, CHUNK
        )
        within = tl.where(chunk == own[:, None], (index % CHUNK)[:, None] - low, 0)
        lesser += tl.sum(low, 1)
        count += tl.sum(high - low, 1)
        before += tl.sum(tl.where(chunk < own[:, None], high - low, within), 1)
    rank = lesser + before
    tl.store(places + rank, own * CHUNK + key % CHUNK, real)
    tl.store(rows + rank, row, real)
    span = (count.to(tl.int64) << 32) | lesser.to(tl.int64)
    tl.store(spans + row, span, real & (before == 0) & (row < entries))


@triton.jit(do_not_specialize=["lookups", "entries"])
def _parts_kernel(
    grad, places, rows, parts, lookups, entries, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Of a block of sorted lookups two sums: of the row that began before it, and of the one that goes on after it."""
    launch_dependents(PDL)
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    start = block * BLOCK
    end = tl.minimum(start + BLOCK, lookups)
    index = (start + tl.arange(0, BLOCK))[:, None]
    wait_for_inputs(PDL)
    row = tl.load(rows + index, index < end, other=-1)
    first, last = tl.load(rows + start), tl.load(rows + end - 1)
    before, after = tl.load(rows + start - 1, start > 0, other=-1), tl.load(rows + end, end < lookups, other=-1)
    began = (before == first) & (first < entries)
    goes_on = (after == last) & (last < entries) & ((last != first) | (before != first))
    if began | goes_on:
        wanted = (row == tl.where(began, first, -2)) | (row == tl.where(goes_on, last, -2))
        place = tl.load(places + index, wanted, other=0).to(tl.int64)
        values = tl.load(grad + place * N + column, wanted & (column < N), other=0.0).to(tl.float32)
        out = parts + block.to(tl.int64) * (2 * N) + column
        if began:
            tl.store(out, tl.sum(tl.where(row == first, values, 0.0), 0, keep_dims=True), column < N)
        if goes_on:
            tl.store(out + N, tl.sum(tl.where(row == last, values, 0.0), 0, keep_dims=True), column < N)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _place(places, start, number, count):
    return tl.load(places + start + number, number < count, other=0).to(tl.int64)


@triton.jit
def _values(grad, place, number, count, column, N: tl.constexpr):
    within = tl.where(number < count, N, 0)
    return tl.load(grad + place[:, None] * N + column, column < within[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["entries"])
def _rows_kernel(
    grad, places, spans, parts, table_grad, scale, out, entries, table_stride, N: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of ROWS rows. AHEAD lookups of each, 2 or 4, are on their way at a time."""
    launch_dependents(PDL)
    blocks = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // blocks * ROWS
    column = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    number = tl.arange(0, ROWS)
    row = first + number
    mask = (row < entries)[:, None] & (column < N)
    wait_for_inputs(PDL)
    span = tl.load(spans + row, row < entries, other=0)
    if table_grad is not None:
        total = tl.load(table_grad + row[:, None].to(tl.int64) * table_stride + column, mask, other=0.0).to(tl.float32)
        if scale is not None:
            total *= tl.load(scale).to(tl.float32)
    else:
        total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    start, count = (span & 0xFFFFFFFF).to(tl.int32), (span >> 32).to(tl.int32)
    reaches = (count > 0) & (start // BLOCK != (start + count - 1) // BLOCK)
    count = tl.where(reaches, 0, count)
    # Bit n is set where a row has n lookups in one block, and the bit above where one has parts.
    found = tl.reduce(1 << tl.where(reaches, BLOCK + 1, count), 0, _or)
    counts = found & ((2 << BLOCK) - 1)
    done = 0
    while (counts >> (done + 1)) != 0:
        one, two = _place(places, start, done, count), _place(places, start, done + 1, count)
        if AHEAD == 4:
            three, four = _place(places, start, done + 2, count), _place(places, start, done + 3, count)
        of_one, of_two = (
            _values(grad, one, done, count, column, N), _values(grad, two, done + 1, count, column, N)
        )  # fmt: skip
        if AHEAD == 4:
            of_three, of_four = (
                _values(grad, three, done + 2, count, column, N), _values(grad, four, done + 3, count, column, N)
            )  # fmt: skip
            total = (total + of_one) + of_two + of_three + of_four
        else:
            total = (total + of_one) + of_two
        done += AHEAD
    if counts != found:
        for other in range(0, tl.minimum(ROWS, entries - first)):
            of_other = tl.load(spans + first + other)
            begin, many = (of_other & 0xFFFFFFFF).to(tl.int32), (of_other >> 32).to(tl.int32)
            block, last = begin // BLOCK, (begin + many - 1) // BLOCK
            if (many > 0) & (block != last):
                added = tl.zeros((PARTS, BLOCK_N), tl.float32)
                for start_part in range(block, last + 1, PARTS):
                    part = (start_part + tl.arange(0, PARTS))[:, None]
                    slot = 2 * part + (part == block).to(tl.int32)
                    added += tl.load(parts + slot.to(tl.int64) * N + column, (part <= last) & (column < N), other=0.0)
                total += tl.where(number[:, None] == other, tl.sum(added, 0, keep_dims=True), 0.0)
    tl.store(out + row[:, None].to(tl.int64) * N + column, total.to(out.dtype.element_ty), mask)


def embedding_backward_configs(N: int) -> list[Config]:
    """How to write rows of N entries, the most promising first."""
    widest = max(32, next_power_of_2(N))
    block = next((b for b in (256, 128) if N % b == 0), 256)
    found = []
    for rows, columns, ahead, warps in ((8, block, 2, 4), (4, block, 2, 2), (4, block, 4, 4), (4, 512, 2, 4)):
        columns = min(columns, widest)
        # Eight entries or more in a thread: with fewer the compiler spills one, though it has registers left.
        warps = min(warps, rows * columns // 256) if columns >= 128 else 1
        found.append(Config.of(warps, ROWS=rows, BLOCK_N=columns, AHEAD=ahead))
    return list(dict.fromkeys(found))


def embedding_backward(
    grad: Tensor,
    ids: Tensor,
    entries: int,
    table_grad: Tensor | None = None,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """For each of `entries` rows the sum of the `grad` of all places where `ids` names it: (entries, N), contiguous.

    ids of any shape, int32 or int64, not empty; grad (*ids.shape, N) float16, bfloat16 or float32, whose dtype the
    result has. `table_grad` (entries, N), of any of these dtypes, is added, times `scale`, a number in a tensor, where
    there is one. Added up in float32, rounded once, the same bits each time. At most MAX_ENTRIES entries.
    """
    N = grad.shape[-1]
    config = config or first_config(embedding_backward_configs, N)
    grad, ids = grad.contiguous(), ids.contiguous()
    if table_grad is not None and table_grad.stride(1) != 1:
        table_grad = table_grad.contiguous()
    lookups = ids.numel()
    blocks = cdiv(lookups, _BLOCK)
    keys, places, rows = (grad.new_empty(lookups, dtype=torch.int32) for _ in range(3))
    spans = grad.new_empty(entries, dtype=torch.int64)  # of each row the first of its sorted lookups; their number
    programs = cdiv(lookups, _SORT["PLACES"]) + cdiv(entries, _CHUNK)
    launch(_sort_kernel, (programs,), ids, keys, spans, lookups, entries, config=_SORT, like=grad)
    programs = cdiv(lookups, _RANK["PLACES"])
    launch(_rank_kernel, (programs,), keys, places, rows, spans, lookups, entries, config=_RANK, like=grad)
    columns = cdiv(N, config["BLOCK_N"])
    parts = grad.new_empty(2 * blocks if blocks > 1 else 0, N, dtype=torch.float32)
    if blocks > 1:
        launch(
            _parts_kernel, (blocks * columns,), grad, places, rows, parts, lookups, entries,
            config=Config.of(4, BLOCK=_BLOCK, BLOCK_N=config["BLOCK_N"]), like=grad, N=N,
        )  # fmt: skip
    out = grad.new_empty(entries, N)
    launch(
        _rows_kernel, (cdiv(entries, config["ROWS"]) * columns,), grad, places, spans, parts, table_grad, scale, out,
        entries, 0 if table_grad is None else table_grad.stride(0), config=config, like=grad, N=N, BLOCK=_BLOCK,
        PARTS=_BLOCK,
    )  # fmt: skip
    return out
