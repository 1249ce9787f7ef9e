"""Sum over the ranks, residual addition and normalization in one kernel, by memory that the GPUs share over NVLink.

Every rank writes its rows into every other's memory and adds up what it finds in its own: one way over the link, where
a ring takes several. For few rows, whose time is all latency.

A row travels in words of 64 bits, half of it data and half the number of the call. A word arrives whole, so who finds
the number has the data: no fence, no flag that follows the data, and nothing to be cleared. (NCCL's LL protocol does
so.) There are two places for each word, for odd and even calls. A rank writes to the same place again in the call after
the next; then the next one is done here, for which the others' rows were needed, which they sent after they were done
with this one: `wait_for_inputs` sees to that. So nothing is overwritten before it was read, without a barrier.

The number of the call is in device memory, and the kernel counts it up: replays of a CUDA graph count as well.
All ranks add in the order of the ranks, so they have the same bits. As by NCCL between two ranks the sum is rounded to
x's dtype, and so are, as by torch, the sums with bias and residual.

A rank that makes no call, or another one, leaves the others waiting, as with any collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.norms import load_vector, normalize

if TYPE_CHECKING:
    from burnish.parallel.symmetric import Room


@triton.jit
def send(pointers, words, mask):
    """Writes int64 words to where another GPU waits for them. Each arrives whole, in any order."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,l,r", [pointers, words, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def receive(pointers, mask, call):
    """The lower halves of int64 words, once all of them say that they are of this call; 0 where `mask` is not set."""
    words = tl.load(pointers, mask, other=0, volatile=True)  # relaxed, of the system's scope
    while tl.min(tl.where(mask & ((words >> 32).to(tl.int32) != call), 0, 1)) == 0:
        words = tl.load(pointers, mask, other=0, volatile=True)
    return words.to(tl.int32)


@triton.jit
def _values(words, DTYPE: tl.constexpr):
    """What int32 words hold, one number of 32 bits or two of 16, in float32."""
    if DTYPE.primitive_bitwidth == 32:
        values = words.to(DTYPE, bitcast=True).to(tl.float32)
    else:
        low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        values = tl.interleave(low, high)
    return values


@triton.jit
def begin(state, call):
    """Counts the call up once all programs know its number."""
    following = tl.where(call == -1, 2, call + 1)  # comes round, without the 0 that fresh words have
    programs = tl.num_programs(0)
    tl.debug_barrier()  # one thread counts for all of them: their loads have to come before
    if programs == 1:
        tl.store(state, following)
    else:
        if tl.atomic_add(state + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(state + 1, 0)
            tl.store(state, following)


@triton.jit
def finish(
    values, added, before, scale, offset, out, total, mask, eps, N: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Stores a row (1, block), summed over the ranks in float32, with bias and residual, and normalized."""
    dtype: tl.constexpr = out.dtype.element_ty
    values = values.to(dtype)
    if added is not None:
        values = (values.to(tl.float32) + added.to(tl.float32)).to(dtype)
    values = (values.to(tl.float32) + before.to(tl.float32)).to(dtype)
    if total is not None:
        tl.store(total, values, mask)
    normed = normalize(values.to(tl.float32), mask, eps, N, RMS)
    if scale is not None:
        normed = normed * scale.to(tl.float32)
    if offset is not None:
        normed = normed + offset.to(tl.float32)
    tl.store(out, normed.to(dtype), mask)


@triton.jit(do_not_specialize=["rank"])
def _all_reduce_norm_kernel(
    x, bias, residual, weight, shift, out, total, words, addresses, state, rank, capacity, bias_step, weight_step,
    shift_step, eps, N: tl.constexpr, BLOCK_N: tl.constexpr, PER_WORD: tl.constexpr, RANKS: tl.constexpr,
    RMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row a program. `x` points to the int32 words of rows (N / PER_WORD,)."""
    launch_dependents(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    added, scale, offset = None, None, None
    if bias is not None:
        added = load_vector(bias, bias_step, N, BLOCK_N)
    if weight is not None:
        scale = load_vector(weight, weight_step, N, BLOCK_N)
    if shift is not None:
        offset = load_vector(shift, shift_step, N, BLOCK_N)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    call = tl.load(state, volatile=True)  # another multiprocessor counted it up: none of this one's caches
    word = tl.arange(0, BLOCK_N // PER_WORD)[None, :]
    mask = word < N // PER_WORD
    place = row * (N // PER_WORD) + word  # in what one rank sends to another
    half = (call & 1).to(tl.int64) * RANKS * capacity
    mine = tl.load(x + place, mask, other=0)
    sent = (mine.to(tl.int64) & 0xFFFFFFFF) | (call.to(tl.int64) << 32)
    for r in range(RANKS):  # not unrolled: 8 ranks' addresses would be held at once
        if r != rank:
            theirs = tl.load(addresses + r).to(tl.pointer_type(tl.int64))
            send(theirs + half + rank * capacity + place, sent, mask)
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = column < N
    to = row * N + column
    before = tl.load(residual + to, inside, other=0.0)
    begin(state, call)
    values = tl.zeros((1, BLOCK_N), tl.float32)
    for r in range(RANKS):
        found = mine
        if r != rank:
            found = receive(words + half + r * capacity + place, mask, call)
        values += _values(found, dtype)
    finish(values, added, before, scale, offset, out + to, None if total is None else total + to, inside, eps, N, RMS)


def all_reduce_add_norm(
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
    """x summed over the ranks, with bias and residual added, normalized; and the sum, empty without `keep_sum`.

    x and residual (..., N), of float16, bfloat16 or float32; bias (N,) of x's dtype or None; weight and shift of the
    norm (N,) or None, each of its own dtype. Both results are x's, contiguous. Every rank of the room has to call this,
    with the same shape. No more rows, and none longer, than `burnish.parallel.symmetric` says; N even for two bytes an
    entry.
    """
    N = x.shape[-1]
    rows = x.numel() // N
    per_word = 4 // x.element_size()
    x, residual = x.contiguous(), residual.contiguous()
    if x.storage_offset() % per_word:  # words are aligned
        x = x.clone()
    out = torch.empty_like(x)
    total = torch.empty_like(x) if keep_sum else None
    config = config or all_reduce_norm_configs(N, x.element_size())[0]
    # Vectors are read before the kernels before this one are known to be done, so a copy of them would come too late.
    steps = (0 if v is None else v.stride(0) for v in (bias, weight, shift))
    launch(
        _all_reduce_norm_kernel, (rows,), x.view(torch.int32), bias, residual, weight, shift, out, total, room.words,
        room.addresses, room.state, room.rank, room.capacity, *steps, eps,
        config=config, like=x, N=N, BLOCK_N=triton.next_power_of_2(N), PER_WORD=per_word, RANKS=room.ranks, RMS=rms,
    )  # fmt: skip
    return out, out.new_empty(0) if total is None else total


def all_reduce_norm_configs(N: int, itemsize: int) -> list[Config]:
    """How to exchange and normalize rows of N entries, the most promising first: with 8 words a thread, with 4, which
    are sent sooner, or with 16, by fewer warps, which meet sooner."""
    words = max(1, triton.next_power_of_2(N) * itemsize // 4)
    warps = dict.fromkeys(min(32, max(1, words // per_warp)) for per_warp in (256, 128, 512))
    return [Config.of(num_warps=w) for w in warps]
