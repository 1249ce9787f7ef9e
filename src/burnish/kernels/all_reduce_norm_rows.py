"""Sum over the ranks, residual addition and normalization in one kernel for many rows: for what takes its time on the
link, where `all_reduce_norm.py` is for what is all latency.

Some programs push: they copy this rank's rows into every other's memory as they are, so that the link carries data
alone, and then write a flag for each row, the number of the call. The others, at the same time, add up: of each of
their rows they wait for the flags, read what arrived, and do the rest. So the memory of this GPU is busy while the link
is.

The programs that push come first in the grid, and wait for nobody: whatever a GPU has room for at a time, all rows
arrive in the end, and those who wait for them get on. (All of them have room anyway: `_registers`.)

A flag is written when the row is there: all threads of a program store, meet, and one warp of it passes a fence of the
system's scope, which covers what the others stored before they met, and writes the flags. Who adds up loads the flag
with `acquire` by each thread, and then the row, past the first-level cache.

There are two places for each row and flag, for odd and even calls, and a call is counted as in `all_reduce_norm.py`, by
the same counter. A rank writes to a place again in the call after the next, at the earliest. Then the next call is done
here, all of it, for `wait_for_inputs` waits for whole kernels; it needed a row or word of every other rank; and those
push nothing in a call before they are done with the one before it, this one, by the same `wait_for_inputs`. So whatever
is overwritten has been read, whichever of the two kernels the calls are by. Of one place for both, a rank could write
the next call's flag while another still waits to see this one's.

Each row has its own flag, so ranks need not agree on how they share the rows among programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.all_reduce_norm import begin, finish
from burnish.kernels.launch import (
    Config,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    target_of,
    wait_for_inputs,
)
from burnish.kernels.norms import load_vector
from burnish.parallel.symmetric import MOST_BYTES, MOST_PUSHED_ROWS

if TYPE_CHECKING:
    from burnish.parallel.symmetric import Room

_FLAGS = tl.constexpr(MOST_PUSHED_ROWS)
_WARP = 32
_PUSHED_AT_ONCE = 64  # bytes that a thread loads before it stores them: four loads on their way


@triton.jit
def settle(count):
    """What this program's threads stored before they met is there, for the whole system, before what the first `count`
    of them store after this."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $1; @p fence.acq_rel.sys; mov.b32 $0, 0; }",
        "=r,r", [count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def signal(flags, count, call):
    """Writes `call` to `count` flags in a row, one thread each: no more than 32 of them, which pass one fence."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; .reg .b64 a; mov.u32 t, %tid.x; setp.lt.u32 p, t, $2; mad.wide.u32 a, t, 4, $1; "
        "@p st.relaxed.sys.global.b32 [a], $3; mov.b32 $0, 0; }",
        "=r,l,r,r", [flags, count, call], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def acquire(flag):
    """A flag, as each thread sees it; what was written before it is seen by that thread's loads after this."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _wait(flag, call):
    """By each thread for itself: none has to meet another for it."""
    seen = acquire(flag)
    while seen != call:
        seen = acquire(flag)


@triton.jit
def _share(pushed, call, sender, receiver, share, RANKS: tl.constexpr):
    """Where the receiver, whose memory `pushed` points to, has what a sender pushes in a call: first the flags."""
    place = sender
    if sender > receiver:  # nobody sends to himself
        place = sender - 1
    return pushed + ((call & 1) * (RANKS - 1) + place) * share


@triton.jit
def _rows_of(share, DTYPE: tl.constexpr):
    return tl.multiple_of((share + _FLAGS).to(tl.pointer_type(DTYPE), bitcast=True), 16)


@triton.jit
def _push(
    x, addresses, call, rank, rows, senders, share, N: tl.constexpr, RANKS: tl.constexpr, TURNS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Every `senders`-th block of ROWS rows, from this program's on, to all others."""
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), senders):
        first = block * ROWS
        count = tl.minimum(rows - first, ROWS)
        for start in range(0, count * N, TILE):  # rows follow each other here and there
            place = start + tl.arange(0, TILE)
            mask = place < count * N
            values = tl.load(x + first * N + place, mask)
            for turn in range(1, TURNS):  # in each, ranks push in pairs: not all to the same one
                to = rank ^ turn
                if to < RANKS:
                    theirs = tl.load(addresses + to).to(tl.pointer_type(tl.int32))
                    theirs = _share(theirs, call, rank, to, share, RANKS)
                    tl.store(_rows_of(theirs, x.dtype.element_ty) + first * N + place, values, mask)
        tl.debug_barrier()
        settle(count)
        for turn in range(1, TURNS):
            to = rank ^ turn
            if to < RANKS:
                theirs = tl.load(addresses + to).to(tl.pointer_type(tl.int32))
                signal(_share(theirs, call, rank, to, share, RANKS) + first, count, call)


@triton.jit(do_not_specialize=["rank", "rows", "senders"])
def _all_reduce_norm_rows_kernel(
    x, bias, residual, weight, shift, out, total, pushed, addresses, state, rank, rows, senders, share, bias_step,
    weight_step, shift_step, eps, N: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr, TURNS: tl.constexpr,
    RMS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PER_SM: tl.constexpr, PUSHES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The first `senders` programs push, the others add up."""
    launch_dependents(PDL)
    if tl.program_id(0) < senders:
        wait_for_inputs(PDL)
        call = tl.load(state, volatile=True)  # another multiprocessor counted it up: none of this one's caches
        _push(x, addresses, call, rank, rows, senders, share, N, RANKS, TURNS, ROWS, TILE)
        begin(state, call)
    else:
        dtype: tl.constexpr = out.dtype.element_ty
        scale = None
        held: tl.constexpr = RMS and bias is None  # all three would take the registers that rows need
        if held and weight is not None:
            scale = load_vector(weight, weight_step, N, BLOCK_N)
        wait_for_inputs(PDL)
        call = tl.load(state, volatile=True)
        begin(state, call)
        column = tl.arange(0, BLOCK_N)[None, :]
        inside = column < N
        for row in range(tl.program_id(0) - senders, rows, tl.num_programs(0) - senders):
            to = row * N + column
            mine = tl.load(x + to, inside, other=0.0)  # on their way while others' rows are
            before = tl.load(residual + to, inside, other=0.0)
            for r in range(RANKS):
                if r != rank:
                    _wait(_share(pushed, call, r, rank, share, RANKS) + row, call)
            values = tl.zeros((1, BLOCK_N), tl.float32)
            for r in range(RANKS):
                found = mine
                if r != rank:
                    theirs = _rows_of(_share(pushed, call, r, rank, share, RANKS), dtype)
                    found = tl.load(theirs + to, inside, other=0.0, cache_modifier=".cg")
                values += found.to(tl.float32)
            sums = None if total is None else total + to
            if held:
                finish(values, None, before, scale, None, out + to, sums, inside, eps, N, RMS)
            else:
                added = None if bias is None else load_vector(bias, bias_step, N, BLOCK_N)
                factor = None if weight is None else load_vector(weight, weight_step, N, BLOCK_N)
                offset = None if shift is None else load_vector(shift, shift_step, N, BLOCK_N)
                finish(values, added, before, factor, offset, out + to, sums, inside, eps, N, RMS)


def all_reduce_add_norm_rows(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool,
    keep_sum: bool,
    room: Room,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """What `kernels.all_reduce_norm.all_reduce_add_norm` computes, to the bit, of more rows, of any N.

    Every rank of the room has to call this, with the same shape; configs may differ. No more rows, and none longer,
    than `burnish.parallel.symmetric` says.
    """
    N, itemsize = x.shape[-1], x.element_size()
    rows = x.numel() // N
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(x)
    total = torch.empty_like(x) if keep_sum else None
    config = config or first_config(all_reduce_norm_rows_configs, rows, N, itemsize)
    per_block, programs = config["ROWS"], config["PER_SM"] * target_of(x).num_sms
    senders = min(cdiv(rows, per_block), programs // config["PUSHES"])
    receivers = min(rows, programs - programs // config["PUSHES"])
    most = config.num_warps * _WARP * _PUSHED_AT_ONCE // itemsize
    # Vectors are read before the kernels before this one are known to be done, so a copy of them would come too late.
    steps = (0 if v is None else v.stride(0) for v in (bias, weight, shift))
    launch(
        _all_reduce_norm_rows_kernel, (senders + receivers,), x, bias, residual, weight, shift, out, total,
        room.pushed, room.pushed_addresses, room.state, room.rank, rows, senders, room.pushed_share, *steps, eps,
        config=config, like=x, registers=_registers(config), N=N, BLOCK_N=next_power_of_2(N), RANKS=room.ranks,
        TURNS=next_power_of_2(room.ranks), RMS=rms, TILE=min(most, next_power_of_2(per_block * N)),
    )  # fmt: skip
    return out, out.new_empty(0) if total is None else total


def all_reduce_norm_rows_configs(rows: int, N: int, itemsize: int) -> list[Config]:
    """How to push, add up and normalize rows of N entries, the most promising first: how many ROWS are pushed with one
    fence, of how many programs one PUSHES, and how many there are for each multiprocessor.

    A fence waits for the link and back, 2 us; meanwhile 450 GB/s are 900 kB, 7 of each of 132 multiprocessors: hence 16
    KiB and more. With fewer programs that push, fewer multiprocessors have their own loads and stores wait behind those
    that the link holds up. Of rows that the kernel for few takes as well there is one config: to compile more is not
    worth what they might gain.
    """
    row_bytes = next_power_of_2(N) * itemsize
    warps = min(32, max(4, row_bytes // (32 * _WARP)))  # 32 bytes a thread: 16 numbers of two bytes
    tried = [(16, 4, 32), (32, 8, 32), (64, 16, 32), (16, 4, 24)]
    tried = tried[: 1 if rows * N * itemsize <= MOST_BYTES else None]
    configs = (
        Config.of(
            num_warps=warps,
            ROWS=min(_WARP, max(1, (kib << 10) // row_bytes)),
            PER_SM=max(1, most_warps // warps),
            PUSHES=pushes,
        )
        for kib, pushes, most_warps in tried
    )
    return list(dict.fromkeys(configs))


def _registers(config: Config) -> int:
    """Of a thread, so that a multiprocessor, which has 64 Ki, holds all programs that are its share."""
    return min(255, (64 << 10) // (config["PER_SM"] * config.num_warps * _WARP) // 8 * 8)
