"""The kernel that appends a token to a cache and attends to it, in the interpreter: every border, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Sample
from burnish.ops import rope_append_attention

pytest.importorskip("triton")

from burnish.kernels import decode_attention
from burnish.kernels.launch import Config, Launch, Target, recording
from tests.slow import slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)
# Of a cache of 120: a block for each program; one program; several blocks for each; more programs than blocks.
CONFIGS = [Config.of(4, 2, BLOCK_N=n, SPLITS=splits) for n, splits in ((16, 8), (32, 1), (16, 3), (32, 6))]
SINGLE, LOOP = CONFIGS[0], CONFIGS[2]
SAMPLES = [
    pytest.param(sample, id=f"{str(dtype)[6:]} {sample.label}")
    for dtype in (BF16, FP32)
    for sample in rope_append_attention.samples("cpu", dtype)
    if sample.args[0].shape[2] == 1
]


def inputs(
    groups: int = 4, d: int = 32, dv: int = 32, rotated: int | None = None, *, most: int = 120, dtype: Any = FP32
) -> list[Tensor]:
    """Two key heads, of a batch of two: q, k and v as they lie in one product, tables, and caches."""
    sizes = (2 * groups, d), (2, d), (2, dv)
    product = randn(2, 1, sum(n * w for n, w in sizes), dtype=dtype, seed=0)
    parts = product.split([n * w for n, w in sizes], dim=-1)
    new = [part.unflatten(-1, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True)]
    tables = [randn(1, rotated or d, seed=seed).cos().to(dtype) for seed in (8, 9)]  # the kernel takes any numbers
    return [*new, *tables, randn(2, 2, most, d, dtype=dtype, seed=3), randn(2, 2, most, dv, dtype=dtype, seed=4)]


def check(*args: Any, config: Config | None = None, **kwargs: Any) -> Tensor:
    """Runs the kernel in place on copies, and looks at all that it was given."""
    bound = rope_append_attention.bind(*args, **kwargs)
    impl = rope_append_attention.impls["triton"]
    reasons = impl.why_not(*bound)
    assert all("not on a CUDA device" in reason for reason in reasons), reasons
    assert impl.in_place is not None
    given = tuple(a.clone() if isinstance(a, Tensor) and i in (5, 6) else a for i, a in enumerate(bound))
    untouched = {i: a.clone() for i, a in enumerate(bound) if isinstance(a, Tensor) and i not in (5, 6)}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        results = impl.in_place(*given, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    reference = rope_append_attention.reference
    assert_close(results, reference(*bound), oracle(reference, *bound))
    assert results[0].transpose(1, 2).is_contiguous()
    for i, before in untouched.items():
        assert torch.equal(bound[i], before)
    for i in (5, 6):
        assert results[i - 4] is given[i]
        old = torch.arange(given[i].shape[2]) != bound[7].reshape(-1, 1)
        kept = old[:, None, :, None].expand(given[i].shape)
        assert torch.equal(given[i][kept], bound[i][kept])  # to the bit
    attended: Tensor = results[0]
    return attended


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples(sample: Sample) -> None:
    check(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [0, 15, 16, 47, 119, 120, 1 << 40, *map(slow, (1, 17, 32, 33, 48, 118, 121))])
def test_every_border(length: int, config: Config) -> None:
    check(*inputs(), torch.tensor(length), config=config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("lengths", [[0, 119], [16, 120], [17, 15]], ids=str)
def test_padding(lengths: list[int], config: Config) -> None:
    real = torch.arange(120) >= torch.tensor([[5], [100]])
    check(*inputs(), torch.tensor(lengths, dtype=torch.int32), real, config=config)


@pytest.mark.parametrize("window", [1, 17, *map(slow, (16, 200))])
@pytest.mark.parametrize("lengths", [[0, 119], [16, 120], [17, 32]], ids=str)
def test_windows(lengths: list[int], window: int) -> None:
    for config in (SINGLE, LOOP):
        check(*inputs(), torch.tensor(lengths), window=window, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("real", [False, True])
def test_the_new_token_may_be_padding(real: bool, config: Config) -> None:
    """All others are, too, in the second row."""
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1] = 0
    mask[:, 40] = real
    attended = check(*inputs(), torch.tensor(40), mask, config=config)
    assert bool(attended[1].any()) == real


@pytest.mark.parametrize("dtype", [BF16, *map(slow, (FP16, FP32))], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 4, 8, 32])
def test_heads_that_share_a_key_head(groups: int, dtype: torch.dtype) -> None:
    for config in (SINGLE, LOOP):
        check(*inputs(groups, dtype=dtype), torch.tensor([40, 119]), config=config)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "table_dtype"), [(BF16, FP32), slow(BF16, BF16), slow(FP16, FP32), slow(FP32, FP16)])
@pytest.mark.parametrize(("d", "rotated", "dv"), [(16, 16, 16), (24, 6, 40), (20, 2, 7), (7, 6, 3), (256, 64, 256)])
def test_widths(d: int, rotated: int, dv: int, dtype: torch.dtype, table_dtype: torch.dtype, interleaved: bool) -> None:
    q, k, v, cos, sin, *caches = inputs(2, d, dv, rotated, dtype=dtype)
    tables = cos.to(table_dtype), sin.to(table_dtype)
    check(q, k, v, *tables, *caches, torch.tensor([30, 77]), interleaved=interleaved, config=LOOP)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_not_rotated_passes_to_the_bit(interleaved: bool) -> None:
    q, k, v, cos, sin, *caches = inputs(2, 24, 24, 6, dtype=FP16)
    k[..., 21], v[..., 3] = -torch.inf, torch.inf
    impl = rope_append_attention.impls["triton"].fn
    _, new_k, new_v = impl(q, k, v, cos, sin, *caches, torch.tensor(50), interleaved=interleaved)
    assert torch.equal(new_k[:, :, 50:51, 6:], k[..., 6:])
    assert torch.equal(new_v[:, :, 50:51], v)
    assert new_k[:, :, 50, :6].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "guessed"), [(SINGLE, 0), (SINGLE, 1 << 22), (LOOP, 0)], ids=str)
@pytest.mark.parametrize("length", [0, 42, 48, 119])
def test_what_is_not_filled_does_not_matter(
    length: int, config: Config, guessed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new row least of all: another program may write it while one reads."""
    monkeypatch.setattr(decode_attention, "_GUESSED", guessed)
    *args, k_cache, v_cache = inputs(dtype=BF16)
    expected = check(*args, k_cache, v_cache, torch.tensor(length), config=config)
    k_cache[:, :, length:], v_cache[:, :, length:] = torch.nan, torch.inf
    run = rope_append_attention.impls["triton"].fn
    attended, new_k, new_v = run(*args, k_cache, v_cache, torch.tensor(length), config=config)
    assert torch.equal(attended, expected)
    assert new_k[:, :, : length + 1].isfinite().all()
    assert new_v[:, :, : length + 1].isfinite().all()
    assert new_k[:, :, length + 1 :].isnan().all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_token_that_is_dropped_does_not_matter(config: Config) -> None:
    q, k, v, *rest = inputs()
    expected = check(q, k, v, *rest, torch.tensor(120), config=config)
    run = rope_append_attention.impls["triton"].fn
    attended, *_ = run(q, k * torch.nan, v * torch.nan, *rest, torch.tensor(120), config=config)
    assert torch.equal(attended, expected)


def test_only_the_new_row_is_written_of_caches_that_lie_in_larger_ones() -> None:
    *args, _, _ = inputs()
    large = randn(2, 2, 300, 32, seed=5), randn(2, 2, 300, 32, seed=6)
    before = [t.clone() for t in large]
    in_place = rope_append_attention.impls["triton"].in_place
    assert in_place is not None
    in_place(*args, *(t[:, :, 100:220] for t in large), torch.tensor([119, 120]))
    for new, old in zip(large, before, strict=True):
        changed = (new != old).any(dim=3).any(dim=1)
        assert [row.nonzero().flatten().tolist() for row in changed] == [[219], []]


def test_token_by_token() -> None:
    """Each step attends to what the ones before wrote."""
    q, k, v, cos, sin, *caches = inputs(2, most=24)
    caches = [t.zero_() for t in caches]
    kept = [t.clone() for t in caches]
    for step in range(24):
        args = (q + step, k - step, v * step, cos, sin)
        in_place = rope_append_attention.impls["triton"].in_place
        assert in_place is not None
        out, *_ = in_place(*args, *caches, torch.tensor(step), config=Config.of(4, 2, BLOCK_N=16, SPLITS=3))
        expected, *kept = rope_append_attention.reference(*args, *kept, torch.tensor(step))
        torch.testing.assert_close((out, *caches), (expected, *kept), rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda t: torch.cat((t, t, t), dim=1)[:, t.shape[1] : 2 * t.shape[1]],
}


@pytest.mark.slow
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(lay: Any) -> None:
    q, k, v, cos, sin, *caches = inputs()
    check(*map(lay, (q, k, v)), cos, sin, *map(lay, caches), torch.tensor([3, 9]))
    every_other = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (q, k, v))
    check(*every_other, cos, sin, *caches, torch.tensor([3, 9]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[3:4, :16],
        lambda t: t[None, 2:3, :16],
        lambda t: t[None, 2:3, :16].expand(2, 1, 16),
        lambda t: torch.stack((t[:1, :16], t[1:2, :16])),
        lambda t: t.t().contiguous().t()[3:4, :16],
    ],
    ids=["offset", "shared", "expanded", "per row", "transposed"],
)
def test_tables(cut: Any) -> None:
    q, k, v, _, _, *caches = inputs()
    cos, sin = (cut(randn(9, 20, seed=seed)) for seed in (8, 9))
    check(q, k, v, cos, sin, *caches, torch.tensor(2), config=LOOP)
    check(q, k, v, cos, sin.contiguous(), *caches, torch.tensor(2), config=LOOP)  # another layout than cos


def test_the_counters_are_left_as_they_were() -> None:
    args = *inputs(), torch.tensor(100)
    results = [check(*args, config=SINGLE) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_all_is_one_launch_into_the_caches_that_were_given() -> None:
    args = *inputs(), torch.tensor(100)
    launches: list[Launch] = []
    in_place = rope_append_attention.impls["triton"].in_place
    assert in_place is not None
    with recording(launches.append, H200):
        in_place(*args)
    (only,) = launches
    assert all(any(a is given for a in only.args) for given in args)
    assert only.options["launch_pdl"]


def test_reasons_against() -> None:
    def reasons(*args: Any, **kwargs: Any) -> list[str]:
        found = rope_append_attention.impls["triton"].why_not(*args, **kwargs)
        return [reason for reason in found if "CUDA" not in reason]

    q, k, v, cos, sin, *caches = inputs()
    length = torch.tensor(3)
    assert reasons(q, k, v, cos, sin, *caches, length) == []
    two = [torch.cat((t, t), dim=2) for t in (q, k, v)]
    tables = cos.expand(2, -1), sin.expand(2, -1)
    assert reasons(*two, *tables, *caches, length) == ["there are 2 new tokens; the kernel takes one"]
    many = q.repeat(1, 17, 1, 1)
    assert reasons(many, k, v, cos, sin, *caches, length) == ["68 queries share a key head; the kernel takes 64"]
    none = cos[:, :0], sin[:, :0]
    assert reasons(q, k, v, *none, *caches, length) == ["cos and sin have no columns: nothing is rotated"]
    assert reasons(q.double(), k.double(), v.double(), cos, sin, *(t.double() for t in caches), length) == [
        "the inputs are torch.float64; the kernels take float16, bfloat16 and float32"
    ]
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in caches]
    assert reasons(q, k, v, cos, sin, caches[0], turned[1], length) == [
        "the last dimension of v_cache has a stride of 120; the kernel writes rows"
    ]
    wide = inputs(1, 512, 16)
    assert reasons(*wide, length) == ["head_dim 512 is above 256"]
