"""The kernel of rotary tables on what its Op's samples leave out: large angles, every tile, odd sizes, strides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle
from burnish.ops import rope_tables

pytest.importorskip("triton")

from burnish.kernels import rope_tables as kernels
from burnish.kernels.launch import Config, Launch, Target, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)


def frequencies(half: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(half) / half)


def assert_right(
    position_ids: Tensor, inv_freq: Tensor, dtype: str = "float32", *rest: Any, config: Any = None
) -> None:
    bound = rope_tables.bind(position_ids, inv_freq, dtype, *rest)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        results = rope_tables.impls["triton"].fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = rope_tables.reference(*bound)
    assert_close(results, expected, oracle(rope_tables.reference, *bound))
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("first", [0, 1000, 100_000, 131_072 - 100, 2**24 - 100])
def test_the_error_at_every_size_of_angle(first: int, base: float) -> None:
    """Of the angle rounded to float32, of which eager's cosine is one of, and of the position times the frequency."""
    position_ids, inv_freq = torch.arange(first, first + 100), frequencies(64, base)
    results = kernels.rope_tables(position_ids, inv_freq, FP32)
    eager = rope_tables.reference(position_ids, inv_freq)
    rounded = (position_ids[:, None].float() * inv_freq).double().repeat(1, 2)
    true = (position_ids[:, None].double() * inv_freq.double()).repeat(1, 2)
    for result, other, function in zip(results, eager, (torch.cos, torch.sin), strict=True):
        assert (result - function(rounded)).abs().max() < 1e-7
        assert (result - function(true)).abs().max() <= 2 * (other - function(true)).abs().max()


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4, 5, 1001, 83_442, 10_000_001])
def test_near_the_quarters(quarters: int) -> None:
    """Where the reduction goes from one quadrant to the next, and where one of the two is zero."""
    near = torch.tensor([quarters * math.pi / 2, (quarters + 0.5) * math.pi / 2]).repeat_interleave(5)
    near = near + torch.tensor([-2e-3, -1e-6, 0.0, 1e-6, 2e-3]).repeat(2)
    angles = torch.cat((near, -near))
    cos, sin = (table[:, 0] for table in kernels.rope_tables(angles, torch.ones(1), FP32))
    assert (cos - angles.double().cos()).abs().max() < 1e-7
    assert (sin - angles.double().sin()).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scaling", [1.0, 1.3466])
def test_frequencies_of_float32_as_models_keep_them(dtype: str, scaling: float) -> None:
    assert_right(torch.arange(4000, 4032).view(2, 16), frequencies(16), dtype, scaling)


@pytest.mark.parametrize(("BLOCK_S", "num_warps"), [(1, 1), (2, 4), (8, 2), (32, 4)])
@pytest.mark.parametrize("half", [1, 3, 10, 32])
def test_every_kind_of_tile_takes_every_angle_once(half: int, BLOCK_S: int, num_warps: int) -> None:
    config = Config.of(num_warps=num_warps, BLOCK_S=BLOCK_S)
    assert_right(torch.arange(14).view(2, 7) * 9, frequencies(half), config=config)


@pytest.mark.parametrize(
    "position_ids",
    [
        torch.arange(10).view(5, 2).t(),
        torch.arange(20).view(2, 10)[:, ::2],
        torch.arange(5)[None].expand(3, 5),
        torch.arange(10)[::3],
        torch.tensor([[7]]),
        torch.tensor([[3], [100_000]], dtype=torch.int32),
        torch.arange(6).view(2, 3).to(FP16) / 8,
        -torch.arange(5),
    ],
    ids=["transposed", "every other", "expanded", "one dim", "one token", "int32", "float16", "negative"],
)
def test_positions(position_ids: Tensor) -> None:
    assert_right(position_ids, frequencies(8))
    assert_right(position_ids, frequencies(16)[::2], "bfloat16")


def test_inputs_are_taken_as_they_lie_in_one_launch() -> None:
    position_ids, inv_freq = torch.arange(5)[None].expand(3, 5), frequencies(64, 500000.0)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        kernels.rope_tables(position_ids, inv_freq, BF16)
    (only,) = launches
    assert only.args[0] is position_ids
    assert only.args[1] is inv_freq


@pytest.mark.parametrize(
    ("shape", "half", "grid"), [((1, 1), 64, 1), ((64, 1), 64, 64), ((1, 100), 16, 50), ((8, 4096), 64, 8 * 4096 // 2)]
)
def test_few_angles_are_spread_over_the_device(shape: tuple[int, int], half: int, grid: int) -> None:
    launches: list[Launch] = []
    with recording(launches.append, H200):
        kernels.rope_tables(torch.zeros(shape, dtype=torch.int64), frequencies(half), BF16)
    assert launches[0].grid == (grid,)


def test_why_not() -> None:
    def reasons(position_ids: Tensor, inv_freq: Tensor, dtype: str = "float32") -> list[str]:
        return rope_tables.impls["triton"].why_not(position_ids.to("meta"), inv_freq.to("meta"), dtype)[1:]

    ids = torch.arange(3)
    assert reasons(ids, frequencies(512), "bfloat16") == []
    assert reasons(ids, frequencies(513)) == ["the tables have 1026 columns; the kernel takes up to 1024"]
    assert reasons(ids, frequencies(8), "float64") == [
        "the tables are to be float64; the kernel writes float16, bfloat16 and float32"
    ]
    assert reasons(ids.double(), frequencies(8)) == ["position_ids is torch.float64; the kernel computes in float32"]
    assert reasons(ids[:0], frequencies(8)) == ["position_ids is empty"]


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ((torch.zeros(1, 1, 3), frequencies(4)), ValueError, r"position_ids has shape \(1, 1, 3\)"),
        ((torch.zeros(3, dtype=torch.bool), frequencies(4)), TypeError, "position_ids has dtype torch.bool"),
        ((torch.arange(3), frequencies(4)[None]), ValueError, r"inv_freq has shape \(1, 4\)"),
        ((torch.arange(3), torch.arange(4)), TypeError, "inv_freq has dtype torch.int64"),
        ((torch.arange(3), frequencies(4), "int8"), ValueError, "dtype is 'int8'; it must be one of float16, bfloat16"),
    ],
)
def test_what_the_op_does_not_take(arguments: tuple[Any, ...], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        rope_tables(*arguments)
