"""GELU's backward pass behind a product as a Triton kernel, in Triton's interpreter: the numbers, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import linear_gelu_backward as op

pytest.importorskip("triton")

from burnish.kernels.gelu_backward import gelu_backward_, gelu_backward_configs
from burnish.kernels.launch import Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("gelu", "gelu_tanh")
SMALL = Config.of(num_warps=1, ROWS=2, COLUMNS=32, PER_SM=1)


def _by_autograd(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        hidden = torch.nn.functional.gelu(leaf, approximate="tanh" if activation == "gelu_tanh" else "none")
        (dx,) = torch.autograd.grad(hidden, leaf, grad)
    return dx, hidden.detach(), dx.flatten(0, -2).to(torch.promote_types(dx.dtype, torch.float32)).sum(0)


def _run(grad: Tensor, x: Tensor, activation: str, config: Config | None = None) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad.clone()
    return dx, *gelu_backward_(dx, x, activation, True, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [1, 33, 64, 300])
def test_against_autograd(columns: int, activation: str, dtype: torch.dtype) -> None:
    grad, x = (randn(3, 7, columns, dtype=dtype, seed=seed) for seed in range(2))
    before = x.clone()
    expected = _by_autograd(grad, x, activation), oracle(_by_autograd, grad, x, activation)
    for config in (None, SMALL):
        assert_close(_run(grad, x, activation, config), *expected)
    dx = grad.clone()
    hidden, total = gelu_backward_(dx, x, activation, keep_hidden=False)
    assert_close((dx, total), expected[0][::2], expected[1][::2])
    assert hidden.shape == (0,)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slope_over_the_range(activation: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-14, 10, 4001).to(dtype)[None]
    args = torch.ones_like(x), x, activation
    assert_close(_run(*args), _by_autograd(*args), oracle(_by_autograd, *args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_the_ends_of_the_range(activation: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[float("nan"), -1e4, 1e4, 0.0, -0.0]], dtype=dtype)
    dx, hidden, total = _run(torch.ones_like(x), x, activation)
    for values in (dx[0], total):
        assert values[0].isnan()
        assert values[1:3].tolist() == [0.0, 1.0]
        assert values[3] == values[4]
    assert hidden[0, 0].isnan()
    assert hidden[0, 1:].tolist() == [0.0, x[0, 2], 0.0, 0.0]


def test_the_same_bits_each_time() -> None:
    args = randn(99, 130, dtype=torch.bfloat16, seed=0), randn(99, 130, dtype=torch.bfloat16, seed=1), "gelu"
    assert all(torch.equal(a, b) for a, b in zip(_run(*args, SMALL), _run(*args, SMALL), strict=True))


def test_bad_inputs_name_the_argument() -> None:
    grad, weight, x = torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3\)"):
        op(grad, weight.t(), x)
    with pytest.raises(ValueError, match=r"x has shape \(4,\); it must be that of grad @ weight, \(2, 4\)"):
        op(grad, weight, x[0])
    with pytest.raises(ValueError, match="activation is 'silu'; it must be one of gelu, gelu_tanh"):
        op(grad, weight, x, "silu")
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        op(grad, weight, x.double())


def test_configs_are_distinct() -> None:
    for columns in (1, 33, 3072, 14336):
        configs = gelu_backward_configs(columns)
        assert 1 <= len(configs) <= 3
        assert len({str(config) for config in configs}) == len(configs)
