"""The product that rotates and appends, in the interpreter: sizes, every config, strides, what is dropped, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import linear_rope_append
from tests.slow import slow

pytest.importorskip("triton")

from burnish.kernels.gemv_append import gemv_append, gemv_append_configs
from burnish.kernels.launch import Config, Launch, Target, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)


def inputs(
    q_heads: int = 3, heads: int = 1, d: int = 8, *, batch: int = 2, s: int = 1, depth: int = 40, most: int = 6,
    dtype: torch.dtype = FP32, bias: bool = True, table_dtype: torch.dtype = FP32, tables: tuple[int, ...] | None = (),
) -> list[Any]:  # fmt: skip
    """All but the lengths. The tables, if not None, are any numbers: both partners' are taken as they come."""
    rows, cache = (q_heads + 2 * heads) * d, (batch, heads, most, d)
    weight, added = randn(rows, depth, dtype=dtype, seed=1) / depth**0.5, randn(rows, dtype=dtype, seed=2)
    shape = tables or (batch, s, d)
    cos, sin = (None if tables is None else randn(*shape, dtype=table_dtype, seed=seed) for seed in (5, 6))
    caches = randn(*cache, dtype=dtype, seed=3), randn(*cache, dtype=dtype, seed=4)
    return [randn(batch, s, depth, dtype=dtype), weight, added if bias else None, cos, sin, *caches]


def check(*args: Any, config: Config | None = None, name: str = "triton_gemv") -> None:
    """Runs the kernel in place on copies, and looks at all that it was given."""
    op, impl = linear_rope_append, linear_rope_append.impls[name]
    bound = op.bind(*args)
    assert impl.why_not(*bound) == ["the inputs are on cpu, not on a CUDA device"]
    given = [a.clone() if isinstance(a, Tensor) and i in op.donates else a for i, a in enumerate(bound)]
    untouched = {i: a.clone() for i, a in enumerate(bound) if isinstance(a, Tensor) and i not in op.donates}
    assert impl.in_place is not None
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        results = impl.in_place(*given, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = op.reference(*bound)
    assert_close(results, expected, oracle(op.reference, *bound))
    assert results[0].transpose(1, 2).is_contiguous()
    for i, before in untouched.items():
        assert torch.equal(bound[i], before)
    for i, result in op.donates.items():
        assert results[result] is given[i]
        position, lengths = torch.arange(given[i].shape[2]), bound[7].reshape(-1, 1)
        old = (position < lengths) | (position >= lengths + bound[0].shape[1])
        kept = old[:, None, :, None].expand(given[i].shape)
        assert torch.equal(given[i][kept], bound[i][kept])  # to the bit


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("batch", "s"), [(1, 1), (5, 1), slow(1, 3), (2, 4)])
@pytest.mark.parametrize(
    ("q_heads", "heads", "d", "depth", "dtype"),
    [
        (3, 1, 8, 40, BF16),
        (1, 1, 2, 1, FP16),
        slow(2, 2, 6, 131, FP16),
        (2, 1, 16, 300, FP32),
        slow(1, 1, 4, 2048, BF16),
    ],
)
def test_sizes(
    q_heads: int, heads: int, d: int, depth: int, dtype: torch.dtype, batch: int, s: int, interleaved: bool
) -> None:
    args = inputs(q_heads, heads, d, batch=batch, s=s, depth=depth, dtype=dtype)
    check(*args, torch.arange(batch), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("depth", [1024, 1100])
def test_every_config(depth: int, interleaved: bool) -> None:
    """Programs that end within a head, and with the last one; whole blocks of K and not, which are loaded otherwise."""
    args = inputs(3, 2, 6, depth=depth, dtype=FP16)
    configs = [*gemv_append_configs(*args[:2]), Config.of(1, 1, BLOCK_M=2, BLOCK_N=8, BLOCK_K=512)]
    for config in configs:
        check(*args, torch.tensor([4, 2]), interleaved, config=config)


@pytest.mark.parametrize("lengths", [0, 3, 5, 6, 1 << 40])
@pytest.mark.parametrize("s", [1, 4])
def test_what_does_not_fit_is_dropped(s: int, lengths: int) -> None:
    check(*inputs(s=s), torch.tensor(lengths))
    check(*inputs(s=s), torch.tensor([lengths, 1]))


def test_nothing_is_written_behind_a_cache() -> None:
    """The caches are windows of larger ones, whose other positions belong to others."""
    *given, k, v = inputs(s=3, most=20)
    before = [t.clone() for t in (k, v)]
    gemv_append(*given, *(t[:, :, 4:10] for t in (k, v)), torch.tensor([4, 6]))
    for new, old in zip((k, v), before, strict=True):
        changed = (new != old).any(dim=3).any(dim=1)
        assert [row.nonzero().flatten().tolist() for row in changed] == [[8, 9], []]


def test_nothing_is_written_behind_the_queries() -> None:
    args = inputs(batch=3)  # of 4 rows of a block
    launches: list[Launch] = []
    with recording(launches.append):
        gemv_append(*args, torch.tensor(4))
    (only,) = launches
    given = list(only.args)
    (at,) = [i for i, a in enumerate(given) if isinstance(a, Tensor) and a.shape == (3, 1, 3, 8)]
    large = torch.full((1000,), torch.nan)
    given[at] = large[: 3 * 3 * 8].view(3, 1, 3, 8)
    only.kernel[only.grid](*given, **only.constants, **only.options)
    assert large[: 3 * 3 * 8].isfinite().all()
    assert large[3 * 3 * 8 :].isnan().all()


@pytest.mark.parametrize("shape", [(4, 8), (1, 4, 8)])
def test_tables_that_texts_share(shape: tuple[int, ...]) -> None:
    args = inputs(s=4, tables=shape)
    check(*args, torch.tensor(1))
    args[4] = args[4].transpose(-1, -2).contiguous().transpose(-1, -2)  # another layout than cos
    check(*args, torch.tensor(1))


@pytest.mark.parametrize(("batch", "s", "d"), [(1, 1, 8), (2, 4, 6), slow(5, 1, 2)])
def test_without_tables(batch: int, s: int, d: int) -> None:
    """As GPT-2 has it: nothing is rotated."""
    args = inputs(d=d, batch=batch, s=s, tables=None)
    check(*args, torch.arange(batch))
    args[1], args[2] = args[1].half(), None
    check(args[0].half(), *args[1:5], *(cache.half() for cache in args[5:]), torch.tensor(1))


@pytest.mark.parametrize("table_dtype", [FP32, BF16, slow(FP16)])
def test_tables_of_another_dtype(table_dtype: torch.dtype) -> None:
    check(*inputs(dtype=BF16, table_dtype=table_dtype, bias=False), torch.tensor(2, dtype=torch.int32))


LAYOUTS = {
    "slice": lambda t: torch.cat((t, t, t), dim=1)[:, t.shape[1] : 2 * t.shape[1]],
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim first in memory": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other entry": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strided_caches_are_written_in_place(lay: Any) -> None:
    *given, k_cache, v_cache = inputs(4, 2, s=2)
    args = *given, lay(k_cache), v_cache.clone(), torch.tensor([1, 3])
    expected, truth = linear_rope_append.reference(*args), oracle(linear_rope_append.reference, *args)
    assert_close((gemv_append(*args), *args[5:7]), expected, truth)


def test_strided_inputs_are_read_in_place() -> None:
    x, weight, bias, *rest = inputs(batch=2, s=3, depth=64)
    packed, weight = randn(2, 3, 3 * 64), torch.cat((weight, weight), dim=1)[:, 32:96]
    for given in (packed[..., 64:128], packed[:, :, ::3], x.transpose(0, 1).contiguous().transpose(0, 1)):
        check(given, weight, bias.repeat_interleave(2)[::2], *rest, torch.tensor(2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_infinite_values_pass(interleaved: bool) -> None:
    x, weight, bias, *rest = inputs(dtype=FP16)
    bias[-3], bias[-1] = torch.inf, -torch.inf
    _, _, v_cache = linear_rope_append.impls["triton_gemv"].fn(x, weight, bias, *rest, torch.tensor(2), interleaved)
    assert (v_cache[:, :, 2, [5, 7]] == torch.tensor([torch.inf, -torch.inf])).all()
    assert v_cache[:, :, 2, [4, 6]].isfinite().all()


def test_the_product_is_not_rounded_before_it_is_rotated() -> None:
    x, weight, _, _, _, *caches = inputs(4, 1, 64, depth=64, dtype=FP16, bias=False)
    cos, sin = torch.full((1, 64), 0.7), torch.full((1, 64), -0.7)  # differences of what is nearly alike show it
    halves = weight[: 4 * 64].unflatten(0, (4, 2, 32))
    halves[:, 1] = halves[:, 0] * -1.01
    args = x, weight, None, cos, sin, *caches, torch.tensor(0)
    exact = oracle(linear_rope_append.reference, *args)[0]
    errors = [(q.double() - exact).abs().mean() for q in (gemv_append(*args), linear_rope_append.reference(*args)[0])]
    assert errors[0] < 0.7 * errors[1]


def test_all_is_one_launch_of_pairs() -> None:
    args = inputs(32, 8, 128, batch=1, depth=64, dtype=BF16)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        gemv_append(*args, torch.tensor(4))
    (only,) = launches
    assert only.grid == (48 * 64 // only.constants["BLOCK_N"],)
    assert (only.constants["Q_HEADS"], only.constants["HEADS"], only.constants["D"]) == (32, 8, 128)


def test_reasons() -> None:
    def reasons(*args: Any, **changed: Any) -> list[str]:
        bound = linear_rope_append.signature.bind(*args, torch.tensor(0))
        bound.arguments |= changed
        found = linear_rope_append.impls["triton_gemv"].why_not(*bound.args)
        return [reason for reason in found if "CUDA" not in reason]

    assert reasons(*inputs(s=5)) == ["x has 10 rows; the kernel takes up to 8"]
    args = inputs()
    assert reasons(*args, weight=args[1].t().contiguous().t()) == ["a weight is not contiguous along K"]
    assert reasons(*args, cos=args[3][..., :4], sin=args[4][..., :4]) == [
        "cos and sin have 4 columns; the kernel rotates whole heads, of 8"
    ]
    assert reasons(*args, v_cache=args[6][..., :4]) == [
        "heads of v have 4 entries, those of k 8; the kernel takes one width"
    ]
    assert reasons(*args, sin=args[4].double()) == [
        "sin is torch.float64; the kernel takes float16, bfloat16 and float32"
    ]
    assert reasons(*inputs(most=0)) == ["an input is empty"]
    assert reasons(*inputs(d=5, tables=None)) == ["heads have 5 entries; the kernel takes pairs of them"]
