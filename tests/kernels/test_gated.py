"""The Triton kernels of `gated_mlp` in the interpreter: sizes, strides and configs that the samples lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import gated_mlp

pytest.importorskip("triton")

from burnish.kernels.gated import GatedConfig
from burnish.kernels.launch import Config

ON_CPU = "not on a CUDA device"


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _assert_right(result: Tensor, args: tuple[Any, ...]) -> None:
    assert_close(result, gated_mlp.reference(*args), oracle(gated_mlp.reference, *args))
    assert result.is_contiguous()


def _impls(*args: Any) -> list[str]:
    names = [name for name in gated_mlp.impls if name.startswith("triton")]
    return [name for name in names if all(ON_CPU in reason for reason in gated_mlp.impls[name].why_not(*args))]


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sizes(rows: int, dtype: torch.dtype) -> None:
    inner, depth, columns = 33, 50, 21
    args = (
        *(_tensor(rows, depth, seed=0, dtype=dtype), _tensor(2 * inner, depth, seed=1, dtype=dtype)),
        *(_tensor(columns, inner, seed=2, dtype=dtype), _tensor(2 * inner, seed=3, dtype=dtype), None, "gelu"),
    )
    names = _impls(*args)
    few = (["triton_gemv"] if rows <= 8 else []) + (["triton_skinny"] if rows > 1 and dtype == torch.float16 else [])
    assert names == ["triton", "triton_gate", *few]
    for name in names:
        _assert_right(gated_mlp.impls[name].fn(*args), args)


@pytest.mark.parametrize("k_major", [False, True])
def test_tma(k_major: bool) -> None:
    weights = _tensor(144, 72, seed=1), _tensor(40, 72, seed=2)
    if k_major:
        weights = _tensor(72, 144, seed=1).t(), _tensor(72, 40, seed=2).t()
    args = (_tensor(130, 72, seed=0), *weights, _tensor(144, seed=3), _tensor(40, seed=4), "silu")
    assert _impls(*args)[2:] == ["triton_tma", "triton_tma_gate"]
    blocks = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "FLATTEN": 1}
    config = GatedConfig(Config.of(HALVES=1, **blocks), Config.of(HALVES=0, **blocks))
    _assert_right(gated_mlp.impls["triton_tma"].fn(*args, config=config), args)
    _assert_right(gated_mlp.impls["triton_tma_gate"].fn(*args), args)


def test_split_sums_are_the_same_each_time() -> None:
    args = (_tensor(2, 9, 128, seed=0)[:, ::2], _tensor(96, 128, seed=1), _tensor(40, 48, seed=2))
    blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2}
    config = GatedConfig(Config.of(SPLIT_K=4, **blocks), Config.of(SPLIT_K=2, **blocks))
    first = gated_mlp.impls["triton"].fn(*args, config=config)
    _assert_right(first, gated_mlp.bind(*args))
    assert torch.equal(first, gated_mlp.impls["triton"].fn(*args, config=config))


def test_configs_are_few_and_distinct() -> None:
    for rows in (1, 16, 128, 2048):
        weights = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((22016, 1024), (1024, 11008))]
        args = (torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta"), *weights, None, None, "silu")
        for name in ("triton", "triton_gate", "triton_gemv", "triton_skinny"):
            if name == "triton_skinny" and rows > 64:
                continue  # it does not claim the case
            configs = gated_mlp.impls[name].configs(*args)  # type: ignore[misc]
            assert 1 <= len(configs) <= 16
            assert len({str(config) for config in configs}) == len(configs)
            assert all(str(config).endswith("F.linear") == (name == "triton_gate") for config in configs)


def test_a_result_whose_rows_are_not_aligned_is_not_claimed() -> None:
    x, gate_up, down = randn(1, 128, 64), randn(24, 64), randn(64, 12)
    args = gated_mlp.bind(*(t.to(torch.bfloat16) for t in (x, gate_up, down)))
    for name in ("triton_tma", "triton_tma_gate"):
        assert any("12 rows" in reason for reason in gated_mlp.impls[name].why_not(*args))
