"""The next token from logits: the largest, or a draw among those that top-k, top-p and min-p keep.

A row is split among programs, and the last to arrive for it combines what they found. There is no sort: each filter
keeps what is at or above some logit. `_search_kernel` finds that, as an integer in the order of the logits, BITS bits a
launch: the programs add up what lies at or above each of the 2**BITS numbers that it may begin with. So the time does
not depend on the logits. Each launch needs sums over whole rows from the one before, and the end of a launch is the
barrier that is safe however many programs there are. One launch with one program for a row would read its 256 KiB (at
V=128256 in bfloat16) through one multiprocessor as often, more than 2 us each time, and make all comparisons there.
Source of the search: as radix selection, Alabi et al., "Fast k-selection algorithms for graphics processing units"
(2012); of the draw: the Gumbel-max trick, with which it is one more largest value.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, Target, launch, launch_dependents, target_of, wait_for_inputs

_KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # of a float32 made from it, that may be set
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_LOG2_E = tl.constexpr(math.log2(math.e))
_NEAREST_TO_1 = tl.constexpr(1 - 2.0**-24)
_GROUP = tl.constexpr(16)  # comparisons of each token at a time
_PENALIZED_BLOCK = 512  # with more a thread spills registers on sm_80: the exact division is a call


@triton.jit
def _load_logits(logits, token, size):
    """In float32; NaN, and what is beyond the row, as -infinity."""
    x = tl.load(logits + token, token < size, other=-float("inf")).to(tl.float32)
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def _ordered(x):
    """Unsigned integers in the order of the numbers; of 0.0 and -0.0, which is not below 0, the same."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x < 0, ~bits, bits | 0x80000000)


@triton.jit
def _scaled(x, inverse_temperature):
    return tl.minimum(x * inverse_temperature, _LARGEST)  # infinity less itself would be NaN


@triton.jit
def _relative(scores, logits, largest, inverse_temperature):
    """Probabilities as shares of the largest one; `largest` is where that token's number lies."""
    first = tl.load(logits + tl.load(largest)).to(tl.float32)
    first = tl.maximum(_scaled(tl.where(first == first, first, -float("inf")), inverse_temperature), -_LARGEST)
    return tl.math.exp2((scores - first) * _LOG2_E)


@triton.jit
def _gumbel(seed, step, row, first, BLOCK: tl.constexpr):
    """The noise of the tokens from `first` on, as burnish.ops.sample_token states it."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low, high = (step & 0xFFFFFFFF).to(tl.uint32), ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad, low, high, row)
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _NEAREST_TO_1)  # 2**-32
    # -log(1 - u); the series where 1 - u would round, up to u**6 / 6, which is below 2**-27 of it.
    series = uniform * (1 + uniform * (1 / 2 + uniform * (1 / 3 + uniform * (1 / 4 + uniform * (1 / 5)))))
    return -tl.log(tl.where(uniform < 0.03125, series, -tl.log(1 - uniform)))


@triton.jit
def _is_last(counter, programs):
    """Whether all other programs that count there are done, and what they stored is there to load (.cg)."""
    tl.debug_barrier()  # one thread counts for all of them: their stores have to come before
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)  # as the next launch wants it
    return last


@triton.jit
def _choose_kernel(
    logits, seed, step, largest, least, out, best_scores, best_tokens, counter, size, stride, seed_step, step_step,
    inverse_temperature, min_p, SAMPLE: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The token of the largest logit or, with SAMPLE, of the largest sum with the noise; PROGRAMS for each row.

    Where given, `largest` is the row's most probable token, for min_p, and `least` the least kept logit, ordered.
    """
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row, program = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * stride
    token = program * CHUNK + tl.arange(0, CHUNK)
    scores = _load_logits(logits, token, size)
    if SAMPLE:
        key = _ordered(scores)
        scores = _scaled(scores, inverse_temperature)
        noise_row = tl.where(seed_step == 0, row, 0)
        noise = _gumbel(
            tl.load(seed + row * seed_step),
            tl.load(step + row * step_step).to(tl.int64),
            noise_row,
            program * CHUNK,
            CHUNK,
        )
        noisy = scores + noise
        if least is not None:
            noisy = tl.where(key >= tl.load(least + row).to(tl.uint32, bitcast=True), noisy, -float("inf"))
        if largest is not None:
            share = _relative(scores, logits, largest + row, inverse_temperature)
            noisy = tl.where(share >= min_p, noisy, -float("inf"))
        scores = noisy
    best, at = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    chosen = program * CHUNK + at
    if PROGRAMS == 1:
        tl.store(out + row, chosen.to(tl.int64))
    else:
        tl.store(best_scores + row * PROGRAMS + program, best)
        tl.store(best_tokens + row * PROGRAMS + program, chosen)
        if _is_last(counter + row, PROGRAMS):
            other = tl.arange(0, triton.next_power_of_2(PROGRAMS))
            mask = other < PROGRAMS
            theirs = tl.load(best_scores + row * PROGRAMS + other, mask, other=-float("inf"), cache_modifier=".cg")
            _, where = tl.max(theirs, 0, return_indices=True, return_indices_tie_break_left=True)
            first = tl.load(best_tokens + row * PROGRAMS + where, cache_modifier=".cg")
            tl.store(out + row, first.to(tl.int64))


@triton.jit(do_not_specialize=["shift"])
def _search_kernel(
    logits, largest, floor, least, sums, counter, size, stride, inverse_temperature, wanted, shift,
    SHARES: tl.constexpr, FIRST: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BITS more bits, from bit `shift` up, of `least`: the largest number with `wanted` tokens at or above it.

    With SHARES those are not counted but their probabilities added, and `wanted` is a part of all; `floor`, where
    given, says of which tokens. `sums` is (rows, PROGRAMS, 2**BITS) float32: of all, then of those at or above each.
    """
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row, program = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * stride
    sums += row * PROGRAMS * (1 << BITS)
    token = program * CHUNK + tl.arange(0, CHUNK)
    x = _load_logits(logits, token, size)
    key = tl.where(token < size, _ordered(x), 0)
    if SHARES:
        shares = _relative(_scaled(x, inverse_temperature), logits, largest + row, inverse_temperature)
        if floor is not None:
            shares = tl.where(key >= tl.load(floor + row).to(tl.uint32, bitcast=True), shares, 0.0)
    begin = tl.load(least + row).to(tl.uint32, bitcast=True) if not FIRST else tl.zeros((), tl.uint32)
    for group in range(0, 1 << BITS, _GROUP):  # all at once would spill registers on sm_80
        number = group + tl.arange(0, _GROUP)
        # That `begin` itself is small enough is known: in its place stands the sum of all.
        bound = tl.where(number == 0, 0, begin + (number.to(tl.uint32) << shift))
        above = key[:, None] >= bound[None, :]
        if SHARES:
            tl.store(sums + program * (1 << BITS) + number, tl.sum(tl.where(above, shares[:, None], 0.0), 0))
        else:
            tl.store(sums + program * (1 << BITS) + number, tl.sum(above.to(tl.float32), 0))  # exact up to 2**24
    if _is_last(counter + row, PROGRAMS):
        each = tl.arange(0, 1 << BITS)
        other = tl.arange(0, triton.next_power_of_2(PROGRAMS))[:, None]
        theirs = tl.load(sums + other * (1 << BITS) + each, other < PROGRAMS, other=0.0, cache_modifier=".cg")
        total = tl.sum(theirs, 0)
        if SHARES:
            wanted *= tl.sum(tl.where(each == 0, total, 0.0))
        found = tl.sum(((each > 0) & (total >= wanted)).to(tl.uint32))
        tl.store(least + row, (begin + (found << shift)).to(tl.int32, bitcast=True))


@triton.jit
def _penalize_kernel(
    logits, tokens, length, start, out, size, most, stride, tokens_stride, tokens_step, length_step, start_step,
    penalty, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes what becomes of the logits of BLOCK tokens; reads another tensor, so that a token may come twice."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(tl.load(length + row * length_step).to(tl.int64), most)
    counts = position < end
    if start is not None:
        counts &= position >= tl.load(start + row * start_step)
    token = tl.load(tokens + row * tokens_stride + position.to(tl.int64) * tokens_step, counts, other=-1).to(tl.int64)
    counts = (token >= 0) & (token < size)
    x = tl.load(logits + row * stride + token, counts, other=0.0).to(tl.float32)
    x = tl.where(x < 0, x * penalty, tl.div_rn(x, penalty))
    tl.store(out + row * size + token, x.to(out.dtype.element_ty), counts)


def sample_configs(logits: Tensor, searches: bool) -> list[Config]:
    """How `largest_token` and `sample_token`, which may or may not search, may be run, the most promising first."""
    rows, size = logits.shape
    return _configs(rows, size, searches, target_of(logits))


def _configs(rows: int, size: int, searches: bool, target: Target) -> list[Config]:
    # Fewer bits a launch need more launches, and fewer comparisons: what matters where there are many programs.
    bits = (6, 4, 5) if rows * triton.cdiv(size, 1024) <= 4 * target.num_sms else (4, 6)
    chunks = (Config.of(num_warps=w, CHUNK=chunk, BITS=0) for chunk, w in ((1024, 4), (2048, 4), (1024, 8), (4096, 8)))
    return [Config.of(num_warps=8, CHUNK=1024, BITS=b) for b in bits] if searches else list(chunks)


def largest_token(logits: Tensor, config: Config | None = None) -> Tensor:
    """The first of each row's largest logits, (B,) int64; NaN counts as -infinity. logits (B, V), V up to 2**18."""
    config = config or sample_configs(logits, False)[0]
    return _choose(_rows(logits), None, None, 1.0, None, None, 0.0, config)


def sample_token(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    config: Config | None = None,
) -> Tensor:
    """A token drawn from each row, arguments as of the Op. logits (B, V), V up to 2**18."""
    config = config or sample_configs(logits, top_k > 0 or top_p < 1)[0]
    logits = _rows(logits)
    largest = least = None
    if top_p < 1 or min_p > 0:
        largest = _choose(logits, None, None, 1.0, None, None, 0.0, config)
    if 0 < top_k < logits.shape[1]:
        least = _search(logits, None, None, 1.0, float(top_k), config)
    if top_p < 1:  # of a part too small to be told from nothing, the most probable is left
        least = _search(logits, largest, least, temperature, max(top_p, 1e-30), config)
    return _choose(logits, seed, step, temperature, largest if min_p > 0 else None, least, min_p, config)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _choose(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    largest: Tensor | None,
    least: Tensor | None,
    min_p: float,
    config: Config,
) -> Tensor:
    rows, size = logits.shape
    programs = triton.cdiv(size, config["CHUNK"])
    out = logits.new_empty(rows, dtype=torch.int64)
    scores = tokens = counter = None
    if programs > 1:
        scores, tokens = (logits.new_empty((rows, programs), dtype=d) for d in (torch.float32, torch.int32))
        counter = counters(logits, rows)
    steps = (0 if number is None or number.numel() == 1 else number.stride(0) for number in (seed, step))
    launch(
        _choose_kernel, (rows, programs), logits, seed, step, largest, least, out, scores, tokens, counter, size,
        logits.stride(0), *steps, 1 / temperature, min_p, config=config, like=logits, SAMPLE=seed is not None,
        PROGRAMS=programs,
    )  # fmt: skip
    return out


def _search(
    logits: Tensor,
    largest: Tensor | None,
    floor: Tensor | None,
    temperature: float,
    wanted: float,
    config: Config,
) -> Tensor:
    """The `least` of `_search_kernel`, all its bits."""
    rows, size = logits.shape
    programs, bits = triton.cdiv(size, config["CHUNK"]), config["BITS"]
    least = logits.new_empty(rows, dtype=torch.int32)
    sums = logits.new_empty((rows, programs, 1 << bits), dtype=torch.float32)
    for begin in range(0, _KEY_BITS[logits.dtype], bits):
        launch(
            _search_kernel, (rows, programs), logits, largest, floor, least, sums, counters(logits, rows), size,
            logits.stride(0), 1 / temperature, wanted, max(32 - begin - bits, 0), config=config, like=logits,
            SHARES=largest is not None, FIRST=begin == 0, PROGRAMS=programs,
        )  # fmt: skip
    return least


def penalize_repetition(
    logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None = None
) -> Tensor:
    """`logits` with those of tokens[:, start:length] penalized, arguments as of the Op; contiguous."""
    rows, size = logits.shape
    logits = _rows(logits)
    out = logits.clone(memory_format=torch.contiguous_format)
    steps = (0 if number is None or number.numel() == 1 else number.stride(0) for number in (length, start))
    launch(
        _penalize_kernel, (rows, triton.cdiv(tokens.shape[1], _PENALIZED_BLOCK)), logits, tokens, length, start, out,
        size, tokens.shape[1], logits.stride(0), *tokens.stride(), *steps, penalty, config=Config.of(num_warps=4),
        like=logits, BLOCK=_PENALIZED_BLOCK,
    )  # fmt: skip
    return out
