"""The Triton kernel for up to 64 rows in the interpreter: sizes, strides, gates, splits and copies by descriptors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import linear
from burnish.ops._activations import activate

pytest.importorskip("triton")

from burnish.kernels import counters
from burnish.kernels.launch import INTERPRETED, Config, Target
from burnish.kernels.matmul_configs import Product
from burnish.kernels.skinny import skinny, skinny_configs


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _config(rows: int, split: int = 1, tma: int = 0) -> Config:
    return Config.of(BLOCK_M=16 if rows <= 16 else 64, BLOCK_N=32, BLOCK_K=32, SPLIT_K=split, TMA=tma)


def _assert_right(result: Tensor, *args: Any) -> None:
    assert_close(result, linear.reference(*args), oracle(linear.reference, *args))
    assert result.is_contiguous()


def _gated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    gate, up = linear.reference(x, weight, bias).chunk(2, dim=-1)
    return activate(gate, activation) * up


@pytest.mark.parametrize("rows", [2, 16, 33, 64])
@pytest.mark.parametrize(
    ("columns", "depth", "dtype"),
    [(130, 96, torch.float16), (33, 130, torch.bfloat16), (1, 33, torch.float16), (70, 72, torch.bfloat16)],
)
def test_sizes(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = _tensor(rows, depth, seed=0, dtype=dtype), _tensor(columns, depth, seed=1, dtype=dtype)
    bias, residual = _tensor(columns, seed=2, dtype=dtype), _tensor(rows, columns, seed=3, dtype=dtype)
    impl = linear.impls["triton_skinny"]
    assert impl.why_not(x, weight, bias) == ["the inputs are on cpu, not on a CUDA device"]
    for args in ((x, weight), (x, weight, bias, "gelu"), (x, weight, None, "silu", residual)):
        _assert_right(impl.fn(*args), *args)


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize(("columns", "depth"), [(70, 104), (32, 50)])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tma", [0, 1])  # with a depth of 50, rows do not start where a descriptor needs them to
def test_gates(rows: int, columns: int, depth: int, split: int, tma: int) -> None:
    x, weight, bias = _tensor(rows, depth, seed=0), _tensor(2 * columns, depth, seed=1), _tensor(2 * columns, seed=2)
    for args in ((x, weight, None, "silu"), (x, weight, bias, "gelu_tanh")):
        result = skinny(*args, gated=True, config=_config(rows, split, tma))
        assert_close(result, _gated(*args), oracle(_gated, *args))


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_split_sums_are_the_same_each_time_and_leave_no_trace(parts: int, tma: int) -> None:
    args = (
        *(_tensor(33, 248, seed=0), _tensor(70, 248, seed=1)),
        *(_tensor(70, seed=2), "gelu", _tensor(70, seed=3).expand(33, 70)),
    )
    first = skinny(*args, config=_config(33, parts, tma))
    _assert_right(first, *args)
    assert torch.equal(first, skinny(*args, config=_config(33, parts, tma)))
    assert all(not counter.any() for counter in counters._buffers.values())


def test_a_split_may_have_more_parts_than_there_are_blocks() -> None:
    args = (_tensor(3, 40, seed=0), _tensor(20, 40, seed=1))
    _assert_right(skinny(*args, config=_config(3, 4)), *args)


def test_strided_inputs_are_read_in_place() -> None:
    packed, weight = _tensor(2, 3, 3 * 64, seed=0), _tensor(40, 128, seed=1)[:, 64:]
    bias = _tensor(80, seed=2)[::2]
    for x in (packed[..., 64:128], packed[:, :, ::3], packed.transpose(0, 1)[..., :64]):
        residual = _tensor(40, *x.shape[:-1], seed=3).permute(1, 2, 0)
        for tma in (0, 1):
            _assert_right(
                skinny(x, weight, bias, "silu", residual, config=_config(6, tma=tma)), x, weight, bias, "silu", residual
            )


def test_reasons() -> None:
    impl, weight = linear.impls["triton_skinny"], _tensor(21, 33, seed=1)
    assert "takes 2 to 64" in impl.why_not(_tensor(1, 33, seed=0), weight)[-1]
    assert "takes 2 to 64" in impl.why_not(_tensor(65, 33, seed=0), weight)[-1]
    assert "contiguous along K" in impl.why_not(_tensor(2, 33, seed=0), _tensor(33, 21, seed=1).t())[-1]
    assert "takes float16" in impl.why_not(_tensor(2, 33, seed=0).float(), weight.float())[-1]


def test_sums_are_split_only_where_tiles_are_few() -> None:
    h200 = Target((9, 0), 132)
    wide = skinny_configs(Product(16, 14336, 4096, torch.bfloat16, h200, gated=True))
    assert {config["SPLIT_K"] for config in wide} == {1}
    narrow = skinny_configs(Product(16, 4096, 14336, torch.bfloat16, h200))
    assert narrow[0]["SPLIT_K"] == 1, "of 32 columns each: 128 tiles for 132 multiprocessors"
    assert max(config["SPLIT_K"] for config in narrow) > 1
    assert any(config["TMA"] for config in narrow)
    assert not any(config["TMA"] for config in skinny_configs(Product(16, 4096, 4096, torch.bfloat16, INTERPRETED)))
