"""The elementwise kernel between the products of `gated_mlp`, in the interpreter, and the Impl that it is made for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Sample
from burnish.ops import gated_mlp
from burnish.ops._activations import GATES, activate

pytest.importorskip("triton")

from burnish.kernels.gate import gate, gate_configs
from burnish.kernels.launch import Config

IMPL = gated_mlp.impls["torch_triton"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _reference(gate_up: Tensor, activation: str) -> Tensor:
    left, right = gate_up.chunk(2, dim=-1)
    return activate(left, activation) * right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("columns", [1, 33, 64, 130])
def test_gate(columns: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = randn(3, 5, 2 * columns, dtype=dtype, seed=0)
    before = gate_up.clone()
    for config in (None, Config.of(BLOCK=32)):
        result = gate(gate_up, activation, config)
        assert_close(result, _reference(gate_up, activation), oracle(_reference, gate_up, activation))
        assert result.is_contiguous()
    assert torch.equal(gate_up, before)


def test_strided_input() -> None:
    gate_up = randn(7, 5, 2 * 24, dtype=torch.float16, seed=0).transpose(0, 1)
    result = gate(gate_up, "silu")
    assert_close(result, _reference(gate_up, "silu"), oracle(_reference, gate_up, "silu"))
    assert result.is_contiguous()


def test_nan_and_the_ends_of_the_range() -> None:
    gates = torch.tensor([float("nan"), float("inf"), -1e4, 1e4, 0.0, -0.0])
    result = gate(torch.cat((gates, torch.full((6,), 2.0)))[None], "silu")[0]
    assert result[0].isnan()
    assert result[1:].tolist() == [float("inf"), 0.0, 2e4, 0.0, 0.0]


SAMPLES = [
    pytest.param(sample, id=f"{dtype}-{sample.label}") for dtype in DTYPES for sample in gated_mlp.samples("cpu", dtype)
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_impl(sample: Sample) -> None:
    args = gated_mlp.bind(*sample.args, **sample.kwargs)
    assert [reason for reason in IMPL.why_not(*args) if "not on a CUDA device" not in reason] == []
    result = IMPL.fn(*args)
    assert_close(result, gated_mlp.reference(*args), oracle(gated_mlp.reference, *args))
    assert result.is_contiguous()


def test_reasons() -> None:
    x = torch.empty(2, 8)
    assert "a weight is empty" in IMPL.why_not(x, torch.empty(0, 8), torch.empty(4, 0))


def test_configs_are_distinct() -> None:
    for columns in (1, 33, 1024, 11008, 14336):
        configs = gate_configs(columns)
        assert 1 <= len(configs) <= 2
        assert len({str(config) for config in configs}) == len(configs)
