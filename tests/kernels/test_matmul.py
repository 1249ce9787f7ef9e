"""The Triton kernels of `linear` in the interpreter: sizes, strides, splits and configs that the samples lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels.layout import Rows, rows_of
from burnish.numerics import assert_close, oracle, randn
from burnish.ops import linear

pytest.importorskip("triton")

from burnish.kernels import counters
from burnish.kernels.gemv import gemv, gemv_configs
from burnish.kernels.launch import Config, Target
from burnish.kernels.matmul import matmul
from burnish.kernels.matmul_configs import Product, matmul_configs
from burnish.kernels.matmul_tma import matmul_tma, matmul_tma_configs
from burnish.kernels.skinny import skinny_configs

ON_CPU = "not on a CUDA device"


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _assert_right(result: Tensor, *args: Any, **kwargs: Any) -> None:
    assert_close(result, linear.reference(*args, **kwargs), oracle(linear.reference, *args, **kwargs))
    assert result.is_contiguous()


def _split(parts: int, block_k: int = 32) -> Config:
    return Config.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=block_k, GROUP_M=2, SPLIT_K=parts)


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 128])
@pytest.mark.parametrize(("columns", "depth", "bias"), [(130, 96, True), (33, 130, False), (1, 33, True)])
def test_sizes(rows: int, columns: int, depth: int, bias: bool) -> None:
    args = (_tensor(rows, depth, seed=0), _tensor(columns, depth, seed=1), _tensor(columns, seed=2) if bias else None)
    for name in ("triton", "triton_gemv"):
        impl = linear.impls[name]
        reasons = [reason for reason in impl.why_not(*args) if ON_CPU not in reason]
        assert bool(reasons) == (name == "triton_gemv" and rows > 8)
        if not reasons:
            _assert_right(impl.fn(*args), *args)


@pytest.mark.parametrize("multiply", [matmul, gemv])
def test_strided_inputs_are_read_in_place(multiply: Any) -> None:
    packed, weight = _tensor(2, 3, 3 * 64, seed=0), _tensor(40, 64, seed=1)
    bias, wide = _tensor(80, seed=2)[::2], _tensor(40, 2, 3, seed=3)
    residual = wide.permute(1, 2, 0)
    for x in (packed[..., 64:128], packed[:, :, ::3], packed.transpose(0, 1)[..., :64], packed[:, :1, 128:]):
        args = (x, weight, bias, "silu", residual[:, : x.shape[1]] if x.shape[0] == 2 else residual.transpose(0, 1))
        _assert_right(multiply(*args), *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_strides(dtype: torch.dtype) -> None:
    x = _tensor(33, 48, seed=0, dtype=dtype)
    for weight in (_tensor(48, 40, seed=1, dtype=dtype).t(), _tensor(80, 96, seed=2, dtype=dtype)[::2, ::2]):
        _assert_right(matmul(x, weight), x, weight)
        _assert_right(matmul(x, weight, config=_split(2)), x, weight)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_split_sums_are_the_same_each_time_and_leave_no_trace(parts: int) -> None:
    x, weight = _tensor(33, 250, seed=0), _tensor(70, 250, seed=1)
    args = (x, weight, _tensor(70, seed=2), "gelu", _tensor(33, 70, seed=3))
    first = matmul(*args, config=_split(parts))
    _assert_right(first, *args)
    assert torch.equal(first, matmul(*args, config=_split(parts)))
    assert all(not counter.any() for counter in counters._buffers.values())


def test_a_split_may_have_more_parts_than_there_are_blocks() -> None:
    args = (_tensor(3, 40, seed=0), _tensor(20, 40, seed=1))
    _assert_right(matmul(*args, config=_split(4)), *args)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("multiply", [matmul, gemv])
def test_activations_at_the_ends_of_their_range(multiply: Any, activation: str) -> None:
    values = torch.tensor([0.0, 1e-6, -1e-3, 0.0999, -0.1001, 0.5, -3.0, 20.0, -100.0, 1e4, -1e4, float("inf")])
    x = values.repeat(2)[:, None][:8] if multiply is gemv else values[:, None]
    weight = torch.ones(1, 1)
    expected = linear.reference(x.double(), weight.double(), None, activation)
    assert_close(multiply(x, weight, None, activation), linear.reference(x, weight, None, activation), expected)
    assert multiply(torch.full((1, 1), float("nan")), weight, None, activation).isnan().all()


@pytest.mark.parametrize(("half", "flatten"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("k_major", [False, True])
def test_tma(half: int, flatten: int, k_major: bool) -> None:
    x = _tensor(130, 2 * 72, seed=0)[:, 72:]
    weight = _tensor(72, 104, seed=1).t() if k_major else _tensor(104, 72, seed=1)
    args = (x, weight, _tensor(104, seed=2), "gelu", _tensor(104, seed=3).expand(130, 104))
    assert [reason for reason in linear.impls["triton_tma"].why_not(*args) if ON_CPU not in reason] == []
    blocks = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "HALVES": half, "FLATTEN": flatten}
    _assert_right(matmul_tma(*args, config=Config.of(**blocks)), *args)
    _assert_right(matmul_tma(*args), *args)


def test_reasons() -> None:
    x, weight = _tensor(4, 33, seed=0), _tensor(21, 33, seed=1)
    assert linear.impls["triton"].why_not(x, weight) == ["the inputs are on cpu, not on a CUDA device"]
    scattered = _tensor(4, 4, 4, 5, seed=0)[::2, ::2, ::2]
    assert "two have to be enough" in linear.impls["triton"].why_not(scattered, _tensor(3, 5, seed=1))[-1]
    assert "up to 8" in linear.impls["triton_gemv"].why_not(_tensor(9, 33, seed=0), weight)[-1]
    assert "contiguous along K" in linear.impls["triton_gemv"].why_not(x, _tensor(33, 21, seed=1).t())[-1]
    reasons = "; ".join(linear.impls["triton_tma"].why_not(x.float(), weight.float()))
    for part in ("takes float16", "128 and more", "x has strides (33, 1)", "21 rows", "a weight has strides (33, 1)"):
        assert part in reasons


def test_rows() -> None:
    assert rows_of(torch.empty(2, 3, 5)) == Rows(6, 6, 0, 5)
    assert rows_of(torch.empty(5)) == Rows(1, 1, 0, 5)
    assert rows_of(torch.empty(2, 3, 5)[:, :2]) == Rows(4, 2, 15, 5)
    assert rows_of(torch.empty(7).expand(2, 3, 7)) == Rows(6, 6, 0, 0)
    assert rows_of(torch.empty(2, 3, 4, 5).permute(2, 0, 1, 3)) == Rows(24, 6, 5, 20)
    assert rows_of(torch.empty(4, 4, 4, 4)[::2, ::2, ::2]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("target", [Target((8, 0), 108), Target((8, 6), 84), Target((9, 0), 132), Target((10, 0), 148)])
def test_configs_are_few_and_distinct(target: Target, dtype: torch.dtype) -> None:
    for rows in (1, 8, 16, 17, 64, 128, 384, 1024, 4096):
        for columns, depth in ((1, 1), (768, 3072), (4096, 14336), (33, 130)):
            for gated in (False, True):
                product = Product(rows, columns, depth, dtype, target, gated)
                kinds = [matmul_configs(product)]
                kinds += [gemv_configs(product)] if rows <= 8 else []
                kinds += [skinny_configs(product)] if rows <= 64 and dtype == torch.float16 else []
                kinds += [matmul_tma_configs(product)] if target.tma and dtype == torch.float16 else []
                for configs in kinds:
                    assert 1 <= len(configs) <= 10
                    assert len({str(config) for config in configs}) == len(configs)
