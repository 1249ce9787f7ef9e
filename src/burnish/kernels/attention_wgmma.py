"""Attention forward on Hopper by warps with roles: one loads keys and values, teams of four attend for 64 queries each.

A block's scores are computed while the values of the one before are summed, and its exponentials are taken meanwhile.
Where queries are few, SPLIT teams share 64: each sees every SPLIT-th block of keys, and the first adds up the sums.
In Gluon, as `burnish.kernels.matmul_wgmma`. 1x32x2048x64 causal, 8 key heads, bfloat16, H200: 48 us (cuDNN 57, in
Triton 59); with heads of 128: 65 (82, 91).
Source: Shah et al., "FlashAttention-3", arXiv:2407.08608; otherwise as in `burnish.kernels.attention`.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.attention_inputs import as_bytes
from burnish.kernels.launch import Config, launch, target_of
from burnish.kernels.matmul_wgmma_fill import HALF_TYPES, async_load

_ROWS = gl.constexpr(64)  # queries of a team
_LOADERS = gl.constexpr(24)  # registers of a thread that loads
_LOWEST = gl.constexpr(torch.finfo(torch.float32).min)
_IN_CACHE = 16 << 20  # bytes of keys and values that the L2 cache keeps, of H200's 50 MB


@gluon.jit
def _load(
    descs, buffers, barriers, place, blocks,
    TEAMS: gl.constexpr, SPLIT: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: the teams' queries, then keys and values block by block."""
    q_desc, k_desc, v_desc = descs
    qs, ks, vs = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    batch, head, key_head, row = place
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    for group in gl.static_range(TEAMS // SPLIT):
        mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
        async_load(q_desc, [batch, head, row + group * _ROWS, 0], q_full.index(group), qs.index(group))
    for first in range(0, blocks, SPLIT):
        # The keys of all shares go ahead of values: no team waits for keys behind the values of another.
        for share in gl.static_range(SPLIT):
            _load_block(k_desc, ks, k_full, k_empty, batch, key_head, first + share, blocks, BLOCK_N, STAGES)
        for share in gl.static_range(SPLIT):
            _load_block(v_desc, vs, v_full, v_empty, batch, key_head, first + share, blocks, BLOCK_N, STAGES)


@gluon.jit
def _load_block(desc, buffer, full, empty, batch, head, i, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    stage = i % STAGES
    there = i < blocks
    mbarrier.wait(empty.index(stage), (i // STAGES + 1) & 1, pred=(i >= STAGES) & there)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes, pred=there)
    async_load(desc, [batch, head, i * BLOCK_N, 0], full.index(stage), buffer.index(stage), pred=there)


@gluon.jit
def _real_keys(padding_ptr, start, lk, stride_pn, PADDING: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """The padding mask's entries for a block of keys, 0 past the last one; None without a mask."""
    real = None
    if PADDING:
        keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        real = gl.load(padding_ptr + keys.to(gl.int64) * stride_pn, mask=keys < lk, other=0)
    return real


@gluon.jit
def _hide(scores, real, start, first, lq, lk, CAUSAL: gl.constexpr, PADDING: gl.constexpr, BLOCK_N: gl.constexpr):
    """The scores of a block of keys, -inf for those that are not to be seen."""
    keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores.type.layout))
    if PADDING:
        scores += gl.where(real != 0, 0.0, -float("inf"))[None, :]
    if CAUSAL:
        if start + BLOCK_N > first + (lk - lq) + 1:
            positions = first + (lk - lq) + gl.arange(0, _ROWS, gl.SliceLayout(1, scores.type.layout))
            scores = gl.where(keys[None, :] <= positions[:, None], scores, -float("inf"))
    elif not PADDING:  # noqa: SIM102 - this is known when the kernel is compiled, what follows is not
        if start + BLOCK_N > lk:
            scores = gl.where((keys < lk)[None, :], scores, -float("inf"))
    return scores


@gluon.jit
def _weigh(scores, row_max, row_sum, scale, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """Weights of a block of keys, what is left of older ones, and the new maximum and sum of each row."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_max[:, None])
    keep = gl.exp2(row_max - new_max)
    return gl.convert_layout(weights.to(DTYPE), WEIGHTS), keep, new_max, row_sum * keep + gl.sum(weights, 1)


@gluon.jit
def _hand_over(acc, row_max, row_sum, shares, SHARE: gl.constexpr):
    """Leaves what a team has found among its keys to the first of those that share its queries."""
    accs, maxima, sums, left = shares
    accs.index(SHARE - 1).store(acc)
    maxima.index(SHARE - 1).store(row_max)
    sums.index(SHARE - 1).store(row_sum)
    mbarrier.arrive(left.index(SHARE - 1), count=1)


@gluon.jit
def _add_up(acc, row_max, row_sum, shares, SPLIT: gl.constexpr):
    """A team's sums with those of the teams that share its queries. A share without keys has the lowest maximum."""
    accs, maxima, sums, left = shares
    for share in gl.static_range(SPLIT - 1):
        mbarrier.wait(left.index(share), 0)
        their_max = maxima.index(share).load(row_max.type.layout)
        new_max = gl.maximum(row_max, their_max)
        keep, take = gl.exp2(row_max - new_max), gl.exp2(their_max - new_max)
        row_sum = row_sum * keep + sums.index(share).load(row_sum.type.layout) * take
        acc = acc * _by_row(keep, acc) + accs.index(share).load(acc.type.layout) * _by_row(take, acc)
        row_max = new_max
    return acc, row_sum


@gluon.jit
def _by_row(factors, acc):
    return gl.convert_layout(factors, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _attend(
    buffers, barriers, shares, place, blocks, out_ptr, padding_ptr, heads, lq, lk, scale, stride_pb, stride_pn,
    TEAM: gl.constexpr, SPLIT: gl.constexpr, CAUSAL: gl.constexpr, PADDING: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 queries against the blocks of keys, or every SPLIT-th of them."""
    qs, ks, vs = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    batch, head, _, row = place
    DTYPE: gl.constexpr = qs.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    GROUP: gl.constexpr = TEAM // SPLIT
    SHARE: gl.constexpr = TEAM % SPLIT
    if PDL:
        tl_cuda.gdc_wait()
    first = row + GROUP * _ROWS
    padding_ptr += batch.to(gl.int64) * stride_pb
    row_max = gl.full((_ROWS,), _LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.zeros((_ROWS,), gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros((_ROWS, D), gl.float32, SUMS)
    nothing = gl.zeros((_ROWS, BLOCK_N), gl.float32, SCORES)
    q = qs.index(GROUP).reshape([_ROWS, D])
    start = SHARE * BLOCK_N
    first_real = _real_keys(padding_ptr, start, lk, stride_pn, PADDING, BLOCK_N, SCORES)
    mbarrier.wait(q_full.index(GROUP), 0)
    mbarrier.wait(k_full.index(SHARE), 0)
    scores = warpgroup_mma(q, ks.index(SHARE).reshape([BLOCK_N, D]).permute((1, 0)), nothing, use_acc=False)
    mbarrier.arrive(k_empty.index(SHARE), count=1)
    scores = _hide(scores, first_real, start, first, lq, lk, CAUSAL, PADDING, BLOCK_N)
    weights, _, row_max, row_sum = _weigh(scores, row_max, row_sum, scale, WEIGHTS, DTYPE)
    for i in range(SHARE + SPLIT, blocks, SPLIT):
        stage, before = i % STAGES, (i - SPLIT) % STAGES
        # Asked for before the wait for the keys: nothing else hides the time that they take to come.
        real = _real_keys(padding_ptr, i * BLOCK_N, lk, stride_pn, PADDING, BLOCK_N, SCORES)
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        key = ks.index(stage).reshape([BLOCK_N, D])
        scores = warpgroup_mma(q, key.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (i - SPLIT) // STAGES & 1)
        acc = warpgroup_mma(weights, vs.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = _hide(scores, real, i * BLOCK_N, first, lq, lk, CAUSAL, PADDING, BLOCK_N)
        next_weights, keep, row_max, row_sum = _weigh(scores, row_max, row_sum, scale, WEIGHTS, DTYPE)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc *= _by_row(keep, acc)
        weights = next_weights
    last = blocks - 1 - (blocks - 1 - SHARE) % SPLIT  # of this team
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(weights, vs.index(last % STAGES).reshape([BLOCK_N, D]), acc)
    if SHARE > 0:
        _hand_over(acc, row_max, row_sum, shares, SHARE)
    else:
        if SPLIT > 1:
            acc, row_sum = _add_up(acc, row_max, row_sum, shares, SPLIT)
        # A query that saw no key has a sum of zero and gives zeros.
        acc *= _by_row(1.0 / gl.where(row_sum == 0, 1.0, row_sum), acc)
        OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        result = gl.convert_layout(acc.to(DTYPE), OUT)
        rows = first + gl.arange(0, _ROWS, gl.SliceLayout(1, OUT))
        columns = gl.arange(0, D, gl.SliceLayout(0, OUT))
        places = ((batch * lq + rows).to(gl.int64) * heads + head) * D
        gl.store(out_ptr + places[:, None] + columns[None, :], result, mask=(rows < lq)[:, None])


@gluon.jit(do_not_specialize=["heads", "groups", "together", "lq", "lk", "stride_pb"])
def attention_wgmma_kernel(
    q_desc,  # (B, Hq, Lq, D)
    k_desc,  # (B, Hkv, Lk, D)
    v_desc,
    out_ptr,  # (B, Lq, Hq, D)
    padding_ptr,  # (B, Lk)
    heads,
    groups,
    together,
    lq,
    lk,
    scale,
    stride_pb,
    stride_pn,
    CAUSAL: gl.constexpr,
    PADDING: gl.constexpr,
    D: gl.constexpr,
    TEAMS: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PER_SM: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    # A share's values are released in its next round: with fewer stages than shares, this one would wait for that.
    gl.static_assert(TEAMS % SPLIT == 0 and (SPLIT == 1 or SPLIT == TEAMS) and STAGES >= SPLIT)
    GROUPS: gl.constexpr = TEAMS // SPLIT  # of 64 queries
    qs = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, _ROWS, D], q_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(group), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    shares = (qs, qs, qs, q_full)
    if SPLIT > 1:  # not for one team: Triton gives the place of barriers that nobody waits for to other things
        # Eight columns stay together, as a row's four threads hold them, and neighbouring rows are in other banks.
        accs = gl.allocate_shared_memory(gl.float32, [SPLIT - 1, _ROWS, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
        maxima = gl.allocate_shared_memory(gl.float32, [SPLIT - 1, _ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        sums = gl.allocate_shared_memory(gl.float32, [SPLIT - 1, _ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        left = gl.allocate_shared_memory(gl.int64, [SPLIT - 1, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(SPLIT - 1):
            mbarrier.init(left.index(s), count=1)
        shares = (accs, maxima, sums, left)

    # Heads whose keys fit the L2 cache run together, of each the last queries first: they see the most keys if causal.
    rows: gl.constexpr = GROUPS * _ROWS
    parts = gl.cdiv(lq, rows)
    batch_heads = gl.num_programs(0) // parts
    first_head = gl.program_id(0) // (together * parts) * together
    among = gl.program_id(0) - first_head * parts
    heads_here = min(together, batch_heads - first_head)
    batch_head = first_head + among % heads_here
    row = (parts - 1 - among // heads_here) * rows
    batch, head = batch_head // heads, batch_head % heads
    stop = lk
    if CAUSAL:
        stop = min(lk, row + rows + (lk - lq))
    # Of teams that share queries each has a block, be it one past the last key, where nothing is seen.
    blocks = gl.cdiv(gl.maximum(stop, (SPLIT - 1) * BLOCK_N + 1), BLOCK_N)
    place = (batch, head, head // groups, row)
    buffers = (qs, ks, vs)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    descs = (q_desc, k_desc, v_desc)
    if TEAMS == 1:
        gl.warp_specialize(
            [
                (_attend, (buffers, barriers, shares, place, blocks, out_ptr, padding_ptr, heads, lq, lk, scale,
                           stride_pb, stride_pn, 0, SPLIT, CAUSAL, PADDING, D, BLOCK_N, STAGES, PDL)),
                (_load, (descs, buffers, barriers, place, blocks, TEAMS, SPLIT, BLOCK_N, STAGES, PDL)),
            ],
            [1],
            [_LOADERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (buffers, barriers, shares, place, blocks, out_ptr, padding_ptr, heads, lq, lk, scale,
                           stride_pb, stride_pn, 0, SPLIT, CAUSAL, PADDING, D, BLOCK_N, STAGES, PDL)),
                (_attend, (buffers, barriers, shares, place, blocks, out_ptr, padding_ptr, heads, lq, lk, scale,
                           stride_pb, stride_pn, 1, SPLIT, CAUSAL, PADDING, D, BLOCK_N, STAGES, PDL)),
                (_load, (descs, buffers, barriers, place, blocks, TEAMS, SPLIT, BLOCK_N, STAGES, PDL)),
            ],
            [4, 1],
            [TEAM_REGISTERS, _LOADERS],
        )  # fmt: skip


def attention_wgmma(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    config: Config | None = None,
) -> Tensor:
    """`softmax(q @ k.T * scale, over the keys allowed) @ v`, arguments as of the Op `attention`.

    q (B, Hq, Lq, D), k and v (B, Hkv, Lk, D), of float16 or bfloat16, nothing empty; D is 64 or 128, contiguous, and
    all other strides are positive multiples of 16 bytes. scale is positive. The result is (B, Hq, Lq, D), stored as
    (B, Lq, Hq, D). Compute capability 9.0 only.
    """
    (batch, heads, lq, d), (_, key_heads, lk, _) = q.shape, k.shape
    config = config or attention_wgmma_configs(d, useful_split(q, k))[0]
    out = torch.empty((batch, lq, heads, d), dtype=q.dtype, device=q.device)
    padding, strides = q, [0, 0]
    if key_padding_mask is not None:
        padding, strides = as_bytes(key_padding_mask), [*key_padding_mask.stride()]
    teams, rows = config["TEAMS"], config["TEAMS"] // config["SPLIT"] * _ROWS.value
    registers = 65536 // (32 * 4 * (teams + 1) * config["PER_SM"]) // 8 * 8  # all that there are
    together = max(1, _IN_CACHE * heads // key_heads // (2 * lk * d * k.element_size()))
    launch(
        attention_wgmma_kernel,
        (triton.cdiv(lq, rows) * batch * heads,),
        _described(q, _ROWS.value),
        _described(k, config["BLOCK_N"]),
        _described(v, config["BLOCK_N"]),
        *(out, padding, heads, heads // key_heads, together, lq, lk),
        (d**-0.5 if scale is None else scale) * math.log2(math.e),
        *strides,
        config=config,
        like=q,
        registers=registers,
        TEAM_REGISTERS=(registers * (teams + 1) - _LOADERS.value) // teams // 8 * 8,
        CAUSAL=is_causal,
        PADDING=key_padding_mask is not None,
        D=d,
    )
    return out.transpose(1, 2)


def _described(t: Tensor, rows: int) -> TensorDescriptor:
    block = [1, 1, rows, t.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, HALF_TYPES[t.dtype])
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block, layout)


def useful_split(q: Tensor, k: Tensor) -> int:
    """How many teams may share 64 queries: one where there are enough queries for all multiprocessors."""
    few = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], _ROWS.value) < 2 * target_of(q).num_sms
    return 2 if few and k.shape[2] > 64 else 1


def attention_wgmma_configs(d: int, split: int = 1) -> list[Config]:
    """Configs of `attention_wgmma` for heads of `d` columns, in which up to `split` teams share queries, the most
    promising first."""
    # (TEAMS, SPLIT, BLOCK_N, STAGES, PER_SM). H200, us: 1x32/8x2048x64 causal 48, 48, 52; x128 65, 69, 72 (SPLIT 1).
    # 1x12x384x64 padded 5.6 by two teams, 6.1 by one, 6.3 by three, which are not offered.
    if d <= 64:
        shared = [(2, 2, 64, 6, 1), (2, 2, 128, 4, 1)]
        shapes = [(1, 1, 128, 2, 2), (2, 1, 128, 2, 1), (1, 1, 64, 3, 2)]
    else:
        shared = [(2, 2, 64, 4, 1)]
        shapes = [(2, 1, 128, 2, 1), (1, 1, 64, 2, 2), (2, 1, 64, 4, 1)]
    names = ("TEAMS", "SPLIT", "BLOCK_N", "STAGES", "PER_SM")
    useful = [shape for shape in shared if shape[1] <= split] + shapes
    return [Config.of(4, 1, **dict(zip(names, shape, strict=True))) for shape in useful]
