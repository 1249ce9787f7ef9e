"""The rotary kernel on what its Op's samples leave out: every tile, odd sizes, strides, q and k at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import linear_rope, rope

pytest.importorskip("triton")

from burnish.kernels import rope as kernels
from burnish.kernels.launch import Config, Launch, Target, recording
from tests.slow import slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)


def assert_right(result: Tensor, x: Tensor, *rest: Any) -> None:
    expected = rope.reference(x, *rest)
    assert_close(result, expected, oracle(rope.reference, x, *rest))
    assert result.stride() == expected.stride()


def packed(heads: int, groups: int, *, batch: int = 2, length: int = 5, width: int = 16, dtype: torch.dtype = FP32):
    """q and k (B, heads, S, D) as they lie in one product with v."""
    qkv = randn(batch, length, heads + 2 * groups, width, dtype=dtype)
    return qkv[:, :, :heads].transpose(1, 2), qkv[:, :, heads : heads + groups].transpose(1, 2)


def tables(*shape: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """Any numbers: the kernel takes both halves as they come."""
    return randn(*shape, dtype=dtype, seed=8), randn(*shape, dtype=dtype, seed=9)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("BLOCK_S", "BLOCK_H"), [(1, 1), (4, 1), (1, 4), (2, 2), (8, 8)])
def test_every_kind_of_tile_takes_every_row_once(BLOCK_S: int, BLOCK_H: int, interleaved: bool) -> None:
    q, k = packed(6, 3)
    config = Config.of(num_warps=4, BLOCK_S=BLOCK_S, BLOCK_H=BLOCK_H)
    cos, sin = tables(5, 16)
    assert_right(rope.impls["triton"].fn(q, cos, sin, interleaved, config=config), q, cos, sin, interleaved)
    new_q, new_k = kernels.rope_pair(q, k, cos, sin, interleaved, config)
    assert_right(new_q, q, cos, sin, interleaved)
    assert_right(new_k, k, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "table_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP16)])
@pytest.mark.parametrize(("D", "R"), [(16, 16), (24, 6), (20, 2), (6, 4)])
def test_partial_rotation(D: int, R: int, dtype: torch.dtype, table_dtype: torch.dtype, interleaved: bool) -> None:
    q, k = packed(4, 1, width=D, dtype=dtype, length=3)
    cos, sin = tables(2, 3, R, dtype=table_dtype)
    new_q, new_k = kernels.rope_pair(q, k, cos, sin, interleaved)
    assert_right(new_q, q, cos, sin, interleaved)
    assert_right(new_k, k, cos, sin, interleaved)


@pytest.mark.parametrize(
    "x",
    [
        randn(2, 3, 5, 16),
        randn(2, 5, 3, 16).transpose(1, 2),
        randn(2, 5, 9, 16).transpose(1, 2)[:, 3:6],
        randn(16, 3, 2, 5).permute(2, 1, 3, 0),
        randn(2, 3, 5, 32)[..., ::2],
        randn(2, 1, 5, 16).expand(2, 3, 5, 16),
    ],
    ids=["contiguous", "heads last", "slice", "head_dim first in memory", "every other entry", "one head for all"],
)
def test_strides_are_taken_in_place(x: Tensor) -> None:
    cos, sin = tables(5, 16)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        kernels.rope(x, cos, sin)
    (only,) = launches
    assert only.args[0] is x
    assert_right(kernels.rope(x, cos, sin), x, cos, sin)
    assert_right(kernels.rope(x, cos, sin, True), x, cos, sin, True)


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
    x = randn(2, 3, 5, 16)
    cos, sin = (cut(t) for t in tables(9, 20))
    assert_right(kernels.rope(x, cos, sin), x, cos, sin)
    assert_right(kernels.rope(x, cos, sin.contiguous()), x, cos, sin)  # another layout than cos


def test_q_and_k_are_one_launch() -> None:
    q, k = packed(32, 8, batch=1, length=1, width=64, dtype=BF16)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        kernels.rope_pair(q, k, *tables(1, 64))
    (only,) = launches
    assert only.grid == (5,)  # 8 heads each


def test_in_place_writes_the_heads_and_nothing_else() -> None:
    cos, sin = tables(5, 16)
    for BLOCK_S, BLOCK_H in ((1, 1), (4, 1), (1, 4), (2, 2), (8, 8)):
        product = randn(2, 5, 10 * 16)
        before = product.clone()
        heads, old = (t[..., 16:112].unflatten(-1, (6, 16)).transpose(1, 2) for t in (product, before))
        kernels.rope_in_place(heads, cos, sin, Config.of(num_warps=4, BLOCK_S=BLOCK_S, BLOCK_H=BLOCK_H))
        assert_close(heads, rope.reference(old, cos, sin), oracle(rope.reference, old, cos, sin))
        assert torch.equal(product[..., :16], before[..., :16])
        assert torch.equal(product[..., 112:], before[..., 112:])


@pytest.mark.parametrize("R", [16, 6])
def test_in_place_by_tables_for_each_row(R: int) -> None:
    x = randn(2, 3, 5, 16, dtype=BF16)
    old, (cos, sin) = x.clone(), tables(2, 5, R)
    kernels.rope_in_place(x, cos, sin)
    assert_right(x, old, cos, sin)


def test_in_place_is_one_launch_that_says_so() -> None:
    x = randn(2, 3, 5, 16)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        kernels.rope_in_place(x, *tables(5, 16))
        kernels.rope(x, *tables(5, 16))
    one, other = launches
    assert one.args[0] is one.args[2] is x
    assert (one.constants["IN_PLACE"], other.constants["IN_PLACE"]) == (True, False)


@pytest.mark.parametrize("dtype", [FP16, *map(slow, (BF16, FP32))])
def test_heads_of_a_product_on_the_samples(dtype: torch.dtype) -> None:
    impl = linear_rope.impls["torch_triton"]
    for sample in linear_rope.samples("cpu", dtype):
        expected = linear_rope.reference(*sample.args), oracle(linear_rope.reference, *sample.args)
        assert impl.configs is not None
        for config in impl.configs(*sample.args):
            assert_close(impl.fn(*sample.args, config=config), *expected)


@pytest.mark.parametrize("R", [24, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(32, 8), (12, 12), (71, 1)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1024, 1), (1, 2048)])
def test_configs_are_few_and_distinct(R: int, heads: int, groups: int, batch: int, length: int) -> None:
    q, k = (torch.empty(batch, n, length, 128, dtype=BF16, device="meta") for n in (heads, groups))
    with recording(lambda launch: None, H200):
        configs = kernels.rope_configs(q, k, R)
    assert 1 <= len(configs) <= 4
    assert len({str(config) for config in configs}) == len(configs)
    for config in configs:
        assert heads % config["BLOCK_H"] == groups % config["BLOCK_H"] == 0
        assert config["BLOCK_S"] <= max(1, length)


def test_reasons_against() -> None:
    x = randn(1, 1, 2, 2048)
    reasons = [r for r in rope.impls["triton"].why_not(x, *tables(2, 0)) if "CUDA" not in r]
    assert reasons == ["head_dim 2048 is above 1024", "cos and sin have no columns: nothing is rotated"]
    cos, sin = tables(2, 8)
    reasons = [r for r in rope.impls["triton"].why_not(randn(1, 1, 2, 8), cos.double(), sin) if "CUDA" not in r]
    assert reasons == ["cos is torch.float64; the kernel takes float16, bfloat16 and float32"]
