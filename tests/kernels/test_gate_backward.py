"""The backward pass of a gate as a Triton kernel, in Triton's interpreter: the numbers, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import gate_backward as op
from burnish.ops._activations import GATES, activate

pytest.importorskip("triton")

from burnish.kernels.gate_backward import gate_backward, gate_backward_configs
from burnish.kernels.launch import Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _by_autograd(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = gate_up.detach().clone().requires_grad_()
        gates, up = leaf.chunk(2, dim=-1)
        hidden = activate(gates, activation) * up
        return torch.autograd.grad(hidden, leaf, grad)[0], hidden.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("columns", [1, 33, 64, 130])
def test_against_autograd(columns: int, activation: str, dtype: torch.dtype) -> None:
    grad, gate_up = randn(3, 5, columns, dtype=dtype, seed=0), randn(3, 5, 2 * columns, dtype=dtype, seed=1)
    before = grad.clone(), gate_up.clone()
    expected = _by_autograd(grad, gate_up, activation), oracle(_by_autograd, grad, gate_up, activation)
    for config in (None, Config.of(BLOCK=32)):
        result = gate_backward(grad, gate_up, activation, config=config)
        assert_close(result, *expected)
        assert all(t.is_contiguous() for t in result)
    d_gate_up, hidden = gate_backward(grad, gate_up, activation, keep_hidden=False)
    assert_close(d_gate_up, expected[0][0], expected[1][0])
    assert hidden.shape == (0,)
    assert torch.equal(grad, before[0])
    assert torch.equal(gate_up, before[1])


@pytest.mark.parametrize("activation", GATES)
def test_slopes_over_the_range(activation: str) -> None:
    """In float32, where the slope of what is large must not lose digits: 1 - sigmoid(20) is 2e-9."""
    gates = torch.linspace(-30, 30, 4001)
    gate_up, grad = torch.cat((gates, torch.ones(4001)))[None], torch.ones(1, 4001)
    result = gate_backward(grad, gate_up, activation)
    assert_close(result, _by_autograd(grad, gate_up, activation), oracle(_by_autograd, grad, gate_up, activation))


@pytest.mark.parametrize("activation", GATES)
def test_nan_and_the_ends_of_the_range(activation: str) -> None:
    gates = torch.tensor([float("nan"), -1e4, 1e4, 0.0, -0.0])
    d_gate_up, hidden = gate_backward(torch.ones(1, 5), torch.cat((gates, torch.full((5,), 2.0)))[None], activation)
    assert d_gate_up[0, [0, 5]].isnan().all()
    assert d_gate_up[0, 1:3].tolist() == [0.0, 2.0]
    assert d_gate_up[0, 6:].tolist() == [0.0, 1e4, 0.0, 0.0]
    assert hidden[0, 0].isnan()
    assert hidden[0, 1:].tolist() == [0.0, 2e4, 0.0, 0.0]


def test_strided_inputs() -> None:
    grad, gate_up = (randn(7, 5, n, dtype=torch.float16, seed=n).transpose(0, 1) for n in (24, 48))
    result = gate_backward(grad, gate_up, "gelu")
    assert_close(result, _by_autograd(grad, gate_up, "gelu"), oracle(_by_autograd, grad, gate_up, "gelu"))
    assert all(t.is_contiguous() for t in result)


def test_the_same_bits_each_time() -> None:
    args = randn(9, 130, dtype=torch.bfloat16, seed=0), randn(9, 260, dtype=torch.bfloat16, seed=1), "silu"
    first, again = gate_backward(*args), gate_backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bad_inputs_name_the_argument() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 5\)"):
        op(x, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        op(x, torch.zeros(2, 6), "relu")
    with pytest.raises(TypeError, match=r"gate_up has dtype torch\.float64"):
        op(x, torch.zeros(2, 6).double())


def test_configs_are_distinct() -> None:
    for columns in (1, 33, 1024, 8192, 14336):
        configs = gate_backward_configs(columns)
        assert 1 <= len(configs) <= 3
        assert len({str(config) for config in configs}) == len(configs)
