"""The kernel that appends to a cache on what its Ops' samples leave out: every tile, odd sizes, strides, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import append_kv, rope_append

pytest.importorskip("triton")

from burnish.kernels import append as kernels
from burnish.kernels.launch import Config, Launch, Target, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)
TILES = [Config.of(4, BLOCK_S=s, BLOCK_H=h) for s, h in ((1, 1), (4, 1), (1, 4), (2, 2), (8, 8))]


def packed(heads: int, groups: int, d: int = 16, dv: int = 16, *, length: int = 5, batch: int = 2, dtype: Any = FP32):
    """q, k and v (B, heads, S, D) as they lie in one product."""
    sizes = (heads, d), (groups, d), (groups, dv)
    parts = randn(batch, length, sum(n * w for n, w in sizes), dtype=dtype).split([n * w for n, w in sizes], dim=-1)
    return [part.unflatten(-1, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True)]


def caches(k: Tensor, v: Tensor, most: int = 12) -> list[Tensor]:
    shapes = [(*t.shape[:2], most, t.shape[3]) for t in (k, v)]
    return [randn(*shape, dtype=k.dtype, seed=seed) for seed, shape in enumerate(shapes, 3)]


def tables(*shape: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """Any numbers: the kernel takes both halves as they come."""
    return randn(*shape, dtype=dtype, seed=8), randn(*shape, dtype=dtype, seed=9)


def check(op: Op, *args: Any, config: Config | None = None) -> None:
    """Runs the kernel in place on copies, and looks at all that it was given."""
    bound = op.bind(*args)
    given = tuple(a.clone() if isinstance(a, Tensor) and i in op.donates else a for i, a in enumerate(bound))
    untouched = {i: a.clone() for i, a in enumerate(bound) if isinstance(a, Tensor) and i not in op.donates}
    in_place = op.impls["triton"].in_place
    assert in_place is not None
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        results = in_place(*given, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = op.reference(*bound)
    assert_close(results, expected, oracle(op.reference, *bound))
    assert [r.stride() for r in results] == [e.stride() for e in expected]
    for i, before in untouched.items():
        assert torch.equal(bound[i], before)
    names = list(op.signature.parameters)
    k, lengths = (bound[names.index(name)] for name in ("k", "lengths"))
    for i, result in op.donates.items():
        assert results[result] is given[i]
        position = torch.arange(given[i].shape[2])
        old = (position < lengths.reshape(-1, 1)) | (position >= lengths.reshape(-1, 1) + k.shape[2])
        kept = old[:, None, :, None].expand(given[i].shape)
        assert torch.equal(given[i][kept], bound[i][kept])  # to the bit


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("lengths", [torch.tensor(4), torch.tensor([9, 0], dtype=torch.int32)], ids=["one", "each"])
def test_every_kind_of_tile_takes_every_row_once(lengths: Tensor, config: Config, interleaved: bool) -> None:
    q, k, v = packed(6, 3)
    check(rope_append, q, k, v, *tables(5, 16), *caches(k, v), lengths, interleaved, config=config)
    check(append_kv, *caches(k, v), k, v, lengths, config=config)


@pytest.mark.parametrize("length", [0, 7, 8, 11, 12, 13, 1 << 40])
@pytest.mark.parametrize("new", [1, 5, 20])
def test_what_does_not_fit_is_dropped(new: int, length: int) -> None:
    q, k, v = packed(2, 1, length=new)
    for lengths in (torch.tensor(length), torch.tensor([length, 3])):
        check(rope_append, q, k, v, *tables(new, 16), *caches(k, v), lengths)
        check(append_kv, *caches(k, v), k, v, lengths)


def test_nothing_is_written_behind_a_cache() -> None:
    """The caches are windows of larger ones, whose other positions belong to others."""
    q, k, v = packed(2, 1)
    large = caches(k, v, 30)
    before = [t.clone() for t in large]
    in_place = rope_append.impls["triton"].in_place
    assert in_place is not None
    in_place(q, k, v, *tables(5, 16), *(t[:, :, 4:16] for t in large), torch.tensor([10, 12]))
    for new, old in zip(large, before, strict=True):
        changed = (new != old).any(dim=3).any(dim=1)
        assert [row.nonzero().flatten().tolist() for row in changed] == [[14, 15], []]


@pytest.mark.parametrize("config", TILES, ids=str)
def test_nothing_is_written_behind_the_rotated_queries(config: Config) -> None:
    q, k, v = packed(6, 3)
    launches: list[Launch] = []
    with recording(launches.append):
        kernels.rope_append(q, k, v, *tables(5, 16), *caches(k, v), torch.tensor(4), config=config)
    (only,) = launches
    args = list(only.args)
    (at,) = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.shape == q.shape and a is not q]
    large = torch.full((q.numel() + 1000,), torch.nan)
    args[at] = large.as_strided(q.shape, args[at].stride())
    only.kernel[only.grid](*args, **only.constants, **only.options)
    assert large[: q.numel()].isfinite().all()
    assert large[q.numel() :].isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "table_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP16)])
@pytest.mark.parametrize(("D", "R", "DV"), [(16, 16, 16), (24, 6, 40), (20, 2, 7), (7, 6, 3), (256, 64, 256)])
def test_widths(D: int, R: int, DV: int, dtype: torch.dtype, table_dtype: torch.dtype, interleaved: bool) -> None:
    q, k, v = packed(4, 1, D, DV, dtype=dtype, length=3)
    cos, sin = tables(2, 3, R, dtype=table_dtype)
    check(rope_append, q, k, v, cos, sin, *caches(k, v), torch.tensor([3, 8]), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_not_rotated_passes_to_the_bit(interleaved: bool) -> None:
    q, k, v = packed(2, 1, 24, dtype=FP16)
    q[..., 20], k[..., 21], v[..., 3] = torch.inf, -torch.inf, torch.inf
    k_cache, v_cache = caches(k, v)
    arguments = q, k, v, *tables(5, 6), k_cache, v_cache, torch.tensor(2), interleaved
    new_q, new_k, new_v = rope_append.impls["triton"].fn(*arguments)
    assert torch.equal(new_q[..., 6:], q[..., 6:])
    assert torch.equal(new_k[:, :, 2:7, 6:], k[..., 6:])
    assert torch.equal(new_v[:, :, 2:7], v)
    assert new_q[..., :6].isfinite().all()
    assert new_k[:, :, 2:7, :6].isfinite().all()


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda t: torch.cat((t, t, t), dim=1)[:, t.shape[1] : 2 * t.shape[1]],
    "head_dim first in memory": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other entry": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides_are_taken_in_place(lay: Any) -> None:
    q, k, v = map(lay, packed(4, 2))
    k_cache, v_cache = map(lay, caches(k, v))
    arguments = q, k, v, *tables(5, 16), k_cache, v_cache, torch.tensor([3, 9])
    launches: list[Launch] = []
    in_place = rope_append.impls["triton"].in_place
    assert in_place is not None
    with recording(launches.append, H200):
        in_place(*arguments)
    (only,) = launches
    assert all(any(a is given for a in only.args) for given in (q, k, v, k_cache, v_cache))
    new_q = in_place(*arguments)[0]
    expected = rope_append.reference(*arguments)
    assert_close((new_q, k_cache, v_cache), expected, oracle(rope_append.reference, *arguments))
    assert new_q.stride() == expected[0].stride()


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[3:8, :16],
        lambda t: t[None, 2:7, :16],
        lambda t: t[None, 2:7, :16].expand(2, 5, 16),
        lambda t: torch.stack((t[:5, :16], t[1:6, :16])),
    ],
    ids=["offset", "shared", "expanded", "per row"],
)
def test_tables(cut: Any) -> None:
    q, k, v = packed(4, 2)
    cos, sin = (cut(t) for t in tables(9, 20))
    check(rope_append, q, k, v, cos, sin, *caches(k, v), torch.tensor(2))
    check(rope_append, q, k, v, cos, sin.contiguous(), *caches(k, v), torch.tensor(2))  # another layout than cos


def test_all_is_one_launch() -> None:
    q, k, v = packed(32, 8, 128, 128, batch=1, length=1, dtype=BF16)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        kernels.rope_append(q, k, v, *tables(1, 128), *caches(k, v), torch.tensor(4))
        kernels.append(*caches(k, v), k, v, torch.tensor(4))
    assert [launch.grid for launch in launches] == [(8 + 2 + 2,), (2 + 2,)]  # 4 heads each
    assert all(launch.options["num_warps"] == 1 for launch in launches)


@pytest.mark.parametrize(("heads", "groups"), [(32, 8), (12, 12), (71, 1), (0, 8)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1024, 1), (1, 2048)])
def test_configs_are_few_and_distinct(heads: int, groups: int, batch: int, length: int) -> None:
    q, k = (torch.empty(batch, n, length, 128, dtype=BF16, device="meta") for n in (heads, groups))
    with recording(lambda launch: None, H200):
        configs = kernels.append_configs(q if heads else None, k, k)
    assert 1 <= len(configs) <= 2
    assert len({str(config) for config in configs}) == len(configs)
    for config in configs:
        assert heads % config["BLOCK_H"] == groups % config["BLOCK_H"] == 0
        assert config["BLOCK_S"] <= max(1, length)


def test_reasons_against() -> None:
    def reasons(op: Op, *args: Any) -> list[str]:
        return [reason for reason in op.impls["triton"].why_not(*args) if "CUDA" not in reason]

    q, k, v = packed(1, 1, 16, 512)
    assert reasons(append_kv, *caches(k, v), k, v, torch.tensor(0)) == ["head_dim 512 is above 256"]
    q, k, v = packed(1, 1)
    none = tables(5, 0)
    assert reasons(rope_append, q, k, v, *none, *caches(k, v, 0), torch.tensor(0)) == [
        "cos and sin have no columns: nothing is rotated",
        "an input is empty",
    ]
